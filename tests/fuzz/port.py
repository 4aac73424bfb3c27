"""Mutated associations, PDUs, commands and datasets, sent to the port of a node.

The node is a process of its own, with short limits and a folder. Between the attacks it has to answer a
C-ECHO and keep an image; in the end, no more threads, file descriptors and memory may be in use than
at the start, and nothing may be printed that looks like an error of the program.
"""

import argparse
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.e2e import wire
from tests.e2e.wire import Raw, pdu, value

from dicomnode.lib.dimse import Address, echo, send
from dicomnode.testing import make_series

_NODE = """
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.server.limits import Limits
class Never(AbstractInput):
    def validate(self):
        return False
class Node(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": Never}
    root_data_directory = "root"
    log_level = "INFO"
    limits = Limits(
        associations=20, idle_seconds=2.0, stall_seconds=2.0, instance_bytes=16 << 20, free_bytes=0
    )
"""
_RUN = "from dicomnode.cli.main import main; main()"
# What may be in use beyond the start: caches, the allocator, and one association that is ending.
_MORE_MEMORY = 96 << 20
_MORE_THREADS = 4
_MORE_FILES = 8


@dataclass
class Found:
    """What a run came to."""

    sessions: int = 0
    images: int = 0
    threads: int = 0
    descriptors: int = 0
    memory: int = 0
    most_memory: int = 0
    slowest: float = 0.0


class _Process:
    """A node that is attacked."""

    def __init__(self, folder: Path) -> None:
        (folder / "pipeline.py").write_text(_NODE)
        self._said = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", _RUN, "run", "pipeline.py"],
            cwd=folder,
            stdout=self._said,
            stderr=subprocess.STDOUT,
        )
        self.port = 0
        end = time.monotonic() + 60
        while not self.port:
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"the node does not start: {self.said()}")
            for line in self.said().splitlines():
                if " listens on " in line:
                    self.port = int(line.rsplit(":", 1)[1].split()[0])

    def said(self) -> str:
        return Path(self._said.name).read_text(errors="replace")

    def used(self) -> tuple[int, int, int]:
        """Threads, file descriptors, and bytes of memory."""
        own = Path("/proc", str(self.process.pid))
        status = dict(
            line.split(":", 1) for line in (own / "status").read_text().splitlines() if ":" in line
        )
        files = len(list((own / "fd").iterdir()))
        return int(status["Threads"]), files, int(status["VmRSS"].split()[0]) * 1024

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self._said.close()


def _request(chance: random.Random) -> bytes:
    contexts = [
        (2 * k + 1, kind, [chance.choice([wire.EXPLICIT, wire.IMPLICIT, "1.2.840.10008.1.2.4.70"])])
        for k, kind in enumerate([wire.VERIFICATION, wire.CT, wire.MR][: chance.randrange(1, 4)])
    ]
    if chance.randrange(4):
        contexts = list(wire.CONTEXTS)
    more = b"".join(
        struct.pack(">BBH", chance.randrange(0x50, 0x5A), 0, len(data)) + data
        for data in (chance.randbytes(chance.randrange(12)) for _ in range(chance.randrange(3)))
    )
    return wire.request(contexts=contexts, more=more if chance.randrange(2) else b"")


def _message(chance: random.Random, number: int) -> bytes:
    kind = chance.randrange(8)
    if kind == 0:
        return pdu(wire.DATA, value(1, 3, wire.echo_command(number)))
    if kind == 1:
        fields = {
            chance.choice([0x2, 0x100, 0x110, 0x120, 0x700, 0x800, 0x900, 0x1000, 0x1030]): (
                chance.randbytes(chance.choice([0, 1, 2, 2, 4, 30]))
            )
            for _ in range(chance.randrange(1, 8))
        }
        return pdu(wire.DATA, value(chance.choice([1, 3]), 3, wire.command(fields)))
    if kind == 2:
        return pdu(chance.randrange(9), chance.randbytes(chance.randrange(40)))
    if kind == 3:
        return pdu(wire.RELEASE, bytes(4))
    uid, data = wire.image("FUZZ", 8, 8)
    if kind == 4:
        # Of a large one only the start, or an end that never comes.
        data = data + bytes(chance.randrange(1 << 19))
    return wire.store(uid, _mutated(data, chance) if kind > 5 else data)


def _mutated(data: bytes, chance: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        if not made:
            break
        at = chance.randrange(min(len(made), chance.choice([12, 120, 600, len(made)])))
        match chance.randrange(8):
            case 0 | 1:
                made[at] = chance.randrange(256)
            case 2 | 3:
                made[at] ^= 1 << chance.randrange(8)
            case 4:
                made[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", bytes(4), b"\0\0\0\1"])
            case 5:
                del made[at : at + chance.randrange(1, 9)]
            case 6:
                made[at:at] = chance.randbytes(chance.randrange(1, 9))
            case _:
                del made[at:]
    return bytes(made)


def _attack(port: int, chance: random.Random) -> None:
    """One connection: a session, changed somewhere, in pieces, and some end."""
    asked = _request(chance)
    session = b"".join(_message(chance, k) for k in range(chance.randrange(1, 5)))
    if chance.randrange(2):
        asked = _mutated(asked, chance)
    else:
        session = _mutated(session, chance)
    with suppress(OSError), Raw(port, seconds=1.0) as peer:
        peer.send(asked)
        if chance.randrange(4):
            peer.receive()
        for start in range(0, len(session), size := chance.choice([1 << 20, 5000, 700])):
            if not peer.send(session[start : start + size]):
                break
        match chance.randrange(6):
            case 0:
                peer.send(pdu(wire.ABORT, bytes(4)))
            case 1:
                peer.socket.shutdown(socket.SHUT_WR)
                peer.until_the_end()
            case 2:
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case 3:
                peer.socket.settimeout(0.2)
                peer.until_the_end()
            case _:
                pass


def _attacks(port: int, chance: random.Random, count: int) -> int:
    """So many, some of them at once."""
    seeds = [chance.getrandbits(64) for _ in range(count)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: _attack(port, random.Random(seed)), seeds))
    return count


def run(seed: int, seconds: float) -> Found:
    """Attack a new node for some time. Raises AssertionError for what it may not do."""
    chance, found = random.Random(seed), Found()
    with tempfile.TemporaryDirectory(prefix="dicomnode-port-") as name:
        node = _Process(Path(name))
        address = Address("127.0.0.1", node.port, "NODE")
        try:
            # So that what is made once is there at the start.
            _attacks(node.port, chance, 200)
            _serves(address)
            before = node.used()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                found.sessions += _attacks(node.port, chance, 100)
                start = time.monotonic()
                _serves(address)
                found.slowest = max(found.slowest, time.monotonic() - start)
                assert node.process.poll() is None, node.said()[-3000:]
                found.most_memory = max(found.most_memory, node.used()[2])
            end = time.monotonic() + 30
            while time.monotonic() < end:
                found.threads, found.descriptors, found.memory = node.used()
                if found.threads <= before[0] and found.descriptors <= before[1]:
                    break
                time.sleep(0.2)
            said = node.said()
            found.images = sum(1 for _ in Path(name, "root").rglob("*.dcm"))
            _serves(address)
        finally:
            node.close()
    assert "Traceback" not in said and "Exception" not in said, said[-5000:]
    assert found.threads <= before[0] + _MORE_THREADS, (before, found)
    assert found.descriptors <= before[1] + _MORE_FILES, (before, found)
    assert found.memory <= before[2] + _MORE_MEMORY, (before, found)
    return found


def _serves(address: Address) -> None:
    echo(address)
    (one,) = send(address, make_series(1, 8, 8))
    assert one.status == 0, one


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.port", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    options = parser.parse_args()
    print(f"== port: seed {options.seed}, {options.seconds:.0f} s", flush=True)
    print(run(options.seed, options.seconds), flush=True)

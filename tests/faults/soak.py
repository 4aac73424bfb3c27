"""A node under load for a long time, and what it uses afterwards: `make soak`.

Series are sent again and again, beside them associations that are aborted, connections that say
nothing or nonsense, and ones that just stay. At first the node is stopped and started now and then.
Then one node has all the time that is left: its threads and open files have to return to where they
were, and its memory has to level off.
"""

import argparse
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy
from benchmarks.timing import memory_mb
from tests.e2e.programs import Command, pipeline_file
from tests.faults.crash import Broken, free_port

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dimse import Address, Response, echo, send
from dicomnode.storage.ledger import Ledger, State
from dicomnode.testing import make_series

IMAGES = 20
# How much more a node may have than after its first moments: pools of the allocator fill.
MOST_MB = 40.0
# Such pools are full after some minutes. After that, no more than this in ten minutes.
WARM_MINUTES = 10
MOST_MB_IN_TEN_MINUTES = 2.0
NODE = """
class Some(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    def validate(self):
        return self.images >= {images}

class Node(Base):
    input = {{"ct": Some}}
    port = {port}
    workers = 2
    durability = "process"
    log_level = "WARNING"

    def process(self, input_data):
        images, array = input_data["ct"]
        assert array.shape[0] == {images}
        return None

print("PID", os.getpid(), flush=True)
"""


@dataclass(frozen=True)
class Use:
    """What a node uses, the lowest of each over some time: memory in MB."""

    threads: int
    files: int
    memory: float

    def __str__(self) -> str:
        return f"{self.memory:.1f} MB, {self.threads} threads, {self.files} open files"


class Soak:
    """One run over one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.address = Address("127.0.0.1", self.port, "NODE")
        self._file = pipeline_file(folder, NODE.format(images=IMAGES, port=self.port))
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._numbers = iter(range(1, sys.maxsize))
        self._pausing = threading.Event()
        # Always the same, so that what waits for the rest of them does not grow.
        self._broken_off = [make_series(3, 16, 16, patient_id=f"ABORTED-{k}") for k in range(20)]

    @contextmanager
    def node(self) -> Iterator[Command]:
        """The node, until it is stopped as a service is."""
        with Command("run", self._file) as node:
            until_it_is_there(self.address, node)
            yield node
            node.process.terminate()
            try:
                said = node.ended(90)
            except subprocess.TimeoutExpired:
                raise Broken(f"it does not stop:\n{''.join(node.said)[-2000:]}") from None
            if node.process.returncode != 0:
                raise Broken(f"it did not stop well:\n{said[-2000:]}")
            if "Traceback" in said:
                raise Broken(f"a traceback:\n{said[said.index('Traceback') :][:2000]}")

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.counts[name] += number

    # Who comes

    def bring(self) -> None:
        """A series, whole: as often as it takes."""
        images = make_series(IMAGES, 16, 16, patient_id=f"P{next(self._numbers)}")
        acknowledged: set[str] = set()

        def count(response: Response) -> None:
            if response.status == 0x0000:
                acknowledged.add(response.sop_instance_uid)
            self._count(f"answers 0x{response.status:04X}")

        end = time.monotonic() + 120
        while len(acknowledged) < IMAGES:
            left = [one for one in images if str(one.SOPInstanceUID) not in acknowledged]
            try:
                send(self.address, left, on_response=count)
            except CouldNotCompleteDIMSEMessage as error:
                self._count("associations that a restart ended")
                if time.monotonic() > end:
                    raise Broken(f"{len(left)} images cannot be sent: {error}") from error
                self._pausing.wait(0.2)
        self._count("series")

    def abort(self) -> None:
        """An association that ends in the middle of a series."""

        def stop(response: Response) -> None:
            raise KeyError(response.sop_instance_uid)

        with suppress(KeyError, CouldNotCompleteDIMSEMessage):
            send(self.address, random.choice(self._broken_off), on_response=stop)
        self._count("aborted associations")

    def connect(self) -> None:
        """A connection that says nothing, or what is no DICOM, and goes."""
        with suppress(OSError), socket.create_connection((self.address.ip, self.port), 5) as one:
            what = random.randint(0, 3)
            if what == 1:
                one.sendall(b"GET / HTTP/1.0\r\n\r\n")
            elif what == 2:
                one.sendall(b"\x01\x00\x00\x00\x01\x00" + bytes(100))
            elif what == 3:
                # With a reset instead of an end.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._count("bare connections")

    def idle(self) -> None:
        """A connection that stays for a while."""
        with suppress(OSError), socket.create_connection((self.address.ip, self.port), 5):
            self._pausing.wait(random.uniform(1, 5))
        self._count("idle connections")

    # The load

    def load(self, seconds: float) -> None:
        """All of these at once, for so long."""
        end = time.monotonic() + seconds

        def repeat(visit: Callable[[], None], pause: float) -> None:
            while time.monotonic() < end:
                visit()
                self._pausing.wait(pause)

        visits = [(self.bring, 0.0)] * 3 + [(self.abort, 0.1), (self.connect, 0.02)]
        visits += [(self.idle, 0.1)] * 2
        with ThreadPoolExecutor(len(visits)) as pool:
            for visitor in [pool.submit(repeat, *given) for given in visits]:
                visitor.result(seconds + 180)

    def use(self, node: Command, seconds: float = 5.0) -> Use:
        """What a node uses at least, over so long."""
        process = int(node.until(r"PID (\d+)"))
        seen: list[Use] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                threads, files = (
                    len(list(Path(f"/proc/{process}/{name}").iterdir())) for name in ("task", "fd")
                )
                seen.append(Use(threads, files, memory_mb("VmRSS", process)))
            except (FileNotFoundError, LookupError):
                raise Broken(f"the node is gone:\n{''.join(node.said)[-2000:]}") from None
            self._pausing.wait(min(0.2, seconds / 5))
        return Use(
            *map(min, zip(*((one.threads, one.files, one.memory) for one in seen), strict=True))
        )

    # The run

    def run(self, seconds: float) -> None:
        """Restarts for a sixth of the time, then one node; raises Broken."""
        restarts = max(1, min(10, int(seconds / 90)))
        part = seconds / 6 / restarts
        with ThreadPoolExecutor(1) as pool:
            for _ in range(restarts):
                with self.node():
                    loading = pool.submit(self.load, part)
                    self._pausing.wait(part / 2)
                # Senders find nobody, and then the next one.
                with self.node():
                    loading.result(part + 200)
                self._count("restarts", 2)
        with self.node() as node:
            self.load(max(5.0, seconds / 30))
            before = self.use(node)
            print(f"when warm: {before}", flush=True)
            memory = self._minutes(node, seconds * 0.8)
            after = self.use(node)
            print(f"at the end: {after}", flush=True)
            self._until_done()
        if after.threads > before.threads or after.files > before.files:
            raise Broken(f"it does not come back: {before} when warm, {after} at the end")
        check_memory(before.memory, memory)

    def _minutes(self, node: Command, seconds: float) -> list[float]:
        """Load for so long; the memory (MB) of each minute, told as it comes."""
        memory = []
        start = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(self.load, seconds)
            while not loading.done():
                use = self.use(node, min(60.0, seconds / 10))
                memory.append(use.memory)
                minutes = (time.monotonic() - start) / 60
                print(f"{minutes:.1f} min: {use}; {self.counts['series']} series", flush=True)
            loading.result()
        return memory

    def _until_done(self) -> None:
        """Every series that was acknowledged is processed."""
        ledger = Ledger(self._folder / "root" / ".dicomnode" / "ledger.sqlite")
        try:
            end = time.monotonic() + 60
            while True:
                open_cases = [
                    case
                    for case in ledger.cases(*(one for one in State if one is not State.DONE))
                    if not case.identifier.startswith("ABORTED")
                ]
                # A restart ended the association before the last answer: it was sent again.
                left = [one for one in open_cases if "it was sent again" not in one.error]
                if not left:
                    return
                if time.monotonic() > end:
                    raise Broken(f"{len(left)} cases are not done: {left[:3]}")
                self._pausing.wait(0.2)
        finally:
            ledger.close()


def check_memory(warm: float, minutes: Sequence[float]) -> None:
    """Raise Broken where memory (MB; one figure for each minute) does not level off.

    A run that is too short to tell is only asked not to take much.
    """
    if max(minutes) > warm + MOST_MB:
        raise Broken(f"{warm:.1f} MB when warm, then {max(minutes):.1f} MB")
    late = minutes[max(WARM_MINUTES, len(minutes) // 2) :]
    if len(late) < WARM_MINUTES:
        return
    slope = 10 * float(numpy.polyfit(range(len(late)), late, 1)[0])
    print(f"the last {len(late)} minutes: {slope:+.2f} MB in ten minutes", flush=True)
    if slope > MOST_MB_IN_TEN_MINUTES:
        raise Broken(f"memory grows by {slope:.2f} MB in ten minutes, and does not level off")


def until_it_is_there(address: Address, node: Command) -> None:
    """Wait until a node answers."""
    end = time.monotonic() + 60
    while True:
        try:
            echo(address)
        except CouldNotCompleteDIMSEMessage:
            if node.process.poll() is not None:
                raise Broken(f"it did not start:\n{node.ended()[-2000:]}") from None
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def main() -> None:
    """`make soak`."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        start = time.monotonic()
        try:
            soak.run(options.seconds)
        finally:
            for name, count in sorted(soak.counts.items()):
                print(f"{name}: {count}")
    print(f"all came back; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

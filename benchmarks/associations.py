"""What does an association cost that brings nothing?

Many senders open one for each image. A plain client asks for an association with as many presentation contexts,
waits for the answer, asks for the release, waits for that, and does the same again; the clock runs over all of
them. The first ones, in which a receiver gets warm, do not count.
"""

import socket
import statistics
import struct
import time
from collections.abc import Sequence

from pynetdicom import AllStoragePresentationContexts

from benchmarks.receive import Receiver
from benchmarks.timing import Row, Table, cpu_seconds, scratch

_FIRST = 20
_ACCEPTED, _RELEASED = 0x02, 0x06
_RELEASE = b"\x05\0\0\0\0\4\0\0\0\0"
_EXPLICIT = "1.2.840.10008.1.2.1"


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def request(contexts: int) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 section 9.3.2) with so many storage SOP classes."""
    items = _item(0x10, b"1.2.840.10008.3.1.1.1")
    for number, context in enumerate(AllStoragePresentationContexts[:contexts]):
        names = _item(0x30, str(context.abstract_syntax).encode()) + _item(0x40, _EXPLICIT.encode())
        items += _item(0x20, bytes([2 * number + 1, 0, 0, 0]) + names)
    items += _item(0x50, _item(0x51, struct.pack(">I", 16384)) + _item(0x52, b"1.2.826.0.1"))
    body = struct.pack(">HH", 1, 0) + b"ANY-SCP".ljust(16) + b"SENDER".ljust(16) + bytes(32) + items
    return struct.pack(">BBI", 0x01, 0, len(body)) + body


def _receive(client: socket.socket, kind: int) -> None:
    """One PDU, of that type."""
    head = client.recv(6, socket.MSG_WAITALL)
    if len(head) < 6 or head[0] != kind:
        raise RuntimeError(f"answered with {head.hex()}")
    client.recv(int.from_bytes(head[2:], "big"), socket.MSG_WAITALL)


def _associate(port: int, asked: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(asked)
        _receive(client, _ACCEPTED)
        client.sendall(_RELEASE)
        _receive(client, _RELEASED)


def answer(receivers: Sequence[Receiver], contexts: int, count: int, repeats: int) -> Table:
    """So many associations one after the other with every receiver, in turn."""
    asked = request(contexts)
    results: dict[str, list[tuple[float, float]]] = {}
    wrong: dict[str, str] = {}
    for _ in range(repeats):
        for receiver in receivers:
            if receiver.name in wrong:
                continue
            try:
                results.setdefault(receiver.name, []).append(_run(receiver, asked, count))
            except (OSError, RuntimeError) as error:
                wrong[receiver.name] = f"fails: {error}"
    rows = []
    for receiver in receivers:
        name = receiver.name
        if name in wrong:
            rows.append(Row(name, wrong=wrong[name]))
            continue
        seconds, cpu = zip(*results[name], strict=True)
        rate, cost = count / statistics.median(seconds), 1000 * statistics.median(cpu) / count
        rows.append(Row(name, seconds, extra=(f"{rate:.0f}", f"{cost:.2f}")))
    title = f"{count} associations without an image, one after the other, with {contexts} presentation context"
    title += "s" * (contexts > 1)
    return Table(title, tuple(rows), ("associations/s", "CPU ms/association"))


def _run(receiver: Receiver, asked: bytes, count: int) -> tuple[float, float]:
    """Seconds, and those of the receiver's processor."""
    target = scratch() / "received"
    target.mkdir(parents=True)
    with receiver.running(target) as (process, port):
        for _ in range(_FIRST):
            _associate(port, asked)
        cpu, begin = cpu_seconds(process.pid), time.perf_counter()
        for _ in range(count):
            _associate(port, asked)
        seconds = time.perf_counter() - begin
        # What a receiver does after its answer is its work, too.
        time.sleep(0.2)
        return seconds, cpu_seconds(process.pid) - cpu

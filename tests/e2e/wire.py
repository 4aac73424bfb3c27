"""A peer of which every byte can be wrong, and what a node has to be after it. For tests."""

import gc
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import echo, send
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import address_of, make_series

VERIFICATION = "1.2.840.10008.1.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
ACCEPT, REJECT, DATA, RELEASE, RELEASED, ABORT = 0x02, 0x03, 0x04, 0x05, 0x06, 0x07
CONTEXTS = ((1, VERIFICATION, (IMPLICIT,)), (3, CT, (EXPLICIT,)))

Context = tuple[int, str, Sequence[str]]


def pdu(kind: int, body: bytes, length: int | None = None) -> bytes:
    """A PDU (PS3.8 section 9.3), also with a length that lies."""
    return struct.pack(">BBI", kind, 0, len(body) if length is None else length) + body


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def request(
    called: bytes | str = "NODE",
    calling: bytes | str = "RAW",
    contexts: Sequence[Context] = CONTEXTS,
    largest: int = 16384,
    more: bytes = b"",
) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 section 9.3.2); `more` are sub-items of the user information."""

    def title(name: bytes | str) -> bytes:
        return (name.encode("latin-1") if isinstance(name, str) else name)[:16].ljust(16)

    items = _item(0x10, b"1.2.840.10008.3.1.1.1")
    for number, abstract, syntaxes in contexts:
        body = bytes([number, 0, 0, 0]) + _item(0x30, abstract.encode())
        items += _item(0x20, body + b"".join(_item(0x40, one.encode()) for one in syntaxes))
    user = _item(0x51, struct.pack(">I", largest)) + _item(0x52, b"1.2.826.0.1") + more
    head = struct.pack(">HH", 1, 0) + title(called) + title(calling) + bytes(32)
    return pdu(0x01, head + items + _item(0x50, user))


def value(context: int, control: int, data: bytes, length: int | None = None) -> bytes:
    """A presentation data value (PS3.8 section 9.3.5.1); control is 1 for command, 2 for last."""
    size = len(data) + 2 if length is None else length
    return struct.pack(">IBB", size, context, control) + data


def command(elements: dict[int, bytes]) -> bytes:
    """A command set (PS3.7 section 6.3.1), of the elements of group 0000."""
    body = b"".join(
        struct.pack("<HHI", 0, number, len(data)) + data for number, data in elements.items()
    )
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _uid(uid: str | bytes) -> bytes:
    data = uid.encode() if isinstance(uid, str) else uid
    return data + b"\0" * (len(data) % 2)


def echo_command(number: int = 1) -> bytes:
    """A C-ECHO-RQ."""
    return command(
        {
            0x0002: _uid(VERIFICATION),
            0x0100: struct.pack("<H", 0x0030),
            0x0110: struct.pack("<H", number),
            0x0800: struct.pack("<H", 0x0101),
        }
    )


def store_command(
    uid: str | bytes = "1.2.3", sop_class: str | bytes = CT, number: int = 1
) -> bytes:
    """A C-STORE-RQ."""
    return command(
        {
            0x0002: _uid(sop_class),
            0x0100: struct.pack("<H", 0x0001),
            0x0110: struct.pack("<H", number),
            0x0700: struct.pack("<H", 0),
            0x0800: struct.pack("<H", 1),
            0x1000: _uid(uid),
        }
    )


def store(uid: str | bytes, data: bytes, sop_class: str = CT, context: int = 3) -> bytes:
    """The PDUs of a C-STORE."""
    parts = [pdu(DATA, value(context, 3, store_command(uid, sop_class)))]
    for start in range(0, max(1, len(data)), 16000):
        part = data[start : start + 16000]
        parts.append(pdu(DATA, value(context, 2 * (start + 16000 >= len(data)), part)))
    return b"".join(parts)


def image(identifier: str = "WIRE", rows: int = 16, columns: int = 16) -> tuple[str, bytes]:
    """A new image: its SOPInstanceUID, and its dataset as it is sent."""
    (made,) = make_series(1, rows, columns, patient_id=identifier)
    return str(made.SOPInstanceUID), bare(encode(made)[0])


def bare(part10: bytes) -> bytes:
    """The dataset of a file."""
    return part10[144 + int.from_bytes(part10[140:144], "little") :]


class Raw:
    """A connection to a node."""

    def __init__(
        self, node: AbstractPipeline | int, source: str = "127.0.0.1", seconds: float = 20.0
    ) -> None:
        port = node if isinstance(node, int) else node.port
        self.socket = socket.create_connection(
            ("127.0.0.1", port), seconds, source_address=(source, 0)
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Whether all of it could be sent."""
        try:
            self.socket.sendall(data)
        except (ConnectionError, TimeoutError):
            return False
        return True

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                break
            data += part
        return data

    def receive(self) -> tuple[int, bytes]:
        """Type and body of the next PDU; 0 where the connection has ended."""
        with suppress(ConnectionError):
            head = self._exactly(6)
            if len(head) == 6:
                return head[0], self._exactly(struct.unpack(">I", head[2:])[0])
        return 0, b""

    def open(self, asked: bytes | None = None) -> "Raw":
        """Establish the association."""
        self.send(request() if asked is None else asked)
        kind, body = self.receive()
        assert kind == ACCEPT, (kind, body)
        return self

    def status(self) -> int:
        """The status of the next response."""
        kind, body = self.receive()
        assert kind == DATA, (kind, body)
        at = body.index(struct.pack("<HHI", 0, 0x0900, 2)) + 8
        return int.from_bytes(body[at : at + 2], "little")

    def release(self) -> None:
        """Ask for the release, and get it."""
        self.send(pdu(RELEASE, bytes(4)))
        assert self.receive()[0] == RELEASED

    def until_the_end(self) -> list[tuple[int, bytes]]:
        """The PDUs up to the end of the connection."""
        found = []
        while (one := self.receive())[0]:
            found.append(one)
        return found


def threads() -> int:
    """Threads of this process."""
    return threading.active_count()


def descriptors() -> int:
    """Open files and sockets of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def _links() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def resident() -> int:
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serves(node: AbstractPipeline) -> None:
    """C-ECHO and C-STORE of another association."""
    address = address_of(node)
    calling = next(iter(node.require_calling_aet), "FRIEND")
    echo(address, calling)
    assert [one.status for one in send(address, make_series(1, 8, 8), calling)] == [0]


@contextmanager
def unharmed(node: AbstractPipeline, memory: int = 48 << 20) -> Iterator[None]:
    """After the block, others are served, and threads, descriptors and memory are as before it."""
    serves(node)
    assert node.wait(lambda: not _connections(node), 20)
    gc.collect()
    before = threads(), descriptors(), resident()
    yield
    serves(node)
    calm = node.wait(
        lambda: not _connections(node) and threads() <= before[0] and descriptors() <= before[1],
        30,
    )
    names = sorted(one.name for one in threading.enumerate())
    left = _connections(node)
    assert calm, (before, threads(), _links(), names, left)
    gc.collect()
    assert resident() - before[2] < memory, (before, resident())


def _connections(node: AbstractPipeline) -> int:
    assert node._server is not None
    assert node._server._server is not None
    return len(node._server._visits) + len(node._server._server._connections)

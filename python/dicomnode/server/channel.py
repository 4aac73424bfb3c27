"""A channel between a node and a worker process: small messages, and descriptors of shared memory.

Solves that nothing is pickled: a message is JSON and holds numbers and short texts; pixels and whole
objects lie in shared memory, of which only the descriptor goes along.
"""

import array
import json
import select
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

# No message of a worker is longer, and its parts come within this time.
MOST_BYTES = 1 << 20
_PART_SECONDS = 30.0
_MOST_DESCRIPTORS = 200
_HEAD = struct.Struct(">I")


class BrokenChannel(Exception):
    """The other side sent what is no message, or does not read."""


class Channel:
    """One end. `most_bytes` is the longest message that it takes; None takes any."""

    def __init__(self, end: socket.socket, most_bytes: int | None = None) -> None:
        self._socket = end
        self._most_bytes = most_bytes
        self._sending = threading.Lock()
        #: The length of the longest message in either direction.
        self.longest = 0

    def fileno(self) -> int:
        """For `select.poll`."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the conversation; the other side is told."""
        self._socket.close()

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Raises BrokenChannel where nobody is there, or nobody reads."""
        if len(descriptors) > _MOST_DESCRIPTORS:
            raise BrokenChannel(f"{len(descriptors)} descriptors are too many for one message")
        body = json.dumps(message).encode()
        data = memoryview(_HEAD.pack(len(body)) + body)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        with self._sending:
            self.longest = max(self.longest, len(body))
            try:
                sent = self._socket.sendmsg([data], rights if descriptors else [])
                self._socket.sendall(data[sent:])
            except OSError as error:
                raise BrokenChannel(f"a message cannot be sent: {error}") from error

    def receive(self, seconds: float | None = None) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, which are the caller's; None after the last.

        Raises TimeoutError where none begins within `seconds`, BrokenChannel.
        """
        if seconds is not None:
            waiting = select.poll()
            waiting.register(self._socket, select.POLLIN)
            if not waiting.poll(1000 * max(0.0, seconds)):
                raise TimeoutError
        descriptors: list[int] = []
        try:
            head = self._read(_HEAD.size, descriptors)
            if head is None:
                return None
            (size,) = _HEAD.unpack(head)
            if self._most_bytes is not None and size > self._most_bytes:
                raise BrokenChannel(f"a message of {size} bytes")
            body = self._read(size, descriptors) if size else b""
            if body is None:
                _close_all(descriptors)
                return None
            self.longest = max(self.longest, size)
            message = json.loads(body)
            if not isinstance(message, dict):
                raise BrokenChannel("a message that is no object")
        except (OSError, ValueError, RecursionError) as error:
            _close_all(descriptors)
            raise BrokenChannel(f"no message: {error}") from error
        except BrokenChannel:
            _close_all(descriptors)
            raise
        return message, descriptors

    def _read(self, size: int, descriptors: list[int]) -> bytes | None:
        """So many bytes; None where the other side closed before."""
        data = bytearray()
        room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
        while len(data) < size:
            try:
                chunk, rights, _, _ = self._socket.recvmsg(
                    min(size - len(data), 1 << 20), room, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError:
                # It closed before it had read all that was sent to it.
                return None
            for _, kind, value in rights:
                if kind == socket.SCM_RIGHTS:
                    found = array.array("i")
                    found.frombytes(value[: len(value) - len(value) % found.itemsize])
                    descriptors.extend(found)
            if not chunk:
                return None
            data += chunk
        return bytes(data)


def bounded(end: socket.socket) -> socket.socket:
    """The node's end: no part of a message keeps it waiting for long."""
    end.settimeout(_PART_SECONDS)
    return end


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        socket.close(descriptor)
    descriptors.clear()

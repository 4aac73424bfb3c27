"""The connection of an association that we accept: its socket, as pynetdicom's state machine uses it.

Solves that pynetdicom's looks for something to read ten times a second, and believes the length of whatever
comes.
"""

import contextlib
import socket
import ssl
import time
from typing import Any, Protocol

from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket

from dicomnode.errors import InvalidDicom
from dicomnode.server.limits import Limits
from dicomnode.server.waiting import Wake, wait_readable

#: How long a thread waits at most before it looks at its timers again.
LOOK_SECONDS = 0.5
#: Of pynetdicom's states: the connection is about to be closed.
CLOSING = "Sta13"
# A request for an association with 128 contexts of 50 transfer syntaxes has some 400 KiB.
_MOST_NEGOTIATION = 1 << 20
# So many times 64 KiB are read of a peer that has got our A-ABORT and goes on.
_MOST_READ_OFF = 64


class Provider(Protocol):
    """What a connection asks of whoever reads from it."""

    limits: Limits
    wake: Wake
    #: The peer broke the protocol: what it still sends is not looked at.
    is_aborting: bool
    state_machine: Any

    @property
    def is_reading(self) -> bool:
        """Whether more of a message has to be read, or can be without waiting."""

    @property
    def is_served_slowly(self) -> bool:
        """Whether so many messages wait to be served that no more are read."""

    def pause(self) -> None:
        """Wait a moment for what other threads ask."""


class Connection(AssociationSocket):
    """The socket of an association that we accept."""

    def __init__(self, association: Association, provider: Provider, client: socket.socket) -> None:
        self._provider = provider
        #: The first bytes of a PDU.
        self.head = b""
        super().__init__(association, client_socket=client)

    @property
    def ready(self) -> bool:
        """Whether there is something to read, after waiting for it."""
        client, provider = self.socket, self._provider
        if not self.event_queue.empty():
            # What came before is dealt with first.
            return False
        if client is None or not self._is_connected:
            # Nothing will come of this; whoever waits looks at the timers.
            provider.pause()
            return False
        if provider.is_served_slowly:
            # Also where the peer never pauses, so that more of a message is always here.
            provider.pause()
            return False
        if provider.is_reading:
            return True
        if isinstance(client, ssl.SSLSocket) and client.pending():
            return True
        closing = provider.state_machine.current_state == CLOSING
        if closing and provider.is_aborting:
            _read_off(client)
            return False
        try:
            found = wait_readable(client, provider.wake, 0.0 if closing else LOOK_SECONDS)
        except (OSError, ValueError):
            self.event_queue.put("Evt17")
            return False
        return found

    def recv(self, nr_bytes: int) -> bytearray:
        """So many bytes, or fewer where the connection was closed. For negotiation only.

        Raises InvalidDicom where there are more than a negotiation has, OSError where not all come within
        the time.
        """
        client = self.socket
        if nr_bytes > _MOST_NEGOTIATION:
            raise InvalidDicom(f"a PDU of {nr_bytes} bytes before there is an association")
        if client is None:
            raise OSError("closed")
        whole = bytearray(nr_bytes)
        view, count = memoryview(whole), 0
        end = time.monotonic() + self._provider.limits.stall_seconds
        while count < nr_bytes:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("the PDU takes too long")
            client.settimeout(left)
            read = client.recv_into(view[count:])
            if not read:
                break
            count += read
        del view, whole[count:]
        self.head = self.head or bytes(whole)
        return whole

    def send(self, bytestream: bytes) -> None:
        """All bytes, within the time; where that fails the connection counts as closed."""
        client = self.socket
        try:
            if client is None:
                raise OSError("closed")
            seconds = self._provider.limits.stall_seconds
            if client.gettimeout() != seconds:
                client.settimeout(seconds)
            client.sendall(bytestream)
        except OSError:
            self.event_queue.put("Evt17")

    def _shutdown_socket(self) -> None:
        """pynetdicom leaves a socket open that cannot be shut down, since its peer has reset it."""
        client = self.socket
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                client.close()


def _read_off(client: socket.socket) -> None:
    """Let a peer have our A-ABORT: a connection that is closed with bytes unread is reset instead."""
    end = time.monotonic() + LOOK_SECONDS
    with contextlib.suppress(OSError):
        if not isinstance(client, ssl.SSLSocket):
            client.shutdown(socket.SHUT_WR)
        for _ in range(_MOST_READ_OFF):
            client.settimeout(max(0.001, end - time.monotonic()))
            if not client.recv(1 << 16):
                return

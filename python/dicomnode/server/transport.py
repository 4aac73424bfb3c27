"""The transport below associations: pynetdicom's, without its waiting and its trust in strangers.

pynetdicom keeps negotiation, the state machine and every service but one. C-STORE requests, which are
nearly all that a node receives, are read by the compiled core straight from the socket. Solved here by
subclassing, with nothing replaced in pynetdicom itself:

- its threads poll; ours wait until something happens;
- what a stranger can hold is bounded: connections, bytes of a PDU and of a dataset, and how long
  a PDU and a dataset may take;
- neither a TLS handshake nor a silent peer keeps the listener from the next one;
- time is monotonic, so that a corrected clock ends no association.
"""

import contextlib
import errno
import ipaddress
import logging
import math
import os
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.fsm import InvalidEventError
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RQ
from pynetdicom.presentation import PresentationContext
from pynetdicom.timer import Timer
from pynetdicom.transport import (
    AssociationSocket,
    RequestHandler,
    ThreadedAssociationServer,
)

from dicomnode.errors import InvalidDicom
from dicomnode.lib.dicom import Received, Receiver
from dicomnode.server.limits import Limits
from dicomnode.server.logs import about
from dicomnode.server.negotiation import plain_request

# How long a thread waits at most before it looks at its timers again.
_LOOK_SECONDS = 0.5
# A request for an association with 128 contexts of 50 transfer syntaxes has some 400 KiB.
_MOST_NEGOTIATION = 1 << 20
# Requests that are no larger are known again.
_MOST_KNOWN = 1 << 13
# Messages that are no C-STORE and wait to be served; more are not read.
_MOST_WAITING = 4
# So many times 64 KiB are read of a peer that has got our A-ABORT and goes on.
_MOST_READ_OFF = 64
# Connections beyond the associations, and how long one may take to ask before others need its place.
_MOST_SILENT = 32
_MOMENT = 2.0
_ESTABLISHED = "Sta6"
_CLOSING = "Sta13"
_IDLE = "Sta1"
_AWAITING = "Sta2"
# Of pynetdicom's events: an unrecognised or invalid PDU.
_NOT_UNDERSTOOD = "Evt19"
# All but a request for an association and an abort.
_NO_REQUESTS = [bytes([number]) for number in range(0x02, 0x07)]
_PDU_TYPES = [bytes([number]) for number in range(0x01, 0x08)]
_ASSOCIATE_REQUEST = 0x01
_RELEASE_REQUEST = 0x05


Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Service(Protocol):
    """What the owner of a transport does with what arrives."""

    def store(self, association: Association, received: Received) -> bytes:
        """Keep an image; the PDU of the response. Raises nothing."""

    def arriving(self, association: Association) -> None:
        """Bytes of an image have arrived."""

    def released(self, association: Association) -> None:
        """The peer asked for the release of its association."""

    def closed(self, association: Association) -> None:
        """The connection has ended, whatever it was that ended it; may be told twice."""

    def turned_away(self) -> None:
        """A connection was not let in."""


@dataclass(frozen=True)
class Keeping:
    """How images are kept while they arrive."""

    #: Bytes of one that may be in memory.
    memory_bytes: int
    #: Of what kind the digests are.
    digest_size: int
    #: Where their files begin, and how many bytes have to be free there now; None to keep them in memory.
    folder: Path | None = None
    least_free: Callable[[], int] = lambda: 0


class _Timer(Timer):
    """pynetdicom's timer by a clock that nobody sets."""

    @property
    def remaining(self) -> float:
        if self.timeout is None:
            return 1.0
        if self._start_time is None:
            return self.timeout
        end = time.monotonic() if self._end_time is None else self._end_time
        return self.timeout - (end - self._start_time)

    def start(self) -> None:
        self._start_time, self._end_time = time.monotonic(), None

    def stop(self) -> None:
        self._end_time = time.monotonic()


class _Wake:
    """Ends the waiting of another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.number = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self.number >= 0:
                os.eventfd_write(self.number, 1)

    def wait(self, seconds: float) -> None:
        poll = select.poll()
        if self.number >= 0:
            poll.register(self.number, select.POLLIN)
        poll.poll(seconds * 1000)
        self.clear()

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_read(self.number)

    def close(self) -> None:
        with self._lock:
            if self.number >= 0:
                os.close(self.number)
            self.number = -1


class _Signalling(queue.Queue[Any]):
    """A queue that tells when something was put into it."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell
        #: Whether anything was ever put into it.
        self.is_used = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.is_used = True
        super().put(item, block, timeout)
        self._tell()


class _Socket(AssociationSocket):
    """The socket of an association that we accept."""

    def __init__(self, association: "NodeAssociation", client: socket.socket) -> None:
        self._provider = association.provider
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
        closing = provider.state_machine.current_state == _CLOSING
        if closing and provider.is_aborting:
            _read_off(client)
            return False
        try:
            found = _wait(client, provider.wake, 0.0 if closing else _LOOK_SECONDS)
        except (OSError, ValueError):
            self.event_queue.put("Evt17")
            return False
        return found

    def close(self) -> None:
        """Also tells the thread of the association, where that still waits for a request."""
        super().close()
        if not self._provider.to_user_queue.is_used:
            self._provider.to_user_queue.put(None)

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
    end = time.monotonic() + _LOOK_SECONDS
    with contextlib.suppress(OSError):
        if not isinstance(client, ssl.SSLSocket):
            client.shutdown(socket.SHUT_WR)
        for _ in range(_MOST_READ_OFF):
            client.settimeout(max(0.001, end - time.monotonic()))
            if not client.recv(1 << 16):
                return


def _wait(client: socket.socket, wake: _Wake, seconds: float) -> bool:
    """Whether a socket can be read within so many seconds; sooner false where somebody wakes us."""
    poll = select.poll()
    poll.register(client, select.POLLIN)
    if wake.number >= 0:
        poll.register(wake.number, select.POLLIN)
    found = {number for number, _ in poll.poll(seconds * 1000)}
    if wake.number in found:
        wake.clear()
    return client.fileno() in found


def _no_request(head: bytes) -> str:
    """What a PDU that is not understood may be, by its first bytes."""
    if head[:2] == b"\x16\x03":
        return (
            "it begins with a TLS handshake, and this port takes no TLS: set `tls` of the pipeline"
        )
    if head.split(b" ")[0] in (b"GET", b"POST", b"HEAD", b"PUT", b"OPTION"):
        return "it speaks HTTP, and this port takes DICOM"
    if head[:1] in _PDU_TYPES:
        return f"its PDU of type 0x{head[:1].hex()} cannot be decoded"
    return f"it begins with {head.hex(' ')}, which no PDU of DICOM does (PS3.8 section 9.3)"


@lru_cache(maxsize=64)
def _request(pdu: bytes) -> A_ASSOCIATE_RQ:
    """A request for an association, decoded: a sender asks with the same bytes each time.

    Nobody changes it. Raises InvalidDicom, and whatever else comes of the bytes.
    """
    request = A_ASSOCIATE_RQ()
    request.decode(plain_request(pdu))
    return request


class _Provider(DULServiceProvider):
    """The upper layer service; in the state of an established association the core reads."""

    def __init__(self, association: "NodeAssociation", service: Service, limits: Limits) -> None:
        super().__init__(association)
        self.daemon = True
        self.limits = limits
        self.wake = _Wake()
        self._service = service
        self._association = association
        self.receiver: Receiver | None = None
        #: The peer broke the protocol: what it still sends is not looked at.
        self.is_aborting = False
        # Why its request for an association is not understood.
        self._trouble = ""
        # When the message that is arriving began, and how much had arrived by then; and when last
        # something came, and how much by then.
        self._began: tuple[float, int] | None = None
        # Since when an image is whole that is not answered.
        self._whole = math.inf
        self._last: tuple[float, int] = (0.0, 0)
        self._run_loop_delay = 0.0
        self._idle_timer = _Timer(limits.idle_seconds)
        self.artim_timer = _Timer(limits.idle_seconds)
        self.to_provider_queue = _Signalling(self.wake.set)
        self.to_user_queue: _Signalling = _Signalling(association.tell)

    @property
    def arriving(self) -> int:
        """Bytes in memory of the image that is arriving."""
        receiver = self.receiver
        return 0 if receiver is None else receiver.arriving

    @property
    def is_arriving(self) -> bool:
        """Whether an image is here, or a part of one, that was not answered.

        One that is whole for long does not count: code of a user may hang with it.
        """
        receiver = self.receiver
        is_stuck = time.monotonic() - self._whole > self.limits.stall_seconds
        return receiver is not None and receiver.is_arriving and not is_stuck

    @property
    def is_reading(self) -> bool:
        """Whether more of a message has to be read, or can be without waiting."""
        receiver = self.receiver
        established = self.state_machine.current_state == _ESTABLISHED
        return receiver is not None and established and receiver.is_within

    @property
    def is_served_slowly(self) -> bool:
        """Whether so many messages wait to be served that no more are read."""
        return self._association.dimse.msg_queue.qsize() >= _MOST_WAITING

    @property
    def _has_other_work(self) -> bool:
        is_asked = not (self.to_provider_queue.empty() and self.event_queue.empty())
        return is_asked or self._kill_thread

    def pause(self) -> None:
        """Wait a moment for what other threads ask."""
        self.wake.wait(0.02)

    def kill_dul(self) -> None:
        super().kill_dul()
        self.wake.set()

    def stop_dul(self) -> bool:
        if self.state_machine.current_state == _IDLE:
            self.kill_dul()
            if threading.current_thread() is not self:
                self.join(_LOOK_SECONDS)
        return not self.is_alive()

    def run_reactor(self) -> None:
        try:
            # A stop and a broken message may end an association at the same moment.
            with contextlib.suppress(InvalidEventError):
                super().run_reactor()
        except Exception as error:  # noqa: BLE001
            # Its state machine raises whatever comes of what it decoded.
            self._association.complain(f"what came cannot be handled ({type(error).__name__})")
            abort = A_ABORT_RQ()
            abort.source, abort.reason_diagnostic = 0x02, 0x00
            if self.socket is not None:
                self.socket.send(abort.encode())
        finally:
            self.end()

    def end(self) -> None:
        """Let go of all that belongs to the connection."""
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            receiver.close()
        if self.socket is not None:
            self.socket.close()
        self.wake.close()
        self._association.forget()
        self._service.closed(self._association)
        # The thread that waits for a peer which has left without a word need not wait longer.
        self.to_user_queue.put(None)

    def _read_pdu_data(self) -> None:
        if self.state_machine.current_state != _ESTABLISHED:
            self._negotiate()
            return
        try:
            receiver = self.receiver or self._new_receiver()
            found = self._read(receiver)
            while isinstance(found, Received):
                self._began = None
                # Its sender is not idle, also where it never pauses so that this loop would end.
                self._idle_timer.restart()
                self._whole = time.monotonic()
                response = self._service.store(self._association, found)
                # Its memory is that of the next one.
                found = None
                sent = receiver.answer(response)
                if sent < len(response):
                    if self.socket is not None:
                        self.socket.send(response[sent:])
                    receiver.answered()
                self._whole = math.inf
                if self._has_other_work:
                    return
                # The next image, without the way through pynetdicom's loop.
                found = self._read(receiver)
            if found is None:
                self._check_pace(receiver)
                return
            self._began = None
            if found:
                self._pass_on(found)
            else:
                self.event_queue.put("Evt17")
        except InvalidDicom as error:
            self._association.complain(str(error))
            self.is_aborting = True
            self.event_queue.put(_NOT_UNDERSTOOD)
        except OSError:
            self.event_queue.put("Evt17")

    def _negotiate(self) -> None:
        """Read what is no part of an established association, and tell once what is no request for one."""
        assert isinstance(self.socket, _Socket)
        self.socket.head = b""
        is_first = self.state_machine.current_state == _AWAITING
        try:
            super()._read_pdu_data()
        except InvalidDicom as error:
            self._trouble = str(error)
            self.event_queue.put(_NOT_UNDERSTOOD)
        if _NOT_UNDERSTOOD in self.event_queue.queue:
            self._trouble = self._trouble or _no_request(self.socket.head)
        elif is_first and self.socket.head[:1] in _NO_REQUESTS:
            self._trouble = f"its first PDU, of type 0x{self.socket.head[:1].hex()}, is no request"
        if self._trouble and not self.is_aborting and not self._association.was_let_in:
            self.is_aborting = True
            self._association.complain(self._trouble)

    def _decode_pdu(self, bytestream: bytearray) -> tuple[Any, str]:
        if bytestream[0] != _ASSOCIATE_REQUEST:
            return super()._decode_pdu(bytestream)
        decode = _request if len(bytestream) <= _MOST_KNOWN else _request.__wrapped__
        try:
            request = decode(bytes(bytestream))
        except InvalidDicom as error:
            self._trouble = str(error)
            raise
        evt.trigger(self.assoc, evt.EVT_PDU_RECV, {"pdu": request})
        return request, "Evt6"

    def _new_receiver(self) -> Receiver:
        limits = self.limits
        client = None if self.socket is None else self.socket.socket
        if client is None:
            raise OSError("closed")
        is_plain = not isinstance(client, ssl.SSLSocket)
        association, keeping = self._association, self._association.keeping
        self.receiver = Receiver(
            [
                (int(context.context_id or 0), str(context.transfer_syntax[0]))
                for context in association.accepted_contexts
            ],
            # A tolerance for senders that count the headers in.
            limits.pdu_bytes + 1024,
            limits.instance_bytes,
            keeping.memory_bytes,
            client.fileno() if is_plain else None,
            keeping.digest_size,
            keeping.folder,
            0 if keeping.folder is None else keeping.least_free(),
            str(association.requestor.ae_title or "").strip(),
        )
        self._last = (time.monotonic(), 0)
        return self.receiver

    def _read(self, receiver: Receiver) -> Received | bytes | None:
        client = None if self.socket is None else self.socket.socket
        if not isinstance(client, ssl.SSLSocket):
            found = receiver.receive(self.wake.number, _LOOK_SECONDS)
            if found is None:
                self.wake.clear()
            return found
        found = receiver.offer(b"")
        if found is not None or not (client.pending() or _wait(client, self.wake, _LOOK_SECONDS)):
            return found
        client.settimeout(_LOOK_SECONDS)
        try:
            data = client.recv(65536)
        except (TimeoutError, ssl.SSLWantReadError):
            return None
        return receiver.offer(data) if data else b""

    def _check_pace(self, receiver: Receiver) -> None:
        """Raises InvalidDicom for a message that stalls, or is slower than `bytes_per_second`."""
        now, total, limits = time.monotonic(), receiver.total, self.limits
        if total != self._last[1]:
            self._last = (now, total)
            self._service.arriving(self._association)
        if not receiver.is_within:
            self._began = None
            return
        if self._began is None:
            self._began = self._last = (now, total)
        began, before = self._began
        allowed = limits.stall_seconds + (total - before) / limits.bytes_per_second
        if now - self._last[0] > limits.stall_seconds or now - began > allowed:
            raise InvalidDicom(
                f"a message is not whole after {now - began:.0f} s and {total - before} bytes"
            )

    def _pass_on(self, found: bytes) -> None:
        """Give a PDU to pynetdicom."""
        if found[0] == _RELEASE_REQUEST:
            self._service.released(self._association)
        try:
            pdu, event = self._decode_pdu(bytearray(found))
        except Exception as error:
            # Its decoder raises whatever comes of the bytes.
            raise InvalidDicom(f"a PDU of type 0x{found[0]:02X} cannot be decoded") from error
        self.event_queue.put(event)
        self._recv_pdu.put(pdu)


class _Messages(DIMSEServiceProvider):
    """The messages of an association; whoever takes one waits until there is something to do."""

    def get_msg(self, block: bool = False) -> Any:
        if block:
            return self._response()
        try:
            return self.msg_queue.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            return None, None

    def _response(self) -> Any:
        """The answer to what was sent; requests of the peer that cross it are served after that."""
        end = time.monotonic() + (self.dimse_timeout or 0.0)
        crossed: list[Any] = []
        try:
            while True:
                found = self.msg_queue.get(timeout=max(0.0, end - time.monotonic()))
                is_request = getattr(found[1], "MessageIDBeingRespondedTo", 0) is None
                if not is_request or len(crossed) >= _MOST_WAITING:
                    return found
                crossed.append(found)
        except queue.Empty:
            return None, None
        finally:
            for one in crossed:
                self.msg_queue.put(one)


class NodeAssociation(Association):
    """An association that a node accepts."""

    def __init__(self, ae: AE, service: Service, limits: Limits, keeping: Keeping) -> None:
        super().__init__(ae, "acceptor")
        #: In the log.
        self.number: int | None = None
        #: There was room for it among the associations.
        self.was_let_in = False
        self.keeping = keeping
        self.dimse = _Messages(self)
        self.dul = self.provider = _Provider(self, service, limits)
        self.acse_timeout = limits.idle_seconds
        self.dimse_timeout = limits.stall_seconds
        self.network_timeout = limits.idle_seconds
        self._complain: Callable[[str], None] = lambda _: None

    @property
    def arriving(self) -> int:
        """Bytes in memory of the image that is arriving."""
        return self.provider.arriving

    @property
    def is_arriving(self) -> bool:
        """Whether an image is here, or a part of one, that was not answered."""
        return self.provider.is_arriving

    @property
    def is_in(self) -> bool:
        """Whether it is established or is about to be."""
        return self.was_let_in and not (self.is_rejected or self.is_released or self.is_aborted)

    def _bind_defaults(self) -> None:
        """Nothing: it gets all handlers of its server."""

    def keep_no_more(self, number: int) -> None:
        """Read an image too large for memory to its end, and keep nothing of it; `number` is of an error."""
        receiver = self.provider.receiver
        if receiver is not None:
            receiver.discard(number)

    def cut_off(self) -> None:
        """End the connection at once."""
        held = self.dul.socket
        client = None if held is None else held.socket
        with contextlib.suppress(OSError):
            if client is not None:
                client.shutdown(socket.SHUT_RDWR)

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        except Exception as error:  # noqa: BLE001
            # Its negotiation raises whatever comes of what it decoded.
            self.complain(f"what came cannot be handled ({type(error).__name__})")
            self.cut_off()
            self.kill()
            if self.provider.ident is None:
                # There was no thread for it, which would do that in its end.
                self.provider.end()

    def forget(self) -> None:
        """The connection has ended."""
        if isinstance(self._server, Server):
            self._server.forget(self)

    def tell(self) -> None:
        """Let the thread of the association look what there is to do."""
        self.dimse.msg_queue.put((None, None))

    def complain(self, trouble: str) -> None:
        """Why this association is ended."""
        self._complain(trouble)

    def kill(self) -> None:
        self.tell()
        super().kill()


class _Contexts(list[PresentationContext]):
    """pynetdicom copies the contexts for each association, which takes longer than the rest of
    the negotiation; they are never changed, so all associations may share them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Contexts":
        return self


class _Handler(RequestHandler):
    """Makes an association of a connection."""

    server: "Server"
    _made: NodeAssociation | None = None

    def _create_association(self) -> Association:
        server = self.server
        association = NodeAssociation(self.ae, server.service, server.limits, server.keeping)
        association._server = server
        association.name = "AcceptorThread"
        association._complain = lambda trouble: server.complain(association, trouble)
        association.acceptor.maximum_length = self.ae.maximum_pdu_size
        association.acceptor.ae_title = server.ae_title
        association.acceptor.address_info = self.local
        association.acceptor.implementation_class_uid = self.ae.implementation_class_uid
        association.acceptor.implementation_version_name = self.ae.implementation_version_name
        association.acceptor.supported_contexts = server.contexts
        association.requestor.address_info = self.remote
        association.set_socket(_Socket(association, self.request))
        association._handlers = {
            event: list(bound) if isinstance(bound, list) else bound
            for event, bound in server._handlers.items()
        }
        server.add(self.request, association)
        self._made = association
        return association

    def handle(self) -> None:
        client = self.request
        if isinstance(client, ssl.SSLSocket):
            client.do_handshake()
        try:
            super().handle()
        except RuntimeError:
            # There is no thread for it, which would do that in its end.
            if self._made is not None and self._made.ident is None:
                self._made.provider.end()
            raise


@dataclass(eq=False)
class _Connection:
    """Since when it is there, and what became of it."""

    since: float = field(default_factory=time.monotonic)
    association: NodeAssociation | None = None

    @property
    def is_established(self) -> bool:
        return self.association is not None and self.association.is_established


class Server(ThreadedAssociationServer):
    """Listens. `networks` are those that may connect, empty for all."""

    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        ae: AE,
        address: tuple[str, int],
        contexts: Sequence[PresentationContext],
        handlers: list[Any],
        service: Service,
        limits: Limits,
        keeping: Keeping,
        networks: Sequence[Network],
        tls: ssl.SSLContext | None,
        logger: logging.Logger,
    ) -> None:
        self.service = service
        self.limits = limits
        self.keeping = keeping
        self._networks = networks
        self._logger = logger
        self._guard = threading.Lock()
        self._fewer = threading.Condition(self._guard)
        # Oldest first.
        self._connections: dict[socket.socket, _Connection] = {}
        super().__init__(ae, address, ae.ae_title, _Contexts(contexts), tls, handlers, _Handler)

    def _bind_defaults(self) -> None:
        """Without pynetdicom's own log of all that comes, where nobody reads it when the node opens: it costs
        as much.
        """
        super()._bind_defaults()
        if not logging.getLogger("pynetdicom").isEnabledFor(logging.INFO):
            for event in (
                evt.EVT_DIMSE_RECV,
                evt.EVT_DIMSE_SENT,
                evt.EVT_PDU_RECV,
                evt.EVT_PDU_SENT,
            ):
                self._handlers.pop(event, None)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make an association; a handshake takes as long as the peer likes, and a thread of its own."""
        if isinstance(request, ssl.SSLSocket):
            super().process_request(request, client_address)
        else:
            self.process_request_thread(request, client_address)

    def get_request(self) -> tuple[socket.socket, Any]:
        assert self.socket is not None
        try:
            client, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The connection stays in the queue, and would be tried again at once for ever.
                time.sleep(_LOOK_SECONDS)
            raise
        client.settimeout(self.limits.stall_seconds)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.ssl_context is not None:
            client = self.ssl_context.wrap_socket(
                client, server_side=True, do_handshake_on_connect=False
            )
        return client, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection may come in; a stranger that says nothing makes room for it."""
        host = str(client_address[0])
        if self._networks and not is_within(host, self._networks):
            self._logger.warning("connection from %s refused: not among allowed_networks", host)
            self.service.turned_away()
            return False
        with self._guard:
            silent = self._make_room()
            # Connections that have not become associations do not count as such, but end too.
            is_full = len(self._connections) >= self.limits.associations + _MOST_SILENT
            if not is_full:
                self._connections[request] = _Connection()
        if is_full:
            self._logger.warning("connection from %s refused: too many are open", host)
            self.service.turned_away()
            return False
        if silent is not None:
            self._logger.warning("a connection that asked for nothing makes room for %s", host)
            with contextlib.suppress(OSError):
                silent.shutdown(socket.SHUT_RDWR)
        return True

    def _make_room(self) -> socket.socket | None:
        """Wait until there is room for one more; the connection that has to end for it.

        Those who are being answered are done in a moment. Only who had time to ask and did not is
        silent.
        """
        for client in [one for one in self._connections if one.fileno() < 0]:
            del self._connections[client]
        end = time.monotonic() + _MOMENT
        while len(self._connections) >= self.limits.associations + _MOST_SILENT:
            now = time.monotonic()
            for client, one in self._connections.items():
                if now - one.since > _MOMENT and not one.is_established:
                    del self._connections[client]
                    return client
            if now >= end:
                break
            self._fewer.wait(0.1)
        return None

    def add(self, request: socket.socket, association: NodeAssociation) -> None:
        """Remember which association a connection has."""
        with self._guard:
            if request in self._connections:
                self._connections[request].association = association

    def forget(self, association: NodeAssociation) -> None:
        """The connection of an association has ended."""
        with self._guard:
            for client, one in self._connections.items():
                if one.association is association:
                    del self._connections[client]
                    self._fewer.notify_all()
                    break

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._connections.pop(request, None)
            self._fewer.notify_all()
        super().shutdown_request(request)

    @property
    def active_associations(self) -> list[Association]:
        """Those that are established, and connections that will be or not."""
        with self._guard:
            found = [one.association for one in self._connections.values()]
        return [one for one in found if one is not None]

    def end_all(self, seconds: float) -> None:
        """Abort all associations, after the image that each stores now, and close what is left then."""
        threads = [
            threading.Thread(target=one.abort, daemon=True, name="abort")
            for one in self.active_associations
            if isinstance(one, NodeAssociation) and one.is_established
        ]
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._guard:
            left = list(self._connections)
        for client in left:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def complain(self, association: Association, trouble: str) -> None:
        """Tell why an association is aborted; also strangers that have none."""
        level = logging.ERROR if getattr(association, "was_let_in", False) else logging.WARNING
        with about(association=getattr(association, "number", None)):
            self._logger.log(
                level,
                "association with %r at %s is aborted: %s",
                str(association.requestor.ae_title or "").strip(),
                association.requestor.address,
                trouble,
            )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A handshake that failed, mostly; one line, and no traceback on the screen."""
        del request
        self._logger.warning(
            "connection from %s ended before there was an association", client_address[0],
            exc_info=self._logger.isEnabledFor(logging.DEBUG),
        )  # fmt: skip

    def service_actions(self) -> None:
        """Nothing: pynetdicom collects garbage here, while everybody waits."""


def is_within(host: str, networks: Sequence[Network]) -> bool:
    """Whether an address is in one of these networks."""
    try:
        address = ipaddress.ip_address(host.split("%", maxsplit=1)[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in network for network in networks)


class NodeEntity(AE):
    """The application entity of a node, which counts associations, not connections."""

    def __init__(self, ae_title: str, most_of_one_address: int) -> None:
        super().__init__(ae_title=ae_title)
        self._most_of_one_address = most_of_one_address
        self._letting_in = threading.Lock()

    def let_in(self, asking: NodeAssociation) -> str:
        """Count an association from now on, unless there are too many: then why it is not let in.

        Many may ask at the same moment, before the first of them is established.
        """
        address = asking.requestor.address
        with self._letting_in:
            found = self.active_associations
            if len(found) >= self.maximum_associations:
                return "too many associations"
            of_one = sum(one.requestor.address == address for one in found)
            if of_one >= self._most_of_one_address:
                return "too many associations of this address"
            asking.was_let_in = True
        return ""

    @property
    def active_associations(self) -> list[Association]:
        """Those that were let in."""
        return [
            one
            for server in self._servers
            for one in server.active_associations
            if isinstance(one, NodeAssociation) and one.is_in
        ]


__all__ = [
    "Keeping",
    "Limits",
    "Network",
    "NodeAssociation",
    "NodeEntity",
    "Server",
    "Service",
    "is_within",
]

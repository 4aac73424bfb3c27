"""The transport below associations: pynetdicom's, without its waiting and its trust in strangers.

pynetdicom keeps negotiation, the state machine and every service but one. C-STORE requests, which are
nearly all that a node receives, are read by the compiled core straight from the socket. Solved here by
subclassing, with nothing replaced in pynetdicom itself:

- its threads poll; ours wait until something happens (`waiting.py`);
- each of its associations has two threads; ours get the second when a message comes that is no C-STORE;
- what a stranger can hold is bounded: bytes of a PDU and of a dataset, and how long a PDU and a dataset may take;
- time is monotonic, so that a corrected clock ends no association.

Which connections come in is the matter of `listener.py`.
"""

import contextlib
import math
import queue
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.fsm import InvalidEventError, StateMachine
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC
from pynetdicom.pdu_primitives import A_ASSOCIATE

from dicomnode.errors import InvalidDicom
from dicomnode.lib.dicom import Received, Receiver
from dicomnode.server.agreements import Negotiation, Request, Requests
from dicomnode.server.connection import CLOSING, LOOK_SECONDS, Connection
from dicomnode.server.limits import Limits
from dicomnode.server.waiting import Line, MonotonicTimer, Wake, wait_readable

# Messages that are no C-STORE and wait to be served; more are not read.
_MOST_WAITING = 4
_ESTABLISHED = "Sta6"
_IDLE = "Sta1"
_AWAITING = "Sta2"
_ASKED = "Sta3"
# Of pynetdicom's events: an unrecognised or invalid PDU, and nothing but a request for an association.
_NOT_UNDERSTOOD = "Evt19"
_REQUESTED = deque(["Evt6"])
# All but a request for an association and an abort.
_NO_REQUESTS = [bytes([number]) for number in range(0x02, 0x07)]
_PDU_TYPES = [bytes([number]) for number in range(0x01, 0x08)]
_ASSOCIATE_REQUEST = 0x01
_RELEASE_REQUEST = 0x05
_RELEASE_RESPONSE = b"\x06\0\0\0\0\4\0\0\0\0"


class Service(Protocol):
    """What the owner of a transport does with what arrives."""

    def store(self, association: "NodeAssociation", received: Received) -> None:
        """Keep an image, and answer it. Raises nothing."""

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
    #: The attribute that tells who an image belongs to.
    identifier_tag: int
    #: Where their files begin, and how many bytes have to be free there now; None to keep them in memory.
    folder: Path | None = None
    least_free: Callable[[], int] = lambda: 0
    #: The files of larger ones may have names ahead; None where none has.
    named_above: int | None = None


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


class _Provider(DULServiceProvider):
    """The upper layer service; in the state of an established association the core reads."""

    # Each is a `Line`; pynetdicom has queues at which threads can wait.
    event_queue: Any
    to_provider_queue: Any
    to_user_queue: Any
    _recv_pdu: Any

    def __init__(self, association: "NodeAssociation", service: Service, limits: Limits) -> None:
        super().__init__(association)
        self.limits = limits
        self._service = service
        self._run_loop_delay = 0.0
        self._begin(association)

    def again(self, association: "NodeAssociation") -> "_Provider":
        """One like this one, for another association."""
        made = _Provider.__new__(_Provider)
        made.__dict__.update(self.__dict__)
        made._begin(association)
        return made

    def _begin(self, association: "NodeAssociation") -> None:
        """What each association has for itself."""
        self._assoc = self._association = association
        self.state_machine = StateMachine(self)
        self.wake = Wake()
        self.socket = None
        self.event_queue = Line()
        self._recv_pdu = Line()
        self.to_provider_queue = Line(self.wake.set)
        self.to_user_queue = Line(association.tell)
        self._idle_timer = MonotonicTimer(self.limits.idle_seconds)
        self.artim_timer = MonotonicTimer(self.limits.idle_seconds)
        self.receiver: Receiver | None = None
        #: What the peer asked for.
        self.request: Request | None = None
        #: The peer broke the protocol: what it still sends is not looked at.
        self.is_aborting = False
        # Why its request for an association is not understood.
        self._trouble = ""
        # When the message that is arriving began, and how much had arrived by then; and when last
        # something came, and how much by then.
        self._began: tuple[float, int] | None = None
        # Since when an image is whole that is not dealt with.
        self._whole = math.inf
        self._last: tuple[float, int] = (0.0, 0)
        # The thread that runs this, while it does.
        self._runner: threading.Thread | None = None

    @property
    def arriving(self) -> int:
        """Bytes in memory of the image that is arriving."""
        receiver = self.receiver
        return 0 if receiver is None else receiver.arriving

    @property
    def is_arriving(self) -> bool:
        """Whether an image is here, or a part of one, that was not dealt with.

        One that is whole for long does not count: code of a user may hang with it.
        """
        receiver = self.receiver
        is_stuck = time.monotonic() - self._whole > self.limits.stall_seconds
        return receiver is not None and receiver.is_arriving and not is_stuck

    @property
    def is_hung(self) -> bool:
        """Whether code of a user has had an image for as long as a peer may be silent."""
        return time.monotonic() - self._whole > self.limits.idle_seconds

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
    def is_over(self) -> bool:
        """Whether the connection has ended, or was ended, and nothing is left to do for it."""
        is_idle = self.state_machine.current_state == _IDLE
        return is_idle and not self.event_queue.queue and not self.to_provider_queue.queue

    @property
    def is_here(self) -> bool:
        """Whether this is run by the thread that asks."""
        return threading.current_thread() is self._runner

    def is_alive(self) -> bool:
        """Whether it is run; by a thread that is not its own."""
        return self._runner is not None

    @property
    def _has_other_work(self) -> bool:
        # Looked at after each image, and so without the queues' locks.
        return bool(self.to_provider_queue or self.event_queue or self._kill_thread)

    def pause(self) -> None:
        """Wait a moment for what other threads ask."""
        self.wake.wait(0.02)

    def kill_dul(self) -> None:
        super().kill_dul()
        self.wake.set()

    def stop_dul(self) -> bool:
        if self.state_machine.current_state == _IDLE:
            self.kill_dul()
        return not self.is_alive()

    def run_reactor(self) -> None:
        """Read and answer until the connection has ended. For the thread of the association."""
        self._runner = threading.current_thread()
        try:
            # A stop and a broken message may end an association at the same moment.
            with contextlib.suppress(InvalidEventError):
                super().run_reactor()
            # What ended it may have been an abort.
            self._association.attend()
        except Exception as error:  # noqa: BLE001
            # Its state machine raises whatever comes of what it decoded.
            self._association.complain(f"what came cannot be handled ({type(error).__name__})")
            abort = A_ABORT_RQ()
            abort.source, abort.reason_diagnostic = 0x02, 0x00
            if self.socket is not None:
                self.socket.send(abort.encode())
        finally:
            self._runner = None
            self.end()

    def _process_recv_primitive(self) -> bool:
        self._association.attend()
        return super()._process_recv_primitive()

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
        # Whoever serves its messages need not wait longer.
        self._association.tell()

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
                self._whole = self._idle_timer._start_time = time.monotonic()
                self._service.store(self._association, found)
                # Its memory is that of the next one.
                found = None
                self._whole = math.inf
                if self._has_other_work:
                    self._end_answer(receiver)
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
        assert isinstance(self.socket, Connection)
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
        elif is_first and self.event_queue == _REQUESTED and self._is_known:
            self._ask()

    @property
    def _is_known(self) -> bool:
        return self.request is not None and self.request.agreement is not None

    def _ask(self) -> None:
        """Take a request that is known again to whoever negotiates, as the state machine does in some rounds more."""
        self.event_queue.clear()
        self.artim_timer.stop()
        self.state_machine.current_state = _ASKED
        self._association.ask(self._recv_pdu.get().to_primitive())

    def _decode_pdu(self, bytestream: bytearray) -> tuple[Any, str]:
        if bytestream[0] != _ASSOCIATE_REQUEST:
            return super()._decode_pdu(bytestream)
        try:
            request = self._association.requests.of(bytes(bytestream))
        except InvalidDicom as error:
            self._trouble = str(error)
            raise
        self.request = request
        if evt.EVT_PDU_RECV in self._association._handlers:
            evt.trigger(self.assoc, evt.EVT_PDU_RECV, {"pdu": request.whole})
        return request.pdu, "Evt6"

    def accept(self, pdu: A_ASSOCIATE_AC, encoded: bytes) -> None:
        """Answer a request for an association that is known again, where the state machine would do the same."""
        if self.socket is None:
            raise OSError("closed")
        self.socket.send(encoded)
        self.state_machine.current_state = _ESTABLISHED
        evt.trigger(self.assoc, evt.EVT_PDU_SENT, {"pdu": pdu})

    def _new_receiver(self) -> Receiver:
        limits = self.limits
        client = None if self.socket is None else self.socket.socket
        if client is None:
            raise OSError("closed")
        is_plain = not isinstance(client, ssl.SSLSocket)
        association, keeping = self._association, self._association.keeping
        association.agreed = {
            int(context.context_id or 0): (
                str(context.abstract_syntax),
                str(context.transfer_syntax[0]),
            )
            for context in association.accepted_contexts
        }
        self.receiver = Receiver(
            [(number, syntax) for number, (_, syntax) in association.agreed.items()],
            # A tolerance for senders that count the headers in.
            limits.pdu_bytes + 1024,
            limits.instance_bytes,
            keeping.memory_bytes,
            client.fileno() if is_plain else None,
            self.wake.number,
            keeping.digest_size,
            keeping.folder,
            0 if keeping.folder is None else keeping.least_free(),
            str(association.requestor.ae_title or "").strip(),
            keeping.identifier_tag,
            keeping.named_above,
        )
        self._last = (time.monotonic(), 0)
        return self.receiver

    def _end_answer(self, receiver: Receiver) -> None:
        """Send what is left of the answer to an image."""
        if (rest := receiver.unsent()) and self.socket is not None:
            self.socket.send(rest)
        receiver.answered()

    def _read(self, receiver: Receiver) -> Received | bytes | None:
        """What comes next, after the answer to what came before."""
        client = None if self.socket is None else self.socket.socket
        if not isinstance(client, ssl.SSLSocket):
            found = receiver.receive(LOOK_SECONDS)
            if found is None:
                self.wake.clear()
                self._end_answer(receiver)
            return found
        self._end_answer(receiver)
        if self._has_other_work:
            # It may not have come through.
            return None
        found = receiver.offer(b"")
        if found is not None or not (
            client.pending() or wait_readable(client, self.wake, LOOK_SECONDS)
        ):
            return found
        client.settimeout(LOOK_SECONDS)
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
            if len(found) == len(_RELEASE_RESPONSE) and self._release():
                return
        try:
            pdu, event = self._decode_pdu(bytearray(found))
        except Exception as error:
            # Its decoder raises whatever comes of the bytes.
            raise InvalidDicom(f"a PDU of type 0x{found[0]:02X} cannot be decoded") from error
        self.event_queue.put(event)
        self._recv_pdu.put(pdu)

    def _release(self) -> bool:
        """Answer the request for a release of an association that nothing else is done for, and close it.

        As the state machine does in some rounds more; False where that has to do it.
        """
        connection, association = self.socket, self._association
        if self._has_other_work or not association.has_images_only or connection is None:
            return False
        if evt.EVT_PDU_RECV in association._handlers:
            # Somebody reads pynetdicom's own log, which tells of each PDU.
            return False
        # Before the peer knows: it may ask for the next association at once.
        association.leave()
        connection.send(_RELEASE_RESPONSE)
        self.state_machine.current_state = CLOSING
        connection.close()
        return True


class _Messages(DIMSEServiceProvider):
    """The messages of an association; whoever takes one waits until there is something to do."""

    def get_msg(self, block: bool = False) -> Any:
        if block:
            return self._response()
        try:
            return self.msg_queue.get(timeout=LOOK_SECONDS)
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

    def __init__(
        self, ae: AE, service: Service, limits: Limits, keeping: Keeping, requests: Requests
    ) -> None:
        super().__init__(ae, "acceptor")
        #: Those that came to its server.
        self.requests = requests
        #: In the log.
        self.number: int | None = None
        #: There was room for it among the associations.
        self.was_let_in = False
        self.keeping = keeping
        #: SOP class and transfer syntax of each accepted presentation context, once images may come.
        self.agreed: dict[int, tuple[str, str]] = {}
        # Who serves its messages that are no images.
        self._servant: threading.Thread | None = None
        self.provider = _Provider(self, service, limits)
        self._begin()
        self.acse_timeout = limits.idle_seconds
        self.dimse_timeout = limits.stall_seconds
        self.network_timeout = limits.idle_seconds
        #: What the listener does where its connection has ended, and where it has to be ended and why.
        self.on_end: Callable[[], None] = lambda: None
        self.on_trouble: Callable[[str], None] = lambda _: None

    def again(self) -> "NodeAssociation":
        """One like this one, which was never used: pynetdicom's way to make one takes a millisecond."""
        made = NodeAssociation.__new__(NodeAssociation)
        made.__dict__.update(self.__dict__)
        threading.Thread.__init__(made, target=made.run_reactor, name=self.name, daemon=True)
        made.provider = self.provider.again(made)
        made.requestor, made.acceptor = copy(self.requestor), copy(self.acceptor)
        for user in (made.requestor, made.acceptor):
            user.assoc = made
            user.reset_negotiation_items()
        made._accepted_cx, made._rejected_cx = {}, []
        made._dul_ready, made._reactor_checkpoint = threading.Event(), threading.Event()
        made._reactor_checkpoint.set()
        made._begin()
        return made

    def _begin(self) -> None:
        """What serves it is of itself."""
        self.dul = self.provider
        self.acse, self.dimse = Negotiation(self), _Messages(self)

    @property
    def arriving(self) -> int:
        """Bytes in memory of the image that is arriving."""
        return self.provider.arriving

    @property
    def is_arriving(self) -> bool:
        """Whether an image is here, or a part of one, that was not dealt with."""
        return self.provider.is_arriving

    @property
    def is_in(self) -> bool:
        """Whether it is established or is about to be; one that hangs takes no place of others."""
        is_over = self.is_rejected or self.is_released or self.is_aborted or self.provider.is_hung
        return self.was_let_in and not is_over

    def _bind_defaults(self) -> None:
        """Nothing: it gets all handlers of its server."""

    def use(self, client: socket.socket) -> None:
        """This is the connection."""
        self.set_socket(Connection(self, self.provider, client))

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
        """All of an association that only sends images: pynetdicom's thread for the connection is this one."""
        self._started_dul = True
        self.provider.run_reactor()

    def attend(self) -> None:
        """Do what pynetdicom has a second thread for, until there is one for a message that is no image."""
        try:
            if self._kill or self._servant is not None:
                pass
            elif self.dimse.msg_queue.queue:
                self._servant = threading.Thread(target=self._serve, name="servant", daemon=True)
                self._servant.start()
            elif not self.is_established:
                self._negotiate()
            elif self.provider.to_user_queue.queue:
                self._leave()
            elif self.provider.idle_timer_expired():
                self.abort(block=False)
                self._kill = True
        except Exception as error:  # noqa: BLE001
            # Its negotiation raises whatever comes of what it decoded, and there may be no thread.
            self.complain(f"what came cannot be handled ({type(error).__name__})")
            self.cut_off()
            self._kill = True
        if self._kill and self.provider.is_over:
            self.provider.kill_dul()

    def _negotiate(self) -> None:
        """Answer the request for it, if that has come."""
        asked = self.provider.receive_pdu()
        if isinstance(asked, A_ASSOCIATE):
            self.ask(asked)
        elif asked is not None or self.provider.is_over:
            # Whoever was there has left before that.
            self._kill = True

    def ask(self, asked: A_ASSOCIATE) -> None:
        """Accept or reject a request for it."""
        self.requestor.primitive = asked
        evt.trigger(self, evt.EVT_REQUESTED, {})
        if not (self.is_aborted or self.is_rejected):
            self.acse.negotiate_association()
        self._kill = not self.is_established

    def _leave(self) -> None:
        """Answer a request for a release; note an abort, or that the connection is lost."""
        if self.acse.is_release_requested():
            self.acse.send_release(is_response=True)
            self.leave()
        else:
            self.provider.receive_pdu()
            self.is_aborted = True
            self._kill, self.is_established = True, False
            evt.trigger(self, evt.EVT_ABORTED, {})

    @property
    def has_images_only(self) -> bool:
        """Whether nothing but images came."""
        return self._servant is None and not self.dimse.msg_queue.queue

    def leave(self) -> None:
        """The peer has its answer to a request for a release, or is about to get it."""
        self.is_released = True
        self._kill, self.is_established = True, False
        evt.trigger(self, evt.EVT_RELEASED, {})

    def _serve(self) -> None:
        """Serve messages that are no images, each as long as it takes, while others are read."""
        try:
            self._run_reactor()
        except Exception as error:  # noqa: BLE001
            # A service raises whatever comes of what was decoded.
            self.complain(f"what came cannot be handled ({type(error).__name__})")
            self.cut_off()
            self.kill()

    def forget(self) -> None:
        """The connection has ended."""
        self.on_end()

    def tell(self) -> None:
        """Let the thread of the association look what there is to do."""
        if self._servant is not None:
            self.dimse.msg_queue.put((None, None))

    def complain(self, trouble: str) -> None:
        """Why this association is ended."""
        self.on_trouble(trouble)

    def kill(self) -> None:
        self.tell()
        if self.provider.is_here:
            # It ends when what is to be sent yet has been sent.
            self._kill, self.is_established = True, False
        else:
            super().kill()


__all__ = ["Keeping", "NodeAssociation", "Service"]

"""One association as the side that asks for it, over a socket and without threads of its own.

Solves that no wait is without end and none is longer than it has to be: a peer that never reads, reads
slowly, hangs up in the middle of an object or says nothing is found by the call that waits for it.
pynetdicom encodes and decodes the association's negotiation (PS3.8); what goes over it after that is
written from the buffers of the caller, without a copy.
"""

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext, build_context

from dicomnode.errors import (
    CouldNotCompleteDIMSEMessage,
    PeerRefuses,
    PeerRejects,
    PeerUnreachable,
)
from dicomnode.lib.dicom import printable

# Tells a peer that it speaks with this package.
IMPLEMENTATION_UID = "2.25.220906513937283452218462934771205593021"
_IMPLEMENTATION_NAME = "DICOMNODE"
_APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
#: Longest PDU that a peer may send, and that we do whatever it allows.
MOST_PDU_BYTES = 131072
_MOST_SENT_PDU_BYTES = 1 << 20
# An answer has a dataset of some UIDs at most.
_MOST_MESSAGE_BYTES = 64 << 20
# What the system takes at once, and how much the two systems may hold between them.
_MOST_PARTS = 512
_MOST_TLS_PARTS = 32
_IN_FLIGHT_BYTES = 16 << 20
_CONNECT_SECONDS = 10.0
# A peer gets so long for an answer, and for each part of an object that it reads; a large one takes as
# long as it takes at this rate.
_ANSWER_SECONDS = 60.0
_LEAST_BYTES_PER_SECOND = 64 * 1024
_RELEASE_SECONDS = 10.0

_ASSOCIATE_AC, _ASSOCIATE_RJ, _DATA, _RELEASE_RQ, _RELEASE_RP, _ABORT = 2, 3, 4, 5, 6, 7
_REJECTED_TRANSIENT = 2
_NO_DATASET = 0x0101
# What a peer may send that pynetdicom cannot decode.
_DECODE_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, struct.error,
)  # fmt: skip


class PeerBusy(PeerUnreachable):
    """A peer rejects the association for now (rejected-transient, PS3.8 section 9.3.4)."""


@dataclass(frozen=True)
class Message:
    """What a peer sent: the elements of the command, group 0000, by their number, and its dataset."""

    context_id: int
    command: dict[int, bytes]
    dataset: bytes = field(repr=False)

    def number(self, element: int, absent: int = -1) -> int:
        """A US element."""
        value = self.command.get(element, b"")
        return int.from_bytes(value[:2], "little") if len(value) >= 2 else absent

    def text(self, element: int) -> str:
        """A text on one line."""
        return printable(self.command.get(element, b"").decode("ascii", "replace").strip(" \0"))


class Requestor:
    """An established association. Use it in one thread, and `release` or `abort` it.

    `accepted` maps (abstract syntax, transfer syntax) to the number of a presentation context. At most
    128 contexts of odd numbers fit (PS3.8 section 9.3.2.2). `serves` is an abstract syntax for which we are
    the SCP (PS3.7 annex D.3.3.4).

    Raises PeerUnreachable where the peer is not there or is too busy (PeerBusy) or rejects the
    association (PeerRejects), PeerRefuses where it accepts no context. All methods but `release` and
    `abort` raise CouldNotCompleteDIMSEMessage where it stops answering; then the connection is closed.
    """

    def __init__(
        self,
        name: str,
        place: tuple[str, int],
        called: str,
        calling: str,
        contexts: Sequence[tuple[str, str]],
        serves: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._name = name
        self._serves = serves
        self._received = bytearray()
        self._message_id = 0
        self._early: list[Message] = []
        self._poll = select.poll()
        try:
            self._socket = socket.create_connection(place, _CONNECT_SECONDS)
        except (OSError, UnicodeError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PeerUnreachable(f"{name} cannot be reached: {reason}") from error
        try:
            # Without TCP_NODELAY every small message waits 40 ms for a delayed acknowledgement.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._shake_hands(tls, place[0])
            self._socket.setblocking(False)
            self._poll.register(self._socket, select.POLLIN)
            self._negotiate(called, calling, contexts)
        except BaseException:
            self._socket.close()
            raise

    # Negotiation

    def _shake_hands(self, tls: ssl.SSLContext, host: str) -> None:
        """Encrypt from here on. The socket still has the deadline of the connection."""
        try:
            self._socket = tls.wrap_socket(self._socket, server_hostname=host)
        except (OSError, ValueError) as error:
            reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error
            raise PeerUnreachable(
                f"{self._name} cannot be reached: no TLS with it: {reason}"
            ) from error

    def _negotiate(self, called: str, calling: str, contexts: Sequence[tuple[str, str]]) -> None:
        proposed = []
        for k, (abstract, syntax) in enumerate(contexts):
            context = build_context(abstract, syntax)
            context.context_id = 2 * k + 1
            proposed.append(context)
        try:
            self._write([_request(called, calling, proposed, self._serves)])
            kind, body = self._read_pdu(_ANSWER_SECONDS)
        except CouldNotCompleteDIMSEMessage as error:
            raise PeerUnreachable(
                f"{self._name} did not answer the request for an association: {error}"
            ) from error
        if kind == _ASSOCIATE_RJ:
            self._rejected(calling, body)
        if kind != _ASSOCIATE_AC:
            raise PeerUnreachable(
                f"{self._name} answered with PDU {kind} the request for an association"
            )
        try:
            answer = A_ASSOCIATE_AC()
            answer.decode(_pdu(kind, body))
            primitive = answer.to_primitive()
            results = [
                (
                    context.context_id or 0,
                    context.result,
                    [str(one) for one in context.transfer_syntax],
                )
                for context in primitive.presentation_context_definition_results_list
            ]
            longest = int(primitive.maximum_length_received or 0)
            implementation = str(primitive.implementation_class_uid or "")
        except _DECODE_ERRORS as error:
            self.abort()
            raise PeerUnreachable(
                f"{self._name} answered the request for an association with what cannot be understood"
            ) from error
        #: What the peer is made of.
        self.implementation_uid = implementation
        # Six bytes of each are not the object's (PS3.8 section 9.3.5), and parts are of even length.
        most = min(longest, _MOST_SENT_PDU_BYTES) if longest else MOST_PDU_BYTES
        self._part_bytes = max(most - 6, 2) & ~1
        self.accepted: dict[tuple[str, str], int] = {}
        for number, result, syntaxes in results:
            if result == 0 and number % 2 and (number - 1) // 2 < len(contexts):
                abstract, syntax = contexts[(number - 1) // 2]
                if syntaxes[:1] == [syntax]:
                    self.accepted[abstract, syntax] = number
        if not self.accepted:
            self.release()
            raise PeerRefuses(f"{self._name} accepted none of the presentation contexts")

    def _rejected(self, calling: str, body: bytes) -> None:
        try:
            answer = A_ASSOCIATE_RJ()
            answer.decode(_pdu(_ASSOCIATE_RJ, body))
            result, reason = answer.result, answer.reason_str
        except _DECODE_ERRORS:
            result, reason = 0, "no reason given"
        told = f"{self._name} rejected the association of {calling!r}: {reason}"
        if result == _REJECTED_TRANSIENT:
            raise PeerBusy(told)
        raise PeerRejects(told)

    # Services

    def echo(self, context_id: int) -> int:
        """C-ECHO (PS3.7 section 9.1.5): the status."""
        self._send_command(context_id, 0x0030, [(0x0002, _uid("1.2.840.10008.1.1"))])
        return self._answer(0x8030, _ANSWER_SECONDS).number(0x0900)

    def store(
        self, context_id: int, sop_class: str, sop_instance: str, dataset: memoryview
    ) -> Message:
        """C-STORE (PS3.7 section 9.1.1) of an encoded dataset: the answer."""
        self._send_command(
            context_id,
            0x0001,
            [
                (0x0002, _uid(sop_class)),
                (0x0700, b"\0\0"),
                (0x1000, _uid(sop_instance)),
            ],
            dataset,
        )
        in_flight = min(len(dataset), _IN_FLIGHT_BYTES)
        return self._answer(0x8001, _ANSWER_SECONDS + in_flight / _LEAST_BYTES_PER_SECOND)

    def action(
        self, context_id: int, sop_class: str, sop_instance: str, kind: int, dataset: memoryview
    ) -> Message:
        """N-ACTION (PS3.7 section 10.1.4): the answer."""
        self._send_command(
            context_id,
            0x0130,
            [
                (0x0003, _uid(sop_class)),
                (0x1001, _uid(sop_instance)),
                (0x1008, kind.to_bytes(2, "little")),
            ],
            dataset,
        )
        return self._answer(0x8130, _ANSWER_SECONDS)

    def report(
        self, context_id: int, sop_class: str, sop_instance: str, kind: int, dataset: memoryview
    ) -> Message:
        """N-EVENT-REPORT (PS3.7 section 10.1.1), which we send as SCP: the answer."""
        self._send_command(
            context_id,
            0x0100,
            [
                (0x0002, _uid(sop_class)),
                (0x1000, _uid(sop_instance)),
                (0x1002, kind.to_bytes(2, "little")),
            ],
            dataset,
        )
        return self._answer(0x8100, _ANSWER_SECONDS)

    def has_message(self, seconds: float) -> bool:
        """Whether the peer sends something within so many seconds."""
        self._poll.modify(self._socket, select.POLLIN)
        return bool(self._early or self._received) or bool(self._poll.poll(seconds * 1000))

    def take_report(self) -> Message:
        """An N-EVENT-REPORT that the peer sends; it is answered with success."""
        message = self._early.pop() if self._early else self._message(_ANSWER_SECONDS)
        if message.number(0x0100) != 0x0100:
            self.abort()
            raise CouldNotCompleteDIMSEMessage(f"{self._name} sent something else than a report")
        answer = encode_command(
            [
                (0x0002, message.command.get(0x0002, b"")),
                (0x0100, (0x8100).to_bytes(2, "little")),
                (0x0120, message.command.get(0x0110, b"\0\0")),
                (0x0800, _NO_DATASET.to_bytes(2, "little")),
                (0x0900, b"\0\0"),
                (0x1000, message.command.get(0x1000, b"")),
                (0x1002, message.command.get(0x1002, b"\1\0")),
            ]
        )
        self._write(list(_fragments(message.context_id, memoryview(answer), self._part_bytes, 1)))
        return message

    def release(self) -> None:
        """End the association in order; a peer that does not answer is left."""
        with contextlib.suppress(CouldNotCompleteDIMSEMessage):
            self._write([_pdu(_RELEASE_RQ, b"\0\0\0\0")])
            end = time.monotonic() + _RELEASE_SECONDS
            while (left := end - time.monotonic()) > 0:
                kind, _ = self._read_pdu(left)
                if kind == _RELEASE_RP:
                    break
        self._socket.close()

    def abort(self) -> None:
        """End the association at once."""
        with contextlib.suppress(OSError):
            self._socket.send(_pdu(_ABORT, b"\0\0\0\0"))
        self._socket.close()

    # Messages

    def _send_command(
        self,
        context_id: int,
        kind: int,
        elements: Iterable[tuple[int, bytes]],
        dataset: memoryview | None = None,
    ) -> None:
        self._message_id = self._message_id % 0xFFFF + 1
        encoded = encode_command(
            [
                *elements,
                (0x0100, kind.to_bytes(2, "little")),
                (0x0110, self._message_id.to_bytes(2, "little")),
                (0x0800, (_NO_DATASET if dataset is None else 0).to_bytes(2, "little")),
            ]
        )
        parts = list(_fragments(context_id, memoryview(encoded), self._part_bytes, 1))
        if dataset is not None:
            parts += _fragments(context_id, dataset, self._part_bytes, 0)
        self._write(parts)

    def _answer(self, kind: int, seconds: float) -> Message:
        """The response to the last request; one to another, or a request of the peer, is an error."""
        message = self._message(seconds)
        if kind == 0x8130 and message.number(0x0100) == 0x0100:
            # A quick peer reports before it answers.
            self._early.append(message)
            message = self._message(seconds)
        if message.number(0x0100) != kind or message.number(0x0120) != self._message_id:
            self.abort()
            raise CouldNotCompleteDIMSEMessage(
                f"{self._name} sent message 0x{message.number(0x0100):04X} where the answer to a "
                "request was expected"
            )
        return message

    def _message(self, seconds: float) -> Message:
        end = time.monotonic() + seconds
        command, dataset = bytearray(), bytearray()
        decoded: dict[int, bytes] | None = None
        while True:
            kind, body = self._read_pdu(end - time.monotonic())
            if kind == _RELEASE_RQ:
                with contextlib.suppress(CouldNotCompleteDIMSEMessage):
                    self._write([_pdu(_RELEASE_RP, b"\0\0\0\0")])
            if kind != _DATA:
                self._socket.close()
                raise CouldNotCompleteDIMSEMessage(f"{self._name} ended the association")
            try:
                for context_id, control, part in _values(body):
                    (command if control & 1 else dataset).extend(part)
                    if not control & 2:
                        continue
                    if control & 1:
                        decoded = decode_command(bytes(command))
                    if decoded is None:
                        raise ValueError("a dataset without a command")
                    has_none = Message(0, decoded, b"").number(0x0800, _NO_DATASET) == _NO_DATASET
                    if has_none or not control & 1:
                        return Message(context_id, decoded, bytes(dataset))
                if len(command) + len(dataset) > _MOST_MESSAGE_BYTES:
                    raise ValueError("too long")
            except (ValueError, struct.error, IndexError) as error:
                self.abort()
                raise CouldNotCompleteDIMSEMessage(
                    f"{self._name} sent a message that cannot be understood: {error}"
                ) from error

    # The connection

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write all, as long as the peer reads."""
        left = [memoryview(part) for part in parts]
        size = sum(map(len, left))
        now = time.monotonic()
        end, stalled = now + _ANSWER_SECONDS + size / _LEAST_BYTES_PER_SECOND, now + _ANSWER_SECONDS
        first = 0
        try:
            while first < len(left):
                try:
                    sent = self._send_some(left[first : first + _MOST_PARTS])
                except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    self._poll.modify(self._socket, select.POLLIN | select.POLLOUT)
                    seconds = min(end, stalled) - time.monotonic()
                    events = self._poll.poll(max(seconds, 0) * 1000)
                    if not events:
                        raise TimeoutError("it does not read, or too slowly") from None
                    if events[0][1] & ~select.POLLOUT:
                        self._receive()
                    continue
                stalled = time.monotonic() + _ANSWER_SECONDS
                while first < len(left) and sent >= len(left[first]):
                    sent -= len(left[first])
                    first += 1
                if sent:
                    left[first] = left[first][sent:]
        except OSError as error:
            self._lost(error)

    def _send_some(self, parts: list[memoryview]) -> int:
        """Send what the system takes now; how many bytes that was."""
        if not isinstance(self._socket, ssl.SSLSocket):
            return self._socket.sendmsg(parts)
        # What has to be encrypted is one buffer, and the same one after each wait.
        return self._socket.send(b"".join(parts[:_MOST_TLS_PARTS]))

    def _read_pdu(self, seconds: float) -> tuple[int, bytes]:
        """The next PDU: its type and what follows its length. An A-ABORT is an error."""
        end = time.monotonic() + seconds
        self._poll.modify(self._socket, select.POLLIN)
        try:
            while (size := self._pdu_size()) is None:
                left = end - time.monotonic()
                if left <= 0 or not self._poll.poll(left * 1000):
                    raise TimeoutError("it does not answer")
                self._receive()
        except OSError as error:
            self._lost(error)
            raise AssertionError("unreachable: a lost connection raises") from error
        kind, body = self._received[0], bytes(self._received[6:size])
        del self._received[:size]
        return kind, body

    def _pdu_size(self) -> int | None:
        """How long the first PDU is; None while it is not all there."""
        if len(self._received) < 6:
            return None
        size = 6 + int.from_bytes(self._received[2:6], "big")
        if self._received[0] == _ABORT:
            raise ConnectionAbortedError("it aborted the association")
        if size > MOST_PDU_BYTES + 6:
            raise ConnectionAbortedError(f"it sends a PDU of {size} bytes")
        return size if len(self._received) >= size else None

    def _receive(self) -> None:
        """Take what has arrived, and look for an abort. Raises OSError at the end of a connection."""
        while True:
            try:
                data = self._socket.recv(65536)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not data:
                raise ConnectionResetError("it closed the connection")
            self._received += data
            # What was decrypted already is not told of by poll().
            if not (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
                break
        if len(self._received) > MOST_PDU_BYTES * 2:
            raise ConnectionAbortedError("it sends what nobody asked for")
        self._pdu_size()

    def _lost(self, error: OSError) -> None:
        """Close the connection, and tell why."""
        if isinstance(error, TimeoutError):
            self.abort()
        else:
            self._socket.close()
        reason = error.strerror or error
        raise CouldNotCompleteDIMSEMessage(f"{self._name} is lost: {reason}") from error


def encode_command(elements: Iterable[tuple[int, bytes]]) -> bytes:
    """A command set: elements of group 0000, Implicit VR Little Endian (PS3.7 section 6.3.1)."""
    body = b"".join(
        struct.pack("<HHI", 0, element, len(value)) + value for element, value in sorted(elements)
    )
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def decode_command(data: bytes) -> dict[int, bytes]:
    """The elements of a command set. Raises ValueError for what is none."""
    found: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        if position + 8 > len(data):
            raise ValueError("a command set is cut off")
        group, element, length = struct.unpack_from("<HHI", data, position)
        if group or position + 8 + length > len(data):
            raise ValueError("a command set is damaged")
        found[element] = data[position + 8 : position + 8 + length]
        position += 8 + length
    return found


def _fragments(
    context_id: int, data: memoryview, size: int, is_command: int
) -> Iterable[bytes | memoryview]:
    """P-DATA-TF PDUs of one value each (PS3.8 section 9.3.5): heads, and parts of the data."""
    starts = range(0, len(data), size) if len(data) else [0]
    for start in starts:
        part = data[start : start + size]
        control = is_command | (2 if start + size >= len(data) else 0)
        yield struct.pack(">BBIIBB", _DATA, 0, len(part) + 6, len(part) + 2, context_id, control)
        yield part


def _values(body: bytes) -> Iterable[tuple[int, int, bytes]]:
    """(context, control header, part) of each value in a P-DATA-TF PDU."""
    position = 0
    while position < len(body):
        length = int.from_bytes(body[position : position + 4], "big")
        if length < 2 or position + 4 + length > len(body):
            raise ValueError("a presentation data value is cut off")
        yield body[position + 4], body[position + 5], body[position + 6 : position + 4 + length]
        position += 4 + length


def _pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBI", kind, 0, len(body)) + body


def _uid(text: str) -> bytes:
    value = text.encode("ascii", "replace")
    return value + b"\0" if len(value) % 2 else value


def _request(called: str, calling: str, contexts: list[PresentationContext], serves: str) -> bytes:
    primitive = A_ASSOCIATE()
    primitive.application_context_name = _APPLICATION_CONTEXT
    primitive.calling_ae_title = calling
    primitive.called_ae_title = called
    primitive.presentation_context_definition_list = contexts
    longest = MaximumLengthNotification()
    longest.maximum_length_received = MOST_PDU_BYTES
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = IMPLEMENTATION_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = _IMPLEMENTATION_NAME
    primitive.user_information = [longest, implementation, version]
    if serves:
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid, role.scu_role, role.scp_role = serves, False, True
        primitive.user_information.append(role)
    request = A_ASSOCIATE_RQ()
    request.from_primitive(primitive)
    return bytes(request.encode())

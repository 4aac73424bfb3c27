"""A request for an association, before anybody decodes it.

Strangers write it. pynetdicom warns of each UID that is none, in words that Python remembers for good,
and knows parts that a node has no use for. What it gets to see is whole, has each context once, which are
at most 128, and nothing but UIDs where there should be UIDs. The contexts it gets made: it checks each UID in
three places, which takes over 10 ms of the interpreter where an archive asks for a hundred contexts.
"""

import re
import struct
from collections.abc import Iterator
from copy import copy

from pynetdicom.presentation import PresentationContext

from dicomnode.errors import InvalidDicom

# As PS3.5 section 9.1 has it, since pydicom warns of every other.
_UID = re.compile(rb"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")
# Type, reserved, length, protocol version, two titles, reserved (PS3.8 table 9-11).
_HEAD = 74
_APPLICATION, _CONTEXT, _ABSTRACT, _TRANSFER, _USER = 0x10, 0x20, 0x30, 0x40, 0x50
_LARGEST, _IMPLEMENTATION, _ROLE, _VERSION = 0x51, 0x52, 0x54, 0x55
# A response has to fit into few fragments.
_LEAST_PDU = 128


def plain_request(pdu: bytes) -> tuple[bytes, list[PresentationContext]]:
    """What a node looks at of an A-ASSOCIATE-RQ (PS3.8 section 9.3.2).

    Returns the request without presentation contexts, and these; some share the list of their transfer syntaxes.
    A UID that is none is replaced by one that nobody knows, so that its context is rejected and the others are not. Raises InvalidDicom where the PDU is not whole.
    """
    if len(pdu) < _HEAD:
        raise InvalidDicom(f"a request for an association of {len(pdu)} bytes")
    body, contexts = b"", dict[int, PresentationContext]()
    syntaxes: dict[tuple[bytes, ...], PresentationContext] = {}
    for kind, value in _items(pdu[_HEAD:]):
        if kind == _APPLICATION:
            body += _item(kind, _known(value))
        elif kind == _CONTEXT:
            context = _context(value, syntaxes)
            if value[0] in contexts:
                raise InvalidDicom(f"presentation context {value[0]} twice")
            contexts[value[0]] = context
        elif kind == _USER:
            body += _item(kind, b"".join(_user(*one) for one in _items(value)))
    head = pdu[:2] + struct.pack(">I", _HEAD - 6 + len(body)) + pdu[6:_HEAD]
    return head + body, list(contexts.values())


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if len(data) - at < 4:
            raise InvalidDicom("an item of a request for an association that is cut off")
        kind, length = data[at], int.from_bytes(data[at + 2 : at + 4], "big")
        at += 4 + length
        if at > len(data):
            raise InvalidDicom(f"an item 0x{kind:02X} of {length} bytes, which are not there")
        yield kind, data[at - length : at]


def _item(kind: int, value: bytes) -> bytes:
    if len(value) > 0xFFFF:
        raise InvalidDicom(f"an item 0x{kind:02X} of {len(value)} bytes")
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _known(uid: bytes) -> bytes:
    """A UID without padding, or one that nobody knows."""
    text = uid.rstrip(b"\0 ")
    return text if len(text) <= 64 and _UID.fullmatch(text) else b"2.25.0"


def _context(
    value: bytes, known: dict[tuple[bytes, ...], PresentationContext]
) -> PresentationContext:
    """One context; `known` are others of the request, by their transfer syntaxes."""
    if len(value) < 4 or value[0] % 2 == 0:
        raise InvalidDicom("a presentation context without an odd number")
    abstract, transfer = b"", list[bytes]()
    for kind, uid in _items(value[4:]):
        if kind == _ABSTRACT:
            abstract = _known(uid)
        elif kind == _TRANSFER:
            transfer.append(uid)
    if not abstract or not transfer:
        raise InvalidDicom(f"presentation context {value[0]} without abstract or transfer syntax")
    alike = tuple(transfer)
    if alike not in known:
        known[alike] = PresentationContext()
        known[alike].transfer_syntax = list(dict.fromkeys(map(_known, transfer)))
    context = copy(known[alike])
    context.context_id = value[0]
    context.abstract_syntax = abstract
    return context


def _user(kind: int, value: bytes) -> bytes:
    """A sub-item of the user information (PS3.7 annex D.3.3); empty for those without a meaning here."""
    if kind == _LARGEST:
        if len(value) != 4 or 0 < int.from_bytes(value, "big") < _LEAST_PDU:
            raise InvalidDicom("a largest PDU into which no response fits")
        return _item(kind, value)
    if kind == _IMPLEMENTATION:
        return _item(kind, _known(value))
    if kind == _VERSION:
        return _item(kind, bytes(byte for byte in value[:16] if 0x20 <= byte < 0x7F) or b"-")
    if kind == _ROLE and len(value) >= 4:
        uid = _known(value[2:-2])
        return _item(kind, struct.pack(">H", len(uid)) + uid + bytes(one & 1 for one in value[-2:]))
    return b""

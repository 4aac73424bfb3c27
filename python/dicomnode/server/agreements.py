"""Negotiations that are known again: a sender asks for an association with the same bytes each time.

Solves that a request with a hundred presentation contexts, as many archives send it, takes pynetdicom over 10 ms
of the interpreter, each time, before the first image. pynetdicom negotiates; what comes of it depends on nothing
but these bytes and what the server supports, and is used for the same request once more. Whether the sender may
come in now is asked each time, before that.
"""

import threading
from collections import OrderedDict
from copy import copy
from dataclasses import dataclass
from typing import Any

from pynetdicom import evt
from pynetdicom.acse import ACSE
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_items import PresentationContextItemRQ
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext

from dicomnode.server.negotiation import plain_request

# Larger requests, and more bytes of them, are not known again: decoded they take up to seventy times that.
_MOST_OF_ONE = 1 << 15
_MOST = 1 << 19


@dataclass(frozen=True)
class _Agreement:
    """What came of a request that was accepted. Nobody changes it."""

    accepted: dict[int, PresentationContext]
    rejected: list[PresentationContext]
    #: What pynetdicom knows the acceptance by, as a PDU, and its bytes.
    primitive: A_ASSOCIATE
    pdu: A_ASSOCIATE_AC
    encoded: bytes


class Request:
    """A request for an association, decoded. Nobody changes it."""

    def __init__(self, pdu: bytes) -> None:
        """Raises InvalidDicom, and whatever else comes of the bytes."""
        self.guard = threading.Lock()
        self.agreement: _Agreement | None = None
        plain, contexts = plain_request(pdu)
        #: Without contexts. pynetdicom looks up what to do by the class, so that it has to be this one.
        self.pdu = A_ASSOCIATE_RQ()
        self.pdu.decode(plain)
        self._primitive = self.pdu.to_primitive()
        self._primitive.presentation_context_definition_list = contexts
        self.pdu.to_primitive = self._as_primitive  # type: ignore[method-assign]

    def _as_primitive(self) -> A_ASSOCIATE:
        # An answer may be put down in it.
        return copy(self._primitive)

    @property
    def whole(self) -> A_ASSOCIATE_RQ:
        """All that is negotiated of it, for whoever reads pynetdicom's own log."""
        items: list[Any] = []
        for context in self._primitive.presentation_context_definition_list:
            items.append(PresentationContextItemRQ())
            items[-1].from_primitive(context)
        found = copy(self.pdu)
        found.variable_items = [*self.pdu.variable_items[:1], *items, *self.pdu.variable_items[1:]]
        return found


class Requests:
    """The requests that came to one server, the last of them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._known: OrderedDict[bytes, Request] = OrderedDict()
        self._size = 0

    def of(self, pdu: bytes) -> Request:
        """A request, decoded. Raises InvalidDicom, and whatever else comes of the bytes."""
        with self._guard:
            found = self._known.get(pdu)
            if found is not None:
                self._known.move_to_end(pdu)
                return found
        found = Request(pdu)
        if len(pdu) > _MOST_OF_ONE:
            return found
        with self._guard:
            if pdu in self._known:
                return self._known[pdu]
            self._known[pdu] = found
            self._size += len(pdu)
            while self._size > _MOST:
                oldest, _ = self._known.popitem(last=False)
                self._size -= len(oldest)
        return found


class Negotiation(ACSE):
    """pynetdicom's negotiation, once for each request."""

    def _negotiate_as_acceptor(self) -> None:
        # It is one of `transport.py`.
        association: Any = self.assoc
        request: Request | None = association.provider.request
        if request is None:
            super()._negotiate_as_acceptor()
            return
        # Of several that ask with the same bytes at the same moment the others wait for the first.
        with request.guard:
            agreed = request.agreement
            if agreed is None:
                super()._negotiate_as_acceptor()
                if association.is_established:
                    request.agreement = self._agreement(association)
                return
        association.requestor.ae_title = association.requestor.primitive.calling_ae_title
        association._accepted_cx = dict(agreed.accepted)
        association._rejected_cx = list(agreed.rejected)
        self.acceptor.primitive = agreed.primitive
        evt.trigger(association, evt.EVT_ACCEPTED, {})
        association.is_established = True
        association.provider.accept(agreed.pdu, agreed.encoded)
        evt.trigger(association, evt.EVT_ESTABLISHED, {})

    def _agreement(self, association: Any) -> _Agreement:
        primitive = self.acceptor.primitive
        assert primitive is not None
        pdu = A_ASSOCIATE_AC(primitive)
        return _Agreement(
            dict(association._accepted_cx),
            list(association._rejected_cx),
            primitive,
            pdu,
            pdu.encode(),
        )


__all__ = ["Negotiation", "Request", "Requests"]

"""Requests for an association before they are decoded."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE
from tests.e2e import wire

from dicomnode.errors import InvalidDicom
from dicomnode.server.agreements import Request
from dicomnode.server.negotiation import plain_request


def told(asked: bytes) -> bytes:
    """What pynetdicom makes of what it gets to see."""
    return Request(asked).whole.encode()


def by_pynetdicom(asked: bytes) -> A_ASSOCIATE:
    """All that pynetdicom itself knows a request by."""
    found = A_ASSOCIATE_RQ()
    found.decode(asked)
    return found.to_primitive()


def test_an_ordinary_request_stays_as_it_is() -> None:
    asked = wire.request(more=b"\x55\0\0\x04NAME\x54\0\0\x0b\0\7" + b"1.2.840\1\0")
    assert told(asked) == asked


def test_each_of_many_contexts_is_what_pynetdicom_makes_of_it() -> None:
    three = [(wire.IMPLICIT, wire.EXPLICIT), (wire.EXPLICIT, wire.IMPLICIT), (wire.EXPLICIT,)]
    contexts = [(2 * k + 1, f"1.2.840.{k}", three[k % 3]) for k in range(128)]
    asked = wire.request(contexts=contexts)
    found = Request(asked).pdu.to_primitive()
    assert found.presentation_context_definition_list == (
        by_pynetdicom(asked).presentation_context_definition_list
    )
    assert told(asked) == asked


def test_what_a_node_does_not_look_at_is_left_out() -> None:
    # Asynchronous operations, extended negotiation, user identity, and what nobody knows.
    more = b"".join(bytes([kind, 0, 0, 4]) + b"\0\1\0\1" for kind in (0x53, 0x56, 0x57, 0x58, 0x99))
    assert told(wire.request(more=more)) == wire.request()


@pytest.mark.parametrize("uid", ["1.2.840.x", "", "1..2", "01.2", "9" * 65, "../x", "1.2\n"])
def test_a_uid_that_is_none_rejects_its_context_only_and_is_not_remembered(uid: str) -> None:
    asked = wire.request(contexts=[(1, uid, (uid, wire.IMPLICIT)), (3, wire.CT, (wire.EXPLICIT,))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = plain_request(asked)[1]
        assert first.abstract_syntax == "2.25.0"
        assert first.transfer_syntax == ["2.25.0", wire.IMPLICIT]
        assert second.abstract_syntax == wire.CT
        assert second.transfer_syntax == [wire.EXPLICIT]


@pytest.mark.parametrize(
    "asked",
    [
        wire.request()[:60],
        wire.request()[:-1],
        wire.request()[:76],
        wire.request(contexts=[(2, wire.CT, (wire.EXPLICIT,))]),
        wire.request(contexts=[(1, wire.CT, ())]),
        wire.request(contexts=[(1, wire.CT, (wire.EXPLICIT,))] * 129),
        wire.request(contexts=[(1, wire.CT, (wire.EXPLICIT,)), (1, wire.CT, (wire.IMPLICIT,))]),
        wire.request(largest=1),
    ],
    ids=range(8),
)
def test_what_is_not_whole_is_an_error(asked: bytes) -> None:
    with pytest.raises(InvalidDicom):
        plain_request(asked)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=30), st.integers(74, 300), st.integers(0, 30))
def test_noise_is_an_error_or_what_pynetdicom_decodes_without_a_warning(
    noise: bytes, at: int, gone: int
) -> None:
    asked = bytearray(wire.request(more=b"\x54\0\0\x07\0\3" + b"1.2\1\0"))
    asked[at : at + gone] = noise
    try:
        plain_request(bytes(asked))
    except InvalidDicom:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = told(bytes(asked))
        assert told(plain) == plain

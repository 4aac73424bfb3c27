"""Requests for an association before they are decoded."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.pdu import A_ASSOCIATE_RQ
from tests.e2e import wire

from dicomnode.errors import InvalidDicom
from dicomnode.server.negotiation import plain_request


def decoded(asked: bytes) -> A_ASSOCIATE_RQ:
    found = A_ASSOCIATE_RQ()
    found.decode(plain_request(asked))
    return found


def test_an_ordinary_request_stays_as_it_is() -> None:
    asked = wire.request(more=b"\x55\0\0\x04NAME\x54\0\0\x0b\0\7" + b"1.2.840\1\0")
    assert plain_request(asked) == asked


def test_what_a_node_does_not_look_at_is_left_out() -> None:
    # Asynchronous operations, extended negotiation, user identity, and what nobody knows.
    more = b"".join(bytes([kind, 0, 0, 4]) + b"\0\1\0\1" for kind in (0x53, 0x56, 0x57, 0x58, 0x99))
    assert plain_request(wire.request(more=more)) == wire.request()


@pytest.mark.parametrize("uid", ["1.2.840.x", "", "1..2", "01.2", "9" * 65, "../x", "1.2\n"])
def test_a_uid_that_is_none_rejects_its_context_only_and_is_not_remembered(uid: str) -> None:
    asked = wire.request(contexts=[(1, uid, (uid, wire.IMPLICIT)), (3, wire.CT, (wire.EXPLICIT,))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = decoded(asked).presentation_context
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
        plain = plain_request(bytes(asked))
    except InvalidDicom:
        return
    assert plain_request(plain) == plain
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = A_ASSOCIATE_RQ()
        found.decode(plain)

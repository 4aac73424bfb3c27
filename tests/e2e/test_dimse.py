"""Sending as a client: answers for each instance, deadlines, peers that misbehave."""

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pynetdicom.association import Association

from dicomnode.errors import CouldNotCompleteDIMSEMessage, IncorrectlyConfigured, InvalidDataset
from dicomnode.lib import dimse, requestor
from dicomnode.lib.dimse import Address, echo, send
from dicomnode.testing import StoringNode, address_of, make_series, running_node

CT = [("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1")]


def test_a_peer_that_never_reads_does_not_hold_the_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requestor, "_ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(CouldNotCompleteDIMSEMessage):
            send(Address("127.0.0.1", silent.getsockname()[1], "SILENT"), make_series(1))
        assert time.monotonic() - start < 20


def test_a_peer_that_hangs_up_is_reported_with_what_it_had_acknowledged() -> None:
    class HangingUp(StoringNode):
        def filter(self, dataset: Any) -> bool:
            if dataset.InstanceNumber == 3:
                for thread in threading.enumerate():
                    if isinstance(thread, Association) and thread.is_acceptor:
                        thread.dul.socket.socket.shutdown(socket.SHUT_RDWR)
            return super().filter(dataset)

    got = []
    with (
        running_node(HangingUp) as store,
        pytest.raises(CouldNotCompleteDIMSEMessage, match=r"STORE@127\.0\.0\.1"),
    ):
        send(address_of(store), make_series(5), on_response=got.append)
    assert [one.status for one in got] == [0, 0]


def test_a_wrong_called_title_is_reported_as_a_rejection() -> None:
    with (
        running_node(StoringNode) as store,
        pytest.raises(CouldNotCompleteDIMSEMessage, match="rejected"),
    ):
        echo(Address("127.0.0.1", store.port, "WRONG"))


def test_a_peer_that_is_busy_is_asked_again_until_it_has_time() -> None:
    rejections = threading.Event()
    with running_node(StoringNode) as store:
        assert store._server is not None
        store._server._ae.maximum_associations = 1
        first = dimse.associate(address_of(store), "FIRST", CT)

        class Rejections(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "rejected" in record.getMessage():
                    rejections.set()

        store.logger.addHandler(Rejections())
        with ThreadPoolExecutor() as pool:
            second = pool.submit(send, address_of(store), make_series(2))
            assert rejections.wait(10)
            first.release()
            assert [one.status for one in second.result()] == [0, 0]


def test_a_peer_that_stays_busy_is_reported_as_a_rejection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dimse, "_BUSY_SECONDS", 0.2)
    with running_node(StoringNode) as store:
        assert store._server is not None
        store._server._ae.maximum_associations = 1
        first = dimse.associate(address_of(store), "FIRST", CT)
        with pytest.raises(CouldNotCompleteDIMSEMessage, match="limit exceeded"):
            send(address_of(store), make_series(2))
        first.release()


def test_nobody_there_is_reported_with_the_address() -> None:
    with pytest.raises(CouldNotCompleteDIMSEMessage, match=r"X@127\.0\.0\.1:1 cannot be reached"):
        echo(Address("127.0.0.1", 1, "X"))


def test_a_peer_without_the_sop_class_is_reported_for_that_instance() -> None:
    from pynetdicom.presentation import build_context

    series = make_series(2)
    series[1].SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    with running_node(
        StoringNode, supported_contexts=[build_context(series[0].SOPClassUID)]
    ) as store:
        answers = send(address_of(store), series)
        assert [one.is_stored for one in answers] == [True, False]
        assert answers[1].status == 0x0122


def test_an_empty_address_is_reported() -> None:
    with pytest.raises(CouldNotCompleteDIMSEMessage):
        echo(Address(ip="", port=104, ae_title=""))


@pytest.mark.parametrize("title", ["x" * 20, None, ""])
def test_what_is_no_ae_title_is_told(title: str) -> None:
    with pytest.raises(IncorrectlyConfigured, match="AE title"):
        echo(Address("127.0.0.1", 104, "X"), title)


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID"])
def test_a_dataset_that_cannot_be_sent_is_named_before_anything_is_sent(keyword: str) -> None:
    series = make_series(2)
    delattr(series[1], keyword)
    with running_node(StoringNode) as store:
        with pytest.raises(InvalidDataset, match=keyword):
            send(address_of(store), series)
        assert store.received == []


@pytest.mark.parametrize("given", ["folder", ["a.dcm"]])
def test_paths_in_place_of_datasets_are_told_with_the_remedy(given: Any) -> None:
    with pytest.raises(TypeError, match="load"):
        send(Address("127.0.0.1", 104, "X"), given)

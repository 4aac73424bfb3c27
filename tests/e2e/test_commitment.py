"""Storage commitment, as the one who asks and as the one who is asked."""

import json
import queue
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import CTImageStorage
from tests.e2e import wire
from tests.e2e.programs import serving

from dicomnode.errors import InvalidDataset, PeerRefuses
from dicomnode.lib.commitment import NOT_THERE, PUSH_MODEL, PUSH_MODEL_INSTANCE, Commitment
from dicomnode.lib.dimse import (
    Address,
    _plain,
    ask_commitment,
    associate,
    report_commitment,
    send,
)
from dicomnode.lib.grinders import identity_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.requestor import Requestor
from dicomnode.lib.series import derive_series
from dicomnode.lib.transcode import IMPLICIT
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.commitments import Commitments
from dicomnode.storage.ledger import State
from dicomnode.storage.outbox import Delivery
from dicomnode.testing import StoringNode, address_of, make_series, running_node, wait_for_cases

needs_orthanc = pytest.mark.skipif(
    not Path("/usr/sbin/Orthanc").exists(),
    reason="Orthanc is missing",
)
CT = "1.2.840.10008.5.1.4.1.1.2"


class Two(AbstractInput):
    image_grinder = many_meta_grinder(identity_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images == 2


class Committing(AbstractPipeline):
    """Sends back what it got, and wants it to be kept."""

    ae_title = "NODE"
    input = {"ct": Two}
    commit = True
    export_retry_seconds = 0.02

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array, images)


class Archive:
    """Stores, and reports on a commitment as `reports` tells: on which way, and what is lost."""

    def __init__(self, way: str, lost: Callable[[int], int] = lambda n: 0) -> None:
        self.way = way
        self.lost = lost
        self.stored: list[str] = []
        self.requests = 0
        self.node: Address | None = None
        self.asked: queue.Queue[Commitment] = queue.Queue()

    def on_store(self, event: Any) -> int:
        self.stored.append(str(event.request.AffectedSOPInstanceUID))
        return 0

    def on_action(self, event: Any) -> tuple[int, None]:
        self.requests += 1
        asked = Commitment.of(event.action_information)
        self.asked.put(asked)
        lost = list(asked.instances)[: self.lost(self.requests)]
        report = Commitment(asked.transaction_uid, asked.instances, dict.fromkeys(lost, NOT_THERE))
        if self.way == "refuses":
            return 0x0110, None
        if self.way == "same":
            threading.Thread(target=self._report, args=(event.assoc, report), daemon=True).start()
        elif self.way == "new":
            threading.Thread(target=self._report_to_node, args=(report,), daemon=True).start()
        return 0, None

    def _report(self, association: Any, report: Commitment) -> None:
        association.send_n_event_report(
            report.to_dataset(), report.event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE
        )

    def _report_to_node(self, report: Commitment) -> None:
        assert self.node is not None
        report_commitment(self.node, report, "PEER")

    @contextmanager
    def listening(self) -> Iterator[Address]:
        ae = AE(ae_title="PEER")
        ae.add_supported_context(CTImageStorage)
        if self.way != "none":
            ae.add_supported_context(PUSH_MODEL)
        server = ae.start_server(
            ("127.0.0.1", 0),
            block=False,
            evt_handlers=[
                (evt.EVT_C_STORE, self.on_store),
                (evt.EVT_N_ACTION, self.on_action),
            ],
        )
        try:
            yield Address("127.0.0.1", server.server_address[1], "PEER")
        finally:
            server.shutdown()


@pytest.mark.parametrize("way", ["same", "new"])
def test_a_case_is_done_when_the_endpoint_keeps_all(way: str) -> None:
    archive = Archive(way)
    with archive.listening() as address, running_node(Committing, endpoints=[address]) as node:
        archive.node = address_of(node)
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE)
    assert archive.requests == 1 and len(archive.stored) == 2


@pytest.mark.parametrize("way", ["same", "new"])
def test_what_is_not_kept_is_sent_again(way: str) -> None:
    archive = Archive(way, lambda n: 1 if n == 1 else 0)
    with archive.listening() as address, running_node(Committing, endpoints=[address]) as node:
        archive.node = address_of(node)
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE)
    assert archive.stored[2:] == [archive.stored[0]] and archive.requests == 2


def test_what_is_never_kept_is_given_up_and_stays(tmp_path: Path) -> None:
    archive = Archive("same", lambda n: 1)
    with (
        archive.listening() as address,
        running_node(Committing, endpoints=[address], root_data_directory=tmp_path) as node,
    ):
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.FAILED)
        assert "not committed" in node.cases()[0].error
        assert archive.stored.count(archive.stored[0]) == 4
        archive.lost = lambda n: 0
        node.retry(1)
        wait_for_cases(node, State.DONE)


def test_no_report_leads_to_new_requests_and_then_to_giving_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    monkeypatch.setattr("dicomnode.server.exporter._REPORT_SECONDS", 0.1)
    archive = Archive("silent")
    with archive.listening() as address, running_node(Committing, endpoints=[address]) as node:
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.FAILED)
        assert "has not reported" in node.cases()[0].error
    assert archive.requests == 4 and len(archive.stored) == 2


@pytest.mark.parametrize("way", ["none", "refuses"])
def test_an_endpoint_without_commitment_leaves_the_case_failed(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    archive = Archive(way)
    with archive.listening() as address, running_node(Committing, endpoints=[address]) as node:
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.FAILED)
        assert node._storage is not None
        (export,) = node._storage.outbox.exports(1)
        assert export.state is Delivery.DEAD
        assert ("accepted none" if way == "none" else "0x0110") in export.problem
    assert len(archive.stored) == 2


def test_a_report_that_nobody_waits_for_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with running_node(StoringNode) as node:
        report_commitment(address_of(node), Commitment("1.2.3", {"1.2.4": CT}), "SOMEBODY")
        assert node.wait(lambda: "nobody waits for" in caplog.text, 10)


def test_a_report_counts_from_the_endpoint_that_was_asked_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._REPORT_SECONDS", 0.1)
    archive = Archive("silent")
    with (
        archive.listening() as address,
        running_node(
            Committing,
            endpoints=[address],
            root_data_directory=tmp_path,
            export_retry_seconds=10.0,
        ) as node,
    ):
        send(address_of(node), make_series(2))
        asked = archive.asked.get(timeout=30)
        report_commitment(address_of(node), asked, "SOMEBODY")
        assert node.wait(lambda: "'SOMEBODY' reports on a commitment" in caplog.text, 20)
        assert node.cases()[0].state is State.EXPORTING
        # With the AE title of the endpoint, over another association than that of the request.
        report_commitment(address_of(node), asked, "PEER")
        wait_for_cases(node, State.DONE)


def test_asking_is_no_trouble_and_is_not_told_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = Archive("new")
    with (
        archive.listening() as address,
        running_node(Committing, endpoints=[address], root_data_directory=tmp_path) as node,
    ):
        archive.node = address_of(node)
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE)
    told = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert not [one for one in told if "case 1" in one]


@pytest.mark.parametrize(
    ("way", "told"), [("same", "case 1 is done"), ("silent", "has not reported before the node")]
)
def test_a_node_in_memory_asks_before_it_closes(
    way: str, told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("dicomnode.server.exporter._REPORT_SECONDS", 20 if way == "same" else 0.1)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Committing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            begun.set()
            go_on.wait(60)
            return super().process(input_data)

    archive = Archive(way)
    with archive.listening() as address, running_node(Slow, endpoints=[address]) as node:
        send(address_of(node), make_series(2))
        assert begun.wait(30)
        runner = node._runner
        assert runner is not None
        closing = threading.Thread(target=node.close)
        closing.start()
        try:
            assert node.wait(lambda: runner._loop.is_draining, 30)
        finally:
            go_on.set()
            closing.join(60)
    assert archive.requests == 1 and len(archive.stored) == 2
    assert told in caplog.text
    assert (way == "same") == ("FAILED" not in caplog.text)


def test_what_is_known_of_pauses_is_forgotten_with_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    archive = Archive("same", lambda n: int(n % 2))
    refusing = Archive("refuses")
    with archive.listening() as one, refusing.listening() as other:
        node_of = {"endpoints": [one, other], "root_data_directory": tmp_path}
        with running_node(Committing, **node_of) as node:
            for name in ("A", "B", "C"):
                send(address_of(node), make_series(2, patient_id=name))
            wait_for_cases(node, State.FAILED, 3)
            assert node._runner is not None
            times = node._runner._exporter._times
            assert node.wait(lambda: not any(set(known) - {0} for known in times.values()), 20)


def test_a_node_keeps_what_it_has_and_says_what_not(tmp_path: Path) -> None:
    images = make_series(3)
    instances = {str(one.SOPInstanceUID): CT for one in images}
    with running_node(StoringNode, root_data_directory=tmp_path) as node:
        assert all(one.is_stored for one in send(address_of(node), images[:2]))
        report = ask_commitment(address_of(node), Commitment("1.2.3", instances), "MODALITY")
        assert report is not None and report.transaction_uid == "1.2.3"
        assert dict(report.failed) == {str(images[2].SOPInstanceUID): NOT_THERE}
        # One that changed on the disk is not kept.
        victim = next(tmp_path.glob("*/*/*.dcm"))
        victim.write_bytes(victim.read_bytes()[:-2] + b"\xff\xff")
        again = ask_commitment(address_of(node), Commitment("1.2.4", instances), "MODALITY")
        assert again is not None and len(again.failed) == 2
        # The list tells what belongs together.
        assert node._storage is not None
        assert not node._storage.commitments.lists_all_of(1)
        send(address_of(node), images[2:])
        assert node._storage.commitments.lists_all_of(1)


def test_what_is_in_memory_is_not_kept() -> None:
    (image,) = make_series(1)
    with running_node(StoringNode) as node:
        send(address_of(node), [image])
        asked = Commitment("1.2.3", {str(image.SOPInstanceUID): CT})
        report = ask_commitment(address_of(node), asked, "MODALITY")
        assert report is not None and report.failed


def test_an_endpoint_that_asks_gets_its_report_over_a_new_association(tmp_path: Path) -> None:
    reports: queue.Queue[Commitment] = queue.Queue()

    def on_report(event: Any) -> tuple[int, None]:
        reports.put(Commitment.of(event.event_information))
        return 0, None

    ae = AE(ae_title="PEER")
    context = build_context(PUSH_MODEL)
    context.scu_role = context.scp_role = True
    server = ae.start_server(
        ("127.0.0.1", 0),
        block=False,
        contexts=[context],
        evt_handlers=[(evt.EVT_N_EVENT_REPORT, on_report)],
    )
    try:
        peer = Address("127.0.0.1", server.server_address[1], "PEER")
        (image,) = make_series(1)
        with running_node(StoringNode, endpoints=[peer], root_data_directory=tmp_path) as node:
            send(address_of(node), [image])
            asked = Commitment("1.2.3", {str(image.SOPInstanceUID): CT})
            assert ask_commitment(address_of(node), asked, "PEER", seconds=0.0) is None
            report = reports.get(timeout=20)
        assert report.instances == asked.instances and not report.failed
    finally:
        server.shutdown()


def test_a_request_that_is_none_is_refused() -> None:
    ae = AE(ae_title="MODALITY")
    ae.add_requested_context(PUSH_MODEL)
    with running_node(StoringNode) as node:
        association = ae.associate("127.0.0.1", node.port, ae_title="STORE")
        empty = Dataset()
        empty.TransactionUID = "1.2.3"
        status, _ = association.send_n_action(empty, 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        assert status.Status == 0x0115
        status, _ = association.send_n_action(empty, 7, PUSH_MODEL, PUSH_MODEL_INSTANCE)
        assert status.Status == 0x0123
        association.release()
        with pytest.raises(PeerRefuses):
            ask_commitment(address_of(node), Commitment("../x", {"1.2": CT}))


@pytest.mark.parametrize("uid", ["", "../x", "1.2\n3"])
def test_what_is_no_commitment_is_told(uid: str) -> None:
    dataset = Commitment("1.2.3", {"1.2.4": CT}).to_dataset()
    dataset.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = uid
    with pytest.raises(InvalidDataset):
        Commitment.of(dataset)
    with pytest.raises(InvalidDataset):
        Commitment.of(Dataset())


def _asks(node: AbstractPipeline, title: str) -> Requestor:
    """An association that asks, and will not look at what it is told."""
    return associate(address_of(node), title, [(PUSH_MODEL, IMPLICIT)])


def _status(association: Requestor, instances: int = 1) -> int:
    asked = Commitment(generate_uid(), {generate_uid(): CT for _ in range(instances)})
    data = _plain(asked.to_dataset(), IMPLICIT)
    return association.action(1, PUSH_MODEL, PUSH_MODEL_INSTANCE, 1, data).number(0x0900)


def test_senders_that_take_no_report_keep_nobody_from_theirs() -> None:
    with running_node(StoringNode) as node:
        silent = [_asks(node, f"SILENT{k}") for k in range(8)]
        for one in silent:
            assert _status(one) == 0
            # The report is here, and is not answered.
            assert one.has_message(20)
        start = time.monotonic()
        asked = Commitment("1.2.3", {"1.2.4": CT})
        assert ask_commitment(address_of(node), asked, "OTHER", seconds=20) is not None
        assert time.monotonic() - start < Limits().stall_seconds / 2
        for one in silent:
            one.abort()


def test_a_sender_that_asks_again_before_it_answers_a_report_gets_all_reports(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")

    def action(number: int) -> bytes:
        asked = Commitment(f"1.2.3.{number}", {f"1.2.4.{number}": CT})
        head = {
            0x0003: PUSH_MODEL.encode() + b"\0" * (len(PUSH_MODEL) % 2),
            0x0100: struct.pack("<H", 0x0130),
            0x0110: struct.pack("<H", number),
            0x0800: struct.pack("<H", 1),
            0x1001: PUSH_MODEL_INSTANCE.encode() + b"\0" * (len(PUSH_MODEL_INSTANCE) % 2),
            0x1008: struct.pack("<H", 1),
        }
        data = bytes(_plain(asked.to_dataset(), IMPLICIT))
        parts = wire.value(1, 3, wire.command(head)), wire.value(1, 2, data)
        return b"".join(wire.pdu(wire.DATA, part) for part in parts)

    def answer(number: int) -> bytes:
        head = {
            0x0002: PUSH_MODEL.encode() + b"\0" * (len(PUSH_MODEL) % 2),
            0x0100: struct.pack("<H", 0x8100),
            0x0120: struct.pack("<H", number),
            0x0800: struct.pack("<H", 0x0101),
            0x0900: struct.pack("<H", 0),
        }
        return wire.pdu(wire.DATA, wire.value(1, 3, wire.command(head)))

    field = struct.pack("<HHI", 0, 0x0100, 2)
    report, response = (field + struct.pack("<H", kind) for kind in (0x0100, 0x8130))
    contexts = [(1, PUSH_MODEL, (IMPLICIT,))]
    with running_node(StoringNode) as node, wire.Raw(node) as peer:
        peer.open(wire.request("STORE", "ASKING", contexts))
        peer.send(action(1))
        told = b""
        while told.count(report) < 1:
            told += peer.receive()[1]
        # Before the first report is answered.
        peer.send(action(2) + action(3))
        peer.send(answer(1))
        for count in (2, 3):
            while told.count(report) < count:
                kind, body = peer.receive()
                assert kind == wire.DATA, kind
                told += body
            peer.send(answer(1))
        # A report may be faster than the response to what asked for it.
        while told.count(response) < 3:
            kind, body = peer.receive()
            assert kind == wire.DATA, kind
            told += body
        assert told.count(response) == 3
        assert node.wait(lambda: caplog.text.count("was told that 0 of 1") == 3, 20)
        peer.send(wire.pdu(wire.RELEASE, bytes(4)))
        # Behind what is left of the last report.
        assert peer.until_the_end()[-1][0] == wire.RELEASED


def test_requests_that_wait_are_bounded_for_one_and_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicomnode.server.commitment._MOST_OF_ONE", 100)
    monkeypatch.setattr("dicomnode.server.commitment._MOST_OF_ALL", 150)
    silent: list[Requestor] = []

    def asks(title: str, instances: int = 1) -> int:
        silent.append(_asks(node, title))
        return _status(silent[-1], instances)

    with running_node(StoringNode) as node:
        assert asks("ONE", 81) == 0x0213
        # The first report is not answered, so that the others wait.
        assert [asks("ONE") for _ in range(6)] == [0, 0, 0, 0, 0x0213, 0x0213]
        assert [asks("OTHER") for _ in range(4)] == [0, 0, 0, 0x0213]
        # Who has gone waits for nothing any more.
        for one in silent:
            one.abort()
        assert node._runner is not None
        committing = node._runner.committing
        assert node.wait(lambda: not committing._requests, 20)
        assert asks("THIRD", 80) == 0
        silent[-1].abort()


def test_requests_that_come_at_the_same_moment_are_bounded_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicomnode.server.commitment._MOST_OF_ONE", 100)
    coming = threading.Semaphore(0)
    go_on = threading.Event()
    found: list[int] = []

    def ask(self: Commitments, calling: str, asked: Commitment) -> None:
        coming.release()
        assert go_on.wait(60)

    monkeypatch.setattr(Commitments, "ask", ask)
    with running_node(StoringNode) as node:
        senders = [_asks(node, "ONE") for _ in range(4)]
        threads = [
            threading.Thread(target=lambda one=one: found.append(_status(one, 30)))
            for one in senders
        ]
        for thread in threads[:2]:
            thread.start()
            assert coming.acquire(timeout=30)
        for thread in threads[2:]:
            thread.start()
            thread.join(30)
        assert found == [0x0213, 0x0213]
        go_on.set()
        for thread in threads:
            thread.join(30)
        assert found == [0x0213, 0x0213, 0, 0]
        for one in senders:
            one.abort()


@contextmanager
def orthanc(folder: Path, node_port: int) -> Iterator[tuple[Address, str]]:
    """Orthanc, which knows the node under its AE title: its address, and that of its REST API."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        port, http = one.getsockname()[1], two.getsockname()[1]
    config = folder / "orthanc.json"
    settings = {
        "StorageDirectory": str(folder / "orthanc"),
        "IndexDirectory": str(folder / "orthanc"),
        "DicomPort": port,
        "HttpPort": http,
        "DicomAet": "ORTHANC",
        "AuthenticationEnabled": False,
        "Plugins": [],
        "DicomAlwaysAllowStore": True,
        "DicomModalities": {"node": ["NODE", "127.0.0.1", node_port]},
    }
    config.write_text(json.dumps(settings))
    address = Address("127.0.0.1", port, "ORTHANC")
    with serving(["/usr/sbin/Orthanc", config], address, "NODE"):
        yield address, f"http://127.0.0.1:{http}"


def rest(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
        return json.loads(answer.read() or b"null")


@needs_orthanc
def test_orthanc_keeps_what_a_node_sends_and_says_so(tmp_path: Path) -> None:
    with running_node(Committing, root_data_directory=tmp_path / "first") as probe:
        port = probe.port
    with (
        orthanc(tmp_path, port) as (address, url),
        running_node(
            Committing,
            port=port,
            endpoints=[address],
            root_data_directory=tmp_path / "root",
            export_retry_seconds=1.0,
        ) as node,
    ):
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE, seconds=90)
        assert rest(f"{url}/statistics")["CountInstances"] == 2


@needs_orthanc
def test_orthanc_asks_a_node_and_gets_its_report(tmp_path: Path) -> None:
    with running_node(StoringNode, ae_title="NODE") as probe:
        port = probe.port
    with orthanc(tmp_path, port) as (address, url):
        images = make_series(2)
        assert all(one.is_stored for one in send(address, images, "NODE"))
        with running_node(
            StoringNode,
            ae_title="NODE",
            port=port,
            endpoints=[address],
            root_data_directory=tmp_path / "root",
        ) as node:
            series = rest(f"{url}/series")
            job = rest(
                f"{url}/modalities/node/store",
                {"Resources": series, "StorageCommitment": True, "Synchronous": True},
            )
            transaction = job["StorageCommitmentTransactionUID"]
            assert node.wait(
                lambda: rest(f"{url}/storage-commitment/{transaction}")["Status"] != "Pending", 60
            )
            report = rest(f"{url}/storage-commitment/{transaction}")
            assert report["Status"] == "Success", report
            assert len(report["Success"]) == 2


def test_c9_a_request_that_is_nested_too_deep_is_refused_at_once() -> None:
    deep = b""
    for _ in range(300):
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(deep)) + deep
        deep = struct.pack("<HHI", 0x0008, 0x1199, len(item)) + item
    with running_node(StoringNode) as node:
        address = address_of(node)
        association = associate(address, "MODALITY", [(PUSH_MODEL, IMPLICIT)])
        start = time.monotonic()
        answer = association.action(1, PUSH_MODEL, PUSH_MODEL_INSTANCE, 1, memoryview(deep))
        assert answer.number(0x0900) == 0x0110 and time.monotonic() - start < 10
        association.release()
        assert send(address, make_series(1))[0].status == 0

"""Trouble stays where it is: with its patient, its case, its file, its connection."""

import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from tests.e2e import wire

from dicomnode.errors import (
    CouldNotCompleteDIMSEMessage,
    IncorrectlyConfigured,
    OutOfResources,
)
from dicomnode.lib import dimse
from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import Address, send
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.association import AssociationServer
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.server.transport import NodeAssociation
from dicomnode.storage.ledger import Ledger
from dicomnode.testing import (
    State,
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
)


class Two(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= 2


class Silent(AbstractPipeline):
    """Processes and returns nothing."""

    ae_title = "NODE"
    input = {"ct": Two}

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset] | None:
        return None


class Echoing(Silent):
    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset] | None:
        images, array = input_data["ct"]
        return derive_series(array, images)


@pytest.mark.parametrize("charset", ["ISO_IR 192", "GB18030", "ISO 2022 IR 13", "ISO_IR 100", ""])
def test_identifiers_that_differ_in_bytes_of_another_charset_are_two_patients(
    charset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoded = iter([b"P\xe91 ", b"P\xe81 "])
    real = dimse._encoded

    def relabel(dataset: Dataset) -> bytes:
        return real(dataset).replace(b"P_1 ", next(encoded))

    images = [make_series(1, patient_id="P_1")[0] for _ in range(2)]
    for one in images:
        one.SpecificCharacterSet = charset
    monkeypatch.setattr(dimse, "_encoded", relabel)
    with running_node(Silent, root_data_directory=tmp_path) as node:
        assert [one.status for one in send(address_of(node), images)] == [0, 0]
        assert len({case.identifier for case in node.cases()}) == 2
    monkeypatch.undo()
    with running_node(Silent, root_data_directory=tmp_path) as node:
        assert len({case.identifier for case in node.cases()}) == 2


def test_what_is_wrong_with_the_results_of_one_case_is_not_put_on_another() -> None:
    """A peer takes CT only, and lets the second case wait while it refuses the PET of the first."""
    got, asked = [], threading.Event()
    peer = AE("SCP")
    peer.add_supported_context("1.2.840.10008.5.1.4.1.1.2")

    def on_requested(event: Any) -> None:
        if not asked.is_set():
            asked.wait(5)

    server = peer.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[
            (evt.EVT_C_STORE, lambda event: got.append(event) or 0),
            (evt.EVT_REQUESTED, on_requested),
        ],
    )

    class Mixed(Echoing):
        workers = 2
        export_give_up_seconds = 0

        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            for one in super().process(input_data) or ():
                if one.PatientID == "A":
                    one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.128"
                yield one

    endpoint = Address("127.0.0.1", server.server_address[1], "SCP")
    try:
        with running_node(Mixed, endpoints=[endpoint]) as node:
            send(address_of(node), make_series(2, patient_id="A") + make_series(2, patient_id="B"))
            both = {State.EXPORTING, State.DONE, State.FAILED}
            assert node.wait(lambda: {case.state for case in node.cases()} <= both, 20)
            asked.set()
            wait_for_cases(node, State.FAILED)
            wait_for_cases(node, State.DONE)
            assert {case.identifier: case.state for case in node.cases()} == {
                "A": State.FAILED,
                "B": State.DONE,
            }
    finally:
        peer.shutdown()
    assert len(got) == 2


def test_a_resend_heals_a_file_that_changed_while_the_node_was_down(tmp_path: Path) -> None:
    class Three(Two):
        def validate(self) -> bool:
            return self.images >= 3

    series = make_series(3, patient_id="P1")
    with running_node(Silent, root_data_directory=tmp_path, input={"ct": Three}) as node:
        send(address_of(node), series[:2])
    victim = next((tmp_path / "P1" / "ct").iterdir())
    data = bytearray(victim.read_bytes())
    data[-1] ^= 255
    victim.write_bytes(data)
    with running_node(Silent, root_data_directory=tmp_path, input={"ct": Three}) as node:
        assert [one.status for one in send(address_of(node), series)] == [0, 0, 0]
        wait_for_cases(node, State.DONE)


def test_in_memory_a_case_that_is_being_looked_at_is_processed_before_the_node_closes() -> None:
    looking, processed = threading.Event(), threading.Event()

    class Slow(Two):
        def validate(self) -> bool:
            looking.set()
            threading.Event().wait(0.5)
            return super().validate()

    class Processing(Silent):
        input = {"ct": Slow}

        def process(self, input_data: dict[str, Any]) -> None:
            processed.set()

    with running_node(Processing) as node:
        send(address_of(node), make_series(2))
        assert looking.wait(10)
    assert processed.is_set()


@pytest.mark.parametrize("kind", ["file", "folder", "input folder"])
def test_a_name_that_is_no_utf8_does_not_keep_the_node_from_starting(
    kind: str, tmp_path: Path
) -> None:
    data = encode(make_series(1, patient_id="P1")[0])[0]
    parts = {
        "file": [b"P1", b"ct", b"Image_\xff.dcm"],
        "folder": [b"P\xff", b"ct", b"Image_CT_1.dcm"],
        "input folder": [b"P1", b"c\xff", b"Image_CT_1.dcm"],
    }[kind]
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), *parts)))  # noqa: PTH118
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with running_node(Silent, root_data_directory=tmp_path) as node:
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE)
    assert [one.read_bytes() for one in tmp_path.rglob("Image*")] == [data]


def test_a_huge_file_does_not_keep_the_node_from_starting(tmp_path: Path) -> None:
    (tmp_path / "P1" / "ct").mkdir(parents=True)
    with (tmp_path / "P1" / "ct" / "big.dcm").open("wb") as file:
        file.truncate(10 << 40)
    with running_node(Silent, root_data_directory=tmp_path) as node:
        assert node.cases() == []
    assert (tmp_path / ".dicomnode" / "damaged" / "P1" / "ct" / "big.dcm").exists()


def test_a_validate_that_hangs_holds_up_its_own_patient_only() -> None:
    stuck, looking = threading.Event(), threading.Event()

    class Hanging(Two):
        image_grinder = list_grinder

        def validate(self) -> bool:
            if next(iter(self.data.values())).PatientID == "A":
                looking.set()
                stuck.wait(60)
            return super().validate()

    with running_node(Silent, input={"ct": Hanging}) as node:
        send(address_of(node), make_series(2, patient_id="A"))
        assert looking.wait(10)
        for k in range(100):
            send(address_of(node), make_series(1, 8, 8, patient_id=f"B{k}"))
        # Its own patient is not held up either: more of it is stored while validate() thinks.
        assert send(address_of(node), make_series(1, patient_id="A"))[0].status == 0
        send(address_of(node), make_series(2, patient_id="C"))
        assert node.wait(lambda: any(one.state is State.DONE for one in node.cases()), 20)
        stuck.set()
        wait_for_cases(node, State.DONE, 2)


def test_connections_that_end_at_once_leave_nothing_behind() -> None:
    with running_node(Silent) as node:
        sent: list[bytes] = []
        peer = AE()
        peer.add_requested_context("1.2.840.10008.1.1")
        handlers = [(evt.EVT_DATA_SENT, lambda event: sent.append(bytes(event.data)))]
        peer.associate("127.0.0.1", node.port, ae_title="NODE", evt_handlers=handlers).release()
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", node.port)) as client:
                client.sendall(sent[0])
        server = node._server
        assert server is not None
        assert node.wait(lambda: not server._visits, 20)


@pytest.mark.parametrize("left", [b"", None, b"junk that is no ledger" * 1000])
def test_results_that_were_on_their_way_when_the_ledger_was_lost_do_not_go_out_twice(
    left: bytes | None, tmp_path: Path
) -> None:
    class Half(StoringNode):
        def filter(self, dataset: Dataset) -> bool:
            super().filter(dataset)
            if len(self.received) == 3:
                raise RuntimeError("this one is not stored")
            return True

    with running_node(Half) as store:
        options = {
            "root_data_directory": tmp_path,
            "endpoints": [address_of(store)],
            "export_give_up_seconds": 0,
        }
        with running_node(Echoing, **options) as node:
            send(address_of(node), make_series(6))
            wait_for_cases(node, State.FAILED)
        sent = len(store.received)
        ledger = tmp_path / ".dicomnode" / "ledger.sqlite"
        for one in ledger.parent.glob("ledger.sqlite*"):
            one.unlink()
        if left is not None:
            ledger.write_bytes(left)
        with running_node(Echoing, **options) as node:
            (case,) = node.cases()
            assert case.state is State.FAILED and "may have been delivered" in case.error
            assert len(store.received) == sent
            kept = tmp_path.glob(".dicomnode/ledger-lost-*/outbox/*/*.dcm")
            assert len(list(kept)) == 6
            node.retry(case.id)
            wait_for_cases(node, State.DONE)


def test_a_case_that_cannot_be_made_ready_now_becomes_so_when_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = iter(range(2))
    real = Ledger.move

    def failing(self: Ledger, *args: Any, **options: Any) -> bool:
        if next(faults, None) is not None:
            raise OutOfResources("the ledger cannot be written: disk full")
        return real(self, *args, **options)

    with running_node(Silent) as node:
        monkeypatch.setattr(Ledger, "move", failing)
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE)


def test_an_image_too_large_for_memory_is_refused_and_the_next_is_kept() -> None:
    with running_node(Silent, memory_limit=4_000_000) as node:
        huge = make_series(1, 2000, 2000)[0]
        small = make_series(2)
        answers = send(address_of(node), [huge, *small])
        assert [one.status for one in answers] == [0xA700, 0, 0]
        wait_for_cases(node, State.DONE)


def test_a_node_that_closes_in_post_init_does_not_open() -> None:
    class Closing(Silent):
        def post_init(self) -> None:
            self.close()

    before = set(threading.enumerate())
    with pytest.raises(IncorrectlyConfigured, match="post_init"), running_node(Closing):
        pass
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("where", ["process", "validate"])
def test_an_error_of_the_user_that_speaks_of_a_shutdown_fails_its_case(where: str) -> None:
    class Sick(Two):
        def validate(self) -> bool:
            if where == "validate" and self.images >= 2:
                raise RuntimeError("scanner shutdown in progress")
            return super().validate()

    class Failing(Silent):
        input = {"ct": Sick}

        def process(self, input_data: dict[str, Any]) -> None:
            raise RuntimeError("cannot schedule new futures after shutdown")

    with running_node(Failing) as node:
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.FAILED)
        assert "shutdown" in node.cases()[0].error


def break_before_the_last_answer(node: AbstractPipeline, series: list[Dataset]) -> None:
    """Send all, and lose the connection when the last image is here and not yet answered."""
    assert node._server is not None
    count, real = iter(range(1, len(series) + 1)), AssociationServer.store

    def breaking(self: AssociationServer, one: NodeAssociation, *given: Any) -> None:
        if next(count, 0) == len(series):
            one.cut_off()
        real(self, one, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AssociationServer, "store", breaking)
        with pytest.raises(CouldNotCompleteDIMSEMessage):
            send(address_of(node), series)


def test_a_release_counts_from_its_request_also_where_the_peer_hangs_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection is closed before the association's own thread says that it was released."""
    real = NodeAssociation.leave

    def slow(self: NodeAssociation) -> None:
        time.sleep(0.3)
        real(self)

    monkeypatch.setattr(NodeAssociation, "leave", slow)
    series = make_series(2)
    with running_node(Silent) as node:
        for count in (1, 2):
            send(address_of(node), series)
            wait_for_cases(node, State.DONE, count)


@pytest.mark.parametrize("parts", [1, 5])
def test_what_is_sent_again_after_a_broken_connection_is_not_delivered_twice(parts: int) -> None:
    class Five(Two):
        def validate(self) -> bool:
            return self.images >= 5

    series = make_series(5)
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, input={"ct": Five}, endpoints=[address_of(store)]) as node,
    ):
        break_before_the_last_answer(node, series)
        wait_for_cases(node, State.DONE)
        for k in range(parts):
            send(address_of(node), series[k * 5 // parts : (k + 1) * 5 // parts])
            # Else the next may come into the same case.
            wait_for_cases(node, State.FAILED, k + 1)
        assert len(store.received) == 5
        # The next examination of the patient is its own.
        send(address_of(node), make_series(5))
        wait_for_cases(node, State.DONE, 2)
        assert len(store.received) == 10


def test_what_is_sent_again_after_validate_raised_is_not_delivered_twice() -> None:
    class Sick(Two):
        def validate(self) -> bool:
            if self.images < 5:
                raise ValueError("not enough to look at")
            return True

    series = make_series(5)
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, input={"ct": Sick}, endpoints=[address_of(store)]) as node,
    ):
        break_before_the_last_answer(node, series)
        wait_for_cases(node, State.DONE)
        for one in series:
            send(address_of(node), [one])
        assert node.wait(lambda: all(one.state is not State.RECEIVING for one in node.cases()), 30)
        assert len(store.received) == 5


@pytest.mark.parametrize("breaks_off", [True, False])
def test_what_is_sent_again_after_its_case_was_done_is_not_delivered_twice(
    breaks_off: bool,
) -> None:
    """With `quiet_seconds` a case is done while its sender is still there, and may break off then."""
    series = make_series(2)
    images = {str(one.SOPInstanceUID): wire.bare(encode(one)[0]) for one in series}
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], quiet_seconds=0.3) as node,
    ):
        for count in (1, 2):
            with wire.Raw(node).open() as sender:
                for uid, data in images.items():
                    sender.send(wire.store(uid, data))
                    assert sender.status() == 0
                if count == 1:
                    wait_for_cases(node, State.DONE)
                if not breaks_off:
                    sender.release()
            state = State.FAILED if breaks_off and count == 2 else State.DONE
            assert node.wait(lambda: node.cases()[-1].state is state, 20)  # noqa: B023
            assert node.wait(lambda: len(node.cases()) == count, 20)  # noqa: B023
        # After a release it is a wish to have it processed again.
        assert len(store.received) == (2 if breaks_off else 4)


def test_a_part_that_is_sent_again_is_not_set_aside_while_its_sender_is_there() -> None:
    """Else what comes next would be processed without it."""
    series = make_series(3)
    images = [wire.store(str(one.SOPInstanceUID), wire.bare(encode(one)[0])) for one in series]
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], quiet_seconds=0.5) as node,
    ):
        with wire.Raw(node).open() as breaks_off:
            for data in images[:2]:
                breaks_off.send(data)
                assert breaks_off.status() == 0
            wait_for_cases(node, State.DONE)
            again = wire.Raw(node).open()
            again.send(images[0])
            assert again.status() == 0
        with again:
            # The first association ends only here, and has the open case of the patient looked at.
            assert node.wait(lambda: len(node.cases()) == 2, 20)
            time.sleep(0.1)
            for data in images[1:]:
                again.send(data)
                assert again.status() == 0
            again.release()
        wait_for_cases(node, State.DONE, 2)
        # One of them is new: it is processed together with the others.
        assert len(node.cases()) == 2
        assert len(store.received) == 5


def test_filters_that_hang_do_not_keep_the_places_of_others() -> None:
    inside, go_on = threading.Semaphore(0), threading.Event()

    class Hanging(Silent):
        limits = Limits(associations=2, idle_seconds=1.0, stall_seconds=1.0)

        def filter(self, dataset: Dataset) -> bool:
            inside.release()
            return go_on.wait(30)

    with running_node(Hanging) as node:
        senders = [wire.Raw(node).open() for _ in range(2)]
        for k, one in enumerate(senders):
            one.send(wire.store(*wire.image(f"HANGS {k}")))
            assert inside.acquire(timeout=10)
        with wire.Raw(node) as refused:
            refused.send(wire.request())
            assert refused.receive()[0] == wire.REJECT
        for one in senders:
            one.socket.close()
        time.sleep(1.1)
        with wire.Raw(node) as other:
            other.open().release()
        go_on.set()


def test_two_that_close_a_node_do_not_wait_for_each_other() -> None:
    inside = threading.Event()

    class Closing(Silent):
        def filter(self, dataset: Dataset) -> bool:
            inside.set()
            self.close()
            return True

    with running_node(Closing) as node:

        def try_to_send() -> None:
            with suppress(CouldNotCompleteDIMSEMessage):
                send(address_of(node), make_series(1))

        sender = threading.Thread(target=try_to_send, daemon=True)
        sender.start()
        assert inside.wait(10)
        start = time.monotonic()
        node.close()
        assert time.monotonic() - start < 10


def test_a_full_disk_does_not_keep_a_node_from_closing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(self: Ledger) -> None:
        raise OutOfResources("the ledger cannot be written: disk full")

    before = set(threading.enumerate())
    with running_node(Silent, root_data_directory=tmp_path):
        monkeypatch.setattr(Ledger, "excuse", full)
    assert set(threading.enumerate()) <= before
    with running_node(Silent, root_data_directory=tmp_path):
        pass


def test_the_connection_that_holds_the_memory_is_cut_off_and_not_the_others() -> None:
    uid, data = wire.image(rows=400, columns=400)
    whole = wire.store(uid, data)
    with (
        running_node(Silent, memory_limit=4_000_000) as node,
        wire.Raw(node).open() as hog,
        wire.Raw(node).open() as other,
    ):
        # A dataset without end, of nearly all of the memory; then it says nothing more.
        assert hog.send(wire.pdu(wire.DATA, wire.value(3, 3, wire.store_command())))
        part = wire.pdu(wire.DATA, wire.value(3, 0, bytes(65_000)))
        for _ in range(60):
            assert hog.send(part)
        server = node._server
        assert server is not None
        assert len(server._visits) == 2
        other.send(whole[:200_000])
        assert node.wait(lambda: len(server._visits) == 1, 20)
        other.send(whole[200_000:])
        assert other.status() == 0
        other.release()
        hog.until_the_end()


def test_a_claim_that_cannot_be_written_does_not_keep_the_workers_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried, real = [], Ledger.move

    def failing(self: Ledger, case_id: int, expected: State, state: State, **options: Any) -> bool:
        if state is State.PROCESSING and len(tried) < 4:
            tried.append(time.monotonic())
            raise OutOfResources("the ledger cannot be written: disk full")
        return real(self, case_id, expected, state, **options)

    monkeypatch.setattr(Ledger, "move", failing)
    with running_node(Silent, workers=2) as node:
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE)
    # Each of two workers tries about once in a second.
    assert tried[-1] - tried[0] > 0.5


def test_a_validate_that_closes_while_the_node_opens_closes_it_then(tmp_path: Path) -> None:
    with running_node(Silent, root_data_directory=tmp_path, input={"ct": Two}) as node:
        send(address_of(node), make_series(1))

    class Closing(Silent):
        def __init__(self, start: bool = True) -> None:
            here = self

            class Asking(Two):
                def validate(self) -> bool:
                    here.close()
                    return False

            self.input = {"ct": Asking}
            super().__init__(start)

    with running_node(Closing, root_data_directory=tmp_path) as node:
        assert node.wait(lambda: node._server is None, 20)
    with running_node(Silent, root_data_directory=tmp_path) as node:
        assert [case.state for case in node.cases()] == [State.RECEIVING]

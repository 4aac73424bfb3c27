"""Twenty-two ways in which a node of this kind has lost data (L1 to L22); ours loses none.

The ids are those of the study of an older implementation. What cannot happen to this design is told
at the end of the file.
"""

import asyncio
import os
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicomnode.errors import InvalidRootDataDirectory, OutOfResources
from dicomnode.lib.dimse import Address, send
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import Ledger
from dicomnode.storage.rebuild import Rebuild
from dicomnode.testing import (
    State,
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
)

NOBODY = Address("127.0.0.1", 1, "NOBODY")


class Four(AbstractInput):
    required_values = {"Modality": "CT"}
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= 4


class Echoing(AbstractPipeline):
    """Sends back what it got, as a new series."""

    ae_title = "NODE"
    input = {"ct": Four}
    export_retry_seconds = 0.5
    export_give_up_seconds = 0

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array, images)


def images_below(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*/*/*.dcm") if path.parts[-3] != ".dicomnode")


def send_and_check(node: AbstractPipeline, series: list[Dataset]) -> None:
    assert [one.status for one in send(address_of(node), series)] == [0] * len(series)


def test_L1_images_are_kept_when_process_raises(tmp_path: Path) -> None:
    class Raising(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            raise RuntimeError("the model is not there")

    with running_node(Raising, root_data_directory=tmp_path) as node:
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
        (case,) = node.cases()
        assert "the model is not there" in case.error and "Traceback" in case.error
    assert len(images_below(tmp_path)) == 4
    # After the fix and a retry the same images are processed.
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, root_data_directory=tmp_path, endpoints=[address_of(store)]) as node,
    ):
        node.retry(case.id)
        wait_for_cases(node, State.DONE)
        assert len(store.received) == 4
    assert images_below(tmp_path) == []


def test_L2_results_and_images_are_kept_when_an_endpoint_is_down(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, endpoints=[NOBODY]) as node:
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
        (case,) = node.cases()
        assert "NOBODY@127.0.0.1:1 cannot be reached" in case.error
    assert len(images_below(tmp_path)) == 4
    outbox = list((tmp_path / ".dicomnode" / "outbox").glob("*/*.dcm"))
    expected = {dcmread(path).SOPInstanceUID for path in outbox}
    assert len(expected) == 4
    # The retry sends the kept results: the same UIDs, and process() does not run again.
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, root_data_directory=tmp_path, endpoints=[address_of(store)]) as node,
    ):
        node.retry(case.id)
        wait_for_cases(node, State.DONE)
        assert {one.SOPInstanceUID for one in store.received} == expected


@pytest.mark.parametrize(
    "identifier",
    [
        "/etc",
        "../../outside",
        "..",
        ".",
        "a/b",
        "a\\b",
        "~",
        "%2E",
        "x" * 64,
        "Ærø",
        "CON",
        "-rf *",
    ],
)
def test_L3_an_identifier_is_never_a_path(identifier: str, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    witness = tmp_path / "outside"
    witness.mkdir()
    (witness / "precious").write_text("keep")
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, root_data_directory=root, endpoints=[address_of(store)]) as node,
    ):
        series = make_series(4, patient_id=identifier)
        send_and_check(node, series[:3])
        files = images_below(root)
        assert len(files) == 3
        assert all(path.resolve().is_relative_to(root.resolve()) for path in files)
        send_and_check(node, series[3:])
        wait_for_cases(node, State.DONE)
    assert (witness / "precious").read_text() == "keep"
    assert sorted(path.name for path in root.iterdir()) == [".dicomnode"]


def test_L4_an_empty_identifier_is_refused_and_deletes_nothing(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        send_and_check(node, make_series(3, patient_id="KEPT"))
        answers = send(address_of(node), make_series(4, patient_id=""))
        assert [one.status for one in answers] == [0xB007] * 4
        without = make_series(1)
        del without[0].PatientID
        assert [one.status for one in send(address_of(node), without)] == [0xB007]
    assert len(images_below(tmp_path)) == 3


def test_L5_equal_modality_and_instance_number_do_not_overwrite(tmp_path: Path) -> None:
    class Six(Four):
        image_grinder = list_grinder

        def validate(self) -> bool:
            return self.images >= 7

    class Node(Echoing):
        input = {"ct": Six}

    first, second = make_series(3), make_series(3, seed=5)
    with running_node(Node, root_data_directory=tmp_path) as node:
        send_and_check(node, first + second)
        names = {path.name for path in images_below(tmp_path)}
        assert names == {f"Image_CT_{k}{suffix}.dcm" for k in (1, 2, 3) for suffix in ("", "~2")}
        uids = {dcmread(path).SOPInstanceUID for path in images_below(tmp_path)}
        assert uids == {one.SOPInstanceUID for one in first + second}


def test_L6_an_image_that_no_input_takes_is_not_answered_with_success() -> None:
    with running_node(Echoing) as node:
        answers = send(address_of(node), make_series(2, modality="MR"))
        assert [one.status for one in answers] == [0xB006] * 2
        assert answers[0].comment == "no input takes it"


def test_L7_refused_images_do_not_disturb_the_complete_patients_beside_them() -> None:
    bad = make_series(2, modality="MR")
    del bad[1].StudyInstanceUID
    good = make_series(4, patient_id="GOOD")
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)]) as node,
    ):
        answers = send(address_of(node), [bad[0], bad[0], *good, bad[1]])
        assert [one.status for one in answers] == [0xB006, 0xB006, 0, 0, 0, 0, 0xB006]
        wait_for_cases(node, State.DONE)


def test_L8_a_grinder_that_fails_for_one_patient_leaves_the_others_alone(tmp_path: Path) -> None:
    broken = make_series(4, patient_id="BROKEN")
    broken[2].ImagePositionPatient = [0, 0, 9999]
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        send(
            address_of(node),
            make_series(4, patient_id="A") + broken + make_series(4, patient_id="Z"),
        )
        wait_for_cases(node, State.DONE, 2)
        wait_for_cases(node, State.FAILED, 1)
        (failed,) = (case for case in node.cases() if case.state is State.FAILED)
        assert failed.identifier == "BROKEN"
        assert broken[2].SOPInstanceUID in failed.error
    assert len(images_below(tmp_path)) == 4


def test_L9_a_validate_that_raises_for_one_patient_leaves_the_others_alone() -> None:
    class Fragile(Four):
        def validate(self) -> bool:
            if any(one.PatientID == "BAD" for one in self.data.values()):
                raise KeyError("no such thing")
            return super().validate()

    class Node(Echoing):
        input = {"ct": Fragile}

    with (
        running_node(StoringNode) as store,
        running_node(Node, endpoints=[address_of(store)]) as node,
    ):
        batch = [one for name in ("A", "BAD", "C", "D") for one in make_series(4, patient_id=name)]
        send_and_check(node, batch)
        wait_for_cases(node, State.DONE, 3)
        wait_for_cases(node, State.FAILED, 1)
        assert {c.identifier for c in node.cases() if c.state is State.FAILED} == {"BAD"}
        assert "no such thing" in next(c.error for c in node.cases() if c.state is State.FAILED)


def test_L10_a_process_that_prints_a_lot_does_not_hang(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Chatty(Echoing):
        def process(self, input_data: dict[str, Any]) -> None:
            print("x" * 1_000_000)

    with running_node(Chatty) as node:
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.DONE)


def test_L11_a_process_that_exits_fails_its_case_only() -> None:
    class Exiting(Echoing):
        def process(self, input_data: dict[str, Any]) -> None:
            images, _ = input_data["ct"]
            if images[0].PatientID == "BAD":
                raise SystemExit(0)

    with running_node(Exiting) as node:
        send_and_check(node, make_series(4, patient_id="BAD") + make_series(4, patient_id="GOOD"))
        wait_for_cases(node, State.FAILED)
        wait_for_cases(node, State.DONE)


def test_L12_complete_cases_are_processed_after_a_restart(tmp_path: Path) -> None:
    class Waiting(Echoing):
        """Accepts, but its only worker never gets to the case."""

        workers = 0

    with running_node(Waiting, root_data_directory=tmp_path) as node:
        send_and_check(node, make_series(4, patient_id="COMPLETE"))
        send_and_check(node, make_series(2, patient_id="INCOMPLETE"))
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        wait_for_cases(node, State.DONE)
        assert {one.PatientID for one in store.received} == {"COMPLETE"}
        send_and_check(node, make_series(2, patient_id="OTHER"))
        assert sorted(c.identifier for c in node.cases() if c.state is State.RECEIVING) == [
            "INCOMPLETE",
            "OTHER",
        ]


def test_L13_a_truncated_file_is_set_aside_and_a_resend_heals_the_case(tmp_path: Path) -> None:
    series = make_series(4)
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, series)
    victim = images_below(tmp_path)[2]
    number = int(victim.stem.rpartition("_")[2])
    os.truncate(victim, victim.stat().st_size // 2)
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        # Four images were promised, three are sound: the case waits, it does not run with a gap.
        (case,) = node.cases()
        assert case.state is State.RECEIVING
        aside = list((tmp_path / ".dicomnode" / "damaged").rglob("*.dcm"))
        assert [path.name for path in aside] == [victim.name]
        send_and_check(node, [one for one in series if one.InstanceNumber == number])
        wait_for_cases(node, State.DONE)
        assert numpy.array_equal(numpy_grinder(store.received), numpy_grinder(series))


def test_L14_bad_files_do_not_keep_the_node_from_starting(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, make_series(4, patient_id="GOOD"))
    (tmp_path / "GOOD" / "ct" / "Image_CT_77.dcm").write_bytes(b"garbage")
    (tmp_path / "GOOD" / "ct" / "empty.dcm").touch()
    (tmp_path / "notes.txt").write_text("a note of the operator")
    (tmp_path / "GOOD" / "other").mkdir()
    (tmp_path / "GOOD" / "other" / "x.dcm").write_bytes(b"of an input that is gone")
    (tmp_path / "STRAY").mkdir()
    without = make_series(1)[0]
    del without.PatientID
    (tmp_path / "STRAY" / "ct").mkdir()
    without.save_as(tmp_path / "STRAY" / "ct" / "a.dcm", enforce_file_format=True)
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        wait_for_cases(node, State.DONE)
        store.wait_for_images(4)
    aside = {path.name for path in (tmp_path / ".dicomnode" / "damaged").rglob("*.dcm")}
    assert aside == {"Image_CT_77.dcm", "empty.dcm", "a.dcm"}
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "GOOD" / "other" / "x.dcm").exists()


def test_L14_a_damaged_ledger_is_rebuilt_from_the_files(tmp_path: Path) -> None:
    series = make_series(4)
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, series)
    own = tmp_path / ".dicomnode"
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
        (own / name).unlink(missing_ok=True)
    (own / "ledger.sqlite").write_bytes(b"no database" * 1000)
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        wait_for_cases(node, State.DONE)
        assert numpy.array_equal(numpy_grinder(store.received), numpy_grinder(series))


def test_L14_a_lost_ledger_is_rebuilt_from_the_files(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, make_series(4, patient_id="A/B"))
        send_and_check(node, make_series(3, patient_id="C"))
    shutil.rmtree(tmp_path / ".dicomnode")
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        wait_for_cases(node, State.DONE)
        assert {one.PatientID for one in store.received} == {"A/B"}
        assert [c.identifier for c in node.cases() if c.state is State.RECEIVING] == ["C"]
    assert len(images_below(tmp_path)) == 3


def test_L14_a_case_that_lost_an_image_with_the_ledger_waits_for_you(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, make_series(5, patient_id="SHORT"))
        send_and_check(node, make_series(4, patient_id="WHOLE"))
    shutil.rmtree(tmp_path / ".dicomnode")
    damaged = next(path for path in images_below(tmp_path) if "SHORT" in path.parts)
    damaged.write_bytes(damaged.read_bytes()[:3000])
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        wait_for_cases(node, State.DONE)
        assert {one.PatientID for one in store.received} == {"WHOLE"}
        (short,) = [one for one in node.cases() if one.identifier == "SHORT"]
        assert short.state is State.FAILED and damaged.name in short.error
        assert "1 of its files cannot be used" in short.error
    assert not (tmp_path / ".dicomnode" / "rebuilding").exists()
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        node.retry(short.id)
        wait_for_cases(node, State.DONE, 2)
        assert len(store.received) == 4


@pytest.mark.parametrize("fails", ["add_instances", "park"])
def test_L14_a_node_without_room_for_a_new_ledger_does_not_start(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could process a case without images that it had acknowledged; the start after that knows."""
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, make_series(5))
    shutil.rmtree(tmp_path / ".dicomnode")
    damaged = min(images_below(tmp_path))
    damaged.write_bytes(b"")
    _cannot_start(tmp_path, fails, monkeypatch)
    assert not damaged.exists()
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        (case,) = node.cases()
        assert case.state is State.FAILED and damaged.name in case.error


def test_L14_results_on_their_way_are_known_after_a_start_that_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_node(StoringNode) as store:
        both = [address_of(store), NOBODY]
        with running_node(Echoing, endpoints=both, root_data_directory=tmp_path) as node:
            send_and_check(node, make_series(4, patient_id="SENT"))
            assert node.wait(lambda: len(store.received) == 4, 20)
            send_and_check(node, make_series(2, patient_id="BEFORE"))
        for path in (tmp_path / ".dicomnode").glob("ledger.sqlite*"):
            path.unlink()
        _cannot_start(tmp_path, "add_instances", monkeypatch)
        with running_node(
            Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path
        ) as node:
            states = {case.identifier: case.state for case in node.cases()}
            assert states == {"SENT": State.FAILED, "BEFORE": State.RECEIVING}
        assert len(store.received) == 4


def _cannot_start(root: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Ledger, case_id: int, value: object) -> None:
        raise OutOfResources("the ledger cannot be written: disk full")

    with monkeypatch.context() as short:
        short.setattr(Ledger, fails, full)
        node = running_node(Echoing, root_data_directory=root)
        with pytest.raises(InvalidRootDataDirectory, match="has no room for a start"):
            node.__enter__()


def test_L14_a_case_that_lost_an_image_holds_up_the_next_of_its_patient(
    tmp_path: Path,
) -> None:
    class Any(AbstractInput):
        required_values = {"Modality": "MR"}

        def validate(self) -> bool:
            return True

    class Both(Echoing):
        input = {"ct": Four, "mr": Any}

    with running_node(Both, root_data_directory=tmp_path, workers=0) as node:
        for name in ("SHORT", "NONE", "LACKS"):
            send_and_check(node, make_series(4, patient_id=name))
        send_and_check(node, make_series(2, modality="MR", patient_id="LACKS"))
    shutil.rmtree(tmp_path / ".dicomnode")
    # A second examination of the patient, the first of which lacks an image.
    shutil.copytree(tmp_path / "SHORT", tmp_path / "SHORT~2")
    for path in images_below(tmp_path):
        if "NONE" in path.parts or ("LACKS" not in path.parts and path.name == "Image_CT_1.dcm"):
            path.write_bytes(b"")
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        assert node.wait(lambda: all(c.state is not State.RECEIVING for c in node.cases()), 20)
        found = sorted((case.identifier, case.state.value) for case in node.cases())
        assert found == [(name, "FAILED") for name in ("LACKS", "SHORT", "SHORT")]
        # Also the second one, which waits for another reason, lacks one.
        lacking = [case.folder for case in node.cases() if "cannot be used" in case.error]
        assert sorted(lacking) == ["LACKS", "SHORT", "SHORT~2"]
        assert store.received == []


@pytest.mark.parametrize("breaks", ["input", "case", "root"])
def test_L14_a_folder_that_cannot_be_read_now_is_known_at_the_next_start(
    breaks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, make_series(5, patient_id="AB^C"))
    shutil.rmtree(tmp_path / ".dicomnode")
    (tmp_path / "AB%5EC" / "ct" / "Image_CT_1.dcm").write_bytes(b"")
    broken = {
        "input": tmp_path / "AB%5EC" / "ct",
        "case": tmp_path / "AB%5EC",
        "root": tmp_path,
    }[breaks]
    really = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == broken:
            raise OSError(5, "Input/output error")
        return really(path)

    with monkeypatch.context() as short:
        short.setattr(os, "scandir", scandir)
        with running_node(Echoing, root_data_directory=tmp_path) as node:
            assert node.cases() == []
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        (case,) = node.cases()
        assert (case.identifier, case.state) == ("AB^C", State.FAILED)
        assert "Image_CT_1.dcm" in case.error
    assert len(images_below(tmp_path)) == 4
    assert not (tmp_path / ".dicomnode" / "rebuilding").exists()


def test_L14_files_of_others_in_a_fresh_root_are_no_cases(tmp_path: Path) -> None:
    for name in ("backup/2024/notes.txt", "backup/ct/notes.txt", ".trash/files/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the user")
    (tmp_path / "loop").symlink_to("loop")
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        assert node.cases() == []
        send_and_check(node, make_series(2))
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        assert [case.state for case in node.cases()] == [State.RECEIVING]


@pytest.mark.parametrize(
    "torn", ['["SHORT", ["Imag', "1", "null", "[1, 2]", '["SHORT", null]', "[" * 100_000, "\xff"]
)
def test_L14_what_a_start_wrote_in_part_hides_nothing_of_the_next(
    torn: str, tmp_path: Path
) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, make_series(5, patient_id="SHORT"))
    own = tmp_path / ".dicomnode"
    shutil.rmtree(own)
    own.mkdir()
    (own / "rebuilding").write_text(torn)
    rebuild = Rebuild(own, is_flushed=False)
    assert rebuild.is_going_on and not rebuild.lacking
    rebuild.lacks("SHORT", ["Image_CT_9.dcm"])
    # The start ends here.
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        (case,) = node.cases()
        assert case.state is State.FAILED and "Image_CT_9.dcm" in case.error


def test_L16_nothing_expires_unasked_and_what_is_done_is_deleted(tmp_path: Path) -> None:
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        send_and_check(node, make_series(4, patient_id="DONE"))
        send_and_check(node, make_series(2, patient_id="OLD"))
        wait_for_cases(node, State.DONE)
    assert {path.parts[-3] for path in images_below(tmp_path)} == {"OLD"}
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        states = {case.identifier: case.state for case in node.cases()}
        assert states == {"DONE": State.DONE, "OLD": State.RECEIVING}


def test_L19_close_deletes_nothing_and_waits_for_the_running_step(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            started.set()
            assert go_on.wait(30)
            return super().process(input_data)

    (tmp_path / "mine.txt").write_text("of the user")
    with running_node(Slow, root_data_directory=tmp_path, endpoints=[NOBODY]) as node:
        send_and_check(node, make_series(4))
        assert started.wait(30)
        closing = threading.Thread(target=node.close)
        closing.start()
        go_on.set()
        closing.join(30)
        assert not closing.is_alive()
    assert len(images_below(tmp_path)) == 4
    assert len(list((tmp_path / ".dicomnode" / "outbox").glob("*/*.dcm"))) == 4
    assert (tmp_path / "mine.txt").exists()


def test_L20_a_partial_send_is_resumed_without_sending_twice(tmp_path: Path) -> None:
    class Fussy(StoringNode):
        """Refuses the third object until it is told otherwise."""

        fussy = True

        def filter(self, dataset: Dataset) -> bool:
            if self.fussy and dataset.InstanceNumber == 3:
                raise RuntimeError("not today")
            return super().filter(dataset)

    with (
        running_node(Fussy) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
        (case,) = node.cases()
        assert "refused 1 of 4 results" in case.error
        assert len(store.received) == 3
        store.fussy = False
        node.retry(case.id)
        wait_for_cases(node, State.DONE)
        assert [one.InstanceNumber for one in store.received] == [1, 2, 4, 3]


def test_L20_one_endpoint_that_fails_does_not_keep_the_other_from_its_results() -> None:
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[NOBODY, address_of(store)]) as node,
    ):
        send_and_check(node, make_series(4))
        store.wait_for_images(4)
        wait_for_cases(node, State.FAILED)


def test_L22_associations_that_follow_each_other_are_kept_apart(tmp_path: Path) -> None:
    with running_node(Echoing) as node:
        for name in "ABCDEFGH":
            send_and_check(node, make_series(2, patient_id=name))
        assert {case.state for case in node.cases()} == {State.RECEIVING}
        assert len(node.cases()) == 8


def test_a_node_that_refuses_the_results_leaves_the_case_failed() -> None:
    class OnlyMr(AbstractInput):
        required_values = {"Modality": "MR"}

        def validate(self) -> bool:
            return False

    class Refusing(AbstractPipeline):
        ae_title = "REFUSING"
        input = {"mr": OnlyMr}

    with (
        running_node(Refusing) as other,
        running_node(Echoing, endpoints=[address_of(other)]) as node,
    ):
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
        assert "0xB006 no input takes it" in node.cases()[0].error


def test_results_without_an_endpoint_are_kept(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
        assert "no endpoints" in node.cases()[0].error
    assert len(list((tmp_path / ".dicomnode" / "outbox").glob("*/*.dcm"))) == 4


def test_a_case_whose_validate_failed_still_takes_its_images_and_heals() -> None:
    class NeedsNone(Four):
        required_values = {"Modality": "MR"}

        def validate(self) -> bool:
            return True

        def get_data(self) -> None:
            return None

    class Broken(NeedsNone):
        def validate(self) -> bool:
            if healed.is_set():
                return True
            raise ValueError("max() of nothing")

    healed = threading.Event()

    class Node(Echoing):
        input = {"ct": Four, "mr": Broken}

        def process(self, input_data: dict[str, Any]) -> None:
            assert len(input_data["ct"][0]) == 4

    with running_node(Node) as node:
        series = make_series(4)
        send_and_check(node, series[:1])
        wait_for_cases(node, State.FAILED)
        healed.set()
        node.retry(1)
        # It is looked at again, and waits for its images instead of running with one of them.
        wait_for_cases(node, State.RECEIVING)
        send_and_check(node, series[1:])
        wait_for_cases(node, State.DONE)
        assert len(node.cases()) == 1


def test_images_of_an_input_that_is_gone_are_kept_and_the_case_waits(tmp_path: Path) -> None:
    class Mr(Four):
        required_values = {"Modality": "MR"}
        image_grinder = list_grinder

        def validate(self) -> bool:
            return self.images >= 2

    class Both(AbstractPipeline):
        ae_title = "NODE"
        input = {"ct": Four, "mr": Mr}

    class OnlyMr(Both):
        input = {"mr": Mr}

        def process(self, input_data: dict[str, Any]) -> None:
            raise AssertionError("must not run")

    class Whole(Both):
        def process(self, input_data: dict[str, Any]) -> None:
            assert len(input_data["ct"][0]) == 4

    series = make_series(4)
    with running_node(Both, root_data_directory=tmp_path) as node:
        send_and_check(node, series[:3])
    with running_node(OnlyMr, root_data_directory=tmp_path) as node:
        send_and_check(node, make_series(2, modality="MR"))
        assert [case.state for case in node.cases()] == [State.RECEIVING]
    assert len(images_below(tmp_path)) == 5
    with running_node(Whole, root_data_directory=tmp_path) as node:
        send_and_check(node, series[3:])
        wait_for_cases(node, State.DONE)


def test_two_cases_of_one_identifier_survive_the_loss_of_the_ledger(tmp_path: Path) -> None:
    class Failing(Echoing):
        def process(self, input_data: dict[str, Any]) -> None:
            raise RuntimeError("later")

    with running_node(Failing, root_data_directory=tmp_path) as node:
        send_and_check(node, make_series(4, seed=1))
        wait_for_cases(node, State.FAILED)
        send_and_check(node, make_series(3, seed=2))
    before = {path: path.read_bytes() for path in images_below(tmp_path)}
    assert {path.parts[-3] for path in before} == {"PHANTOM-1", "PHANTOM-1~2"}
    shutil.rmtree(tmp_path / ".dicomnode")
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        wait_for_cases(node, State.READY)
        assert sorted(case.state.value for case in node.cases()) == ["FAILED", "READY"]
    assert {path: path.read_bytes() for path in images_below(tmp_path)} == before


def test_a_process_that_outlasts_close_ends_in_peace(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            started.set()
            assert go_on.wait(30)
            return super().process(input_data)

    with running_node(Slow, root_data_directory=tmp_path, stop_seconds=0.2) as node:
        send_and_check(node, make_series(4))
        assert started.wait(30)
    # While it runs, the root is not given to another node.
    with (
        pytest.raises(InvalidRootDataDirectory),
        running_node(Echoing, root_data_directory=tmp_path),
    ):
        pass
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "close-later":
            thread.join(30)
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        (case,) = node.cases()
        assert case.state in (State.EXPORTING, State.FAILED)
        assert case.attempts == 0


def test_a_damaged_result_is_never_sent_and_a_retry_makes_all_anew(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, endpoints=[NOBODY]) as node:
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
    (victim,) = (tmp_path / ".dicomnode" / "outbox").glob("*/000002.dcm")
    os.truncate(victim, victim.stat().st_size - 1000)
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        node.retry(1)
        wait_for_cases(node, State.FAILED)
        assert "a retry makes all results again" in node.cases()[0].error
        assert len(store.received) <= 1
        node.retry(1)
        wait_for_cases(node, State.DONE)
        assert len({one.SeriesInstanceUID for one in store.received[-4:]}) == 1


def test_an_image_damaged_between_two_runs_is_not_processed(tmp_path: Path) -> None:
    series = make_series(4)
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        send_and_check(node, series)
    victim = images_below(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:-100] + b"\xff" * 100)
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        wait_for_cases(node, State.RECEIVING)
        send_and_check(node, series)
        wait_for_cases(node, State.DONE)
        assert numpy.array_equal(numpy_grinder(store.received), numpy_grinder(series))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
def test_whatever_process_raises_the_next_case_goes_on(kind: type[BaseException]) -> None:
    class Raising(Echoing):
        def process(self, input_data: dict[str, Any]) -> None:
            if input_data["ct"][0][0].PatientID == "BAD":
                raise kind

    with running_node(Raising) as node:
        send_and_check(node, make_series(4, patient_id="BAD"))
        wait_for_cases(node, State.FAILED)
        send_and_check(node, make_series(4, patient_id="GOOD"))
        wait_for_cases(node, State.DONE)


def test_a_passing_fault_of_the_ledger_does_not_end_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)]) as node,
    ):
        assert node._storage is not None
        faults = iter(range(20))
        real = node._storage.ledger.changes

        def failing() -> int:
            if next(faults, None) is not None:
                raise sqlite3.OperationalError("disk I/O error")
            return real()

        monkeypatch.setattr(node._storage.ledger, "changes", failing)
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.DONE)


def test_an_export_that_cannot_be_recorded_is_not_repeated_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)]) as node,
    ):
        assert node._storage is not None
        full = threading.Event()
        full.set()
        ledger, outbox = node._storage.ledger, node._storage.outbox

        def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if full.is_set():
                    raise OutOfResources("the ledger cannot be written: disk is full")
                return real(*args)

            return call

        monkeypatch.setattr(outbox, "answer", guarded(outbox.answer))
        monkeypatch.setattr(ledger, "fail", guarded(ledger.fail))
        send_and_check(node, make_series(4))
        store.wait_for_images(4)
        assert not node.wait(lambda: len(store.received) > 4 * 8, 3)
        full.clear()
        wait_for_cases(node, State.DONE)


def test_an_endpoint_that_hangs_does_not_hold_up_the_results_of_others(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        running_node(StoringNode) as store,
        running_node(
            Echoing,
            endpoints=[Address("127.0.0.1", silent.getsockname()[1], "SILENT"), address_of(store)],
            root_data_directory=tmp_path,
        ) as node,
    ):
        send_and_check(node, make_series(4, patient_id="A") + make_series(4, patient_id="B"))
        store.wait_for_images(8, seconds=20)
        silent.close()


def test_close_may_be_called_by_process(tmp_path: Path) -> None:
    class OneShot(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            self.close()
            return super().process(input_data)

    with running_node(OneShot, root_data_directory=tmp_path, endpoints=[NOBODY]) as node:
        send_and_check(node, make_series(4))
        for thread in threading.enumerate():
            if thread.name in ("worker-0", "close-later"):
                thread.join(30)
    for thread in threading.enumerate():
        if thread.name == "close-later":
            thread.join(30)
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        (case,) = node.cases()
        # The step that called close() ended in peace: its results are kept.
        assert case.state in (State.EXPORTING, State.FAILED), case


def test_close_by_process_without_a_root_processes_what_is_complete() -> None:
    class OneShot(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            self.close()
            return super().process(input_data)

    with running_node(StoringNode) as store:
        node = OneShot(start=False)
        node.ip, node.port, node.endpoints = "127.0.0.1", 0, [address_of(store)]
        opened = threading.Thread(target=node.open)
        opened.start()
        while node._server is None:
            opened.join(0.01)
        batch = [one for name in "ABC" for one in make_series(4, patient_id=name)]
        send_and_check(node, batch)
        # It closes when the step has ended, and only then does open() return.
        opened.join(30)
        assert not opened.is_alive()
        assert len(store.wait_for_images(12)) == 12


def test_a_result_that_cannot_be_read_now_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], root_data_directory=tmp_path) as node,
    ):
        assert node._storage is not None
        broken = threading.Event()
        broken.set()
        real = node._storage.results.read

        def failing(*args: Any) -> Any:
            if broken.is_set() and len(store.received) == 2:
                raise OSError(24, "Too many open files")
            return real(*args)

        monkeypatch.setattr(node._storage.results, "read", failing)
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
        assert len(list((tmp_path / ".dicomnode" / "outbox").glob("*/*.dcm"))) == 4
        broken.clear()
        node.retry(1)
        wait_for_cases(node, State.DONE)
        assert len(store.received) == 4
        assert len({one.SOPInstanceUID for one in store.received}) == 4


def test_an_endpoint_that_takes_one_association_gets_every_case() -> None:
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)], workers=2) as node,
    ):
        assert store._server is not None
        store._server._ae.maximum_associations = 1
        for name in "ABCDEF":
            send_and_check(node, make_series(4, patient_id=name))
        wait_for_cases(node, State.DONE, 6)


def test_a_passing_fault_while_a_case_is_taken_does_not_strand_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        running_node(StoringNode) as store,
        running_node(Echoing, endpoints=[address_of(store)]) as node,
    ):
        assert node._storage is not None
        faults = iter(range(3))
        real = node._storage.ledger.case

        def failing(case_id: int) -> Any:
            if next(faults, None) is not None:
                raise sqlite3.OperationalError("disk I/O error")
            return real(case_id)

        monkeypatch.setattr(node._storage.ledger, "case", failing)
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.DONE)


def test_text_from_the_network_stays_on_its_line_of_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    forged = "x\n2026/01/01 00:00:00 FAKE INFO forged\x1b[31m"

    class Printing(Echoing):
        def process(self, input_data: dict[str, Any]) -> None:
            raise RuntimeError(forged)

    with running_node(Printing) as node:
        send_and_check(node, make_series(4))
        wait_for_cases(node, State.FAILED)
        node.logger.info("%s", forged)
        assert "\x1b" not in node.cases()[0].error
    said = capsys.readouterr().out
    assert "forged" in said and "\x1b" not in said
    assert not [line for line in said.splitlines() if line.startswith("2026/01/01")]


# L15 (a timer at midnight) and L17, L18 (fetching of earlier studies) are parts that this design
# does not have. L21 (flushed before it is acknowledged) is in test_durability.py.

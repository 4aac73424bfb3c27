"""When a case is ready: quiet time, counts, gaps, open associations, deadlines; with real senders.

The clock of a node is replaced, so that nothing here waits for time to go by.
"""

import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_context
from typer.testing import CliRunner

from dicomnode.cli.main import app
from dicomnode.errors import IncorrectlyConfigured, NoRoom, UnknownCase
from dicomnode.lib.commitment import Commitment
from dicomnode.lib.dimse import Address, ask_commitment, send
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.server.association import AssociationServer
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import Case, Ledger
from dicomnode.storage.waits import Waits
from dicomnode.testing import (
    State,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
    write_series,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
DAY = 24 * 3600.0


class Clock:
    """Seconds that go by when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class AtLeastTwo(AbstractInput):
    required_values = {"Modality": "CT"}

    def validate(self) -> bool:
        return self.images >= 2


class Counting(AbstractPipeline):
    """Remembers how many images it got for each case."""

    ae_title = "NODE"
    input = {"ct": AtLeastTwo}

    def __init__(self, start: bool = True) -> None:
        self.seen: list[int] = []
        super().__init__(start)

    def process(self, input_data: dict[str, Any]) -> None:
        self.seen.append(sum(len(list(one)) for one in input_data.values()))


def look(node: AbstractPipeline) -> None:
    """Look at all cases whose time it is, as the node's own threads do."""
    assert node._runner is not None
    completeness = node._runner._completeness

    def is_over() -> bool:
        completeness.step()
        return not completeness.is_pending()

    assert node.wait(is_over, 20)


def waits(node: AbstractPipeline, case: Case | int) -> str:
    assert node._storage is not None
    return node._storage.waits.of(case if isinstance(case, int) else case.id).reason


def is_told(node: AbstractPipeline, text: str, number: int = 1) -> bool:
    """Wait until a case says that it waits for this."""
    return node.wait(lambda: text in waits(node, number), 20)


def wait_for_ends(node: AbstractPipeline, left: int) -> None:
    """Wait until no more than so many associations are open, and their cases were looked at."""
    server, runner = node._server, node._runner
    assert server is not None and runner is not None

    def is_over() -> bool:
        is_ended = len(server._visits) <= left and not server._working._busy
        return is_ended and not runner._completeness.is_pending()

    end = time.monotonic() + 20
    while not is_over():
        assert time.monotonic() < end
        time.sleep(0.005)


def send_all(node: AbstractPipeline, datasets: Iterable[Dataset]) -> None:
    answers = send(address_of(node), list(datasets))
    assert {answer.status for answer in answers} == {0}


def dcmsend(node: AbstractPipeline, folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        ["/usr/bin/dcmsend", "-aec", node.ae_title, "127.0.0.1", str(node.port)]
        + [str(path) for path in sorted(folder.iterdir())]
    )


def storescu(node: AbstractPipeline, folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        ["/usr/bin/storescu", "-aec", node.ae_title, "127.0.0.1", str(node.port)]
        + [str(path) for path in sorted(folder.iterdir())]
    )


@contextmanager
def sender(node: AbstractPipeline) -> Iterator[Callable[[Dataset], None]]:
    """An association that stays open; gives what sends an image over it."""
    association = AE(ae_title="KEEPER").associate(
        "127.0.0.1", node.port, [build_context(CT, "1.2.840.10008.1.2.1")], ae_title=node.ae_title
    )
    assert association.is_established

    def store(dataset: Dataset) -> None:
        assert association.send_c_store(dataset).Status == 0

    try:
        yield store
    finally:
        association.release()


# Quiet time


def test_a_case_is_not_ready_before_no_image_came_for_quiet_seconds(tmp_path: Path) -> None:
    clock = Clock()
    series = make_series(8)
    with running_node(Counting, quiet_seconds=60.0, _clock=clock) as node:
        for k in range(4):
            folder = tmp_path / str(k)
            write_series(series[2 * k : 2 * k + 2], folder)
            assert dcmsend(node, folder).wait(60) == 0
            assert is_told(node, "no image for 60 s more")
            clock.seconds += 59
            look(node)
            assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 1
        wait_for_cases(node, State.DONE)
        assert node.seen == [8]


def test_four_associations_at_once_give_one_case(tmp_path: Path) -> None:
    clock = Clock()
    series = make_series(16)
    with running_node(Counting, quiet_seconds=60.0, _clock=clock) as node:
        senders = []
        for k in range(4):
            write_series(series[k::4], tmp_path / str(k))
            senders.append((dcmsend, storescu)[k % 2](node, tmp_path / str(k)))
        assert [one.wait(60) for one in senders] == [0] * 4
        assert is_told(node, "no image for 60 s more")
        clock.seconds += 60
        wait_for_cases(node, State.DONE)
        assert node.seen == [16]


def test_a_case_that_many_bring_is_asked_once_and_tells_what_it_waits_for() -> None:
    asked: list[int] = []

    class Asked(AtLeastTwo):
        def validate(self) -> bool:
            asked.append(self.images)
            return super().validate()

    class Many(Counting):
        input = {"ct": Asked}

    series = make_series(9)
    with running_node(Many) as node, ExitStack() as others:
        with sender(node) as last:
            last(series[0])
            for one in series[1:]:
                others.enter_context(sender(node))(one)
            others.close()
            assert is_told(node, "an association that brought images of it is open")
            # Whoever ends one after the last would have it looked at, too.
            wait_for_ends(node, 1)
            assert asked == []
        wait_for_cases(node, State.DONE)
        assert (node.seen, asked) == ([9], [9])


def test_n18_a_sender_that_keeps_its_association_open_does_not_hold_up_the_case() -> None:
    clock = Clock()
    with (
        running_node(Counting, quiet_seconds=60.0, _clock=clock) as node,
        sender(node) as store,
    ):
        for one in make_series(4):
            store(one)
        clock.seconds += 61
        wait_for_cases(node, State.DONE)
        assert node.seen == [4]
        # The images after that are a case of their own.
        for one in make_series(3):
            store(one)
        clock.seconds += 61
        wait_for_cases(node, State.DONE, 2)
        assert node.seen == [4, 3]


def test_quiet_time_goes_on_after_a_restart_and_does_not_count_while_the_node_is_down(
    tmp_path: Path,
) -> None:
    clock = Clock()
    settings = {"quiet_seconds": 60.0, "_clock": clock, "root_data_directory": tmp_path}
    with running_node(Counting, **settings) as node:
        send_all(node, make_series(4))
        assert is_told(node, "no image for 60 s more")
        clock.seconds += 40
    clock.seconds = 5.0  # The machine was started anew, and its clock with it.
    with running_node(Counting, **settings) as node:
        assert is_told(node, "no image for 20 s more")
        clock.seconds += 19
        look(node)
        assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 1
        wait_for_cases(node, State.DONE)
        assert node.seen == [4]


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 30 * DAY, -30 * DAY])
def test_s6_a_change_of_the_time_of_day_makes_nothing_ready_late_or_old(
    jump: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock()
    settings = {
        "quiet_seconds": 60.0,
        "deadline_seconds": 600.0,
        "study_expiration_days": 14,
        "_clock": clock,
        "root_data_directory": tmp_path,
    }
    import time

    real = time.time
    with running_node(Counting, **settings) as node:
        send_all(node, make_series(4, patient_id="A"))
        send_all(node, make_series(1, patient_id="B"))
        assert is_told(node, "no image for 60 s more", 2)
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        look(node)
        assert [case.state for case in node.cases()] == [State.RECEIVING] * 2
    with running_node(Counting, **settings) as node:
        look(node)
        assert [case.state for case in node.cases()] == [State.RECEIVING] * 2
        clock.seconds += 60
        wait_for_cases(node, State.DONE)
        clock.seconds += 540
        wait_for_cases(node, State.FAILED)


# Open associations


def test_a_case_waits_for_the_other_association_that_brings_images_of_it() -> None:
    series = make_series(6)
    with running_node(Counting) as node, sender(node) as store:
        store(series[0])
        send_all(node, series[1:4])
        assert is_told(node, "an association that brought images of it is open")
        assert node.cases()[0].state is State.RECEIVING
        store(series[4])
        store(series[5])
    assert node.seen == [6]


def test_an_association_counts_from_its_first_image_on_while_that_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, third = make_series(3)
    decoding, go_on = threading.Event(), threading.Event()

    def add(self: EagerDecoding, identifier: str, uid: str) -> None:
        if uid == third.SOPInstanceUID:
            decoding.set()
            assert go_on.wait(60)

    monkeypatch.setattr(EagerDecoding, "add", add)
    monkeypatch.setattr(EagerDecoding, "is_wanted", True)
    with running_node(Counting) as node:
        other = threading.Thread(target=send_all, args=(node, [third]))
        other.start()
        assert decoding.wait(30)
        send_all(node, [first, second])
        told = is_told(node, "an association that brought images of it is open")
        go_on.set()
        other.join(30)
        assert told
        wait_for_cases(node, State.DONE)
        assert node.seen == [3]


def test_an_association_of_another_patient_holds_nothing_up() -> None:
    with running_node(Counting) as node, sender(node) as store:
        store(make_series(1, patient_id="OTHER")[0])
        send_all(node, make_series(3))
        wait_for_cases(node, State.DONE)
        assert node.seen == [3]


def test_a_waiting_case_is_not_claimed_while_an_association_brings_more(tmp_path: Path) -> None:
    """It is READY, no worker was free, and then its sender goes on."""
    release, started = threading.Event(), threading.Event()

    class Slow(Counting):
        def process(self, input_data: dict[str, Any]) -> None:
            started.set()
            assert release.wait(60)
            super().process(input_data)

    series = make_series(4, patient_id="B")
    with running_node(Slow) as node:
        send_all(node, make_series(2, patient_id="A"))
        assert started.wait(30)
        send_all(node, series[:2])
        wait_for_cases(node, State.READY)
        with sender(node) as store:
            store(series[2])
            release.set()
            wait_for_cases(node, State.DONE)
            assert is_told(node, "an association that brought images of it is open", 2)
            store(series[3])
        wait_for_cases(node, State.DONE, 2)
        assert node.seen == [2, 4]


# Counts


class Counted(AtLeastTwo):
    expected_images = "NumberOfSeriesRelatedInstances"


def counted(count: int, **options: Any) -> list[Dataset]:
    series = make_series(count, **options)
    for one in series:
        one.NumberOfSeriesRelatedInstances = count
    return series


def test_a_case_waits_for_as_many_images_as_the_headers_tell() -> None:
    series = counted(8)
    with running_node(Counting, input={"ct": Counted}) as node:
        send_all(node, series[:5])
        assert is_told(node, "input ct is not complete: 5 of 8 images of")
        send_all(node, series[5:])
        wait_for_cases(node, State.DONE)
        assert node.seen == [8]


def test_a_number_of_images_and_a_function_tell_the_count_too() -> None:
    class Three(AtLeastTwo):
        expected_images = 3

    class Told(AtLeastTwo):
        required_values = {"Modality": "PT"}

        def expected_images(dataset: Dataset) -> int:
            return int(dataset.NumberOfSlices) * int(dataset.NumberOfTimeSlices)

    ct, pet = make_series(3), make_series(4, modality="PT")
    for one in pet:
        one.NumberOfSlices, one.NumberOfTimeSlices = 2, 2
    with running_node(Counting, input={"ct": Three, "pet": Told}) as node:
        send_all(node, ct[:2] + pet[:3])
        assert is_told(node, "input ct is not complete: 2 of 3 images are here; input pet is not")
        assert "complete: 3 of 4 images of" in waits(node, 1)
        send_all(node, ct[2:] + pet[3:])
        wait_for_cases(node, State.DONE)
        assert node.seen == [7]


def test_where_the_headers_tell_the_count_no_quiet_time_is_needed() -> None:
    clock = Clock()
    with running_node(Counting, input={"ct": Counted}, quiet_seconds=60.0, _clock=clock) as node:
        send_all(node, counted(4, patient_id="A"))
        wait_for_cases(node, State.DONE)
        # Without the attribute it is.
        send_all(node, make_series(4, patient_id="B"))
        assert is_told(node, "no image for 60 s more", 2)
        clock.seconds += 60
        wait_for_cases(node, State.DONE, 2)
        assert node.seen == [4, 4]


def test_a_sender_that_asks_for_commitment_has_sent_all_so_no_quiet_time_is_needed(
    tmp_path: Path,
) -> None:
    clock = Clock()

    def ask(node: AbstractPipeline, series: list[Dataset]) -> int:
        """How many are not kept."""
        classes = {str(one.SOPInstanceUID): str(one.SOPClassUID) for one in series}
        report = ask_commitment(address_of(node), Commitment(generate_uid(), classes))
        assert report is not None
        return len(report.failed)

    with running_node(
        Counting, quiet_seconds=60.0, _clock=clock, root_data_directory=tmp_path
    ) as node:
        series = make_series(4, patient_id="A")
        send_all(node, series)
        assert is_told(node, "no image for 60 s more")
        assert ask(node, series) == 0
        wait_for_cases(node, State.DONE)
        # What it lists and has not sent is still to come.
        series = make_series(4, patient_id="B")
        send_all(node, series[:2])
        assert is_told(node, "no image for 60 s more", 2)
        assert ask(node, series) == 2
        look(node)
        assert node.cases()[1].state is State.RECEIVING
        send_all(node, series[2:])
        wait_for_cases(node, State.DONE, 2)
        assert node.seen == [4, 4]


@pytest.mark.parametrize("wrong", [0, True, 1.5, "PatientName", "NoSuchKeyword", [1]])
def test_what_is_no_count_is_refused(wrong: object) -> None:
    class Wrong(AtLeastTwo):
        expected_images = wrong

    class Node(AbstractPipeline):
        input = {"ct": Wrong}

    with pytest.raises(IncorrectlyConfigured, match="expected_images of Wrong"):
        Node(start=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quiet_seconds": 0}, "quiet_seconds has to be a number greater than zero"),
        ({"deadline_seconds": "60"}, "deadline_seconds has to be"),
        ({"study_expiration_days": float("inf")}, "study_expiration_days has to be"),
        ({"at_deadline": "keep"}, "at_deadline has to be"),
        ({"quiet_seconds": 60, "deadline_seconds": 30}, "no case would ever be ready"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    node = Counting(start=False)
    for name, value in settings.items():
        setattr(node, name, value)
    with pytest.raises(IncorrectlyConfigured, match=message):
        node.open(blocking=False)


# Gaps


class Gapless(AtLeastTwo):
    gapless = True
    image_grinder = numpy_grinder


def test_a_case_waits_for_the_slice_that_is_missing_in_between() -> None:
    series = make_series(8)
    late = series.pop(3)
    with running_node(Counting, input={"ct": Gapless}) as node:
        send_all(node, series)
        assert is_told(node, "input ct has a gap: slices are 2.5 mm apart, but 5 mm between")
        assert "(1 missing)" in waits(node, 1)
        send_all(node, [late])
        wait_for_cases(node, State.DONE)
        assert node.seen == [8]


# The deadline


def test_an_incomplete_case_fails_at_its_deadline_and_still_takes_images() -> None:
    clock = Clock()
    series = make_series(4)

    class Four(AtLeastTwo):
        def validate(self) -> bool:
            return self.images == 4

    with running_node(Counting, input={"ct": Four}, deadline_seconds=600.0, _clock=clock) as node:
        send_all(node, series[:3])
        assert is_told(node, "does not validate")
        clock.seconds += 599
        look(node)
        assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 1
        wait_for_cases(node, State.FAILED)
        (case,) = node.cases()
        assert case.error == (
            "not complete 600 s after its last image (deadline_seconds): input ct does not validate"
        )
        send_all(node, series[3:])
        wait_for_cases(node, State.DONE)
        assert node.seen == [4]


def test_each_image_gives_a_case_its_whole_time_again() -> None:
    clock = Clock()
    with running_node(Counting, deadline_seconds=600.0, quiet_seconds=600.0, _clock=clock) as node:
        for one in make_series(3):
            send_all(node, [one])
            assert is_told(node, "no image for 600 s more")
            clock.seconds += 500
            look(node)
            assert node.cases()[0].state is State.RECEIVING


def test_the_time_before_a_restart_counts_for_the_deadline(tmp_path: Path) -> None:
    clock = Clock()
    settings = {"deadline_seconds": 600.0, "_clock": clock, "root_data_directory": tmp_path}
    with running_node(Counting, **settings) as node:
        send_all(node, make_series(1))
        clock.seconds += 500
    clock.seconds = 0.0
    with running_node(Counting, **settings) as node:
        assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 100
        wait_for_cases(node, State.FAILED)


def test_an_incomplete_case_is_processed_as_it_is_where_that_is_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with running_node(
        Counting, deadline_seconds=600.0, at_deadline="process", _clock=clock
    ) as node:
        send_all(node, make_series(1))
        assert is_told(node, "does not validate")
        clock.seconds += 600
        wait_for_cases(node, State.DONE)
        assert node.seen == [1]
        assert "case 1 is processed as it is, though not complete 600 s after" in caplog.text
        assert "input ct does not validate" in waits(node, 1)


def test_what_cannot_be_ground_as_it_is_fails_and_still_takes_images() -> None:
    clock = Clock()
    series = make_series(8)
    late = series.pop(3)
    with running_node(
        Counting,
        input={"ct": Gapless},
        deadline_seconds=600.0,
        at_deadline="process",
        _clock=clock,
    ) as node:
        send_all(node, series)
        clock.seconds += 600
        wait_for_cases(node, State.FAILED)
        (case,) = node.cases()
        assert "InconsistentSeries" in case.error and not case.sealed
        send_all(node, [late])
        wait_for_cases(node, State.DONE)
        assert node.seen == [8]


# By hand


def test_a_command_beside_a_running_node_completes_a_case(tmp_path: Path) -> None:
    with running_node(Counting, root_data_directory=tmp_path) as node:
        send_all(node, make_series(1))
        assert is_told(node, "does not validate")
        listed = CliRunner().invoke(app, ["cases", "--root", str(tmp_path)])
        assert "input ct does not validate" in listed.stdout
        done = CliRunner().invoke(app, ["cases", "--root", str(tmp_path), "--complete", "1"])
        assert done.exit_code == 0, done.output
        assert "case 1 is processed as it is: the running node takes it up now" in done.stdout
        wait_for_cases(node, State.DONE)
        assert node.seen == [1]
        again = CliRunner().invoke(app, ["cases", "--root", str(tmp_path), "--complete", "1"])
        assert again.exit_code == 1
        assert "case 1 is DONE; only one that waits for images" in again.stderr
        with pytest.raises(UnknownCase):
            node.complete(7)


def test_a_case_completed_by_hand_waits_for_room_and_stays_so() -> None:
    fails = iter([True])

    class Full(AtLeastTwo):
        def get_data(self) -> Any:
            if next(fails, False):
                raise NoRoom("no working directory: full")
            return super().get_data()

    with running_node(Counting, input={"ct": Full}) as node:
        send_all(node, make_series(1))
        assert is_told(node, "does not validate")
        node.complete(1)
        wait_for_cases(node, State.DONE)
        assert node.seen == [1]


def test_a_case_completed_by_hand_is_processed_though_an_association_is_open() -> None:
    with running_node(Counting) as node, sender(node) as store:
        store(make_series(1)[0])
        node.complete(1)
        wait_for_cases(node, State.DONE)
        assert node.seen == [1]


def test_a_sealed_case_that_is_not_complete_can_be_completed_by_hand(tmp_path: Path) -> None:
    with running_node(Counting, root_data_directory=tmp_path) as node:
        send_all(node, make_series(1))
    ledger = Ledger(tmp_path / ".dicomnode" / "ledger.sqlite")
    assert ledger.park(1, "for a test")
    ledger.close()
    with running_node(Counting, root_data_directory=tmp_path) as node:
        node.retry(1)
        assert node.wait(lambda: "takes no images" in node.cases()[0].error, 20)
        node.complete(1)
        wait_for_cases(node, State.DONE)
        assert node.seen == [1]


# Late images


class Failing(Counting):
    """Fails until all eight slices are there."""

    def process(self, input_data: dict[str, Any]) -> None:
        super().process(input_data)
        if self.seen[-1] < 8:
            raise RuntimeError("a slice is missing")


class FourOrEight(AtLeastTwo):
    def validate(self) -> bool:
        return self.images >= 7


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_late_slice_of_a_failed_case_makes_a_revision_with_all_slices(
    on_disk: bool, tmp_path: Path
) -> None:
    series = make_series(8)
    with running_node(
        Failing, input={"ct": FourOrEight}, root_data_directory=tmp_path if on_disk else None
    ) as node:
        send_all(node, series[:7])
        wait_for_cases(node, State.FAILED)
        send_all(node, series[7:])
        # The case that failed is done with, too: all its images were in the revision.
        wait_for_cases(node, State.DONE, 2)
        assert node.seen == [7, 8]
        assert node._storage is not None and node._storage.waits.of(2).revises == 1
    if on_disk:
        assert not list(tmp_path.glob("*/*/*.dcm"))
        listed = CliRunner().invoke(app, ["cases", "--root", str(tmp_path), "--all"])
        assert "revision of case 1" in listed.stdout


def test_a_late_slice_joins_no_running_case_and_makes_a_revision_of_it() -> None:
    release, started = threading.Event(), threading.Event()

    class Slow(Counting):
        def process(self, input_data: dict[str, Any]) -> None:
            super().process(input_data)
            started.set()
            assert release.wait(60)

    series = make_series(8)
    with running_node(Slow, input={"ct": FourOrEight}) as node:
        send_all(node, series[:7])
        assert started.wait(30)
        send_all(node, series[7:])
        wait_for_cases(node, State.READY)
        release.set()
        wait_for_cases(node, State.DONE, 2)
        assert node.seen == [7, 8]


def test_an_image_that_came_after_its_case_was_done_waits_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = make_series(8)
    with running_node(Counting, input={"ct": FourOrEight}, root_data_directory=tmp_path) as node:
        send_all(node, series[:7])
        wait_for_cases(node, State.DONE)
        send_all(node, series[7:])
        assert is_told(node, "does not validate", 2)
        assert "case 2: 1 image came after case 1 was done, and waits" in caplog.text
        listed = CliRunner().invoke(app, ["cases", "--root", str(tmp_path)])
        assert "after case 1 was done" in listed.stdout
        # Another series of that patient is no late image.
        send_all(node, make_series(7))
        wait_for_cases(node, State.DONE, 2)


def test_another_series_of_the_patient_is_no_revision() -> None:
    with running_node(Failing, input={"ct": FourOrEight}) as node:
        send_all(node, make_series(7))
        wait_for_cases(node, State.FAILED)
        send_all(node, make_series(3))
        assert is_told(node, "does not validate", 2)
        assert node._storage is not None and node._storage.waits.of(2).revises == 0
        assert len(node._storage.ledger.instances(2)) == 3


def test_images_that_come_twice_are_no_late_images() -> None:
    series = make_series(7)
    with running_node(Failing, input={"ct": FourOrEight}) as node:
        send_all(node, series)
        wait_for_cases(node, State.FAILED)
        send_all(node, series[:3])
        assert is_told(node, "does not validate", 2)
        assert node.seen == [7]


# Expiry


def test_an_incomplete_case_expires_with_its_files_and_that_is_told_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    settings = {
        "study_expiration_days": 14,
        "_clock": clock,
        "root_data_directory": tmp_path,
        "input": {"ct": FourOrEight},
    }
    with running_node(Failing, **settings) as node:
        send_all(node, make_series(1, patient_id="OLD"))
        send_all(node, make_series(7, patient_id="FAILED"))
        wait_for_cases(node, State.FAILED)
        clock.seconds += 13 * DAY - 60
        look(node)
        assert "is deleted" not in caplog.text
    clock.seconds = 0.0
    with running_node(Failing, **settings) as node:
        assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 61
        assert node.wait(lambda: "case 1 is deleted in 1.0 days" in caplog.text, 20)
        clock.seconds += DAY - 120
        look(node)
        assert node.cases()[0].state is State.RECEIVING
        assert list(tmp_path.glob("OLD/*/*.dcm"))
        clock.seconds += 120
        wait_for_cases(node, State.EXPIRED)
        assert node.wait(lambda: "case 1 is deleted, with its images" in caplog.text, 20)
        assert not list(tmp_path.glob("OLD/*/*.dcm"))
        # What was processed and failed is not deleted.
        assert len(list(tmp_path.glob("FAILED/*/*.dcm"))) == 7
        # The same images are welcome again.
        send_all(node, make_series(1, patient_id="OLD"))
        assert is_told(node, "does not validate", 3)


def test_s6_a_case_that_is_too_old_is_not_deleted_at_the_first_look_after_a_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    settings = {"_clock": clock, "root_data_directory": tmp_path}
    with running_node(Counting, study_expiration_days=1000, **settings) as node:
        send_all(node, make_series(1))
        clock.seconds += 100 * DAY
    with running_node(Counting, study_expiration_days=14, **settings) as node:
        assert node.wait(lambda: "case 1 is deleted in 1.0 days" in caplog.text, 20)
        clock.seconds += DAY - 1
        look(node)
        assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 2
        wait_for_cases(node, State.EXPIRED)


def test_an_image_saves_a_case_that_was_about_to_expire() -> None:
    clock = Clock()
    first, second = make_series(2)
    with running_node(
        Counting, study_expiration_days=10, input={"ct": FourOrEight}, _clock=clock
    ) as node:
        send_all(node, [first])
        clock.seconds += 9.5 * DAY
        look(node)
        send_all(node, [second])
        clock.seconds += 5 * DAY
        look(node)
        assert node.cases()[0].state is State.RECEIVING


def test_a_case_that_cannot_be_deleted_now_is_deleted_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    fails = iter([True])
    expire = Waits.expire

    def failing(self: Waits, case_id: int) -> bool:
        if next(fails, False):
            raise NoRoom("the ledger cannot be written: full")
        return expire(self, case_id)

    monkeypatch.setattr(Waits, "expire", failing)
    with running_node(
        Counting, study_expiration_days=10, input={"ct": FourOrEight}, _clock=clock
    ) as node:
        send_all(node, make_series(1))
        clock.seconds += 9.5 * DAY
        assert node.wait(lambda: "case 1 is deleted in 1.0 days" in caplog.text, 20)
        clock.seconds += 5 * DAY
        assert node.wait(lambda: "case 1 cannot be deleted now" in caplog.text, 20)
        assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 60
        wait_for_cases(node, State.EXPIRED)


def test_an_image_that_comes_as_soon_as_a_node_listens_gives_its_case_its_whole_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    first, second = make_series(2)
    settings = {"_clock": clock, "root_data_directory": tmp_path, "deadline_seconds": 100.0}
    with running_node(Counting, input={"ct": FourOrEight}, **settings) as node:
        send_all(node, [first])
        clock.seconds += 90
    listen = AssociationServer.open

    def listening(self: AssociationServer, ip: str, port: int) -> int:
        found = listen(self, ip, port)
        assert send(Address("127.0.0.1", found, "NODE"), [second])[0].status == 0
        return found

    monkeypatch.setattr(AssociationServer, "open", listening)
    with running_node(Counting, input={"ct": FourOrEight}, **settings) as node:
        clock.seconds += 20
        look(node)
        assert node.cases()[0].state is State.RECEIVING
        clock.seconds += 90
        wait_for_cases(node, State.FAILED)


def test_nothing_expires_by_default() -> None:
    clock = Clock()
    with running_node(Counting, _clock=clock) as node:
        send_all(node, make_series(1))
        clock.seconds += 10_000 * DAY
        look(node)
        assert node.cases()[0].state is State.RECEIVING


# Twins


def test_c6_the_same_images_over_two_associations_at_once_are_one_case(tmp_path: Path) -> None:
    series = make_series(8)
    with running_node(Counting, root_data_directory=tmp_path) as node:
        with sender(node) as one, sender(node) as other:
            for dataset in series:
                one(dataset)
                other(dataset)
        wait_for_cases(node, State.DONE)
        assert node.seen == [8]
        assert len(node.cases()) == 1


def test_c6_real_senders_of_the_same_images_at_once_make_one_case(tmp_path: Path) -> None:
    clock = Clock()
    write_series(make_series(8), tmp_path / "sent")
    with running_node(
        Counting, root_data_directory=tmp_path / "root", quiet_seconds=60.0, _clock=clock
    ) as node:
        senders = [dcmsend(node, tmp_path / "sent"), storescu(node, tmp_path / "sent")]
        assert [one.wait(60) for one in senders] == [0, 0]
        assert is_told(node, "no image for 60 s more")
        clock.seconds += 60
        wait_for_cases(node, State.DONE)
        assert node.seen == [8]
        assert len(node.cases()) == 1


def test_c8_one_uid_under_two_patients_is_told_and_is_not_two_jobs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    series = make_series(4, patient_id="ANNA")
    with running_node(Counting) as node:
        send_all(node, series)
        wait_for_cases(node, State.DONE)
        for one in series:
            one.PatientID = "BERTA"
        send_all(node, series)
        assert is_told(node, "came under another identifier before", 2)
        assert "one of the two is of another patient than it says" in caplog.text
        assert node.seen == [4]
        assert node.cases()[1].state is State.RECEIVING
        node.complete(2)
        wait_for_cases(node, State.DONE, 2)


def test_c8_it_is_known_after_a_restart_where_the_first_is_kept(tmp_path: Path) -> None:
    series = make_series(1, patient_id="ANNA")
    with running_node(Counting, root_data_directory=tmp_path) as node:
        send_all(node, series)
    series[0].PatientID = "BERTA"
    with running_node(Counting, root_data_directory=tmp_path) as node:
        send_all(node, series)
        assert is_told(node, "came under another identifier before", 2)


def test_a_filter_that_hangs_holds_up_its_case_for_a_while_only() -> None:
    hang = threading.Event()

    class Hanging(Counting):
        def filter(self, dataset: Dataset) -> bool:
            if dataset.InstanceNumber == 4:
                hang.wait(60)
            return True

    limits = Limits(stall_seconds=1.0)
    with running_node(Hanging, quiet_seconds=0.3, limits=limits) as node:
        sender = threading.Thread(target=send, args=(address_of(node), make_series(4)), daemon=True)
        sender.start()
        try:
            wait_for_cases(node, State.DONE)
            assert node.seen == [3]
        finally:
            hang.set()
            sender.join(30)

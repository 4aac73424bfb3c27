"""Disks that are full, out of file entries, read-only, or out of open files (S3, S5)."""

import os
import resource
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from benchmarks.timing import cpu_seconds
from pydicom.dataset import Dataset
from tests.e2e.programs import Command, pipeline_file

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import Address, Response, echo, send
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import (
    State,
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
)

MIB = 1 << 20


class Disk:
    """A small file system, which others fill and empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Leave only so many bytes free; none at all where there are none."""
        with (self.path / "filler").open("ab", buffering=0) as file, suppress(OSError):
            file.write(bytes(max(0, self.free - leave)))
            while not leave:
                file.write(b"\0")

    def empty(self) -> None:
        """Give that room back."""
        (self.path / "filler").unlink(missing_ok=True)


def _as_root(*command: str) -> None:
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    subprocess.run([*prefix, *command], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    """Makes tmpfs of a size; skipped visibly where nobody may mount."""
    made: list[Path] = []

    def make(mib: int, options: str = "") -> Disk:
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        try:
            owner = f"uid={os.getuid()},gid={os.getgid()},mode=700"
            options = f"size={mib}m,{owner}{options and ','}{options}"
            _as_root("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path))
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no right to mount a small disk (root, or sudo without a password)")
        made.append(path)
        return Disk(path)

    yield make
    for path in made:
        _as_root("umount", "-l", str(path))


class Many(AbstractInput):
    """Complete with as many images as the test sends."""

    wanted = 4
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= self.wanted


class Echoing(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": Many}
    export_retry_seconds = 0.2

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array, images)


def counting(number: int) -> type[Echoing]:
    """A node that waits for so many images."""
    return type("Node", (Echoing,), {"input": {"ct": type("Some", (Many,), {"wanted": number})}})


def statuses(answers: list[Response]) -> list[int]:
    return [one.status for one in answers]


@pytest.mark.parametrize("watermark", [3 * MIB, 0])
def test_s3_images_are_refused_while_the_disk_is_full_and_taken_again(
    watermark: int, small_disk: Callable[..., Disk]
) -> None:
    disk = small_disk(10)
    series = make_series(36, 128, 128)
    answers: list[Response] = []
    lowest = [disk.free]

    def fill(response: Response) -> None:
        answers.append(response)
        lowest[0] = min(lowest[0], disk.free)
        if len(answers) == 8:
            disk.fill(leave=watermark + 200_000 if watermark else 0)
        if len(answers) == 28:
            disk.empty()

    root = disk.path / "root"
    with (
        running_node(StoringNode) as store,
        running_node(
            counting(36),
            root_data_directory=root,
            limits=Limits(free_bytes=watermark),
            endpoints=[address_of(store)],
        ) as node,
    ):
        # All over one association, which survives.
        send(address_of(node), series, on_response=fill)
        found = statuses(answers)
        assert found[:8] == [0x0000] * 8 and found[28:] == [0x0000] * 8
        assert found[20:28] == [0xA700] * 8 and set(found) == {0x0000, 0xA700}
        # The watermark keeps room for the ledger and for results.
        assert not watermark or lowest[0] > watermark - MIB
        stored = {one.sop_instance_uid for one in answers if one.status == 0x0000}
        assert {one.SOPInstanceUID for one in load(root / "PHANTOM-1")} == stored
        left = [one for one in series if one.SOPInstanceUID not in stored]
        assert statuses(send(address_of(node), left)) == [0x0000] * len(left)
        wait_for_cases(node, State.DONE)
        assert len(store.wait_for_images(36)) == 36
    assert not list((root / ".dicomnode" / "incoming").iterdir())


@pytest.mark.parametrize("rows", [16, 1600])
def test_s3_on_a_full_disk_only_what_would_be_new_is_refused_for_it(
    rows: int, tmp_path: Path
) -> None:
    class Filtering(counting(9)):  # type: ignore[misc]
        def filter(self, dataset: Dataset) -> bool:
            return bool(dataset.InstanceNumber != 3)

    first, second, third = make_series(3, rows, rows)
    other = make_series(1, rows, rows, seed=5)[0]
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
    with running_node(Filtering, root_data_directory=tmp_path) as node:
        assert statuses(send(address_of(node), [first])) == [0x0000]
    full = Limits(free_bytes=1 << 60)
    with running_node(Filtering, root_data_directory=tmp_path, limits=full) as node:
        found = statuses(send(address_of(node), [first, other, second, third]))
        # A large one has no file, and cannot be looked at.
        assert found == ([0x0000, 0x0111, 0xA700, 0xB006] if rows == 16 else [0xA700] * 4)
    with running_node(Filtering, root_data_directory=tmp_path) as node:
        found = statuses(send(address_of(node), [first, other, second, third]))
        assert found == [0x0000, 0x0111, 0x0000, 0xB006]


def test_s3_results_wait_for_room_and_are_kept_without_help(
    small_disk: Callable[..., Disk], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(10)
    with (
        running_node(StoringNode) as store,
        running_node(
            counting(4),
            root_data_directory=disk.path / "root",
            limits=Limits(free_bytes=0),
            endpoints=[address_of(store)],
        ) as node,
    ):
        series = make_series(4, 256, 256)
        send(address_of(node), series[:3])
        disk.fill(leave=300_000)
        # Room for an image, and none for four results.
        assert statuses(send(address_of(node), series[3:])) == [0x0000]
        assert node.wait(lambda: "its results are not kept" in _said(capfd), 30)
        assert [case.state for case in node.cases()] != [State.FAILED]
        disk.fill()
        # Now the ledger cannot be written either.
        assert statuses(send(address_of(node), make_series(1, patient_id="OTHER"))) == [0xA700]
        disk.empty()
        wait_for_cases(node, State.DONE)
        assert len(store.wait_for_images(4)) == 4
        assert node.cases()[0].attempts <= 1


def test_s3_a_case_that_waits_for_room_is_not_processed_again_before_there_is_some(
    small_disk: Callable[..., Disk],
) -> None:
    processed: list[int] = []

    class Counting(Echoing):
        input = {"ct": type("Some", (Many,), {"wanted": 2})}
        health_port = 0
        export_give_up_seconds = 0
        endpoints = [Address("127.0.0.1", 9, "NOBODY")]

        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            processed.append(1)
            return super().process(input_data)

    disk = small_disk(10)
    with running_node(
        Counting, root_data_directory=disk.path / "root", limits=Limits(free_bytes=0)
    ) as node:
        series = make_series(2, 512, 512)
        send(address_of(node), series[:1])
        disk.fill(leave=700_000)
        assert statuses(send(address_of(node), series[1:])) == [0x0000]
        assert node.wait(lambda: _gauge(node, "dicomnode_cases_without_room") == 1, 30)
        # Time for several more attempts, which are not made.
        assert not node.wait(lambda: len(processed) > 1, 4)
        (case,) = node.cases()
        assert case.state is State.READY and "when there is room" in case.error
        assert case.attempts == 0
        disk.empty()
        # Nobody takes the results, so that they are given up.
        wait_for_cases(node, State.FAILED)
        assert "NOBODY" in node.cases()[0].error and len(processed) == 2
        assert _gauge(node, "dicomnode_cases_without_room") == 0
        assert _gauge(node, 'dicomnode_dead_letters{endpoint="NOBODY@127.0.0.1:9"}') == 1
        node.retry(1)
        wait_for_cases(node, State.FAILED)


def _gauge(node: AbstractPipeline, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{node.health_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return next(float(one.rpartition(" ")[2]) for one in lines if one.rpartition(" ")[0] == name)


def test_s3_results_that_no_disk_can_hold_fail_their_case(small_disk: Callable[..., Disk]) -> None:
    class Huge(Echoing):
        input = {"ct": type("Some", (Many,), {"wanted": 2})}

        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            images, array = input_data["ct"]
            for _ in range(20 if images[0].PatientID == "HUGE" else 1):
                yield from derive_series(array, images)

    disk = small_disk(8)
    with (
        running_node(StoringNode) as store,
        running_node(
            Huge,
            root_data_directory=disk.path / "root",
            limits=Limits(free_bytes=0),
            endpoints=[address_of(store)],
        ) as node,
    ):
        send(address_of(node), make_series(2, 512, 512, patient_id="HUGE"))
        wait_for_cases(node, State.FAILED)
        assert "the whole disk of root_data_directory has 8388608" in node.cases()[0].error
        send(address_of(node), make_series(2, 512, 512, patient_id="OTHER"))
        wait_for_cases(node, State.DONE)
        # The images are kept, and no half of the results.
        assert len(list((disk.path / "root" / "HUGE").glob("*/*.dcm"))) == 2
        outbox = disk.path / "root" / ".dicomnode" / "outbox"
        assert node.wait(lambda: not list(outbox.glob("*/*.dcm")), 20)


_all_said: list[str] = []


def _said(capfd: pytest.CaptureFixture[str]) -> str:
    _all_said.extend(capfd.readouterr())
    return "".join(_all_said)


NODE = """
from dicomnode.server.limits import Limits

class Node(Base):
    {settings}
    endpoints = [Address("127.0.0.1", {port}, "STORE")]
    export_retry_seconds = 0.2
    limits = Limits(free_bytes=1 << 20)
    def process(self, input_data):
        return derive_series(__import__("numpy").zeros((2, 64, 64), "int16"), input_data["ct"])
"""


def test_s3_a_node_starts_on_a_full_disk_sends_what_it_has_and_takes_images_again(
    small_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    disk = small_disk(8)
    root = disk.path / "root"
    settings = f"root_data_directory = {str(root)!r}"
    file = pipeline_file(tmp_path, NODE.format(port=1, settings=settings))
    with Command("run", file) as node:
        address = node.address("NODE")
        send(address, make_series(2, 64, 64, patient_id="WAITS"))
        send(address, make_series(1, 64, 64, patient_id="HALF"))
        node.until("cannot be reached")
        # Killed, it leaves all as it is.
    disk.fill()
    assert disk.free == 0
    with running_node(StoringNode) as store:
        file = pipeline_file(tmp_path, NODE.format(port=store.port, settings=settings))
        with Command("run", file) as node:
            address = node.address("NODE")
            node.until("the disk of root_data_directory is full")
            # It takes nothing, and says why; but what it has goes out.
            answers = send(address, make_series(2, 64, 64, patient_id="LATE"))
            assert statuses(answers) == [0xA700] * 2
            node.until("case 1 is done")
            assert len(store.wait_for_images(2)) == 2
            disk.empty()
            assert statuses(send(address, make_series(2, 64, 64, patient_id="LATE"))) == [0, 0]
            node.until(r"case \d+ is done")
            node.until(r"case 3 is done")
            node.process.terminate()
            assert "Traceback" not in node.ended()
        # The second start on a full disk is like the first.
        disk.fill()
        with Command("run", file) as node:
            node.until("the disk of root_data_directory is full")
            echo(node.address("NODE"))


def test_s3_a_log_on_a_full_disk_disturbs_nobody(
    small_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    disk = small_disk(1)
    with (
        running_node(StoringNode) as store,
        running_node(
            counting(4),
            root_data_directory=tmp_path / "root",
            log_path=disk.path / "log",
            endpoints=[address_of(store)],
        ) as node,
    ):
        disk.fill()
        assert statuses(send(address_of(node), make_series(4))) == [0x0000] * 4
        wait_for_cases(node, State.DONE)
        disk.empty()
        assert statuses(send(address_of(node), make_series(4, patient_id="B"))) == [0x0000] * 4
        wait_for_cases(node, State.DONE, 2)
    assert "case 2 is done" in (disk.path / "log").read_text()


# An association needs three open files, an image that is stored one or two more.
@pytest.mark.parametrize(
    ("trouble", "extra"), [("inodes", 0), ("open files", 3), ("open files", 1)]
)
def test_s5_what_cannot_be_written_is_refused_until_it_can(
    trouble: str, extra: int, small_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    disk = small_disk(8, "nr_inodes=40")
    root = disk.path / "root"
    settings = f"root_data_directory = {str(root)!r}; workers = 0"
    file = pipeline_file(tmp_path, NODE.format(port=1, settings=settings).replace("1 << 20", "0"))
    with Command("run", file) as node:
        address = node.address("NODE")
        used = _open_files(node)
        assert statuses(send(address, make_series(1, patient_id="BEFORE"))) == [0]
        while trouble == "open files" and _open_files(node) > used:
            node.process.poll()
        limits = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
        if trouble == "inodes":
            fillers = _fill_inodes(disk.path)
        else:
            resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (used + extra, limits[1]))
        for _ in range(3):
            assert 0x0000 not in _answers(address, make_series(2, patient_id="MEANWHILE"))
        if trouble == "inodes":
            for path in fillers:
                path.unlink()
        else:
            resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, limits)
        for name in ("MEANWHILE", "AFTER"):
            assert statuses(send(address, make_series(2, patient_id=name))) == [0, 0]
        assert len(list(root.glob("*/ct/*.dcm"))) == 5


def _open_files(node: Command) -> int:
    return len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))


def _fill_inodes(folder: Path) -> list[Path]:
    made = []
    with suppress(OSError):
        for k in range(1000):
            path = folder / f"inode{k}"
            path.touch()
            made.append(path)
    return made


def _answers(address: Address, series: list[Dataset]) -> list[int]:
    """Also where there is no association to be had."""
    answers: list[Response] = []
    with suppress(CouldNotCompleteDIMSEMessage):
        send(address, series, on_response=answers.append)
    return statuses(answers)


def test_s5_without_open_files_a_node_waits_in_peace(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, NODE.format(port=1, settings=""))
    with Command("run", file) as node:
        address = node.address("NODE")
        limits = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (_open_files(node), limits[1]))
        with socket.create_connection((address.ip, address.port)):
            before = cpu_seconds(node.process.pid)
            with suppress(subprocess.TimeoutExpired):
                node.process.wait(2)
            assert cpu_seconds(node.process.pid) - before < 1.0
            resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, limits)
            echo(address)

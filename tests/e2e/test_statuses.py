"""What a sender is told: each status of the contract, with real associations and hostile bytes."""

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE

from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import echo, send
from dicomnode.server.completeness import Completeness
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.disk import Disk
from dicomnode.storage.instances import KEPT_BESIDES
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


class Never(AbstractInput):
    required_values = {"Modality": "CT"}

    def validate(self) -> bool:
        return False


class Node(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": Never}


def dataset_bytes(dataset: Dataset) -> bytes:
    part10 = encode(dataset)[0]
    return part10[144 + int.from_bytes(part10[140:144], "little") :]


class RawSender:
    """Sends any bytes as a C-STORE, whatever they are."""

    def __init__(self, node: AbstractPipeline, syntax: str = EXPLICIT) -> None:
        ae = AE(ae_title="RAW")
        ae.dimse_timeout = 20
        self.association: Association = ae.associate(
            "127.0.0.1", node.port, [build_context(CT, syntax)], ae_title=node.ae_title
        )
        assert self.association.is_established

    def store(self, data: bytes, uid: str = "1.2.3", sop_class: str = CT) -> Dataset:
        request = C_STORE()
        request.MessageID = 1
        request.AffectedSOPClassUID = sop_class
        request.AffectedSOPInstanceUID = uid
        request.Priority = 2
        request.DataSet = BytesIO(data)
        self.association._reactor_checkpoint.clear()
        self.association.dimse.send_msg(request, 1)
        _, answer = self.association.dimse.get_msg(block=True)
        self.association._reactor_checkpoint.set()
        assert answer is not None
        result = Dataset()
        result.Status = answer.Status
        result.ErrorComment = answer.ErrorComment or ""
        return result

    def __enter__(self) -> "RawSender":
        take = self.association.dimse.get_msg
        import threading

        self.association.dimse.get_msg = lambda block=False: (
            (None, None) if threading.current_thread() is self.association else take(block)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.association.abort()


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node(Node) as one:
        yield one
        echo(address_of(one))


def test_stored_is_0000(node: Node) -> None:
    assert send(address_of(node), make_series(1))[0].status == 0x0000


def test_the_same_bytes_again_are_stored_once(node: Node) -> None:
    series = make_series(2)
    for _ in range(3):
        assert [one.status for one in send(address_of(node), series)] == [0, 0]
    assert node._storage is not None
    assert node._storage.ledger.counts(1) == {"ct": (2, 0)}


def test_c7_the_same_uid_with_other_content_is_refused_and_the_first_is_kept(node: Node) -> None:
    (image,) = make_series(1)
    send(address_of(node), [image])
    image.PixelData = bytes(len(image.PixelData))
    (answer,) = send(address_of(node), [image])
    assert answer.status == 0x0111
    with RawSender(node) as sender:
        found = sender.store(dataset_bytes(image), image.SOPInstanceUID)
        assert found.ErrorComment == "same SOPInstanceUID, other content"


@pytest.mark.parametrize("data", [b"x", b"garbage " * 100, b"\x00" * 64, b"\xff" * 4096])
def test_c3_data_that_is_no_dataset_is_C000(node: Node, data: bytes) -> None:
    with RawSender(node) as sender:
        answer = sender.store(data)
        assert answer.Status in (0xC000, 0xA900)
        assert 0 < len(answer.ErrorComment) <= 64


def test_c11_a_truncated_dataset_is_C000(node: Node) -> None:
    (image,) = make_series(1)
    data = dataset_bytes(image)
    with RawSender(node) as sender:
        for length in (len(data) - 1, len(data) - 1000, 300, 9):
            assert sender.store(data[:length], image.SOPInstanceUID).Status == 0xC000


def test_c9_c11_lying_lengths_and_depth_bombs_are_C000(node: Node) -> None:
    (image,) = make_series(1)
    data = dataset_bytes(image)
    bomb = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 20000
    lying = b"\x08\x00\x05\x00CS\x08\x00ISO_IR 1" + b"\x09\x00\x10\x00OB\x00\x00\xf0\xff\xff\xff1"
    with RawSender(node) as sender:
        for hostile in (bomb, lying, data[:200] + bomb):
            assert sender.store(hostile, image.SOPInstanceUID).Status == 0xC000


def test_n15_request_dataset_and_context_that_differ_are_refused(node: Node) -> None:
    (image,) = make_series(1)
    data = dataset_bytes(image)
    with RawSender(node) as sender:
        assert sender.store(data, "1.2.3.4").Status == 0xA900
        other = sender.store(data, image.SOPInstanceUID, "1.2.840.10008.5.1.4.1.1.4")
        assert other.Status == 0x0122


@pytest.mark.parametrize("uid", ["../../x", "/etc/passwd", "1.2.a", "x" * 64])
def test_c1_an_instance_uid_that_is_none_is_refused(node: Node, uid: str) -> None:
    with RawSender(node) as sender:
        try:
            answer = sender.store(b"x", uid)
        except (ValueError, AssertionError):
            return  # pynetdicom refuses to send it, or the node hung up
        assert answer.Status in (0x0117, 0xC000)


def test_c4_no_identifier_is_B007(node: Node) -> None:
    (image,) = make_series(1)
    image.PatientID = None
    assert send(address_of(node), [image])[0].status == 0xB007
    image.PatientID = "   "
    assert send(address_of(node), [image])[0].status == 0xB007


def test_another_identifier_tag_is_used() -> None:
    series = make_series(2)
    with running_node(Node, patient_identifier_tag="StudyInstanceUID") as one:
        send(address_of(one), series)
        assert [case.identifier for case in one.cases()] == [series[0].StudyInstanceUID]


def test_c5_refused_by_every_input_is_B006_and_the_log_says_why(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    image = make_series(1, modality="MR")[0]
    with caplog.at_level(logging.INFO, "dicomnode"):
        assert send(address_of(node), [image])[0].status == 0xB006
    assert (
        f"{image.SOPInstanceUID}: input 'ct' does not take it: "
        "(0008,0060) Modality is 'MR', it has to be 'CT'"
    ) in caplog.text


def test_a_filter_that_fails_is_no_success(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Node):
        def filter(self, dataset: Dataset) -> bool:
            raise KeyError("oops")

    with running_node(Failing) as one, caplog.at_level(logging.INFO, "dicomnode"):
        assert send(address_of(one), make_series(1))[0].status == 0xC000
    assert "oops" in caplog.text


def test_the_memory_limit_is_A700_and_the_rest_goes_on() -> None:
    series = make_series(8)
    size = len(encode(series[0])[0])

    class Three(Never):
        def validate(self) -> bool:
            return self.images >= 3

    class Small(Node):
        input = {"ct": Three}
        memory_limit = 3 * (size + KEPT_BESIDES) + size // 2

        def process(self, input_data: dict[str, Any]) -> None:
            list(input_data["ct"])

    with running_node(Small) as one:
        answers = send(address_of(one), series[:5])
        assert [answer.status for answer in answers] == [0, 0, 0, 0xA700, 0xA700]
        wait_for_cases(one, State.DONE)
        # What is done with is let go.
        assert one.wait(lambda: not _used(one), 10)
        assert [a.status for a in send(address_of(one), series[3:5])] == [0, 0]


def _used(node: AbstractPipeline) -> int:
    assert node._storage is not None
    return node._storage._instances._used  # type: ignore[attr-defined]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    command = [mount, "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_A700_nothing_is_damaged_and_space_heals_it(small_disk: Path) -> None:
    series = make_series(40, 200, 200)
    with running_node(Node, root_data_directory=small_disk / "root") as one:
        answers = send(address_of(one), series)
        statuses = [answer.status for answer in answers]
        kept = statuses.count(0)
        assert 5 < kept < 40
        assert set(statuses) == {0, 0xA700}
        files = list((small_disk / "root").glob("*/ct/*.dcm"))
        assert len(files) == kept
        assert all(path.stat().st_size > 80_000 for path in files)
        assert not list((small_disk / "root" / ".dicomnode" / "incoming").iterdir())
        subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
        missing = [one for one, status in zip(series, statuses, strict=True) if status]
        assert {answer.status for answer in send(address_of(one), missing)} == {0}
        assert one._storage is not None
        assert one._storage.ledger.counts(1) == {"ct": (40, 0)}


def test_results_that_find_no_room_wait_for_it_and_the_images_are_kept(small_disk: Path) -> None:
    class Three(Never):
        def validate(self) -> bool:
            return self.images >= 3

    class Large(Node):
        input = {"ct": Three}

        def process(self, input_data: dict[str, Any]) -> Any:
            # The disk could hold them, had it nothing else.
            return make_series(3, 560, 560)

    with running_node(Large, root_data_directory=small_disk / "root") as one:
        send(address_of(one), make_series(3))
        assert one.wait(lambda: "results are not kept" in one.cases()[0].error, 30)
        assert one.cases()[0].state is not State.FAILED
        assert len(list((small_disk / "root").glob("*/ct/*.dcm"))) == 3
        assert not list((small_disk / "root" / ".dicomnode" / "outbox").glob("*/*"))


def test_titles_are_checked() -> None:
    from dicomnode.errors import CouldNotCompleteDIMSEMessage
    from dicomnode.lib.dimse import Address

    with running_node(Node, require_calling_aet=["FRIEND"]) as one:
        echo(address_of(one), "FRIEND")
        with pytest.raises(CouldNotCompleteDIMSEMessage):
            echo(address_of(one), "FOE")
        with pytest.raises(CouldNotCompleteDIMSEMessage):
            echo(Address("127.0.0.1", one.port, "OTHER"), "FRIEND")
    with running_node(Node, require_called_aet=False) as one:
        echo(Address("127.0.0.1", one.port, "OTHER"))


def test_no_name_and_no_birth_date_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    series = make_series(3) + make_series(2, modality="MR")
    for one in series:
        one.PatientName = "Secret^Person"
        one.PatientBirthDate = "19230405"
    with running_node(Node, log_level=logging.DEBUG, input={"ct": Never}) as node:
        send(address_of(node), series)
        send(address_of(node), series)
    said = capsys.readouterr()
    assert "stored in case 1" in said.out
    for text in (said.out, said.err):
        assert "Secret" not in text and "19230405" not in text


def test_s3_a_large_image_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room when it begins, and less than has to stay free while it arrives."""
    free = iter([10 << 30, 10 << 30])
    monkeypatch.setattr(Disk, "free_bytes", lambda _: next(free, 0))
    large = make_series(1, 4600, 4600)[0]
    with running_node(Node, root_data_directory=tmp_path) as one:
        address = address_of(one)
        assert send(address, [large])[0].status == 0xA700
        monkeypatch.undo()
        assert [answer.status for answer in send(address, [large, *make_series(2)])] == [0, 0, 0]
        kept = max(path.stat().st_size for path in tmp_path.rglob("*.dcm"))
        assert kept > 4600 * 4600 * 2
    assert not list((tmp_path / ".dicomnode" / "incoming").iterdir())


def test_an_association_has_a_number_of_images_and_bytes() -> None:
    series = make_series(4)
    size = len(dataset_bytes(series[0]))
    for limits in (Limits(instances=2), Limits(association_bytes=2 * size + 100)):
        with running_node(Node, limits=limits) as one:
            address = address_of(one)
            assert [a.status for a in send(address, series)] == [0, 0, 0xA700, 0xA700]
            assert [a.status for a in send(address, series[2:])] == [0, 0]


@pytest.mark.parametrize("has_root", [False, True])
def test_an_image_that_is_stored_is_answered_so_whatever_fails_then(
    has_root: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Completeness, "arrived", fails)
    root = tmp_path if has_root else None
    with running_node(Node, root_data_directory=root, log_level="INFO") as node:
        series = make_series(2)
        assert [one.status for one in send(address_of(node), series)] == [0, 0]
        assert [total for total, _ in node._storage.ledger.counts(1).values()] == [2]  # type: ignore[union-attr]
        assert node.wait(lambda: "closed: 2 stored, 0 refused" in caplog.text, 10)
    assert f"{series[0].SOPInstanceUID} is stored, but the node failed" in caplog.text

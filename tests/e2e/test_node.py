"""The main job: a user's class receives, gets its data, and its results arrive."""

import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import Address, echo, send
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder, volume_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import (
    State,
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
)


class Eight(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= 8


class PlusOne(AbstractPipeline):
    ae_title = "PLUSONE"
    input = {"ct": Eight}

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array + 1, images)


class Recorder(AbstractPipeline):
    """Keeps what process() got."""

    ae_title = "RECORDER"

    def __init__(self, start: bool = True) -> None:
        self.calls: list[dict[str, Any]] = []
        super().__init__(start)

    def process(self, input_data: dict[str, Any]) -> None:
        self.calls.append(input_data)


def recorder(**inputs: type[AbstractInput]) -> type[Recorder]:
    return type("MyRecorder", (Recorder,), {"input": inputs})


def test_results_arrive_at_every_endpoint(tmp_path: Path) -> None:
    series = make_series(8)
    with (
        running_node(StoringNode) as first,
        running_node(StoringNode) as second,
        running_node(PlusOne, endpoints=[address_of(first), address_of(second)]) as node,
    ):
        assert all(one.status == 0 for one in send(address_of(node), series))
        wait_for_cases(node, State.DONE)
        for store in (first, second):
            arrived = store.wait_for_images(8)
            expected = numpy_grinder(series) + 1
            assert numpy.array_equal(numpy_grinder(arrived), expected)
            assert {one.StudyInstanceUID for one in arrived} == {series[0].StudyInstanceUID}
            assert not {one.SOPInstanceUID for one in arrived} & {
                one.SOPInstanceUID for one in series
            }


def test_real_ct_goes_through_dcmtk_and_back_voxel_by_voxel(
    ct_folder: Path,
    storescp: tuple[Address, Path],
    peer: Callable[[str], str],
    tmp_path: Path,
) -> None:
    class All(Eight):
        def validate(self) -> bool:
            return self.images >= 140

    class Node(PlusOne):
        input = {"ct": All}

    address, folder = storescp
    files = sorted(path for path in ct_folder.iterdir() if path.name != "DIRFILE")
    assert len(files) == 140
    with running_node(Node, endpoints=[address], root_data_directory=tmp_path / "root") as node:
        sent = subprocess.run(
            [peer("storescu"), "-aec", "PLUSONE", "127.0.0.1", str(node.port), *map(str, files)],
            check=False,
            env={"TCP_NODELAY": "1"},
        )
        assert sent.returncode == 0
        wait_for_cases(node, State.DONE, seconds=60)
    assert not [path for path in (tmp_path / "root").iterdir() if path.name[0] != "."]
    source = volume_grinder(load(files))
    arrived = [dcmread(path) for path in folder.iterdir()]
    assert len(arrived) == 140
    result = volume_grinder(arrived)
    assert numpy.array_equal(result.array, source.array + 1)
    assert numpy.array_equal(result.affine, source.affine)
    by_position = {str(one.ImagePositionPatient): one for one in map(dcmread, files)}
    for one in arrived:
        origin = by_position[str(one.ImagePositionPatient)]
        for keyword in (
            "ImageOrientationPatient",
            "PixelSpacing",
            "FrameOfReferenceUID",
            "SliceThickness",
            "StudyInstanceUID",
            "Rows",
            "Columns",
        ):
            assert one[keyword].value == origin[keyword].value, keyword


@pytest.mark.parametrize("program", ["storescu", "dcmsend"])
def test_dcmtk_senders_are_understood(
    program: str, peer: Callable[[str], str], tmp_path: Path
) -> None:
    from dicomnode.testing import write_series

    files = write_series(make_series(8), tmp_path / "series")
    with running_node(recorder(ct=Eight)) as node:
        subprocess.run(
            [peer(program), "-aec", "RECORDER", "127.0.0.1", str(node.port), *map(str, files)],
            check=True,
        )
        wait_for_cases(node, State.DONE)
        assert node.calls[0]["ct"][1].shape == (8, 32, 40)


def test_echo_is_answered(peer: Callable[[str], str]) -> None:
    with running_node(recorder(ct=Eight)) as node:
        echo(address_of(node))
        subprocess.run(
            [peer("echoscu"), "-aec", "RECORDER", "127.0.0.1", str(node.port)], check=True
        )


def test_an_image_goes_to_each_input_that_takes_it() -> None:
    class Ct(AbstractInput):
        required_values = {"Modality": "CT"}

        def validate(self) -> bool:
            return self.images == 4

    class Mr(AbstractInput):
        required_values = {0x00080060: ["MR", "PT"]}

        def validate(self) -> bool:
            return self.images == 3

    class Any_(AbstractInput):
        image_grinder = staticmethod(list_grinder)

        def validate(self) -> bool:
            return self.images == 7

    series = make_series(4) + make_series(3, modality="MR")
    with running_node(recorder(ct=Ct, mr=Mr, both=Any_)) as node:
        send(address_of(node), series)
        wait_for_cases(node, State.DONE)
        (data,) = node.calls
        assert len(list(data["ct"])) == 4
        assert len(list(data["mr"])) == 3
        assert len(data["both"]) == 7


def test_patients_of_one_association_are_separate_cases() -> None:
    with running_node(recorder(ct=Eight)) as node:
        send(
            address_of(node),
            make_series(8, patient_id="A")
            + make_series(5, patient_id="B")
            + make_series(8, patient_id="C"),
        )
        wait_for_cases(node, State.DONE, 2)
        assert [case.identifier for case in node.cases() if case.state is State.RECEIVING] == ["B"]
        assert len(node.calls) == 2


def test_one_patient_over_several_associations() -> None:
    series = make_series(8)
    with running_node(recorder(ct=Eight)) as node:
        for one in series:
            send(address_of(node), [one])
        wait_for_cases(node, State.DONE)
        assert len(node.calls) == 1


def test_several_associations_at_once() -> None:
    batches = {name: make_series(8, patient_id=name) for name in "ABCDEF"}
    with running_node(recorder(ct=Eight), workers=2) as node:
        threads = [
            threading.Thread(target=send, args=(address_of(node), part))
            for series in batches.values()
            for part in (series[:4], series[4:])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for_cases(node, State.DONE, 6)
        assert len(node.calls) == 6
        for data in node.calls:
            images, array = data["ct"]
            name = images[0].PatientID
            assert {one.PatientID for one in images} == {name}
            assert numpy.array_equal(array, numpy_grinder(batches[name]))


def test_images_that_arrive_while_a_case_is_processed_form_the_next_case() -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow(Recorder):
        input = {"ct": Eight}

        def process(self, input_data: dict[str, Any]) -> None:
            started.set()
            assert go_on.wait(30)
            super().process(input_data)

    first, second = make_series(8), make_series(8, seed=2)
    with running_node(Slow) as node:
        send(address_of(node), first)
        assert started.wait(30)
        send(address_of(node), second)
        go_on.set()
        wait_for_cases(node, State.DONE, 2)
        for data, series in zip(node.calls, (first, second), strict=True):
            assert {one.SOPInstanceUID for one in data["ct"][0]} == {
                one.SOPInstanceUID for one in series
            }


def test_an_aborted_association_counts_what_it_completed() -> None:
    from pynetdicom import AE

    series = make_series(8)
    with running_node(recorder(ct=Eight)) as node:
        ae = AE(ae_title="SENDER")
        ae.add_requested_context(series[0].SOPClassUID, series[0].file_meta.TransferSyntaxUID)
        association = ae.associate("127.0.0.1", node.port, ae_title="RECORDER")
        for one in series:
            assert association.send_c_store(one).Status == 0
        association.abort()
        wait_for_cases(node, State.DONE)
        assert len(node.calls) == 1


def test_inputs_of_two_pipelines_share_nothing() -> None:
    kind = recorder(ct=Eight)
    with running_node(kind) as first, running_node(kind) as second:
        send(address_of(first), make_series(8))
        send(address_of(second), make_series(4))
        wait_for_cases(first, State.DONE)
        assert [case.state for case in second.cases()] == [State.RECEIVING]


def test_a_generator_of_results_is_consumed_while_it_is_kept() -> None:
    class Generating(PlusOne):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            images, array = input_data["ct"]
            yield from derive_series(array, images)

    with (
        running_node(StoringNode) as store,
        running_node(Generating, endpoints=[address_of(store)]) as node,
    ):
        send(address_of(node), make_series(8))
        store.wait_for_images(8)
        wait_for_cases(node, State.DONE)


def test_results_of_several_kinds_go_over_one_association() -> None:
    class Mixed(PlusOne):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            images, array = input_data["ct"]
            results = list(derive_series(array, images))
            results[1].SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
            results[2].SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
            return results

    with (
        running_node(StoringNode) as store,
        running_node(Mixed, endpoints=[address_of(store)]) as node,
    ):
        send(address_of(node), make_series(8))
        assert len({one.SOPClassUID for one in store.wait_for_images(8)}) == 3
        wait_for_cases(node, State.DONE)


def test_compressed_images_are_kept_as_sent_and_decoded(tmp_path: Path) -> None:
    from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

    class EightAsSent(Eight):
        # Looked at now: the files are gone when the case is done.
        image_grinder = many_meta_grinder(
            lambda images: {one.file_meta.TransferSyntaxUID for one in images}, numpy_grinder
        )

    plain = make_series(8)
    expected = numpy_grinder(plain)
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        series = make_series(8, patient_id=str(syntax))
        for one in series:
            one.compress(syntax, generate_instance_uid=False)
        kind = recorder(ct=EightAsSent)
        with running_node(kind, root_data_directory=tmp_path / syntax) as node:
            answers = send(address_of(node), series)
            assert [one.status for one in answers] == [0] * 8
            wait_for_cases(node, State.DONE)
            syntaxes, array = node.calls[0]["ct"]
            assert numpy.array_equal(array, expected)
            assert syntaxes == {syntax}


def test_process_gets_the_memory_that_the_core_wrote(tmp_path: Path) -> None:
    class Whole(AbstractInput):
        image_grinder = volume_grinder

        def validate(self) -> bool:
            return self.images == 8

    with running_node(recorder(ct=Whole), root_data_directory=tmp_path / "root") as node:
        send(address_of(node), make_series(8))
        wait_for_cases(node, State.DONE)
        (data,) = node.calls
    array = data["ct"].array
    # Its inputs are gone from disk and memory, the node is closed; the array is its own.
    assert array.base is None and array.flags.owndata
    assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
    array += 1
    assert array.dtype == numpy.float32


def test_filter_sees_a_dataset_and_refuses() -> None:
    class EightAsTheyAre(Eight):
        # Without image 3 there is a gap, which array grinders refuse.
        image_grinder = list_grinder

    class Filtering(Recorder):
        input = {"ct": EightAsTheyAre}

        def filter(self, dataset: Dataset) -> bool:
            return dataset.InstanceNumber != 3

    with running_node(Filtering) as node:
        answers = send(address_of(node), make_series(9))
        assert [one.status for one in answers] == [0, 0, 0xB006, *[0] * 6]
        wait_for_cases(node, State.DONE)
        (data,) = node.calls
        assert sorted(one.InstanceNumber for one in data["ct"]) == [1, 2, 4, 5, 6, 7, 8, 9]


def test_what_filter_keeps_of_a_large_image_is_never_another_one(tmp_path: Path) -> None:
    kept: list[Dataset] = []

    class Keeping(recorder(ct=Eight)):  # type: ignore[misc]
        def filter(self, dataset: Dataset) -> bool:
            kept.append(dataset)
            return bool(dataset.PatientID)

    series = make_series(2, 1600, 1600) + make_series(1, 16, 16)
    with running_node(Keeping, root_data_directory=tmp_path) as node:
        send(address_of(node), series)
        # Of a large one what was read stays, and nothing else can be.
        for one in kept[:2]:
            assert one.PatientID == "PHANTOM-1"
            with pytest.raises(OSError, match="during the call only"):
                one.PixelData  # noqa: B018
        assert kept[2].PixelData == series[2].PixelData


def test_result_without_new_uids_is_reported() -> None:
    class Twice(PlusOne):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            images, array = input_data["ct"]
            results = list(derive_series(array, images))
            results[1].SOPInstanceUID = results[0].SOPInstanceUID
            return results

    with running_node(Twice, endpoints=[Address("127.0.0.1", 1, "X")]) as node:
        send(address_of(node), make_series(8))
        wait_for_cases(node, State.FAILED)
        assert "two results have the SOPInstanceUID" in node.cases()[0].error


def test_nothing_to_send_is_no_error() -> None:
    with running_node(recorder(ct=Eight)) as node:
        send(address_of(node), make_series(8))
        wait_for_cases(node, State.DONE)
        assert send(address_of(node), []) == []

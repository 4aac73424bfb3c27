"""The eight ready-made grinders beside slow, obvious versions."""

import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from dicomnode.errors import InconsistentSeries, IncorrectlyConfigured, InvalidDataset
from dicomnode.lib.dicom import LazyDataset, encode, load
from dicomnode.lib.grinders import (
    dicom_tree_grinder,
    identity_grinder,
    list_grinder,
    many_meta_grinder,
    numpy_grinder,
    tag_meta_grinder,
    volume_grinder,
)
from dicomnode.lib.volume import Volume
from dicomnode.testing import make_series, write_series


def slow(datasets: list[Dataset]) -> numpy.ndarray:
    ordered = sorted(datasets, key=lambda one: float(one.ImagePositionPatient[2]))
    return numpy.stack(
        [
            one.pixel_array.astype("f8") * float(one.RescaleSlope) + float(one.RescaleIntercept)
            for one in ordered
        ]
    ).astype("f4")


def lazy(datasets: list[Dataset]) -> list[Dataset]:
    return [LazyDataset(encode(one)[0]) for one in datasets]


@pytest.fixture
def series() -> list[Dataset]:
    made = make_series(5, 7, 9)
    return [made[2], made[4], made[0], made[1], made[3]]


def test_identity_returns_what_it_was_given(series: list[Dataset]) -> None:
    assert identity_grinder(series) is series


def test_list_returns_a_new_list_in_the_order_given(series: list[Dataset]) -> None:
    ground = list_grinder(iter(series))
    assert ground == series
    assert list_grinder(series) is not series


def test_each_of_many_grinders_sees_all_images_of_a_true_iterator(series: list[Dataset]) -> None:
    def counting(datasets: Iterator[Dataset]) -> int:
        return sum(1 for _ in datasets)

    grinder = many_meta_grinder(counting, numpy_grinder, counting, list_grinder)
    first, array, second, images = grinder(one for one in series)
    assert (first, second, images) == (5, 5, series)
    numpy.testing.assert_array_equal(array, slow(series))
    assert many_meta_grinder()(series) == []


def test_many_grinders_nest(series: list[Dataset]) -> None:
    grinder = many_meta_grinder(many_meta_grinder(list_grinder), list_grinder)
    assert grinder(iter(series)) == [[series], series]


def test_a_grinder_cannot_shorten_the_list_of_the_next(series: list[Dataset]) -> None:
    def emptying(datasets: list[Dataset]) -> None:
        list_of_images = list_grinder(datasets)
        list_of_images.clear()

    assert many_meta_grinder(emptying, list_grinder)(series)[1] == series


@pytest.mark.parametrize("key", [0x00100020, "PatientID", (0x0010, 0x0020), Tag(0x00100020)])
def test_tags_are_keyed_as_they_were_given(series: list[Dataset], key: object) -> None:
    values = tag_meta_grinder([key])(iter(series))
    assert values == {key: "PHANTOM-1"}
    assert [type(one) for one in values] == [type(key)]


def test_a_missing_tag_is_an_error_or_none(series: list[Dataset]) -> None:
    with pytest.raises(InvalidDataset, match="PatientWeight") as told:
        tag_meta_grinder(["PatientID", "PatientWeight"])(series)
    assert series[0].SOPInstanceUID in str(told.value)
    values = tag_meta_grinder(["PatientID", "PatientWeight"], optional=True)(series)
    assert values == {"PatientID": "PHANTOM-1", "PatientWeight": None}
    with pytest.raises(InvalidDataset, match="no dataset"):
        tag_meta_grinder(["PatientID"])([])


def test_a_wrong_tag_is_told_when_the_grinder_is_made() -> None:
    with pytest.raises(IncorrectlyConfigured, match="PatientsWeigth"):
        tag_meta_grinder(["PatientsWeigth"])


def test_a_tag_grinder_can_be_used_again(series: list[Dataset]) -> None:
    grinder = tag_meta_grinder(iter(["PatientID"]))
    assert grinder(series) == grinder(series) == {"PatientID": "PHANTOM-1"}


def test_the_tree_is_patient_study_series_image() -> None:
    images = [*make_series(2, patient_id="A"), *make_series(3, patient_id="B")]
    more = make_series(1, patient_id="A")[0]
    more.StudyInstanceUID = images[0].StudyInstanceUID
    images.append(more)
    expected: dict = {}
    for one in images:
        expected.setdefault(one.PatientID, {}).setdefault(one.StudyInstanceUID, {}).setdefault(
            one.SeriesInstanceUID, {}
        )[one.SOPInstanceUID] = one
    tree = dicom_tree_grinder(iter(images))
    assert tree == expected
    assert [len(one) for one in tree["A"][more.StudyInstanceUID].values()] == [2, 1]
    assert dicom_tree_grinder([]) == {}


def test_an_image_without_patient_id_has_the_empty_one_and_without_uid_no_place() -> None:
    images = make_series(1)
    del images[0].PatientID
    assert list(dicom_tree_grinder(images)) == [""]
    del images[0].SeriesInstanceUID
    with pytest.raises(InvalidDataset, match="SeriesInstanceUID"):
        dicom_tree_grinder(images)


@pytest.mark.parametrize("kind", ["plain", "lazy", "mixed", "iterator"])
def test_numpy_is_ready_as_it_is(series: list[Dataset], kind: str) -> None:
    given = {
        "plain": series,
        "lazy": lazy(series),
        "mixed": [*series[:2], *lazy(series[2:])],
        "iterator": iter(lazy(series)),
    }[kind]
    array = numpy_grinder(given)
    numpy.testing.assert_array_equal(array, slow(series))
    assert array.dtype == numpy.float32
    assert array.flags.c_contiguous and array.flags.writeable and array.flags.owndata


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "i4", numpy.int16, float])
def test_numpy_takes_a_dtype(series: list[Dataset], dtype: object) -> None:
    array = numpy_grinder(dtype=dtype)(lazy(series))
    assert array.dtype == numpy.dtype(dtype)
    numpy.testing.assert_array_equal(array, slow(series))
    assert volume_grinder(dtype=dtype)(series).array.dtype == numpy.dtype(dtype)


@pytest.mark.parametrize("dtype", [">f4", ">i2", "c8", "U2", "f2", "M8[s]", object, "?", "i8"])
@pytest.mark.parametrize("grinder", [numpy_grinder, volume_grinder])
def test_a_dtype_that_is_not_offered_is_told_when_the_grinder_is_made(
    grinder: object, dtype: object
) -> None:
    with pytest.raises(IncorrectlyConfigured, match="dtype"):
        grinder(dtype=dtype)


def test_an_integer_dtype_that_cannot_hold_the_values_is_an_error(series: list[Dataset]) -> None:
    with pytest.raises(InvalidDataset):
        numpy_grinder(dtype=numpy.uint8)(series)
    series[0].RescaleSlope = "0.5"
    with pytest.raises(InvalidDataset, match=series[0].SOPInstanceUID.replace(".", r"\.")):
        numpy_grinder(dtype=numpy.int16)(series)


@pytest.mark.parametrize("kind", ["plain", "lazy"])
def test_without_rescale_the_stored_values_come(series: list[Dataset], kind: str) -> None:
    given = series if kind == "plain" else lazy(series)
    array = numpy_grinder(values="stored", dtype=numpy.uint16)(given)
    numpy.testing.assert_array_equal(array, (slow(series) + 1024).astype("u2"))
    numpy.testing.assert_array_equal(volume_grinder(values="stored")(given).array, array)


def test_orders_other_than_the_position_need_no_geometry(series: list[Dataset]) -> None:
    expected = slow(series)
    given = numpy.stack([slow([one])[0] for one in series])
    for one in series:
        one.InstanceNumber = 9 - one.InstanceNumber
        del one.ImagePositionPatient
    numpy.testing.assert_array_equal(
        numpy_grinder(order="InstanceNumber")(lazy(series)), expected[::-1]
    )
    numpy.testing.assert_array_equal(numpy_grinder(order="given")(iter(series)), given)
    with pytest.raises(InconsistentSeries, match="ImagePositionPatient"):
        numpy_grinder(series)
    numpy.testing.assert_array_equal(numpy_grinder(series[:1])[0], given[0])


def test_instance_numbers_that_give_no_order_are_an_error(series: list[Dataset]) -> None:
    grinder = numpy_grinder(order="InstanceNumber")
    series[1].InstanceNumber = series[0].InstanceNumber
    with pytest.raises(InconsistentSeries) as told:
        grinder(series)
    assert series[0].SOPInstanceUID in str(told.value)
    assert series[1].SOPInstanceUID in str(told.value)
    del series[1].InstanceNumber
    with pytest.raises(InconsistentSeries, match=series[1].SOPInstanceUID.replace(".", r"\.")):
        grinder(series)


def test_an_unknown_order_is_told_when_the_grinder_is_made() -> None:
    with pytest.raises(IncorrectlyConfigured, match="order"):
        numpy_grinder(order="position_z")


@pytest.mark.parametrize("grinder", [numpy_grinder, volume_grinder])
def test_no_images_are_an_error(grinder: object) -> None:
    with pytest.raises(InconsistentSeries, match="no image"):
        grinder([])
    with pytest.raises(InconsistentSeries, match="no image"):
        grinder(iter([]))


def test_volume_tells_where_and_what(series: list[Dataset]) -> None:
    volume = volume_grinder(lazy(series))
    assert isinstance(volume, Volume)
    ordered = sorted(series, key=lambda one: one.InstanceNumber)
    assert volume.sop_instance_uids == tuple(one.SOPInstanceUID for one in ordered)
    assert volume.spacing_mm == (2.5, 0.8, 0.75)
    assert volume.shape == (5, 7, 9)
    expected = [[0.75, 0, 0, -100], [0, 0.8, 0, -90], [0, 0, 2.5, 50], [0, 0, 0, 1]]
    numpy.testing.assert_allclose(volume.affine, expected)


# Zero copy


def test_p27_the_array_lives_on_and_is_writable_when_its_files_are_gone(tmp_path: Path) -> None:
    made = make_series(4, 33, 31)
    paths = write_series(made, tmp_path)
    given = load(tmp_path)
    array = numpy_grinder(given)
    for path in paths:
        path.unlink()
    del given
    assert array.flags.c_contiguous and array.flags.aligned and array.flags.writeable
    assert numpy.shares_memory(numpy.asarray(array), array)
    assert numpy.shares_memory(numpy.from_dlpack(array), array)
    numpy.testing.assert_array_equal(pickle.loads(pickle.dumps(array)), array)
    array += 1
    numpy.testing.assert_array_equal(array, slow(made) + 1)


def test_a_grind_allocates_its_output_and_little_else(tmp_path: Path) -> None:
    write_series(make_series(40, 256, 256), tmp_path)
    given = load(tmp_path)
    numpy_grinder(given[:2])
    tracemalloc.start()
    array = numpy_grinder(given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes <= peak < array.nbytes * 1.05


def test_p27_plain_datasets_are_borrowed_not_copied() -> None:
    given = make_series(40, 256, 256)
    tracemalloc.start()
    array = numpy_grinder(given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes * 1.05


def test_grinding_twice_gives_two_arrays(series: list[Dataset]) -> None:
    first, second = numpy_grinder(series), numpy_grinder(series)
    assert not numpy.shares_memory(first, second)
    first[:] = 0
    numpy.testing.assert_array_equal(second, slow(series))


def test_a_grind_of_files_needs_its_output_and_little_more(tmp_path: Path) -> None:
    """Measured from outside, with the memory of the compiled core: peak of the process."""
    write_series(make_series(64, 512, 512), tmp_path)
    script = (
        "import sys\n"
        "from dicomnode.lib.dicom import load\n"
        "from dicomnode.lib.grinders import volume_grinder\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith('VmHWM'))\n"
        "images = load(sys.argv[1])\n"
        "volume_grinder(images[:2])\n"
        "before = peak()\n"
        "volume = volume_grinder(images)\n"
        "print(peak() - before, volume.array.nbytes)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    grown, output = map(int, run.stdout.split())
    assert output == 64 * 512 * 512 * 4
    assert grown < output + 16 * 2**20


def test_bytes_of_objects_are_images() -> None:
    series = make_series(4, 5, 6)
    objects = [encode(one)[0] for one in series]
    numpy.testing.assert_array_equal(numpy_grinder(objects), slow(series))
    mixed = volume_grinder([*objects[:2], *series[2:]])
    numpy.testing.assert_array_equal(mixed.array, slow(series))


@pytest.mark.parametrize("given", ["folder", ["a.dcm"], None, numpy.int16, 5, b"an object"])
@pytest.mark.parametrize("grinder", [numpy_grinder, volume_grinder])
def test_what_is_no_datasets_is_told_with_the_remedy(grinder: Any, given: object) -> None:
    with pytest.raises(InvalidDataset, match=r"dicomnode\.lib\.dicom\.load"):
        grinder(given)


@pytest.mark.parametrize("tags", ["Modality", ["Foo"], [None]])
def test_tags_that_are_none_are_told_when_the_grinder_is_made(tags: Any) -> None:
    with pytest.raises(IncorrectlyConfigured, match="tag"):
        tag_meta_grinder(tags)


def test_a_dtype_that_is_none_is_told_at_once() -> None:
    with pytest.raises(IncorrectlyConfigured, match="foo"):
        numpy_grinder(dtype="foo")


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2"])
def test_an_array_that_is_given_is_filled(series: list[Dataset], dtype: str) -> None:
    expected = numpy_grinder(dtype=dtype)(lazy(series))
    out = numpy.empty_like(expected)
    assert numpy_grinder(lazy(series), out=out) is out
    numpy.testing.assert_array_equal(out, expected)
    out[:] = 0
    assert volume_grinder(out=out)(lazy(series)).array is out
    numpy.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("order", ["position", "InstanceNumber", "given"])
def test_an_array_that_does_not_fit_is_told(series: list[Dataset], order: Any) -> None:
    shape = numpy_grinder(series).shape
    read_only = numpy.empty(shape, "f4")
    read_only.flags.writeable = False
    for out in (
        numpy.empty((1, 2, 3), "f4"),
        numpy.empty(shape, "f4").transpose(0, 2, 1),
        numpy.empty(shape, "f2"),
        numpy.empty((*shape, 2), "f4")[..., 0],
        read_only,
        [[1.0]],
    ):
        with pytest.raises(IncorrectlyConfigured):
            numpy_grinder(series, order=order, out=out)

"""What is missing in a series, as its headers and positions tell it."""

import random
import time
from pathlib import Path

import numpy
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from dicomnode.errors import InvalidDicom
from dicomnode.lib.dicom import LazyDataset
from dicomnode.lib.expected import missing_images, series_of
from dicomnode.lib.gaps import find_gap
from dicomnode.testing import make_series, write_series

SERIES_COUNT, STUDY_COUNT, ACQUISITION_COUNT, CONCATENATION_COUNT = (
    0x00201209,
    0x00201208,
    0x00201002,
    0x00209163,
)


def as_stored(series: list[Dataset], folder: Path) -> list[Dataset]:
    return [LazyDataset(str(path)) for path in write_series(series, folder)]


# Gaps


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_a_regular_stack_has_no_gap_in_any_order(count: int, tmp_path: Path) -> None:
    series = make_series(count, 8, 8)
    random.Random(1).shuffle(series)
    assert find_gap(series) == ""
    assert find_gap(as_stored(series, tmp_path)) == ""


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 0, -1), (0.8, 0.6, 0, -0.6, 0.8, 0)])
def test_a_slice_that_is_missing_in_between_is_a_gap(
    orientation: tuple[float, float, float, float, float, float],
) -> None:
    series = make_series(9, 8, 8, orientation=orientation)
    before, _, after = (one.SOPInstanceUID for one in series[3:6])
    del series[4]
    gap = find_gap(series)
    assert gap.startswith("slices are 2.5 mm apart, but 5 mm between")
    assert before in gap and after in gap and "(1 missing)" in gap


def test_the_first_the_last_and_every_second_slice_cannot_be_missed() -> None:
    series = make_series(9, 8, 8)
    assert find_gap(series[1:]) == find_gap(series[:-1]) == find_gap(series[::2]) == ""


def test_several_images_at_each_place_are_complete_where_all_have_as_many() -> None:
    first = make_series(6, 8, 8)
    second = make_series(6, 8, 8)
    for one in second:
        one.SeriesInstanceUID = first[0].SeriesInstanceUID
    assert find_gap(first + second) == ""
    late = second.pop(2)
    assert find_gap(first + second) == f"1 of 2 images lie where {first[2].SOPInstanceUID} does"
    assert find_gap([*first, *second, late]) == ""


def test_two_series_and_a_localizer_are_looked_at_by_themselves() -> None:
    series = make_series(5, 8, 8) + make_series(7, 8, 8, spacing_mm=(1.0, 1.0, 1.0))
    (localizer,) = make_series(1, 8, 8, orientation=(0, 1, 0, 0, 0, -1))
    localizer.SeriesInstanceUID = series[0].SeriesInstanceUID
    assert find_gap([localizer, *series]) == ""
    del series[8]
    assert "(1 missing)" in find_gap([localizer, *series])


def test_an_image_without_a_position_is_told() -> None:
    series = make_series(3, 8, 8)
    del series[1].ImagePositionPatient
    assert find_gap(series) == f"image {series[1].SOPInstanceUID} has no position in the patient"


def test_a_sheared_stack_has_no_gap_and_one_that_bends_has() -> None:
    series = make_series(6, 8, 8)
    for k, one in enumerate(series):
        one.ImagePositionPatient = [0.0, 0.7 * k, 2.5 * k]
    assert find_gap(series) == ""
    series[3].ImagePositionPatient = [0.0, 30.0, 7.5]
    assert "off the straight line" in find_gap(series)


def test_a_thousand_slices_are_cheap(tmp_path: Path) -> None:
    stored = as_stored(make_series(1000, 4, 4), tmp_path)
    find_gap(stored[:3])
    start = time.perf_counter()
    assert find_gap(stored) == ""
    assert missing_images(stored, SERIES_COUNT) == ("", False)
    # Mostly 30 ms.
    assert time.perf_counter() - start < 2


# Counts


def counted(tag: int, value: object, count: int = 4) -> list[Dataset]:
    series = make_series(count, 4, 4)
    for one in series:
        one.add_new(tag, "US" if tag == CONCATENATION_COUNT else "IS", value)
    return series


@pytest.mark.parametrize("is_stored", [True, False])
def test_the_images_of_a_series_are_counted(is_stored: bool, tmp_path: Path) -> None:
    series = counted(SERIES_COUNT, 4)
    one, other = series[:3], counted(SERIES_COUNT, 2, 1)
    images = as_stored(one + other, tmp_path) if is_stored else one + other
    uid, other_uid = series[0].SeriesInstanceUID, other[0].SeriesInstanceUID
    assert missing_images(images, SERIES_COUNT) == (
        f"3 of 4 images of {uid} are here, 1 of 2 images of {other_uid} are here",
        True,
    )
    assert missing_images(series, SERIES_COUNT) == ("", True)


def test_the_greatest_number_counts_since_it_grows_during_an_examination() -> None:
    series = counted(SERIES_COUNT, 2, 3)
    series[2].NumberOfSeriesRelatedInstances = 4
    assert missing_images(series, SERIES_COUNT)[0].startswith("3 of 4 images")


@pytest.mark.parametrize("value", [None, 0, -1])
def test_where_the_headers_do_not_tell_nothing_is_missing(value: int | None) -> None:
    assert missing_images(counted(SERIES_COUNT, value), SERIES_COUNT) == ("", False)
    assert missing_images(make_series(2, 4, 4), SERIES_COUNT) == ("", False)
    assert missing_images([], SERIES_COUNT) == ("", False)


def test_each_acquisition_of_a_series_is_counted_by_itself() -> None:
    series = counted(ACQUISITION_COUNT, 2)
    for k, one in enumerate(series):
        one.AcquisitionNumber = k // 2
    assert missing_images(series, ACQUISITION_COUNT) == ("", True)
    assert missing_images(series[:3], ACQUISITION_COUNT)[0].startswith("1 of 2 images")


def test_the_series_of_a_study_are_counted_together() -> None:
    first, second = counted(STUDY_COUNT, 8), counted(STUDY_COUNT, 8)
    for one in second:
        one.StudyInstanceUID = first[0].StudyInstanceUID
    assert missing_images(first + second, STUDY_COUNT) == ("", True)
    assert missing_images(first + second[1:], STUDY_COUNT)[0].startswith("7 of 8 images of")


def test_the_parts_of_a_concatenation_are_counted() -> None:
    parts = counted(CONCATENATION_COUNT, 3, 3)
    uid = generate_uid()
    for one in parts:
        one.ConcatenationUID = uid
    assert missing_images(parts, CONCATENATION_COUNT) == ("", True)
    assert missing_images(parts[:2], CONCATENATION_COUNT) == (
        f"2 of 3 images of {uid} are here",
        True,
    )


def test_a_function_is_asked_once_for_each_series() -> None:
    asked: list[str] = []

    def slices_times_times(dataset: Dataset) -> int:
        asked.append(dataset.SOPInstanceUID)
        return int(dataset.NumberOfSlices) * int(dataset.NumberOfTimeSlices)

    series = make_series(5, 4, 4)
    for one in series:
        one.NumberOfSlices, one.NumberOfTimeSlices = 2, 3
    assert missing_images(series, slices_times_times)[0].startswith("5 of 6 images")
    assert asked == [series[0].SOPInstanceUID]


def test_a_count_that_cannot_be_understood_is_an_error(tmp_path: Path) -> None:
    (path,) = write_series(counted(SERIES_COUNT, 4444, 1), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"4444", b"4x44"))
    with pytest.raises(InvalidDicom, match="NumberOfSeriesRelatedInstances"):
        missing_images([LazyDataset(str(path))], SERIES_COUNT)


def test_the_series_of_datasets(tmp_path: Path) -> None:
    series = make_series(2, 4, 4)
    del series[1].SeriesInstanceUID
    expected = [series[0].SeriesInstanceUID, ""]
    assert series_of(series) == series_of(as_stored(series, tmp_path)) == expected
    assert numpy.array_equal(series_of([]), [])

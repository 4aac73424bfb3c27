"""Derived series: written values, geometry, what is kept, and what other programs say of them."""

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dicomnode.errors import InconsistentSeries, InvalidDataset
from dicomnode.lib.dicom import LazyDataset, encode, load
from dicomnode.lib.grinders import numpy_grinder, volume_grinder
from dicomnode.lib.series import derive_series
from dicomnode.testing import make_series

OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def derived(array: numpy.ndarray, images: Iterable[Dataset], **options: object) -> list[Dataset]:
    return list(derive_series(array, images, **options))


def sent(datasets: Iterable[Dataset]) -> list[Dataset]:
    """As they arrive at the next node."""
    return [LazyDataset(encode(dataset)[0]) for dataset in datasets]


def step_of(results: list[Dataset]) -> float:
    return abs(float(results[0].RescaleSlope))


def test_a_result_grinds_back_to_the_same_volume_and_affine() -> None:
    source = make_series(5, 6, 7, orientation=OBLIQUE, spacing_mm=(1.5, 0.7, 0.9))
    volume = volume_grinder(source[::-1])
    back = volume_grinder(sent(derived(volume.array + 1, source)))
    numpy.testing.assert_array_equal(back.array, volume.array + 1)
    numpy.testing.assert_array_equal(back.affine, volume.affine)
    assert back.spacing_mm == volume.spacing_mm


def test_slices_go_to_the_image_at_their_position_not_to_that_in_the_list() -> None:
    source = make_series(4, 3, 3)
    array = numpy.arange(36, dtype=numpy.float32).reshape(4, 3, 3)
    for result in derived(array, [source[2], source[0], source[3], source[1]]):
        origin = next(
            one
            for one in source
            if one.SOPInstanceUID == result.SourceImageSequence[0].ReferencedSOPInstanceUID
        )
        assert result.ImagePositionPatient == origin.ImagePositionPatient
        assert result.InstanceNumber == origin.InstanceNumber
        numpy.testing.assert_array_equal(
            numpy_grinder([result])[0], array[origin.InstanceNumber - 1]
        )


def test_results_are_a_new_series_in_the_same_study_and_frame() -> None:
    source = make_series(3)
    results = derived(numpy_grinder(source), source, series_number=7, series_description="Sum")
    assert len({one.SeriesInstanceUID for one in results}) == 1
    assert results[0].SeriesInstanceUID != source[0].SeriesInstanceUID
    uids = {one.SOPInstanceUID for one in (*results, *source)}
    assert len(uids) == 6
    for result, origin in zip(results, source, strict=True):
        for keyword in (
            "StudyInstanceUID", "FrameOfReferenceUID", "ImagePositionPatient", "PatientID",
            "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "PatientName",
        ):  # fmt: skip
            assert result[keyword] == origin[keyword], keyword
        assert list(result.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert (result.SeriesNumber, result.SeriesDescription) == (7, "Sum")
        assert result.SourceImageSequence[0].ReferencedSOPClassUID == origin.SOPClassUID
    assert derived(numpy_grinder(source), source)[0].SeriesNumber == 1001


def test_what_was_true_of_the_source_only_is_left_out() -> None:
    source = make_series(1)
    source[0].WindowCenter, source[0].WindowWidth = 40, 400
    source[0].SmallestImagePixelValue = 3
    source[0].add_new(0x60000010, "US", 4)
    source[0].private_block(0x0019, "ACME", create=True).add_new(1, "LO", "secret")
    source[0].ReferencedImageSequence = Sequence([Dataset()])
    result = derived(numpy_grinder(source), source)[0]
    for tag in ("WindowCenter", "SmallestImagePixelValue", "ReferencedImageSequence", 0x60000010):
        assert tag not in result
    assert not any(element.tag.is_private for element in result)


@pytest.mark.parametrize("looked_at", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
def test_changing_a_result_leaves_its_source_and_its_siblings_alone(
    lazy: bool, looked_at: bool
) -> None:
    source: list[Dataset] = make_series(2)
    for one in source:
        item = Dataset()
        item.RadionuclideTotalDose = "5"
        one.RadiopharmaceuticalInformationSequence = Sequence([item])
    if lazy:
        source = sent(source)
    if looked_at:
        _ = str(source[0])
    before = [numpy.array(one.ImagePositionPatient, float) for one in make_like(source)]
    first, second = derived(numpy_grinder(source), source)
    first.PatientName = "Changed"
    first.ImagePositionPatient[2] = 1234
    first.RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose = "6"
    first.Rows = 99
    first.SeriesDescription = "Changed"
    for one, position in zip(source, before, strict=True):
        assert one.PatientName == "Phantom^Test"
        assert list(one.ImagePositionPatient) == list(position)
        assert one.RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose == 5
    assert second.PatientName == "Phantom^Test"
    assert second.Rows == 32
    assert "SeriesDescription" not in second
    assert second.RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose == 5


def make_like(source: Iterable[Dataset]) -> list[Dataset]:
    return [pydicom.dcmread(pydicom.filebase.DicomBytesIO(encode(one)[0])) for one in source]


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"])
def test_a_source_in_another_encoding_gives_the_same_result(syntax: str) -> None:
    source = make_series(2)
    array = numpy_grinder(source) * 2
    expected = derived(array, source)
    for one in source:
        one.file_meta.TransferSyntaxUID = syntax
    results = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(encode(one)[0])) for one in
               derived(array, sent(source))]  # fmt: skip
    for result, wanted in zip(results, expected, strict=True):
        for element in wanted:
            if not re.search("UID|Time|Sequence", element.keyword):
                assert result[element.tag].value == element.value, element.keyword


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 192", "Łukasz^Жук"),
        ("ISO_IR 100", "Müller^Jürgen"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (None, "Plain^Name"),
    ],
)
@pytest.mark.parametrize("description", ["", "Größe Ω"])
@pytest.mark.parametrize("looked_at", [True, False])
def test_names_survive_in_every_character_set(
    charset: object, name: str, description: str, looked_at: bool
) -> None:
    """W5"""
    source = make_series(1)
    if charset is None:
        del source[0].SpecificCharacterSet
    else:
        source[0].SpecificCharacterSet = charset
    source[0].PatientName = name
    source = sent(source)
    if looked_at:
        _ = str(source[0])
    results = derived(numpy_grinder(source), source, series_description=description)
    assert results[0].get("SeriesDescription", "") == description
    assert str(results[0].PatientName) == name
    back = sent(results)[0]
    assert str(back.PatientName) == name
    assert back.get("SeriesDescription", "") == description


@pytest.mark.parametrize(
    ("low", "high"), [(-1024, 3071), (0, 65535), (-32768, 32767), (-1024, 64511)]
)
def test_whole_numbers_of_the_source_are_stored_exactly(low: int, high: int) -> None:
    source = make_series(2, 5, 5)
    array = numpy.linspace(low, high, 50).round().reshape(2, 5, 5)
    for dtype in (numpy.int32, numpy.float64, numpy.float32):
        results = sent(derived(array.astype(dtype), source))
        numpy.testing.assert_array_equal(numpy_grinder(results), array.astype(numpy.float32))


def test_values_of_a_source_with_a_fractional_slope_come_back_unchanged() -> None:
    source = make_series(2)
    for one in source:
        one.RescaleSlope, one.RescaleIntercept = "0.12345", "-7.5"
    array = numpy_grinder(source)
    results = derived(array, source)
    assert results[0].RescaleSlope == pydicom.valuerep.DSfloat("0.12345")
    numpy.testing.assert_array_equal(numpy_grinder(results), array)


def test_whole_numbers_are_not_taken_for_exact_by_rounding() -> None:
    source = make_series(1, 2, 2)
    source[0].RescaleSlope, source[0].RescaleIntercept = "1.7", "0"
    array = numpy.array([[[1, 2], [3, 60000]]], numpy.int32)
    results = derived(array, source)
    back = numpy_grinder(dtype=numpy.float64)(results)
    assert numpy.abs(back - array).max() <= step_of(results) / 2 * 1.0001


@settings(max_examples=60, deadline=None)
@given(
    center=st.floats(-1e12, 1e12),
    reach=st.floats(1e-6, 1e12),
    parts=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    dtype=st.sampled_from(["f4", "f8"]),
)
def test_float_values_are_off_by_at_most_half_a_step(
    center: float, reach: float, parts: list[float], dtype: str
) -> None:
    """W3"""
    array = (center + reach * numpy.array(parts)).astype(dtype).reshape(1, 2, 3)
    source = make_series(1, 2, 3)
    results = derived(array, source)
    assert len(str(results[0]["RescaleSlope"].value)) <= 16
    back = numpy_grinder(dtype=numpy.float64)(sent(results))
    rounding = 4 * numpy.finfo(numpy.float64).eps * float(numpy.abs(array).max())
    assert numpy.abs(back - array).max() <= step_of(results) / 2 * (1 + 1e-9) + rounding
    extent = float(array.max() - array.min())
    assert step_of(results) <= max(extent / 65535 * 1.001 + rounding + 2e-9 * abs(center), 1)


@pytest.mark.parametrize(
    "value", [0.0, 1.0, -3.25, 1 / 3, 1e-30, -1e20 / 3, 5e-324, numpy.pi * 1e9]
)
def test_constant_arrays_come_back(value: float) -> None:
    source = make_series(2, 2, 2)
    array = numpy.full((2, 2, 2), value)
    back = numpy_grinder(dtype=numpy.float64)(sent(derived(array, source)))
    numpy.testing.assert_allclose(back, array, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize(
    "extremes",
    [(0, 1e300), (-1e300, 1e300), (0, 5e-324), (-1e-308, 1e-300), (1e9, 1e9 + 1e-6), (-4e38, 1)],
)
def test_huge_and_tiny_ranges_keep_decimal_strings_within_16_characters(
    extremes: tuple[float, float],
) -> None:
    """W6"""
    low, high = extremes
    source = make_series(1, 2, 2)
    array = numpy.array([[[low, high], [high, low / 2 + high / 2]]])
    results = sent(derived(array, source))
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        assert len(results[0].get_item(keyword).value.strip()) <= 16
    slope, intercept = float(results[0].RescaleSlope), float(results[0].RescaleIntercept)
    stored = numpy.frombuffer(results[0].PixelData, "<u2").reshape(1, 2, 2)
    assert numpy.abs(stored * slope + intercept - array).max() <= slope * 0.50001 + 1e-15 * max(
        abs(low), abs(high)
    )


@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf])
def test_values_that_are_not_finite_are_an_error(bad: float) -> None:
    source = make_series(2)
    array = numpy_grinder(source)
    array[1, 3, 4] = bad
    with pytest.raises(InvalidDataset, match="NaN or infinite"):
        derived(array, source)


def test_a_range_that_no_slope_can_span_is_an_error() -> None:
    array = numpy.array([[[-1.7e308, 1.7e308]]])
    with pytest.raises(InvalidDataset, match="too far"):
        derived(array, make_series(1, 1, 2))


@pytest.mark.parametrize("dtype", ["complex64", "U3", "M8[s]", object])
def test_arrays_of_no_real_numbers_are_an_error(dtype: object) -> None:
    with pytest.raises(InvalidDataset, match="cannot be stored"):
        derived(numpy.zeros((1, 2, 2)).astype(dtype), make_series(1, 2, 2))


def test_a_mask_is_stored_as_zeros_and_ones() -> None:
    source = make_series(2)
    mask = numpy_grinder(source) > 0
    numpy.testing.assert_array_equal(numpy_grinder(derived(mask, source)), mask.astype("f4"))


@pytest.mark.parametrize("shape", [(2, 32, 40), (3, 40, 32), (3, 32, 40, 1), (96, 40)])
def test_an_array_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InconsistentSeries, match=r"\(3, 32, 40\)"):
        derived(numpy.zeros(shape), make_series(3))


def test_no_images_are_an_error() -> None:
    with pytest.raises(InconsistentSeries, match="no image"):
        derived(numpy.zeros((0, 1, 1)), [])


def test_an_image_without_identity_is_an_error() -> None:
    source = make_series(1)
    del source[0].SOPInstanceUID
    with pytest.raises(InvalidDataset, match="SOPInstanceUID"):
        derived(numpy_grinder(source), source)


@pytest.mark.parametrize(
    "option", [{"series_description": "x" * 65}, {"derivation_description": "x" * 1025}]
)
def test_texts_longer_than_dicom_allows_are_an_error(option: dict[str, str]) -> None:
    source = make_series(1)
    with pytest.raises(InvalidDataset, match="DICOM allows"):
        derived(numpy_grinder(source), source, **option)


def test_a_non_contiguous_or_big_endian_array_is_stored_right() -> None:
    source = make_series(3, 4, 5)
    array = numpy.arange(60, dtype=">i4").reshape(5, 4, 3).T
    numpy.testing.assert_array_equal(numpy_grinder(derived(array, source)), array)


def test_a_single_image_without_geometry_can_be_derived_from() -> None:
    source = make_series(1)
    del source[0].ImagePositionPatient, source[0].ImageOrientationPatient
    array = numpy_grinder(source)
    numpy.testing.assert_array_equal(numpy_grinder(derived(array, source)), array)


# What others say


def complaints(dciodvfy: str, folder: Path, datasets: Iterable[Dataset]) -> set[str]:
    """The kinds of errors that dciodvfy finds."""
    found: set[str] = set()
    for number, dataset in enumerate(datasets):
        path = folder / f"{number}.dcm"
        path.write_bytes(encode(dataset)[0])
        told = subprocess.run([dciodvfy, path], capture_output=True, text=True, check=False)
        found |= {line for line in told.stderr.splitlines() if line.startswith("Error -")}
    return found


def test_dciodvfy_finds_no_error_in_a_made_series_and_its_result(
    peer: Callable[[str], str], tmp_path: Path
) -> None:
    dciodvfy = peer("dciodvfy")
    source = make_series(2)
    assert complaints(dciodvfy, tmp_path, source) == set()
    for array in (numpy_grinder(source) + 1, numpy_grinder(source) / 7):
        results = derived(array, source, series_description="S", derivation_description="D")
        assert complaints(dciodvfy, tmp_path, results) == set()


def test_dciodvfy_finds_no_new_error_in_the_result_of_real_ct(
    peer: Callable[[str], str], ct_folder: Path, tmp_path: Path
) -> None:
    dciodvfy = peer("dciodvfy")
    source = sorted(load(ct_folder), key=lambda one: float(one.get("SliceLocation", 0)))
    source = [one for one in source if "PixelSpacing" in one][:3]
    results = derived(numpy_grinder(source) / 3, source)
    assert complaints(dciodvfy, tmp_path, results) <= complaints(dciodvfy, tmp_path, source)


@pytest.mark.parametrize("folder", ["ct-phantom-140", "ct-tilt-54"])
def test_results_of_real_ct_have_the_geometry_of_their_sources(
    real_data: Path, folder: str
) -> None:
    source = load(real_data / folder)
    volume = volume_grinder(source)
    back = volume_grinder(sent(derived(volume.array + 1, source)))
    numpy.testing.assert_array_equal(back.array, volume.array + 1)
    numpy.testing.assert_array_equal(back.affine, volume.affine)


def test_dcm2niix_converts_a_result(peer: Callable[[str], str], tmp_path: Path) -> None:
    """W10"""
    source = make_series(6, 20, 24, spacing_mm=(2, 0.5, 0.75))
    volume = volume_grinder(source)
    (tmp_path / "in").mkdir()
    for number, result in enumerate(derived(volume.array + 1, source)):
        (tmp_path / "in" / f"{number}.dcm").write_bytes(encode(result)[0])
    subprocess.run(
        [peer("dcm2niix"), "-f", "out", "-o", tmp_path, tmp_path / "in"],
        check=True,
        capture_output=True,
    )
    raw = (tmp_path / "out.nii").read_bytes()
    json.loads((tmp_path / "out.json").read_text())
    shape = numpy.frombuffer(raw, "<i2", 8, 40)[1:4]
    slope, intercept = numpy.frombuffer(raw, "<f4", 2, 112)
    rows = numpy.frombuffer(raw, "<f4", 12, 280).reshape(3, 4).astype(float)
    types = {4: "<i2", 512: "<u2"}
    stored = numpy.frombuffer(
        raw, types[int(numpy.frombuffer(raw, "<i2", 1, 70)[0])], int(shape.prod()), 352
    )
    image = stored.reshape(shape[::-1]).astype(float) * (slope or 1) + intercept
    to_lps = numpy.diag([-1, -1, 1]) @ rows
    index = numpy.array([5, 4, 2, 1])
    position = (volume.affine @ index)[:3]
    column, row, k = numpy.linalg.solve(to_lps[:, :3], position - to_lps[:, 3]).round().astype(int)
    assert numpy.abs(to_lps @ [column, row, k, 1] - position).max() < 1e-3
    assert image[k, row, column] == volume.array[2, 4, 5] + 1


def test_the_rescale_type_is_hu_for_ct_unless_told_otherwise() -> None:
    images = make_series(2)
    array = numpy_grinder(images)
    assert {one.RescaleType for one in derive_series(array, images)} == {"HU"}
    told = derive_series(array > 0, images, rescale_type="US")
    assert {one.RescaleType for one in told} == {"US"}
    mr = make_series(2, modality="MR")
    assert not any("RescaleType" in one for one in derive_series(array, mr))


def test_a_lone_image_needs_no_place() -> None:
    (image,) = make_series(1)
    del image.ImagePositionPatient, image.PixelSpacing
    array = numpy_grinder([image])
    (result,) = derive_series(array + 1, [image])
    assert numpy.array_equal(numpy_grinder([result]), array + 1)


@pytest.mark.parametrize(
    "labels",
    [
        numpy.array([-32000, -16000, 0, 16000, 32000], numpy.int16),
        numpy.arange(5, dtype=numpy.uint16) * 16000,
        numpy.array([True, False, True, False, True]),
        numpy.array([40000, 50000, 60000, 70000, 100000], numpy.int32),
        numpy.array([-70000, -50000, -40000, -30000, -10000], numpy.float64),
    ],
)
@pytest.mark.parametrize("slope", ["1", "0.37", "-2.5"])
def test_whole_numbers_come_back_exactly_whatever_the_source(
    labels: numpy.ndarray, slope: str
) -> None:
    images = make_series(2, 5, 5)
    for one in images:
        one.RescaleSlope = slope
    array = numpy.broadcast_to(labels, (2, 5, 5)).copy()
    results = list(derive_series(array, images))
    back = numpy_grinder(dtype=numpy.float64)(results)
    assert numpy.array_equal(back, array.astype(numpy.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"series_description": None},
        {"series_description": "a\\b"},
        {"derivation_description": 5},
        {"series_number": "x"},
        {"series_number": 1 << 40},
    ],
)
def test_a_text_or_number_that_dicom_does_not_take_is_told(options: dict[str, Any]) -> None:
    images = make_series(2)
    with pytest.raises(InvalidDataset, match=r"Description|SeriesNumber"):
        list(derive_series(numpy_grinder(images), images, **options))


def test_a_volume_in_place_of_its_array_is_told() -> None:
    images = make_series(2)
    with pytest.raises(InvalidDataset, match="its array"):
        list(derive_series(volume_grinder(images), images))  # type: ignore[arg-type]

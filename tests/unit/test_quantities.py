"""What the numbers of an array measure: units, real-world values, SUV, and where there is padding.

Oracles are plain numpy, numbers worked out by hand, pydicom and highdicom. The ids in the names are
those of the project's reference of volume readers.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import highdicom
import imagecodecs
import numpy
import pydicom
import pydicom.data
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_rescale
from pydicom.sr.codedict import codes
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless
from tests.unit.test_codecs import RLE, rle
from tests.unit.test_multiframe import enhanced, item

from dicomnode.errors import (
    DicomnodeError,
    InconsistentSeries,
    IncorrectlyConfigured,
    InvalidDataset,
    UnsupportedImage,
)
from dicomnode.lib import images
from dicomnode.lib.dicom import LazyDataset, encode, load
from dicomnode.lib.grinders import numpy_grinder, series_grinder, volume_grinder
from dicomnode.lib.quantities import signed
from dicomnode.lib.series import derive_series
from dicomnode.testing import make_series


def lazy(datasets: Iterable[Dataset]) -> list[Dataset]:
    return [LazyDataset(encode(one)[0]) for one in datasets]


def implicit(datasets: Iterable[Dataset]) -> list[Dataset]:
    given = copy.deepcopy(list(datasets))
    for one in given:
        one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return lazy(given)


def plain(datasets: Iterable[Dataset]) -> list[Dataset]:
    return list(datasets)


@pytest.fixture(params=[plain, lazy, implicit])
def kind(request: pytest.FixtureRequest) -> Callable[[Iterable[Dataset]], list[Dataset]]:
    """As pydicom datasets, and as the lazy ones of a node in either encoding."""
    return request.param


def stored_of(one: Dataset) -> numpy.ndarray:
    """Stored values, written out."""
    cells = numpy.frombuffer(one.PixelData, "<i2" if one.PixelRepresentation else "<u2")
    return cells.reshape(one.Rows, one.Columns).astype(numpy.int64)


def series_of(values: Any, is_signed: bool = False, bits: int = 16) -> list[Dataset]:
    """A series with stored values of its own, in all cells a different one."""
    stored = numpy.asarray(values)
    made = make_series(*stored.shape)
    for one, cells in zip(made, stored, strict=True):
        one.BitsStored, one.HighBit = bits, bits - 1
        one.PixelRepresentation = int(is_signed)
        one.PixelData = cells.astype("<i2" if is_signed else "<u2").tobytes()
    return made


UNSIGNED = numpy.random.default_rng(5).integers(0, 1 << 16, (4, 6, 7))
SIGNED = UNSIGNED - 32768

# Rescale


@pytest.mark.parametrize("slope", ["0.333333", "-2.5", "1e-5", "3"])
@pytest.mark.parametrize("intercept", ["0", "-1024", "0.1"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_p6_p7_p8_rescaled_values_are_pydicoms_rounded_once(
    kind: Callable, slope: str, intercept: str, dtype: str
) -> None:
    made = series_of(SIGNED, True)
    for k, one in enumerate(made):
        one.RescaleSlope = str(float(slope) * (k + 1))[:16]
        one.RescaleIntercept = intercept
    expected = numpy.stack([apply_rescale(stored_of(one).astype("f8"), one) for one in made])
    found = numpy_grinder(dtype=dtype)(kind(made))
    numpy.testing.assert_array_equal(found, expected.astype(dtype))


# Units


def ct(**values: Any) -> list[Dataset]:
    made = make_series(3, 4, 5)
    for one in made:
        del one.RescaleType
        for keyword, value in values.items():
            setattr(one, keyword, value)
    return made


@pytest.mark.parametrize(
    ("changes", "units"),
    [
        ({}, "HU"),
        ({"RescaleType": ""}, "HU"),
        ({"RescaleType": "HU"}, "HU"),
        ({"RescaleType": "US "}, "US"),
        ({"RescaleType": "Z_EFF", "MultienergyCTAcquisition": "YES"}, "Z_EFF"),
        ({"MultienergyCTAcquisition": "YES"}, ""),
        ({"MultienergyCTAcquisition": "NO"}, "HU"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, ""),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "HU"),
        ({"ImageType": "ORIGINAL"}, "HU"),
        ({"ImageType": ""}, "HU"),
        ({"RescaleSlope": None, "RescaleIntercept": None}, ""),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}, ""),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128", "Units": "BQML"}, "BQML"),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128", "Units": "CNTS", "RescaleType": "US"},
            "CNTS",
        ),
        ({"DoseUnits": "GY", "Modality": "RTDOSE"}, "GY"),
    ],
)
def test_units_are_what_the_object_says(
    kind: Callable, changes: dict[str, Any], units: str
) -> None:
    given = kind(ct(**changes))
    assert volume_grinder(given).units == units
    assert volume_grinder(values="stored")(given).units == ""


def test_units_of_frames_come_from_their_groups() -> None:
    one = enhanced(make_series(4, 5, 6))
    assert volume_grinder(lazy([one])).units == "HU"
    for frame in one.PerFrameFunctionalGroupsSequence:
        frame.PixelValueTransformationSequence[0].RescaleType = "US"
    assert volume_grinder(lazy([one])).units == "US"
    one.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence[0].RescaleType = "HU"
    with pytest.raises(InconsistentSeries, match=r"frame 3\) differ in the units"):
        volume_grinder(lazy([one]))


def test_images_with_different_units_are_told(kind: Callable) -> None:
    made = ct()
    made[1].RescaleType = "US"
    with pytest.raises(InconsistentSeries, match="'HU' and 'US'") as told:
        volume_grinder(kind(made))
    assert made[0].SOPInstanceUID in str(told.value)
    assert made[1].SOPInstanceUID in str(told.value)
    volume_grinder(values="stored")(kind(made))


def test_units_that_a_user_changed_are_seen() -> None:
    given = lazy(ct())
    for one in given:
        one.RescaleType = "OD"
    assert volume_grinder(given).units == "OD"


def test_p9_units_of_a_modality_lut_are_its_type(kind: Callable) -> None:
    made = ct(RescaleSlope=None, RescaleIntercept=None)
    for one in made:
        lut = item(LUTDescriptor=[4096, 0, 16], ModalityLUTType="OD")
        lut.add_new("LUTData", "OW", numpy.arange(4096, dtype="<u2").tobytes())
        one.ModalityLUTSequence = [lut]
    assert volume_grinder(kind(made)).units == "OD"
    del made[1].ModalityLUTSequence[0].ModalityLUTType
    with pytest.raises(InconsistentSeries, match="units"):
        volume_grinder(kind(made))


# Real-world values


def mapping(
    first: float, last: float, units: str = "mm2/s", label: str = "ADC", **values: Any
) -> Dataset:
    one = item(
        LUTLabel=label,
        LUTExplanation=label,
        MeasurementUnitsCodeSequence=[
            item(CodeValue=units, CodingSchemeDesignator="UCUM", CodeMeaning=units)
        ],
        **values,
    )
    for keyword, value in (
        ("RealWorldValueFirstValueMapped", first),
        ("RealWorldValueLastValueMapped", last),
    ):
        one.add_new(keyword, "SS" if value < 0 or first < 0 else "US", value)
    return one


def linear(first: float, last: float, slope: float, intercept: float, **values: Any) -> Dataset:
    return mapping(
        first, last, RealWorldValueSlope=slope, RealWorldValueIntercept=intercept, **values
    )


def with_maps(made: list[Dataset], *maps: Dataset) -> list[Dataset]:
    for one in made:
        one.RealWorldValueMappingSequence = [copy.deepcopy(each) for each in maps]
    return made


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("is_signed", [False, True])
def test_p11_a_linear_map_of_all_stored_values_counts_instead_of_the_rescale(
    kind: Callable, is_signed: bool, dtype: str
) -> None:
    stored = SIGNED if is_signed else UNSIGNED
    made = series_of(stored, is_signed)
    for k, one in enumerate(made):
        low = -32768 * is_signed
        with_maps([one], linear(low, low + 65535, 1e-6 * (k + 1), 0.25))
    volume = volume_grinder(values="real_world", dtype=dtype)(kind(made)[::-1])
    slopes = 1e-6 * numpy.arange(1, 5)[:, None, None]
    numpy.testing.assert_array_equal(volume.array, (stored * slopes + 0.25).astype(dtype))
    assert volume.units == "mm2/s"
    assert volume.warnings == ()
    array = numpy_grinder(values="real_world", dtype=dtype)(kind(made))
    numpy.testing.assert_array_equal(array, volume.array)


@pytest.mark.parametrize("is_signed", [False, True])
def test_p11_what_a_map_leaves_out_is_nan_and_told(kind: Callable, is_signed: bool) -> None:
    stored = SIGNED if is_signed else UNSIGNED
    first, last = (-20000, 9) if is_signed else (7, 40000)
    made = with_maps(series_of(stored, is_signed), linear(first, last, 0.5, -3))
    volume = volume_grinder(values="real_world")(kind(made))
    inside = (stored >= first) & (stored <= last)
    assert inside.any()
    assert not inside.all()
    expected = numpy.where(inside, stored * 0.5 - 3, numpy.nan).astype("f4")
    numpy.testing.assert_array_equal(volume.array, expected)
    (warning,) = volume.warnings
    assert f"{(~inside).sum()} values" in warning
    with_maps(made, linear(first, last, 1e38, 0))
    with pytest.raises(InvalidDataset, match="float32"):
        volume_grinder(values="real_world")(kind(made))
    with pytest.raises(InvalidDataset, match="int16"):
        volume_grinder(values="real_world", dtype="i2")(kind(made))


def test_p11_a_table_gives_its_values(kind: Callable) -> None:
    stored = numpy.arange(4 * 6 * 7).reshape(4, 6, 7) % 19
    table = numpy.linspace(-1, 1, 17) ** 3
    made = with_maps(series_of(stored), mapping(1, 17, RealWorldValueLUTData=table.tolist()))
    volume = volume_grinder(values="real_world", dtype="f8")(kind(made))
    expected = numpy.concatenate([[numpy.nan], table, [numpy.nan]])[stored]
    numpy.testing.assert_array_equal(volume.array, expected)


def test_p11_an_integer_dtype_holds_the_values_exactly_or_is_an_error(kind: Callable) -> None:
    stored = numpy.arange(4 * 6 * 7).reshape(4, 6, 7) % 5
    made = with_maps(series_of(stored), mapping(0, 4, RealWorldValueLUTData=[0, 10, -4, 7, 300]))
    found = numpy_grinder(values="real_world", dtype="i2")(kind(made))
    numpy.testing.assert_array_equal(found, numpy.array([0, 10, -4, 7, 300])[stored])
    with pytest.raises(InvalidDataset, match=made[0].SOPInstanceUID):
        numpy_grinder(values="real_world", dtype="u1")(kind(made))
    with_maps(made, linear(0, 65535, 0.5, 0))
    with pytest.raises(InvalidDataset, match=made[0].SOPInstanceUID):
        numpy_grinder(values="real_world", dtype="i4")(kind(made))


def test_p11_values_are_those_of_highdicom(kind: Callable) -> None:
    stored = numpy.arange(4 * 6 * 7).reshape(4, 6, 7)
    unit = codes.UCUM.SquareMillimeterPerSecond
    for options in (
        {"value_range": (3, 120), "slope": 0.37, "intercept": -11.5},
        {"value_range": (0, 167), "lut_data": (numpy.arange(168.0) ** 1.5).tolist()},
    ):
        one = highdicom.pm.RealWorldValueMapping("1", "1", unit, **options)
        made = with_maps(series_of(stored), one)
        first, last = options["value_range"]
        inside = (stored >= first) & (stored <= last)
        expected = one.apply(stored.clip(first, last))
        volume = volume_grinder(values="real_world", dtype="f8")(kind(made))
        numpy.testing.assert_allclose(
            volume.array, numpy.where(inside, expected, numpy.nan), rtol=1e-15
        )
        assert volume.units == unit.value


@pytest.mark.parametrize("fragments", [False, True])
def test_p11_what_a_frame_says_counts_more_than_what_is_shared(fragments: bool) -> None:
    series = make_series(5, 6, 7)
    order = [3, 0, 4, 1, 2]
    one = enhanced(series, order)
    one.RealWorldValueMappingSequence = [linear(0, 65535, 99, 0)]
    one.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = [linear(0, 4095, 2, 0)]
    own = one.PerFrameFunctionalGroupsSequence[0]
    own.RealWorldValueMappingSequence = [linear(0, 4095, 3, 1)]
    if fragments:
        cells = numpy.frombuffer(one.PixelData, "<u2").reshape(5, 6, 7)
        one.PixelData = pydicom.encaps.encapsulate([rle(cell) for cell in cells])
        one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
        one.file_meta.TransferSyntaxUID = RLE
    volume = volume_grinder(values="real_world")(lazy([one]))
    for k, slice_ in enumerate(series):
        slope, intercept = (3, 1) if k == order[0] else (2, 0)
        expected = stored_of(slice_) * slope + intercept
        numpy.testing.assert_array_equal(volume.array[k], expected)
    del one.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    array = numpy_grinder(values="real_world", order="given")(lazy([one]))
    numpy.testing.assert_array_equal(array[1], stored_of(series[0]) * 99)


def test_p11_limits_whose_sign_contradicts_the_pixels_are_read_by_their_bits() -> None:
    made = with_maps(series_of(SIGNED, True), linear(0, 1, 2, 0))
    for one in made:
        mapped = one.RealWorldValueMappingSequence[0]
        mapped.add_new("RealWorldValueFirstValueMapped", "US", 32768)
        mapped.add_new("RealWorldValueLastValueMapped", "US", 32767)
    found = numpy_grinder(values="real_world")(lazy(made))
    numpy.testing.assert_array_equal(found, SIGNED * 2.0)


@pytest.mark.parametrize("last", [100, 40000])
def test_p11_p17_a_limit_with_two_meanings_is_refused(last: int) -> None:
    """The header says unsigned and the codestream signed: 40000 may stand for -25536."""
    cells = numpy.arange(3 * 32 * 40).reshape(3, 32, 40).astype("<i2") % 200 - 50
    made = with_maps(make_series(*cells.shape), linear(0, last, 2, 0))
    for one, slice_ in zip(made, cells, strict=True):
        frame = bytes(
            imagecodecs.jpeg2k_encode(slice_, level=0, reversible=True, codecformat="j2k")
        )
        one.PixelData = encapsulate([frame])
        one.file_meta.TransferSyntaxUID = JPEG2000Lossless
        one.PixelRepresentation, one.BitsStored, one.HighBit = 0, 16, 15
    if last == 40000:
        with pytest.raises(InvalidDataset, match=r"40000.*two meanings.*rescaled") as told:
            numpy_grinder(values="real_world")(lazy(made))
        assert made[0].SOPInstanceUID in str(told.value)
    else:
        found = numpy_grinder(values="real_world")(lazy(made))
        inside = (cells >= 0) & (cells <= last)
        numpy.testing.assert_array_equal(found, numpy.where(inside, cells * 2.0, numpy.nan))


def test_p11_limits_of_double_precision_count() -> None:
    one = linear(0, 0, 2, 0)
    one.DoubleFloatRealWorldValueFirstValueMapped = 9.5
    one.DoubleFloatRealWorldValueLastValueMapped = 40000.5
    found = numpy_grinder(values="real_world")(lazy(with_maps(series_of(UNSIGNED), one)))
    inside = (UNSIGNED >= 9.5) & (UNSIGNED <= 40000.5)
    numpy.testing.assert_array_equal(found, numpy.where(inside, UNSIGNED * 2.0, numpy.nan))


def test_p11_of_several_maps_the_one_whose_units_all_images_have_is_taken(kind: Callable) -> None:
    made = series_of(UNSIGNED)
    with_maps(made, linear(0, 65535, 2, 0), linear(0, 65535, 3, 0, units="1", label="other"))
    with pytest.raises(InvalidDataset, match="'ADC' in 'mm2/s', 'other' in '1'") as told:
        numpy_grinder(values="real_world")(kind(made))
    assert made[0].SOPInstanceUID in str(told.value)
    del made[2].RealWorldValueMappingSequence[0]
    found = volume_grinder(values="real_world")(kind(made))
    numpy.testing.assert_array_equal(found.array, UNSIGNED * 3.0)
    assert found.units == "1"
    # The same map twice is one.
    with_maps(made, linear(0, 65535, 2, 0), linear(0, 65535, 2, 0))
    numpy.testing.assert_array_equal(numpy_grinder(values="real_world")(kind(made)), UNSIGNED * 2.0)


def test_p11_images_without_units_in_common_are_told(kind: Callable) -> None:
    made = with_maps(series_of(UNSIGNED), linear(0, 65535, 2, 0))
    with_maps(made[1:2], linear(0, 65535, 2, 0, units="1"))
    with pytest.raises(InconsistentSeries, match="mm2/s"):
        numpy_grinder(values="real_world")(kind(made))


def test_p11_images_without_a_map_are_told(kind: Callable) -> None:
    made = with_maps(series_of(UNSIGNED), linear(0, 65535, 2, 0))
    del made[1].RealWorldValueMappingSequence, made[3].RealWorldValueMappingSequence
    with pytest.raises(InvalidDataset, match="and 1 more of 4") as told:
        numpy_grinder(values="real_world")(kind(made))
    assert made[1].SOPInstanceUID in str(told.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda one: delattr(one, "RealWorldValueSlope"),
        lambda one: delattr(one, "RealWorldValueIntercept"),
        lambda one: delattr(one, "RealWorldValueFirstValueMapped"),
        lambda one: setattr(one, "RealWorldValueSlope", math.nan),
        lambda one: setattr(one, "RealWorldValueSlope", [1.0, 2.0]),
        lambda one: setattr(one, "RealWorldValueFirstValueMapped", 65535),
        lambda one: setattr(one, "RealWorldValueLUTData", [1.0, 2.0]),
        lambda one: setattr(one, "RealWorldValueSlope", 0.0),
    ],
)
def test_p11_a_map_that_cannot_be_understood_is_told(kind: Callable, damage: Callable) -> None:
    made = with_maps(series_of(UNSIGNED), linear(0, 65534, 2, 0))
    damage(made[2].RealWorldValueMappingSequence[0])
    with pytest.raises(DicomnodeError) as told:
        numpy_grinder(values="real_world")(kind(made))
    assert made[2].SOPInstanceUID in str(told.value)


def test_p10_mr_keeps_its_rescale_and_gives_real_world_values_on_request(kind: Callable) -> None:
    """Of Philips the rescale is for display; the mapping gives the floating point values."""
    made = series_of(UNSIGNED)
    for one in made:
        one.SOPClassUID, one.Modality = "1.2.840.10008.5.1.4.1.1.4", "MR"
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = "1.25", "0", "normalized"
        block = one.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", 0.004)
    with_maps(made, linear(0, 65535, 250.0, 0, units="[arb'U]"))
    volume = volume_grinder(kind(made))
    numpy.testing.assert_array_equal(volume.array, (UNSIGNED * 1.25).astype("f4"))
    assert volume.units == "normalized"
    volume = volume_grinder(values="real_world")(kind(made))
    numpy.testing.assert_array_equal(volume.array, UNSIGNED * 250.0)
    assert volume.units == "[arb'U]"


@pytest.mark.parametrize("double", [False, True])
def test_p5_p11_floats_are_mapped_where_the_map_reaches(kind: Callable, double: bool) -> None:
    made = make_series(3, 4, 5)
    floats = numpy.random.default_rng(2).normal(0, 1, (3, 4, 5)).astype("f8" if double else "f4")
    for one, values in zip(made, floats, strict=True):
        del one.PixelData, one.BitsStored, one.HighBit, one.PixelRepresentation
        del one.RescaleSlope, one.RescaleIntercept
        one.BitsAllocated = 64 if double else 32
        setattr(one, "DoubleFloatPixelData" if double else "FloatPixelData", values.tobytes())
        mapped = linear(0, 0, 2, 1, units="[hnsf'U]")
        del mapped.RealWorldValueFirstValueMapped, mapped.RealWorldValueLastValueMapped
        mapped.DoubleFloatRealWorldValueFirstValueMapped = -1.0
        mapped.DoubleFloatRealWorldValueLastValueMapped = 0.5
        with_maps([one], mapped)
        prefix = "DoubleFloat" if double else "Float"
        setattr(one, f"{prefix}PixelPaddingValue", float(values[1, 1]))
        setattr(one, f"{prefix}PixelPaddingRangeLimit", float(values[1, 1]) - 1)
    volume = volume_grinder(values="real_world", padding=True)(kind(made))
    inside = (floats >= -1) & (floats <= 0.5)
    expected = numpy.where(inside, floats.astype("f8") * 2 + 1, numpy.nan)
    numpy.testing.assert_array_equal(volume.array, expected.astype(floats.dtype))
    assert volume.units == "[hnsf'U]"
    ends = floats[:, 1:2, 1:2]
    numpy.testing.assert_array_equal(volume.padding, (floats <= ends) & (floats >= ends - 1))


def test_p11_a_parametric_map_of_highdicom_is_read(tmp_path: Path) -> None:
    source = make_series(4, 6, 7)
    floats = numpy.random.default_rng(4).normal(0, 1, (4, 6, 7)).astype("f4")
    made = highdicom.pm.ParametricMap(
        source_images=source,
        pixel_array=floats,
        series_instance_uid=highdicom.UID(),
        series_number=1,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            highdicom.pm.RealWorldValueMapping(
                "1",
                "1",
                codes.UCUM.SquareMillimeterPerSecond,
                (-9.0, 9.0),
                slope=2.0,
                intercept=1.0,
            )
        ],
        voi_lut_transformations=[highdicom.VOILUTTransformation(window_center=0, window_width=1)],
        content_qualification="RESEARCH",
    )
    made.save_as(tmp_path / "map.dcm")
    volume = volume_grinder(values="real_world")(load(tmp_path))
    expected = numpy.where(abs(floats) <= 9, floats * 2 + 1, numpy.nan)
    numpy.testing.assert_allclose(volume.array, expected, rtol=1e-6)
    numpy.testing.assert_allclose(volume.affine, volume_grinder(source).affine, atol=1e-6)
    assert volume.units == "mm2/s"


def test_p11_p13_colour_has_neither_real_world_values_nor_padding(kind: Callable) -> None:
    made = with_maps(make_series(2, 4, 5), linear(0, 255, 2, 0))
    for one in made:
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
        one.BitsAllocated, one.BitsStored, one.HighBit = 8, 8, 7
        one.PixelData = bytes(range(60))
    with pytest.raises(UnsupportedImage, match="colour"):
        numpy_grinder(values="real_world")(kind(made))
    with pytest.raises(UnsupportedImage, match="padding"):
        volume_grinder(padding=True)(kind(made))


def test_nothing_of_real_world_values_is_read_twice_for_plain_maps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = with_maps(series_of(UNSIGNED), linear(0, 65535, 2, 0))
    monkeypatch.setattr(images, "_map", None)
    numpy_grinder(values="real_world")(lazy(made))


# SUV


def pet(**values: Any) -> list[Dataset]:
    """One hour after 370 MBq of 18F, 70 kg."""
    made = series_of(UNSIGNED)
    administration = item(
        RadionuclideTotalDose="370000000",
        RadionuclideHalfLife="6586.2",
        RadiopharmaceuticalStartTime="100000",
    )
    for k, one in enumerate(made):
        del one.RescaleType
        one.SOPClassUID, one.Modality = "1.2.840.10008.5.1.4.1.1.128", "PT"
        one.Units, one.DecayCorrection = "BQML", "START"
        one.CorrectedImage = ["DECY", "ATTN", "SCAT"]
        one.PatientWeight = "70"
        one.SeriesDate = one.AcquisitionDate = "20240229"
        one.SeriesTime, one.AcquisitionTime = "110000.00", "110130"
        one.RescaleSlope, one.RescaleIntercept = str(0.5 + k / 4), "0"
        one.RadiopharmaceuticalInformationSequence = [copy.deepcopy(administration)]
        for keyword, value in values.items():
            change(one, keyword, value)
    return made


def change(one: Dataset, keyword: str, value: Any) -> None:
    """Set an attribute at the top or of the administration; None takes it out."""
    administration = one.RadiopharmaceuticalInformationSequence[0]
    of_administration = keyword.startswith("Radio") and "Sequence" not in keyword
    where = administration if of_administration else one
    if value is None:
        delattr(where, keyword)
    else:
        setattr(where, keyword, value)


def factor_of(given: list[Dataset]) -> float:
    """From rescaled values to SUV, the same in all images."""
    volume = volume_grinder(values="suv", dtype="f8")(given)
    assert volume.units == "g/ml"
    rescaled = numpy_grinder(dtype="f8")(given)
    factor = float(volume.array[0, 0, 0] / rescaled[0, 0, 0])
    numpy.testing.assert_allclose(volume.array, rescaled * factor, rtol=1e-12)
    return factor


def hours(count: float, half_life: float = 6586.2) -> float:
    """The factor of 70 kg and 370 MBq after so many hours."""
    return 70_000 / (370e6 * 0.5 ** (count * 3600 / half_life))


def test_p12_suv_is_activity_by_dose_and_weight(kind: Callable) -> None:
    # 0.5^(3600 / 6586.2) = 0.684633, 70000 / (3.7e8 * 0.684633) = 2.76337e-4.
    assert factor_of(kind(pet())) == pytest.approx(2.76337e-4, rel=1e-5)
    assert factor_of(kind(pet())) == pytest.approx(hours(1), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"DecayCorrection": "ADMIN"}, hours(0)),
        ({"DecayCorrection": "ADMIN", "RadionuclideHalfLife": None}, hours(0)),
        ({"RadiopharmaceuticalStartDateTime": "20240229090000"}, hours(2)),
        ({"RadiopharmaceuticalStartDateTime": "20240228230000.5 "}, hours(12 - 0.5 / 3600)),
        ({"RadiopharmaceuticalStartDateTime": "20240225110000", "RadionuclideHalfLife": "282240"},
         hours(96, 282240)),
        ({"RadiopharmaceuticalStartTime": "105959.250000"}, hours(0.75 / 3600)),
        ({"RadiopharmaceuticalStartTime": "1030"}, hours(0.5)),
        # The scan is just past midnight.
        ({"RadiopharmaceuticalStartTime": "233000", "SeriesTime": "001500",
          "AcquisitionTime": "001500"}, hours(0.75)),
        ({"RadiopharmaceuticalStartDateTime": "20240229100000+0100",
          "TimezoneOffsetFromUTC": "+0000"}, hours(2)),
        ({"RadiopharmaceuticalStartDateTime": "20240229100000",
          "TimezoneOffsetFromUTC": "-0330"}, hours(1)),
        # In UTC the day is another one.
        ({"RadiopharmaceuticalStartTime": "000000", "SeriesTime": "003000",
          "AcquisitionTime": "003000", "TimezoneOffsetFromUTC": "+0900"}, hours(0.5)),
        ({"RadiopharmaceuticalStartTime": "190000", "SeriesTime": "200000",
          "AcquisitionTime": "200000", "TimezoneOffsetFromUTC": "-0800"}, hours(1)),
        # An altered SeriesTime: GE, FrameReferenceTime, or else the earliest acquisition.
        ({"SeriesTime": "130000"}, hours(1.025)),
        ({"SeriesTime": "130000", "FrameReferenceTime": "0", "ActualFrameDuration": "60000"},
         hours(1.025)),
        ({"SeriesTime": "130000", "FrameReferenceTime": "90000", "ActualFrameDuration": "1"},
         hours(1 + 0.0005 / 3600)),
        ({"AcquisitionDate": None, "AcquisitionDateTime": "20240229110130"}, hours(1)),
        ({"Units": "GML"}, 1.0),
        ({"Units": "GML", "SUVType": "BW", "PatientWeight": None}, 1.0),
        ({"PatientWeight": "35"}, hours(1) / 2),
        ({"RescaleIntercept": None}, hours(1)),
    ],
)  # fmt: skip
def test_p12_suv_by_hand(kind: Callable, changes: dict[str, Any], expected: float) -> None:
    assert factor_of(kind(pet(**changes))) == pytest.approx(expected, rel=1e-9)


def test_p12_ge_tells_the_time_of_an_altered_series(kind: Callable) -> None:
    made = pet(SeriesTime="130000")
    for one in made:
        block = one.private_block(0x0009, "GEMS_PETD_01", create=True)
        block.add_new(0x0D, "DT", "20240229104500.00")
    assert factor_of(kind(made)) == pytest.approx(hours(0.75), rel=1e-12)


def test_p12_an_altered_series_without_more_takes_the_earliest_bed_and_says_so(
    kind: Callable,
) -> None:
    made = pet(SeriesTime="130000")
    for k, one in enumerate(made):
        one.AcquisitionTime = f"11{3 - k:02}00"
    given = kind(made)
    assert factor_of(given) == pytest.approx(hours(1), rel=1e-12)
    (warning,) = volume_grinder(values="suv")(given).warnings
    assert "SeriesTime" in warning
    assert "11:00:00" in warning


def test_p12_frame_reference_times_of_several_beds_give_one_time(kind: Callable) -> None:
    """Each bed two minutes; the time of average activity is a little before the middle."""
    made = pet(SeriesTime="130000", ActualFrameDuration="120000")
    decay = math.log(2) / 6586.2
    # The activity at the time of the average, over the frame, is the mean of 1000 moments.
    moments = numpy.exp(-decay * (numpy.arange(1000) + 0.5) * 0.12)
    average = -math.log(float(moments.mean())) / decay
    for k, one in enumerate(made):
        one.AcquisitionTime = f"11{2 * k:02}00"
        one.FrameReferenceTime = f"{(120 * k + average) * 1000:.6f}"
    assert factor_of(kind(made)) == pytest.approx(hours(1), rel=1e-8)
    made[2].FrameReferenceTime = "900000"
    with pytest.raises(InvalidDataset, match="FrameReferenceTime"):
        factor_of(kind(made))


@pytest.mark.parametrize(
    ("suv", "activity", "expected"),
    [
        ("0.000551", "1.602563", 0.000551),
        ("0.000551", None, 0.000551),
        ("0", "1.5", 1.5 * hours(1)),
        (None, "1.5", 1.5 * hours(1)),
    ],
)
def test_p12_counts_of_philips_have_factors_of_their_own(
    kind: Callable, suv: str | None, activity: str | None, expected: float
) -> None:
    def written_by(creator: str) -> list[Dataset]:
        made = pet(Units="CNTS")
        for one in made:
            block = one.private_block(0x7053, creator, create=True)
            for element, value in ((0x00, suv), (0x09, activity)):
                if value is not None:
                    block.add_new(element, "DS", value)
        return kind(made)

    found = factor_of(written_by("Philips PET Private Group"))
    assert found == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InvalidDataset, match="Philips"):
        factor_of(written_by("somebody else"))


@pytest.mark.parametrize(
    ("changes", "told_as"),
    [
        ({"PatientWeight": None}, "PatientWeight"),
        ({"PatientWeight": ""}, "PatientWeight"),
        ({"PatientWeight": "0"}, "PatientWeight"),
        ({"PatientWeight": "70000"}, "kilograms"),
        ({"Units": None}, "Units"),
        ({"Units": "PROPCPS"}, "PROPCPS"),
        ({"Units": "CNTS"}, "Philips"),
        ({"Units": "GML", "SUVType": "LBM"}, "SUVType"),
        ({"DecayCorrection": "NONE"}, "DecayCorrection"),
        ({"DecayCorrection": None}, "DecayCorrection"),
        ({"CorrectedImage": ["DECY", "SCAT"]}, "ATTN"),
        ({"CorrectedImage": "ATTN"}, "DECY"),
        ({"CorrectedImage": None}, "CorrectedImage"),
        ({"RadionuclideTotalDose": None}, "RadionuclideTotalDose"),
        ({"RadionuclideTotalDose": "370"}, "becquerels"),
        ({"RadionuclideHalfLife": None}, "RadionuclideHalfLife"),
        ({"RadionuclideHalfLife": "-1"}, "RadionuclideHalfLife"),
        ({"RadiopharmaceuticalStartTime": None}, "RadiopharmaceuticalStartTime"),
        ({"RadiopharmaceuticalStartTime": "10"}, "RadiopharmaceuticalStartTime"),
        ({"RadiopharmaceuticalStartDateTime": "20240229"}, "RadiopharmaceuticalStartDateTime"),
        ({"RadiopharmaceuticalStartDateTime": "20240229100000+0100"}, "TimezoneOffsetFromUTC"),
        ({"RadiopharmaceuticalStartDateTime": "20240229120000"}, "half-lives"),
        (
            {"RadiopharmaceuticalStartDateTime": "20140229100000"},
            "RadiopharmaceuticalStartDateTime",
        ),
        ({"RadiopharmaceuticalStartDateTime": "20140228100000"}, "half-lives"),
        # Nuclides of days are imaged days later.
        ({"RadionuclideHalfLife": "282240"}, "RadiopharmaceuticalStartDateTime"),
        ({"RadiopharmaceuticalInformationSequence": []}, "one item, not 0"),
        ({"SeriesTime": None}, "SeriesTime"),
        ({"SeriesDate": None}, "SeriesDate"),
        ({"AcquisitionTime": None}, "AcquisitionDateTime"),
        ({"RescaleSlope": None}, "RescaleSlope"),
    ],
)
def test_p12_what_is_missing_or_contradictory_is_refused(
    kind: Callable, changes: dict[str, Any], told_as: str
) -> None:
    given = kind(pet(**changes))
    with pytest.raises(InvalidDataset, match=told_as) as told:
        numpy_grinder(values="suv")(given)
    assert any(one.SOPInstanceUID in str(told.value) for one in given)
    assert "rescaled" in str(told.value)


def test_p12_one_image_that_lacks_something_is_enough(kind: Callable) -> None:
    made = pet()
    change(made[3], "PatientWeight", None)
    with pytest.raises(InvalidDataset, match=made[3].SOPInstanceUID):
        numpy_grinder(values="suv")(kind(made))
    made = pet()
    made[2].SeriesTime = "105900"
    with pytest.raises(InvalidDataset, match="SeriesTime"):
        numpy_grinder(values="suv")(kind(made))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientWeight", "71"),
        ("RadionuclideTotalDose", "380000000"),
        ("Units", "GML"),
        ("RadionuclideHalfLife", "6600"),
        ("RadiopharmaceuticalStartTime", "100100"),
        ("DecayCorrection", "ADMIN"),
    ],
)
def test_p12_images_of_one_series_that_contradict_each_other_are_told(
    kind: Callable, keyword: str, value: str
) -> None:
    made = pet()
    change(made[2], keyword, value)
    with pytest.raises(InvalidDataset, match=keyword) as told:
        volume_grinder(values="suv")(kind(made))
    assert made[0].SOPInstanceUID in str(told.value)
    assert made[2].SOPInstanceUID in str(told.value)
    # Another way to write the same is no contradiction.
    made = pet()
    change(made[2], "RadionuclideTotalDose", "3.7e8")
    change(made[2], "RadiopharmaceuticalStartTime", "100000.00")
    assert factor_of(kind(made)) == factor_of(kind(pet()))


def test_p12_what_is_no_pet_is_told() -> None:
    with pytest.raises(UnsupportedImage, match="'CT'"):
        numpy_grinder(values="suv")(lazy(make_series(2, 3, 4)))
    one = enhanced(make_series(2, 3, 4))
    one.Modality = "PT"
    with pytest.raises(UnsupportedImage, match="real_world"):
        numpy_grinder(values="suv")(lazy([one]))


# Headers of scanners, and the factor that cornerstonejs/calculate-suv gives for each: weight, dose,
# half-life, start of the injection, series, acquisition, FrameReferenceTime, ActualFrameDuration.
SCANNERS = {
    "Siemens": (67, 374e6, 6586.2, "083045.000000", "104829.000000", "104830.351370", 38513.36,
                74324, 0.00042748316187197236),
    "GE": (52, 152022720, 6586.2001953125, "084500.00", "095621", "095621", 0, 120000,
           0.0005367387681819742),
    "Philips": (64, 126e6, 6586.199707, "100058", "110155", "110156", 1328700, 120700,
                0.0007463747013889488),
    "Siemens, acquired 5 us before": (65, 225e6, 6586.2, "114100.000000", "123515.000000",
                                      "123514.999995", 59936.854672596, 120000,
                                      0.0004069156854009332),
    "CPS, altered": (69, 388e6, 6586.2, "120037.000000", "134918.000000", "130348.234000", 0,
                     180000, 0.00026503312764157046),
    "Siemens, no date": (102, 412e6, 6586.2, "125000.000000", "135431.843000", "141555.687000",
                         1372857.9232493, 180000, 0.0003721089202818729),
}  # fmt: skip


@pytest.mark.parametrize("scanner", SCANNERS)
def test_p12_headers_of_scanners_give_what_another_library_gives(scanner: str) -> None:
    weight, dose, half_life, injected, series, acquired, offset, duration, expected = SCANNERS[
        scanner
    ]
    made = pet(
        PatientWeight=str(weight),
        RadionuclideTotalDose=str(dose),
        RadionuclideHalfLife=str(half_life),
        RadiopharmaceuticalStartTime=injected,
        SeriesTime=series,
        AcquisitionTime=acquired,
        FrameReferenceTime=str(offset),
        ActualFrameDuration=str(duration),
    )
    assert factor_of(lazy(made)) == pytest.approx(expected, rel=1e-6)


def test_suv_that_become_a_series_are_read_back_with_their_units() -> None:
    given = lazy(pet())
    volume = volume_grinder(values="suv")(given)
    derived = list(derive_series(volume.array, given, rescale_type=volume.units))
    for values in ("rescaled", "suv"):
        back = volume_grinder(values=values)(lazy(derived))
        numpy.testing.assert_allclose(back.array, volume.array, atol=1e-3)
        assert back.units == ("GML" if values == "rescaled" else "g/ml")
    mask = list(derive_series(volume.array > 5, given, rescale_type="US"))
    assert volume_grinder(lazy(mask)).units == "NONE"


# Padding


@pytest.mark.parametrize(
    ("value", "limit", "first", "last"),
    [(0, None, 0, 0), (100, 5000, 100, 5000), (65535, 60000, 60000, 65535), (70, 70, 70, 70)],
)
def test_p13_padding_is_compared_with_stored_values_before_the_rescale(
    kind: Callable, value: int, limit: int | None, first: int, last: int
) -> None:
    stored = UNSIGNED.copy()
    stored[:, ::2, 1] = value
    made = series_of(stored)
    for one in made:
        one.RescaleSlope, one.RescaleIntercept = "2.5", "-1000"
        one.PixelPaddingValue = value
        if limit is not None:
            one.PixelPaddingRangeLimit = limit
    volume = volume_grinder(padding=True)(kind(made[::-1]))
    assert volume.padding is not None
    assert volume.padding.dtype == numpy.bool_
    expected = (stored >= first) & (stored <= last)
    assert expected.any()
    numpy.testing.assert_array_equal(volume.padding, expected)
    # The array has the values nevertheless, and nobody gets a mask who did not ask.
    numpy.testing.assert_array_equal(volume.array, (stored * 2.5 - 1000).astype("f4"))
    assert volume_grinder(kind(made)).padding is None


@pytest.mark.parametrize(
    ("is_signed", "bits", "vr", "value", "found"),
    [
        (True, 16, "SS", -2000, -2000),
        (True, 16, "US", 63536, -2000),
        (True, 12, "SS", -2000, -2000),
        (True, 12, "US", 63536, -2000),
        (True, 12, "US", 2096, -2000),
        (False, 16, "SS", -2000, 63536),
        (False, 16, "US", 63536, 63536),
        (False, 12, "US", 63536, None),
    ],
)
def test_p13_padding_whose_sign_contradicts_the_pixels_is_read_by_its_bits(
    kind: Callable, is_signed: bool, bits: int, vr: str, value: int, found: int | None
) -> None:
    low, high = (-(1 << bits - 1), 1 << bits - 1) if is_signed else (0, 1 << bits)
    stored = numpy.random.default_rng(3).integers(low, high, (3, 5, 6))
    stored[:, 1, ::2] = 7 if found is None else found
    stored[:, 2, 2] = min(2096, high - 1)
    made = series_of(stored, is_signed, bits)
    for one in made:
        one.add_new("PixelPaddingValue", vr, value)
    volume = volume_grinder(padding=True)(kind(made))
    numpy.testing.assert_array_equal(volume.padding, stored == found)


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("stream_is_signed", [False, True])
@pytest.mark.parametrize(
    ("vr", "value", "limit"),
    [("US", 63536, None), ("SS", -2000, None), ("US", 63536, 10), ("SS", -2000, 10), ("US", 7, 9)],
)
def test_p13_p17_padding_has_the_sign_that_the_values_have(
    is_signed: bool, stream_is_signed: bool, vr: str, value: int, limit: int | None
) -> None:
    cells = numpy.random.default_rng(3).integers(0, 100, (3, 32, 40))
    cells[1:, 3, ::2] = 63536
    cells[2, 4, ::2] = 40000
    cells = cells.astype("<i2" if stream_is_signed else "<u2")
    made = make_series(*cells.shape)
    for one, slice_ in zip(made, cells, strict=True):
        frame = bytes(
            imagecodecs.jpeg2k_encode(slice_, level=0, reversible=True, codecformat="j2k")
        )
        one.PixelData = encapsulate([frame])
        one.file_meta.TransferSyntaxUID = JPEG2000Lossless
        one.PixelRepresentation, one.BitsStored, one.HighBit = int(is_signed), 16, 15
        one.add_new("PixelPaddingValue", vr, value)
        if limit is not None:
            one.add_new("PixelPaddingRangeLimit", vr, limit)
    volume = volume_grinder(padding=True, values="stored")(lazy(made))
    kind = "<i2" if is_signed or stream_is_signed else "<u2"
    ends = numpy.array([value, value if limit is None else limit]).astype(kind)
    stored = cells.astype(kind)
    numpy.testing.assert_array_equal(volume.array, stored)
    expected = (stored >= ends.min()) & (stored <= ends.max())
    assert expected.any()
    numpy.testing.assert_array_equal(volume.padding, expected)


def test_p13_padding_is_that_of_each_image(kind: Callable) -> None:
    made = series_of(UNSIGNED % 3)
    for one, value in zip(made, (0, 1, 2), strict=False):
        one.PixelPaddingValue = value
    volume = volume_grinder(padding=True)(kind(made))
    expected = numpy.stack([*(UNSIGNED[k] % 3 == k for k in range(3)), numpy.zeros((6, 7), bool)])
    numpy.testing.assert_array_equal(volume.padding, expected)


def test_p13_padding_at_the_top_is_that_of_all_frames() -> None:
    series = make_series(5, 6, 7)
    one = enhanced(series, [3, 0, 4, 1, 2])
    value = int(stored_of(series[2])[3, 3])
    one.PixelPaddingValue = value
    volume = volume_grinder(padding=True)(lazy([one]))
    expected = numpy.stack([stored_of(slice_) == value for slice_ in series])
    numpy.testing.assert_array_equal(volume.padding, expected)


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm"])
def test_p13_padding_of_pydicoms_own_files(name: str) -> None:
    path = pydicom.data.get_testdata_file(name)
    assert isinstance(path, str)
    one = pydicom.dcmread(path)
    volume = volume_grinder(padding=True)([LazyDataset(path)])
    assert volume.padding is not None
    numpy.testing.assert_array_equal(volume.padding[0], one.pixel_array == one.PixelPaddingValue)
    assert volume.units == "HU"


def test_p13_a_mask_needs_no_second_array_of_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = series_of(UNSIGNED)
    for one in made:
        one.PixelPaddingValue = int(stored_of(one)[2, 2])
    expected = volume_grinder(padding=True)(lazy(made)).padding
    seen: list[int] = []
    stack = images._core.stack

    def counted(slices: Any, out: Any, *options: bool) -> Any:
        seen.append(len(out))
        return stack(slices, out, *options)

    monkeypatch.setattr(images, "_PART", 2 * 6 * 7)
    monkeypatch.setattr(images._core, "stack", counted)
    numpy.testing.assert_array_equal(volume_grinder(padding=True)(lazy(made)).padding, expected)
    assert seen == [4, 2, 2]


@pytest.mark.parametrize("options", [{"gaps": "fill"}, {"gaps": "resample"}, {"tilt": "resample"}])
def test_p13_padding_of_slices_that_no_image_gave_is_refused_at_once(options: Any) -> None:
    with pytest.raises(IncorrectlyConfigured, match="padding=True"):
        volume_grinder(padding=True, **options)


def test_p11_p13_tiles_of_a_mosaic_have_the_scale_and_the_padding_of_the_whole() -> None:
    """Parts of an image, as a Siemens mosaic gives them."""
    made = series_of(UNSIGNED)[:1]
    with_maps(made, linear(10, 60000, 0.5, 1))
    made[0].PixelPaddingValue = int(UNSIGNED[0, 4, 4])
    (whole,), _ = images.read_slices(lazy(made), values="real_world")
    tiles = [whole.moved((row, 3), rows=3, columns=4) for row in (0, 3)]
    found, _ = images.read_array(tiles, images.Reading(values="real_world"))
    expected = numpy.where((UNSIGNED >= 10) & (UNSIGNED <= 60000), UNSIGNED * 0.5 + 1, numpy.nan)
    parts = numpy.stack([expected[0, 0:3, 3:7], expected[0, 3:6, 3:7]])
    numpy.testing.assert_array_equal(found, parts.astype("f4"))
    assert [tile.units for tile in tiles] == ["mm2/s"] * 2
    mask = UNSIGNED[0] == UNSIGNED[0, 4, 4]
    padding = images.read_padding(tiles)
    numpy.testing.assert_array_equal(padding, [mask[0:3, 3:7], mask[3:6, 3:7]])
    assert padding.any()


def test_p11_policies_and_split_series_take_real_world_values() -> None:
    made = with_maps(series_of(UNSIGNED), linear(0, 65535, 2, 0))
    filled = volume_grinder(lazy([*made[:2], made[3]]), values="real_world", gaps="fill")
    expected = (UNSIGNED * 2.0).astype("f4")
    numpy.testing.assert_array_equal(filled.array[[0, 1, 3]], expected[[0, 1, 3]])
    assert numpy.isnan(filled.array[2]).all()
    assert filled.units == "mm2/s"
    split = series_grinder(lazy(made), values="real_world")
    numpy.testing.assert_array_equal(split[None].array, expected)


def test_p13_padding_that_is_no_number_is_told() -> None:
    made = series_of(UNSIGNED)
    made[1].add_new("PixelPaddingValue", "US", [1, 2])
    with pytest.raises(InvalidDataset, match=r"PixelPaddingValue.*padding=True") as told:
        volume_grinder(padding=True)(lazy(made))
    assert made[1].SOPInstanceUID in str(told.value)
    volume_grinder(lazy(made))


@pytest.mark.parametrize(
    ("value", "bits", "is_signed", "expected"),
    [(-1, 16, True, -1), (65535, 16, True, -1), (65535, 32, True, -1), (65535, 32, False, 65535),
     (0x8000, 16, True, -32768), (255, 8, True, -1), (127, 8, True, 127)],
)  # fmt: skip
def test_p13_sixteen_bits_with_the_sign_of_the_pixels(
    value: int, bits: int, is_signed: bool, expected: int
) -> None:
    assert signed(value, bits, is_signed) == expected


def test_an_array_logs_what_a_volume_would_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    made = with_maps(series_of(UNSIGNED), linear(7, 40000, 2, 0))
    with caplog.at_level(logging.WARNING, "dicomnode.grinders"):
        numpy_grinder(values="real_world")(lazy(made))
    assert "NaN" in caplog.text

"""Results that an archive would refuse or misread are told; what is legal passes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.uid import (
    ColorPaletteStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from dicomnode.errors import InvalidDataset
from dicomnode.lib.dicom import LazyDataset, encode, scan
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.lib.results import check_result
from dicomnode.lib.series import derive_series
from dicomnode.testing import make_series


def check(dataset: Dataset) -> None:
    check_result(scan(encode(dataset)[0]))


def one(**values: Any) -> Dataset:
    """A CT slice of 5 x 7 with these values; None leaves an attribute out."""
    (dataset,) = make_series(1, 5, 7)
    for keyword, value in values.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    return dataset


def written(dataset: Dataset) -> Dataset:
    return pydicom.dcmread(io.BytesIO(encode(dataset)[0]))


# What has to be there


@pytest.mark.parametrize(
    ("keyword", "name", "remedy"),
    [
        ("StudyInstanceUID", "(0020,000D) StudyInstanceUID", "copy it from a source image"),
        ("SeriesInstanceUID", "(0020,000E) SeriesInstanceUID", "new one"),
        ("Modality", "(0008,0060) Modality", "such as SEG or SR"),
        ("PhotometricInterpretation", "(0028,0004) PhotometricInterpretation", "derive_series"),
    ],
)
@pytest.mark.parametrize("value", [None, "", " "])
def test_what_is_missing_or_empty_is_told(
    keyword: str, name: str, remedy: str, value: str | None
) -> None:
    dataset = one(**{keyword: value})
    with pytest.raises(InvalidDataset) as told:
        check(dataset)
    message = str(told.value)
    assert message.startswith(f"result {dataset.SOPInstanceUID}: {name} is missing or empty; ")
    assert remedy in message


@pytest.mark.parametrize(
    "keyword",
    ["Rows", "Columns", "SamplesPerPixel", "BitsStored", "HighBit",
     "PixelRepresentation"],
)  # fmt: skip
def test_what_describes_pixels_has_to_be_there(keyword: str) -> None:
    with pytest.raises(InvalidDataset, match=f"{keyword} is missing or empty; copy it"):
        check(one(**{keyword: None}))


def test_what_tells_how_pixels_are_written_has_to_be_there() -> None:
    with pytest.raises(InvalidDataset, match="BitsAllocated"):
        check(one(BitsAllocated=None))


def test_an_image_without_pixels_is_told() -> None:
    with pytest.raises(InvalidDataset, match="PixelData is missing in a CT Image Storage object"):
        check(one(PixelData=None))
    check(one(PixelData=None, PixelDataProviderURL="https://example.org/pixels"))


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID"])
def test_a_uid_that_is_none_is_told(keyword: str) -> None:
    with pytest.raises(InvalidDataset, match=f"{keyword} is '1.2/3', which is no UID"):
        check(one(**{keyword: "1.2/3"}))


# Pixels


@pytest.mark.parametrize(
    "values",
    [
        {"Rows": 6},
        {"Columns": 5},
        {"NumberOfFrames": 2},
        {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7},
        {"BitsAllocated": 32},
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        {"PixelData": b""},
        {"PixelData": bytes(68)},
        {"PixelData": bytes(72)},
    ],
)
@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_pixels_of_another_length_are_told(values: dict[str, Any], syntax: Any) -> None:
    dataset = one(**values)
    if syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
    with pytest.raises(InvalidDataset) as told:
        check(dataset)
    message = str(told.value)
    assert message.startswith(f"result {dataset.SOPInstanceUID}: (7FE0,0010) PixelData has ")
    assert "give these attributes the shape and type of the array" in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"BitsAllocated": 12}, "BitsAllocated is 12, neither 1 nor a multiple of 8"),
        ({"BitsStored": 17}, "BitsStored is 17 with HighBit 11"),
        ({"HighBit": 16}, "HighBit 16 and BitsAllocated 16"),
        ({"NumberOfFrames": 0}, "NumberOfFrames is '0'"),
        ({"Rows": 0}, "Rows is 0"),
        ({"PhotometricInterpretation": "RGB"}, "SamplesPerPixel is 1, and PhotometricInterp"),
        (
            {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PixelData": bytes(210)},
            "PlanarConfiguration is missing",
        ),
    ],
)
def test_pixels_that_contradict_what_describes_them_are_told(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidDataset, match=said):
        check(one(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"Rows": 3, "Columns": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(9)},
        {"Rows": 3, "Columns": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(10)},
        {"NumberOfFrames": 3, "PixelData": bytes(210)},
        {"NumberOfFrames": "+3", "PixelData": bytes(210)},
        {"Rows": 3, "Columns": 3, "NumberOfFrames": 5, "BitsAllocated": 1, "BitsStored": 1, "HighBit": 0,
         "PixelData": bytes(6)},
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422", "PlanarConfiguration": 0,
         "Columns": 8, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(80)},
        {"PatientID": "", "PatientName": "", "StudyDate": "", "SeriesNumber": None, "StudyID": ""},
    ],
)  # fmt: skip
def test_what_is_legal_passes(values: dict[str, Any]) -> None:
    check(one(**values))


def test_the_length_of_compressed_pixels_tells_nothing() -> None:
    dataset = one(PixelData=encapsulate([b"\xff\x4f\xff\x51" + bytes(30)]))
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    check(dataset)


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_pixels_that_are_floating_point_numbers_have_their_length_too(keyword: str) -> None:
    dataset = one(PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None)
    bits = 32 if keyword == "FloatPixelData" else 64
    dataset.BitsAllocated = bits
    setattr(dataset, keyword, bytes(35 * bits // 8))
    check(dataset)
    dataset.Rows = 4
    with pytest.raises(InvalidDataset, match=f"{keyword} has {35 * bits // 8} bytes"):
        check(dataset)


def test_pixels_of_another_byte_order_are_counted_too() -> None:
    dataset = one()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    check(dataset)
    dataset.Rows = 4
    with pytest.raises(InvalidDataset, match="PixelData has 70 bytes"):
        check(dataset)


# Objects of other programs


def test_derived_series_pass() -> None:
    images = [LazyDataset(encode(image)[0]) for image in make_series(5, 9, 11)]
    for result in derive_series(numpy_grinder(images) / 7, images):
        check(result)


def segments(kind: str) -> Dataset:
    hd = pytest.importorskip("highdicom")
    source = [written(image) for image in make_series(5, 9, 11)]
    mask = numpy.zeros((5, 9, 11), numpy.uint8)
    mask[1:3, 2:5, 3:6] = 1
    described = hd.seg.SegmentDescription(
        1, "1", codes.cid7150.Tissue, codes.cid7150.Tissue, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    return hd.seg.Segmentation(
        source, mask if kind == "BINARY" else mask.astype(float), kind, [described], hd.UID(), 1,
        hd.UID(), 1, "m", "mm", "1", "1",
    )  # fmt: skip


def parameters(dtype: type) -> Dataset:
    hd = pytest.importorskip("highdicom")
    source = [written(image) for image in make_series(5, 9, 11)]
    reach = (0, 255) if dtype is numpy.uint16 else (-1e6, 1e6)
    mapping = hd.pm.RealWorldValueMapping(
        "1", "values", codes.UCUM.NoUnits, reach, slope=1, intercept=0
    )
    return hd.pm.ParametricMap(
        source, numpy.ones((5, 9, 11), dtype), hd.UID(), 1, hd.UID(), 1, "m", "mm", "1", "1", False,
        [mapping], voi_lut_transformations=[hd.VOILUTTransformation(1, 2)],
    )  # fmt: skip


def report() -> Dataset:
    hd = pytest.importorskip("highdicom")
    source = [written(image) for image in make_series(2, 9, 11)]
    device = hd.sr.DeviceObserverIdentifyingAttributes(hd.UID())
    observer = hd.sr.ObserverContext(codes.DCM.Device, device)
    content = hd.sr.MeasurementReport(
        hd.sr.ObservationContext(observer_device_context=observer),
        codes.LN.CTUnspecifiedBodyRegion,
        [
            hd.sr.MeasurementsAndQualitativeEvaluations(
                hd.sr.TrackingIdentifier(hd.UID(), "whole"),
                measurements=[hd.sr.Measurement(codes.SCT.Volume, 3.0, codes.UCUM.CubicMillimeter)],
                source_images=[hd.sr.SourceImageForMeasurementGroup.from_source_image(source[0])],
            )
        ],
    )
    return hd.sr.Comprehensive3DSR(source, content, hd.UID(), 1, hd.UID(), 1, manufacturer="m")


def structures() -> Dataset:
    """As other programs write it: no pixels, and empty where type 2 allows it."""
    source = make_series(1, 9, 11)[0]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = source.StudyInstanceUID, generate_uid()
    dataset.Modality, dataset.PatientID, dataset.PatientName = "RTSTRUCT", "", ""
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    return dataset


def capture() -> Dataset:
    """A secondary capture, of which Modality is of type 3."""
    return one(SOPClassUID=SecondaryCaptureImageStorage, Modality=None)


def palette() -> Dataset:
    """About no patient, so that it has no study."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = ColorPaletteStorage, generate_uid()
    dataset.ContentLabel = "GREY"
    return dataset


def private() -> Dataset:
    """What a private object has to have is its inventor's business."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.3.12.2.1107.5.9.1", generate_uid()
    return dataset


@pytest.mark.parametrize(
    "make",
    [
        lambda: segments("BINARY"),
        lambda: segments("FRACTIONAL"),
        lambda: parameters(numpy.float32),
        lambda: parameters(numpy.float64),
        lambda: parameters(numpy.uint16),
        report,
        structures,
        capture,
        palette,
        private,
    ],
)
def test_objects_of_other_kinds_pass(make: Callable[[], Dataset]) -> None:
    check(make())


@pytest.mark.parametrize(
    "name",
    ["CT_small", "MR_small", "MR_small_bigendian", "MR_small_RLE", "JPEG2000", "SC_rgb_small_odd",
     "SC_ybr_full_422_uncompressed", "SC_rgb_rle_16bit_2frame", "examples_palette", "examples_overlay",
     "liver_1frame", "rtdose", "rtplan", "reportsi", "test-SR", "waveform_ecg", "image_dfl"],
)  # fmt: skip
def test_objects_in_the_field_pass(name: str) -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    check(pydicom.dcmread(folder / f"{name}.dcm"))

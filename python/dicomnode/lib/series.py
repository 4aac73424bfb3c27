"""From an array back to DICOM: a derived series on the grid of the images it was made from.

Solves what is easy to get wrong by hand: new UIDs in the same study and frame of reference, the
geometry of each source slice, one rescale for the whole series that loses at most half a step, and
no attribute that was only true of the source.
"""

import copy
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray
from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)
from pydicom.valuerep import format_number_as_ds

from dicomnode.errors import InconsistentSeries, InvalidDataset, UnsupportedImage
from dicomnode.lib.dicom import LazyDataset
from dicomnode.lib.images import ImageHeader, Reading, Slice, called, read_slices
from dicomnode.lib.splits import tags_of, value_of
from dicomnode.lib.stack import Policies, arrange
from dicomnode.lib.uids import SeriesUids, Uids

# What stays true of an image that was computed from another (patient, study, equipment, frame of
# reference, plane), besides all public elements of the groups for acquisition (0018) and nuclear
# medicine (0054). Everything else is left out: LUTs, overlays, private elements, functional groups.
_KEPT_KEYWORDS = (
    "SpecificCharacterSet", "SOPClassUID", "StudyDate", "SeriesDate", "AcquisitionDate",
    "AcquisitionDateTime", "StudyTime", "SeriesTime", "AcquisitionTime", "AccessionNumber",
    "Modality", "Manufacturer", "InstitutionName", "ReferringPhysicianName",
    "TimezoneOffsetFromUTC", "StudyDescription", "ManufacturerModelName", "PatientName",
    "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge",
    "PatientSize", "PatientWeight", "StudyInstanceUID", "StudyID", "AcquisitionNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "Laterality",
    "PositionReferenceIndicator", "SliceLocation", "PixelSpacing", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod", "CorrectedImage",
)  # fmt: skip
# The single-frame class of an enhanced or legacy converted one.
_CLASSIC: dict[str, UID] = {
    EnhancedCTImageStorage: CTImageStorage,
    LegacyConvertedEnhancedCTImageStorage: CTImageStorage,
    EnhancedMRImageStorage: MRImageStorage,
    LegacyConvertedEnhancedMRImageStorage: MRImageStorage,
}
# What a single-frame image says of its acquisition, and where a frame says it.
_FRAME_KEYWORDS = {
    "KVP": ("KVP",),
    "RepetitionTime": ("RepetitionTime",),
    "EchoTime": ("EchoTime", "EffectiveEchoTime"),
    "EchoTrainLength": ("EchoTrainLength",),
    "FlipAngle": ("FlipAngle",),
    "ScanOptions": ("ScanOptions",),
    "MRAcquisitionType": ("MRAcquisitionType",),
    "TemporalPositionIdentifier": ("TemporalPositionIdentifier", "TemporalPositionIndex"),
    "DiffusionBValue": ("DiffusionBValue",),
    "AcquisitionNumber": ("AcquisitionNumber",),
    "PatientPosition": ("PatientPosition",),
}
_FRAME_TAGS = tags_of({place for places in _FRAME_KEYWORDS.values() for place in places})
# What has to be there, be it empty (PS3.3 C.8.2.1, C.8.3.1).
_TYPE_2: dict[str, tuple[str, ...]] = {
    CTImageStorage: ("KVP", "AcquisitionNumber"),
    MRImageStorage: (
        "RepetitionTime", "EchoTime", "EchoTrainLength", "ScanOptions", "MRAcquisitionType",
    ),
}  # fmt: skip
_KEPT = frozenset(tag_for_keyword(keyword) for keyword in _KEPT_KEYWORDS)
_KEPT_GROUPS = (0x0018, 0x0054)
# The longest texts of the value representations LO and ST (PS3.5 section 6.2).
_LO_CHARACTERS, _ST_CHARACTERS = 64, 1024
_DS_CHARACTERS = 16
# Units (0054,1001) of PET, where they have another name than elsewhere.
_PET_UNITS = {"g/ml": "GML", "US": "NONE"}


def derive_series(
    array: NDArray[Any],
    images: Iterable[Dataset],
    *,
    series_description: str = "",
    series_number: int | None = None,
    derivation_description: str = "",
    rescale_type: str | None = None,
) -> Iterator[Dataset]:
    """A new series with the values of `array`, one Dataset for each slice, on the source's grid.

    `array` has the axes (slice, row, column) in the order of `numpy_grinder`: along the slice
    normal. `images` are the datasets that it was made from, in any order. Each result is in the
    source's study and frame of reference, refers to its source (SourceImageSequence, PS3.3
    C.7.6.1.1.4), and has new SeriesInstanceUID and SOPInstanceUID. In a node these are the same if the node died and
    process() runs again. Of the frames of an enhanced or
    legacy converted CT or MR the results are single-frame images, with the geometry of each frame.

    Values that the source's own slope and intercept can hold exactly are stored so, whole numbers in
    a range of 16 bits exactly with a slope of one; others with one slope and intercept for the whole
    series, off by at most half a step.

    `rescale_type` is the RescaleType of the values, such as "US" (unspecified) for a mask; None
    means "HU" for CT, and none for other modalities. Of PET it becomes the Units ("g/ml" is GML, "US"
    NONE), which without it are those of the source: of SUV give `rescale_type=volume.units`.

    The datasets are made one by one, as the caller takes them: leave `array` as it is until then.

    Raises InconsistentSeries where shape and images do not fit, InvalidDataset for values that are
    not finite or not real numbers, too wide a range, a text that is too long, and an image without
    SOPClassUID or SOPInstanceUID, UnsupportedImage for frames of other objects.
    """
    for text, most, name in (
        (series_description, _LO_CHARACTERS, "SeriesDescription"),
        (derivation_description, _ST_CHARACTERS, "DerivationDescription"),
    ):
        if not isinstance(text, str) or "\\" in text:
            raise InvalidDataset(f"{name} has to be a text without backslash, not {text!r}")
        if len(text) > most:
            raise InvalidDataset(f"{name} has {len(text)} characters, DICOM allows {most}")
    if not isinstance(array, numpy.ndarray):
        raise InvalidDataset(
            f"expected an array, found {type(array).__name__}; of a Volume give its array"
        )
    is_whole = isinstance(series_number, int | numpy.integer)
    if series_number is not None and not (is_whole and abs(int(series_number)) < 1 << 31):
        raise InvalidDataset(
            f"SeriesNumber has to be a whole number below 2^31, not {series_number!r}"
        )
    slices, _ = read_slices(images, _FRAME_TAGS)
    if not slices:
        raise InconsistentSeries("there is no image to derive a series from")
    if len(slices) > 1 or "MOSAIC" in slices[0].header.image_type:
        slices = arrange(slices, Reading(), Policies()).slices
    for item in slices:
        _check_source(item)
    first = slices[0].header
    expected = (len(slices), first.rows, first.columns)
    if array.shape != expected:
        raise InconsistentSeries(
            f"the array has the shape {array.shape}, the images are {expected} (slice, row, column)"
        )
    storing = _storing(array, first.slope, first.intercept)
    texts = {
        "SeriesDescription": series_description,
        "DerivationDescription": derivation_description,
    }
    is_ascii = all(text.isascii() for text in texts.values())
    if rescale_type is None and slices[0].dataset.get("Modality") == "CT":
        rescale_type = "HU"
    uids = _uids(slices, series_description, series_number, derivation_description)
    shared = _shared(uids, storing, first, rescale_type, texts if is_ascii else {})
    for k, item in enumerate(slices):
        header = item.header
        if not header.sop_class_uid or not header.sop_instance_uid:
            raise InvalidDataset(
                f"image {header.sop_instance_uid!r} at slice {k} has no SOPClassUID or no "
                "SOPInstanceUID, so a result cannot refer to it"
            )
        result = _copy(item.dataset)
        if _is_frame(item):
            _describe_frame(result, item)
        result.update(shared)
        if not is_ascii:
            result.SpecificCharacterSet = "ISO_IR 192"
            for keyword, text in texts.items():
                setattr(result, keyword, text)
        result.ImageType = ["DERIVED", "SECONDARY", *header.image_type.split("\\")[2:]]
        result.SOPInstanceUID = uids.instance(k)
        result.SeriesNumber = (
            series_number
            if series_number is not None
            else int(item.dataset.get("SeriesNumber") or 0) + 1000
        )
        result.InstanceNumber = k + 1
        reference = Dataset()
        reference.ReferencedSOPClassUID = header.sop_class_uid
        reference.ReferencedSOPInstanceUID = header.sop_instance_uid
        if _is_frame(item):
            reference.ReferencedFrameNumber = header.frame + 1
        result.SourceImageSequence = Sequence([reference])
        result.add_new(0x7FE00010, "OW", storing.stored(array[k]).tobytes())
        yield result


def _is_frame(item: Slice) -> bool:
    return item.header.number_of_frames > 1 or item.header.has_functional_groups


def _check_source(item: Slice) -> None:
    header = item.header
    is_enhanced = header.has_functional_groups and header.sop_class_uid in _CLASSIC
    if item.whole is not None or (_is_frame(item) and not is_enhanced):
        raise UnsupportedImage(
            f"image {called(header)} is a frame of {UID(header.sop_class_uid).name}, from which a "
            "series is not derived; enhanced and legacy converted CT and MR are. Make the results from "
            "its datasets by hand"
        )


def _describe_frame(result: Dataset, item: Slice) -> None:
    """Make the copy of an enhanced object a classic image of one of its frames."""
    header = item.header
    result.SOPClassUID = _CLASSIC[UID(header.sop_class_uid)]
    for keyword, values in (
        ("ImagePositionPatient", header.position),
        ("ImageOrientationPatient", header.orientation),
        ("PixelSpacing", header.pixel_spacing),
        ("SliceThickness", header.slice_thickness),
        ("SpacingBetweenSlices", header.spacing_between_slices),
    ):
        if values is not None:
            parts = values if isinstance(values, tuple) else (values,)
            texts = [format_number_as_ds(part) for part in parts]
            setattr(result, keyword, texts if len(texts) > 1 else texts[0])
    for keyword, places in _FRAME_KEYWORDS.items():
        found = (value_of(item, place) for place in places)
        value = next((value for value in found if value is not None), None)
        is_wanted = keyword in _TYPE_2[result.SOPClassUID]
        if value is not None:
            is_text = not isinstance(value, float)
            setattr(result, keyword, value if is_text else format_number_as_ds(value))
        elif is_wanted and keyword not in result:
            setattr(result, keyword, None)
    if result.SOPClassUID == MRImageStorage:
        # Of an enhanced object this is told in other words: "research mode" and "none" say nothing.
        result.setdefault("ScanningSequence", "RM")
        result.setdefault("SequenceVariant", "NONE")


@dataclass(frozen=True)
class _Storing:
    """How values become 16 bit numbers, and the Decimal Strings of what undoes it."""

    slope: str
    intercept: str
    pixel_type: type[numpy.uint16] | type[numpy.int16]
    # One slice in float64, written anew by each method: a fresh one each time costs more than the
    # arithmetic.
    scratch: NDArray[numpy.float64]

    def steps(self, values: NDArray[Any]) -> NDArray[numpy.float64]:
        steps = self.scratch
        numpy.copyto(steps, values)
        steps -= float(self.intercept)
        steps /= float(self.slope)
        rounded: NDArray[numpy.float64] = numpy.rint(steps, out=steps)
        return rounded

    def stored(self, values: NDArray[Any]) -> NDArray[Any]:
        limits = numpy.iinfo(self.pixel_type)
        steps = self.steps(values)
        numpy.clip(steps, limits.min, limits.max, out=steps)
        return steps.astype(numpy.dtype(self.pixel_type).newbyteorder("<"))

    def is_exact(self, values: NDArray[Any]) -> bool:
        """Whether rescaling what would be stored gives the same values, in their own type."""
        back = self.steps(values)
        back *= float(self.slope)
        back += float(self.intercept)
        if values.dtype.kind == "f":
            return bool((back.astype(values.dtype, copy=False) == values).all())
        return bool((back == values).all())


def _storing(array: NDArray[Any], slope: float, intercept: float) -> _Storing:
    """The source's own slope and intercept where they are exact, else those that fit the range."""
    if array.dtype.kind not in "iufb":
        raise InvalidDataset(f"an array of {array.dtype} cannot be stored as an image")
    if not array.size:
        raise InvalidDataset("an array without voxels cannot be stored as an image")
    low, high = float(array.min()), float(array.max())
    if not numpy.isfinite([low, high]).all():
        raise InvalidDataset("the array holds NaN or infinite values, which cannot be stored")
    scratch = numpy.empty(array.shape[1:])
    own = format_number_as_ds(slope), format_number_as_ds(intercept)
    exact = []
    if slope and (float(own[0]), float(own[1])) == (slope, intercept):
        exact.append(own)
    # Whole numbers, such as labels, are exact with a slope of one.
    exact.append(("1", "0"))
    if low == int(low) and abs(low) < 1e15:
        exact.append(("1", str(int(low))))
    for written in exact:
        factor, offset = map(float, written)
        ends = (low - offset) / factor, (high - offset) / factor
        for pixel_type in (numpy.uint16, numpy.int16):
            limits, storing = numpy.iinfo(pixel_type), _Storing(*written, pixel_type, scratch)
            fits = min(ends) > limits.min - 0.5 and max(ends) < limits.max + 0.5
            if fits and all(storing.is_exact(part) for part in array):
                return storing
    # A Decimal String has 16 characters: the values are computed with what can be written, and
    # that is rounded outwards, so that the ends stay within reach of 0 and 65535.
    new_intercept = _decimal_string(low, ROUND_FLOOR)
    reach = high - float(new_intercept)
    if not numpy.isfinite(reach):
        raise InvalidDataset(f"the array goes from {low:g} to {high:g}, too far for one slope")
    new_slope = _decimal_string(reach / 0xFFFF or reach or 1.0, ROUND_CEILING)
    return _Storing(new_slope, new_intercept, numpy.uint16, scratch)


def _decimal_string(value: float, rounding: str) -> str:
    """A number as a Decimal String (PS3.5 section 6.2), rounded in one direction to what fits."""
    exact = Decimal(repr(value))
    for digits in range(_DS_CHARACTERS, 0, -1):
        text = str(Context(prec=digits, rounding=rounding).plus(exact).normalize())
        if len(text) <= _DS_CHARACTERS:
            return text
    raise InvalidDataset(f"{value} cannot be written in {_DS_CHARACTERS} characters")


Elements: TypeAlias = dict[BaseTag, DataElement | RawDataElement]


def _uids(slices: Iterable[Slice], *about: object) -> SeriesUids:
    """The UIDs of a series: in a node the same when it is made again from the same images."""
    slices = list(slices)
    found = (item.dataset for item in slices if isinstance(item.dataset, LazyDataset))
    uids: Uids | None = next((dataset.uids for dataset in found), None)
    if uids is None:
        return SeriesUids()
    sources = [called(item.header) for item in slices]
    return uids.series([*map(str, about), *sources])


def _shared(
    uids: SeriesUids,
    storing: _Storing,
    header: ImageHeader,
    rescale_type: str | None,
    texts: dict[str, str],
) -> Elements:
    """What is the same in all results, encoded once; raw elements cannot be changed in place."""
    shared = Dataset()
    now = datetime.now()
    shared.SeriesInstanceUID = uids.series()
    shared.InstanceCreationDate = shared.ContentDate = now.strftime("%Y%m%d")
    shared.InstanceCreationTime = shared.ContentTime = now.strftime("%H%M%S")
    for keyword, text in texts.items():
        if text:
            setattr(shared, keyword, text)
    shared.SamplesPerPixel = 1
    shared.PhotometricInterpretation = "MONOCHROME2"
    shared.Rows, shared.Columns = header.rows, header.columns
    shared.BitsAllocated = shared.BitsStored = 16
    shared.HighBit = 15
    shared.PixelRepresentation = 1 if storing.pixel_type is numpy.int16 else 0
    shared.RescaleIntercept, shared.RescaleSlope = storing.intercept, storing.slope
    if rescale_type and header.modality == "PT":
        shared.Units = _PET_UNITS.get(rescale_type, rescale_type)
        if shared.Units == "GML":
            shared.SUVType = "BW"
    elif rescale_type:
        shared.RescaleType = rescale_type
    encoded = DicomBytesIO()
    encoded.is_implicit_VR, encoded.is_little_endian = False, True
    write_dataset(encoded, shared)
    return dict(read_dataset(io.BytesIO(encoded.getvalue()), False, True).items())


def _copy(source: Dataset) -> Dataset:
    """What a result keeps of its source, independent of it: changing one leaves the other alone.

    Elements that nobody looked at stay undecoded bytes where the encoding is the same, which is
    most of the speed of `derive_series`.
    """
    charset = convert_encodings(source.get("SpecificCharacterSet") or default_encoding)
    same_encoding = (
        source.original_encoding == (False, True) and source.original_character_set == charset
    )
    kept: Elements = {}
    for tag in source.keys():  # noqa: SIM118  (iterating a Dataset decodes every element)
        if tag in _KEPT or tag >> 16 in _KEPT_GROUPS:
            element = source.get_item(tag)
            if isinstance(element, RawDataElement) and not same_encoding:
                element = source[tag]
            raw = isinstance(element, RawDataElement)
            kept[tag] = element if raw else _copy_element(element)
    result = Dataset(kept)
    result.set_original_encoding(False, True, charset)
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return result


def _copy_element(element: DataElement) -> DataElement:
    value = element.value
    if not isinstance(value, str | int | float | bytes):
        value = copy.deepcopy(value)
    return DataElement(element.tag, element.VR, value, already_converted=True)

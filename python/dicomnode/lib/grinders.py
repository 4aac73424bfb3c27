"""Ready-made grinders: from the datasets of an input to what `process()` wants.

A *grinder* is any function that takes an iterable of pydicom Datasets and returns something. A
*meta grinder* returns a grinder. Set one as `image_grinder` of an input, or call it on
`dicomnode.lib.dicom.load(folder)` without any server.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args, overload

import numpy
from numpy.typing import DTypeLike, NDArray
from pydicom.dataset import Dataset
from pydicom.tag import TagType

from dicomnode.errors import InconsistentSeries, IncorrectlyConfigured, InvalidDataset
from dicomnode.lib.dicom import tag_name, tag_of
from dicomnode.lib.images import Color, Images, Reading, Slice, Values, read_array, read_slices
from dicomnode.lib.splits import CANDIDATES, SplitBy, keywords_of, tags_of
from dicomnode.lib.volume import (
    Duplicates,
    Gaps,
    Incomplete,
    Localizers,
    Policies,
    Tilt,
    Volume,
    read_volume,
    read_volumes,
)

logger = logging.getLogger("dicomnode.grinders")

#: What a grinder returns: anything.
GrindType: TypeAlias = Any
Grinder: TypeAlias = Callable[[Iterable[Dataset]], GrindType]
_ARRAY_TYPES = ("f4", "f8", "i1", "i2", "i4", "u1", "u2", "u4")
Order: TypeAlias = Literal["position", "InstanceNumber", "given"]
# Stands for "no datasets given": None is what a forgotten value looks like.
_LATER: Iterable[Dataset] = iter(())


def identity_grinder(datasets: Iterable[Dataset]) -> Iterable[Dataset]:
    """The datasets as they are: the default of an input."""
    return datasets


def list_grinder(datasets: Iterable[Dataset]) -> list[Dataset]:
    """The datasets as a list."""
    return list(datasets)


@dataclass(frozen=True, eq=False)
class ManyGrinder:
    """What `many_meta_grinder(...)` returns."""

    grinders: tuple[Grinder, ...]

    def __call__(self, datasets: Iterable[Dataset], /) -> list[Any]:
        kept = list(datasets)
        return [grinder(kept) for grinder in self.grinders]


def many_meta_grinder(*grinders: Grinder) -> ManyGrinder:
    """A grinder that returns a list with the result of each of `grinders`.

    Each of them sees all the images, also where a true iterator comes in.
    """
    return ManyGrinder(grinders)


def tag_meta_grinder(tags: Iterable[TagType], optional: bool = False) -> Grinder:
    """A grinder that returns `{tag: value}` of the first dataset, keyed as `tags` are given.

    Use it for what is equal in all images: PatientWeight, RadiopharmaceuticalInformationSequence.
    A missing tag raises InvalidDataset, or with `optional` has the value None. Raises
    IncorrectlyConfigured at once for what is no tag.
    """
    if isinstance(tags, str):
        raise IncorrectlyConfigured(f"tags has to be a list, such as [{tags!r}]")
    try:
        wanted = [(tag, tag_of(tag)) for tag in tags]
    except (ValueError, TypeError, OverflowError) as error:
        raise IncorrectlyConfigured(
            f"{list(tags)!r} holds what is no DICOM tag: {error}"
        ) from error

    def tag_grinder(datasets: Iterable[Dataset]) -> dict[TagType, Any]:
        first = next(iter(datasets), None)
        if first is None:
            raise InvalidDataset("there is no dataset to take tags from")
        values: dict[TagType, Any] = {}
        for tag, number in wanted:
            if number in first:
                values[tag] = first[number].value
            elif optional:
                values[tag] = None
            else:
                raise InvalidDataset(
                    f"image {first.get('SOPInstanceUID', '')} has no {tag_name(number)}; add it to "
                    "required_tags of the input, or use optional=True"
                )
        return values

    return tag_grinder


DicomTree: TypeAlias = dict[str, dict[str, dict[str, dict[str, Dataset]]]]


def dicom_tree_grinder(datasets: Iterable[Dataset]) -> DicomTree:
    """The datasets as nested dictionaries: patient, study, series, image.

    Keys are PatientID, StudyInstanceUID, SeriesInstanceUID and SOPInstanceUID; a missing PatientID
    is the empty text. Raises InvalidDataset where a UID is missing.
    """
    tree: DicomTree = {}
    for dataset in datasets:
        uids = []
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            value = dataset.get(keyword)
            if not value:
                raise InvalidDataset(
                    f"image {dataset.get('SOPInstanceUID', '')} has no {keyword}, so it has no place "
                    "in a tree; add it to required_tags of the input"
                )
            uids.append(str(value))
        study, series, image = uids
        patient = tree.setdefault(str(dataset.get("PatientID", "") or ""), {})
        patient.setdefault(study, {}).setdefault(series, {})[image] = dataset
    return tree


class ReadOptions(TypedDict, total=False):
    """The options that all array grinders share."""

    dtype: DTypeLike | None
    values: Values
    color: Color


class PolicyOptions(ReadOptions, total=False):
    """See `dicomnode.lib.volume.Policies`."""

    gaps: Gaps
    duplicates: Duplicates
    localizers: Localizers
    tilt: Tilt


class VolumeOptions(PolicyOptions, total=False):
    """The options of `volume_grinder`."""

    out: NDArray[Any] | None
    padding: bool


class ArrayOptions(PolicyOptions, total=False):
    """The options of `numpy_grinder`."""

    out: NDArray[Any] | None
    order: Order


class SeriesOptions(PolicyOptions, total=False):
    """The options of `series_grinder`, `split_by` apart."""

    incomplete: Incomplete


@dataclass(frozen=True, eq=False)
class ArrayGrinder:
    """What `numpy_grinder(...)` returns: called on datasets, it gives an array."""

    reading: Reading = field(default_factory=Reading)
    order: Order = "position"
    policies: Policies = field(default_factory=Policies)
    out: NDArray[Any] | None = None

    def __call__(self, datasets: Images, /) -> NDArray[Any]:
        slices, notes = read_slices(datasets, values=self.reading.values)
        is_stack = len(slices) != 1 or "MOSAIC" in slices[0].header.image_type
        if self.order == "position" and is_stack:
            volume = read_volume(slices, self.reading, self.policies, notes=notes, out=self.out)
            _log(volume.warnings)
            return volume.array
        if self.order == "InstanceNumber":
            slices = _by_instance_number(slices)
        array, notes = read_array(slices, self.reading, out=self.out)
        _log(notes)
        return array


@dataclass(frozen=True, eq=False)
class VolumeGrinder:
    """What `volume_grinder(...)` returns: called on datasets, it gives a `Volume`."""

    reading: Reading = field(default_factory=Reading)
    policies: Policies = field(default_factory=Policies)
    out: NDArray[Any] | None = None
    padding: bool = False

    def __call__(self, datasets: Images, /) -> Volume:
        slices, notes = read_slices(datasets, values=self.reading.values)
        return read_volume(
            slices, self.reading, self.policies, notes=notes, out=self.out, padding=self.padding
        )


@dataclass(frozen=True, eq=False)
class SeriesGrinder:
    """What `series_grinder(...)` returns: called on datasets, it gives a `Volume` for each value."""

    split_by: SplitBy | None = None
    reading: Reading = field(default_factory=Reading)
    policies: Policies = field(default_factory=Policies)
    incomplete: Incomplete = "error"

    def __call__(self, datasets: Images, /) -> dict[Any, Volume]:
        keywords = CANDIDATES if self.split_by is None else keywords_of(self.split_by)
        slices, notes = read_slices(datasets, tags_of(keywords), self.reading.values)
        asked = None if self.split_by is None else keywords
        return read_volumes(slices, asked, self.reading, self.policies, self.incomplete, notes)


@overload
def numpy_grinder(datasets: Images, /, **options: Unpack[ArrayOptions]) -> NDArray[Any]: ...
@overload
def numpy_grinder(**options: Unpack[ArrayOptions]) -> ArrayGrinder: ...
def numpy_grinder(
    datasets: Images = _LATER,
    /,
    *,
    dtype: DTypeLike | None = None,
    order: Order = "position",
    values: Values = "rescaled",
    color: Color = "rgb",
    gaps: Gaps = "error",
    duplicates: Duplicates = "identical",
    localizers: Localizers = "error",
    tilt: Tilt = "keep",
    out: NDArray[Any] | None = None,
) -> NDArray[Any] | ArrayGrinder:
    """All images as one array (slice, row, column); ready to use, and configurable.

    `numpy_grinder(datasets)` grinds. `numpy_grinder(dtype=numpy.int16)` returns a grinder.

    The array is float32 unless `dtype` says otherwise, C-contiguous and yours to write to. Values
    are RescaleSlope * stored + RescaleIntercept of each image (PS3.3 C.11.1), with `values="stored"`
    the stored ones, with `"real_world"` those of the RealWorldValueMappingSequence (PS3.3
    C.7.6.16.2.11; NaN where it leaves a stored value out), with `"suv"` standardized uptake values of
    PET by body weight, in g/ml; these two never guess what an image does not say. Slices are in the
    order of their position along the slice normal, and have to form one regular stack;
    `order="InstanceNumber"` and `order="given"` are for images that have no place in the patient. A
    single image needs none.

    Of colour images the array is (slice, row, column, sample), in the integer type that they are
    stored in. YBR becomes RGB (PS3.3 C.7.6.3.1.2) unless `color="raw"`. Values of PALETTE COLOR images
    are indices, with a warning, and RGB with `color="palette"`. Of Double Float Pixel Data the array is
    float64.

    `gaps`, `duplicates`, `localizers` and `tilt` say what is done with images that are not one plain
    stack: see `dicomnode.lib.volume.Policies`. They count for `order="position"`.

    `out` is an array of the result's shape, C-contiguous, that is filled and returned; its dtype
    counts. Memory that is used again costs about half as much as new memory. It is for your own
    calls: in a node the next case would be written over what `process` still has. What it holds
    after an error is not defined.

    Raises InconsistentSeries (gap, duplicate, mixed series), UnsupportedImage (a video),
    InvalidDataset (an integer dtype cannot hold the values exactly; an attribute that real-world
    values or SUV need is missing), and IncorrectlyConfigured at once for another dtype or order.
    """
    _one_of("order", order, Order)
    reading = _reading(dtype, values, color, out)
    policies = _policies(reading, gaps, duplicates, localizers, tilt)
    grinder = ArrayGrinder(reading, order, policies, out)
    return grinder if datasets is _LATER else grinder(datasets)


@overload
def volume_grinder(datasets: Images, /, **options: Unpack[VolumeOptions]) -> Volume: ...
@overload
def volume_grinder(**options: Unpack[VolumeOptions]) -> VolumeGrinder: ...
def volume_grinder(
    datasets: Images = _LATER,
    /,
    *,
    dtype: DTypeLike | None = None,
    values: Values = "rescaled",
    color: Color = "rgb",
    gaps: Gaps = "error",
    duplicates: Duplicates = "identical",
    localizers: Localizers = "error",
    tilt: Tilt = "keep",
    out: NDArray[Any] | None = None,
    padding: bool = False,
) -> Volume | VolumeGrinder:
    """All images as one `Volume`: the array, its affine (LPS, mm), spacing and the slices' UIDs.

    `volume_grinder(datasets)` grinds. `volume_grinder(dtype=numpy.int16)` returns a grinder. The
    rules for values, order and `out` are those of `numpy_grinder`, those for what is not one plain
    stack those of `dicomnode.lib.volume.Policies`; every image needs ImagePositionPatient,
    ImageOrientationPatient and PixelSpacing. `Volume.units` tells what the values are. With
    `padding=True`, `Volume.padding` is True where PixelPaddingValue and PixelPaddingRangeLimit say
    that there was nothing to measure; the array still has the values.

    Raises InconsistentSeries, UnsupportedImage, InvalidDataset, IncorrectlyConfigured.
    """
    reading = _reading(dtype, values, color, out)
    policies = _policies(reading, gaps, duplicates, localizers, tilt)
    if padding and policies.needs_nan:
        raise IncorrectlyConfigured(
            f"padding=True tells of stored values, and {policies.needs_nan} makes others; choose one"
        )
    grinder = VolumeGrinder(reading, policies, out, padding)
    return grinder if datasets is _LATER else grinder(datasets)


@overload
def series_grinder(
    datasets: Images,
    /,
    *,
    split_by: SplitBy | None = None,
    **options: Unpack[SeriesOptions],
) -> dict[Any, Volume]: ...
@overload
def series_grinder(
    *, split_by: SplitBy | None = None, **options: Unpack[SeriesOptions]
) -> SeriesGrinder: ...
def series_grinder(
    datasets: Images = _LATER,
    /,
    *,
    split_by: SplitBy | None = None,
    incomplete: Incomplete = "error",
    dtype: DTypeLike | None = None,
    values: Values = "rescaled",
    color: Color = "rgb",
    gaps: Gaps = "error",
    duplicates: Duplicates = "identical",
    localizers: Localizers = "error",
    tilt: Tilt = "keep",
) -> dict[Any, Volume] | SeriesGrinder:
    """A `Volume` for each value of an attribute: time points, echoes, b-values, phases, segments.

    `split_by` is the keyword of an attribute, or a tuple of keywords; then the keys are tuples. Keys
    are plain Python values in ascending order: float, int, str, tuple, datetime. Of a frame, what its
    functional groups say counts, however deep it lies. Three keywords are read from several places:
    "DiffusionBValue" and "DiffusionGradientOrientation" also from private elements ((0, 0, 0) where
    no gradient was), "AcquisitionDateTime" also from AcquisitionDate and AcquisitionTime, with
    TimezoneOffsetFromUTC.

    With None the attribute is looked for: the one of `dicomnode.lib.splits.CANDIDATES` that
    separates the images into volumes of the same places. Where no two images lie at one place, there
    is one volume, with the key None.

    `incomplete` is what happens where volumes have different numbers of places, or other places in
    the same planes: "error", "drop" leaves out those that are not like most, with a warning in the
    others, "keep" gives them as they are. The other options are those of `volume_grinder`, for each volume.

    Raises InconsistentSeries (an image without a value, unequal volumes, no or several attributes
    that would separate), and what `volume_grinder` raises.
    """
    if split_by is not None:
        keywords_of(split_by)
    _one_of("incomplete", incomplete, Incomplete)
    reading = _reading(dtype, values, color, None)
    policies = _policies(reading, gaps, duplicates, localizers, tilt)
    grinder = SeriesGrinder(split_by, reading, policies, incomplete)
    return grinder if datasets is _LATER else grinder(datasets)


def reading_of(grinder: object) -> Reading | None:
    """How a grinder reads pixels, where that is known before it is called; else None.

    Of several grinders, that of the first that reads any.
    """
    if grinder is numpy_grinder or grinder is volume_grinder:
        return Reading()
    if isinstance(grinder, ArrayGrinder | VolumeGrinder):
        # Real-world values and SUV need more of the images than their own pixels.
        is_own = grinder.out is None and grinder.reading.values in ("rescaled", "stored")
        return grinder.reading if is_own else None
    if isinstance(grinder, ManyGrinder):
        return next(filter(None, map(reading_of, grinder.grinders)), None)
    return None


def _one_of(name: str, value: object, literal: Any) -> None:
    allowed = get_args(literal)
    if value not in allowed:
        told = ", ".join(repr(one) for one in allowed)
        raise IncorrectlyConfigured(f"{name} is one of {told}, not {value!r}")


def _reading(
    dtype: DTypeLike | None, values: Values, color: Color, out: NDArray[Any] | None
) -> Reading:
    _one_of("values", values, Values)
    _one_of("color", color, Color)
    return Reading(_array_type(dtype, out), values, color)


def _policies(
    reading: Reading, gaps: Gaps, duplicates: Duplicates, localizers: Localizers, tilt: Tilt
) -> Policies:
    for name, value, allowed in (
        ("gaps", gaps, Gaps),
        ("duplicates", duplicates, Duplicates),
        ("localizers", localizers, Localizers),
        ("tilt", tilt, Tilt),
    ):
        _one_of(name, value, allowed)
    policies = Policies(gaps, duplicates, localizers, tilt)
    if policies.needs_nan and reading.dtype is not None and reading.dtype.kind != "f":
        raise IncorrectlyConfigured(
            f"{policies.needs_nan} puts NaN or new values into the array and needs a float dtype, not "
            f"{reading.dtype}"
        )
    return policies


def _array_type(dtype: DTypeLike | None, out: NDArray[Any] | None) -> numpy.dtype[Any] | None:
    """A dtype that the compiled core can write; None where it is left to the images."""
    if out is not None:
        if not isinstance(out, numpy.ndarray):
            raise IncorrectlyConfigured(f"out is an array, not {type(out).__name__}")
        if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
            raise IncorrectlyConfigured("out has to be C-contiguous, aligned and writeable")
        dtype = out.dtype
    if dtype is None:
        return None
    try:
        wanted = numpy.dtype(dtype)
    except TypeError as error:
        raise IncorrectlyConfigured(f"dtype {dtype!r} is none of numpy's: {error}") from error
    if not wanted.isnative or wanted.str[1:] not in _ARRAY_TYPES:
        raise IncorrectlyConfigured(
            f"dtype is float32, float64 or an 8, 16 or 32 bit integer in native byte order, not "
            f"{wanted.str}"
        )
    return wanted


def _log(notes: Iterable[str]) -> None:
    """An array has no place for warnings, as a Volume has."""
    for note in notes:
        logger.warning("%s", note)


def _by_instance_number(slices: Sequence[Slice]) -> list[Slice]:
    seen: dict[tuple[int, int], str] = {}
    for item in slices:
        number, uid = item.header.instance_number, item.header.sop_instance_uid
        if number is None:
            raise InconsistentSeries(f"image {uid} has no InstanceNumber to order it by")
        key = (number, item.header.frame)
        if key in seen:
            raise InconsistentSeries(
                f"images {seen[key]} and {uid} have the same InstanceNumber {number}, which "
                "therefore gives no order"
            )
        seen[key] = uid
    return sorted(slices, key=lambda item: (item.header.instance_number or 0, item.header.frame))

"""Images: what a header says, and the pixels of many as one array.

Solves that the pixels of any image come out right, wherever it is: a file, received
bytes, or a dataset that a user made or changed. They go straight from their source into the array,
in the compiled core, which decodes compressed ones on the way.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID

from dicomnode import _core
from dicomnode._core import codecs as codecs
from dicomnode._core import jpeg_has_simd as jpeg_has_simd
from dicomnode.errors import (
    InconsistentSeries,
    IncorrectlyConfigured,
    InvalidDataset,
    UnsupportedImage,
)
from dicomnode.lib.dicom import (
    LAYOUT_TAGS,
    MEDIA_STORAGE_DIRECTORY,
    PIXEL_TAGS,
    READ_ERRORS,
    LazyDataset,
    Source,
    encode,
    to_scan,
)
from dicomnode.lib.quantities import (
    Scale,
    modality_lut_type,
    padding_of,
    real_world_scales,
    suv_scales,
)

# Values that are read at a time where a second look at the stored ones is needed.
_PART = 1 << 21


class ImageHeader(Protocol):
    """The attributes that planning reads; `_core.Image` has them."""

    @property
    def sop_class_uid(self) -> str: ...
    @property
    def sop_instance_uid(self) -> str: ...
    @property
    def series_instance_uid(self) -> str: ...
    @property
    def frame_of_reference_uid(self) -> str: ...
    @property
    def transfer_syntax(self) -> str: ...
    @property
    def modality(self) -> str: ...
    @property
    def image_type(self) -> str: ...
    @property
    def photometric_interpretation(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def samples_per_pixel(self) -> int: ...
    @property
    def bits_allocated(self) -> int: ...
    @property
    def bits_stored(self) -> int: ...
    @property
    def high_bit(self) -> int: ...
    @property
    def pixel_representation(self) -> int: ...
    @property
    def number_of_frames(self) -> int: ...
    @property
    def slope(self) -> float: ...
    @property
    def intercept(self) -> float: ...
    @property
    def has_rescale(self) -> bool: ...
    @property
    def units(self) -> str: ...
    @property
    def position(self) -> tuple[float, float, float] | None: ...
    @property
    def orientation(self) -> tuple[float, float, float, float, float, float] | None: ...
    @property
    def pixel_spacing(self) -> tuple[float, float] | None: ...
    @property
    def slice_thickness(self) -> float | None: ...
    @property
    def spacing_between_slices(self) -> float | None: ...
    @property
    def instance_number(self) -> int | None: ...
    @property
    def has_modality_lut(self) -> bool: ...
    @property
    def has_functional_groups(self) -> bool: ...
    @property
    def pixel_tag(self) -> int: ...
    @property
    def is_native(self) -> bool: ...
    @property
    def frame(self) -> int: ...
    @property
    def stack_id(self) -> str: ...
    @property
    def position_index(self) -> int | None: ...


@dataclass(frozen=True)
class _PlainHeader:
    """The same attributes, read from a dataset that has no untouched source."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    transfer_syntax: str
    modality: str
    image_type: str
    photometric_interpretation: str
    rows: int
    columns: int
    samples_per_pixel: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    pixel_representation: int
    number_of_frames: int
    slope: float
    intercept: float
    has_rescale: bool
    units: str
    position: tuple[float, float, float] | None
    orientation: tuple[float, float, float, float, float, float] | None
    pixel_spacing: tuple[float, float] | None
    slice_thickness: float | None
    spacing_between_slices: float | None
    instance_number: int | None
    has_modality_lut: bool
    has_functional_groups: bool
    pixel_tag: int
    is_native: bool
    frame: int = 0
    stack_id: str = ""
    position_index: int | None = None


#: What the numbers of an array are: rescaled (PS3.3 C.11.1), as they are stored, by the real-world
#: value mapping (PS3.3 C.7.6.16.2.11), or SUV by body weight.
Values: TypeAlias = Literal["rescaled", "stored", "real_world", "suv"]
#: What images of several samples become: RGB where they are YBR; the samples as they are; RGB also
#: where they are indices of a palette.
Color: TypeAlias = Literal["rgb", "raw", "palette"]

PALETTE = "PALETTE COLOR"
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_PIXEL_DATA, _FLOAT_PIXEL_DATA, _DOUBLE_FLOAT_PIXEL_DATA = PIXEL_TAGS


@dataclass(frozen=True)
class Reading:
    """How pixels become values: the options that all array grinders share."""

    #: None: float32; for Double Float Pixel Data float64; for colour the integers that hold it.
    dtype: numpy.dtype[Any] | None = None
    values: Values = "rescaled"
    color: Color = "rgb"


@dataclass(frozen=True)
class Slice:
    """One frame on its way into an array: its header, and the dataset it came from."""

    header: ImageHeader
    dataset: Dataset
    #: The image that holds the pixels, where `header` tells another place than that does.
    whole: ImageHeader | None = None
    #: Row and column in `whole` where the pixels start.
    corner: tuple[int, int] = (0, 0)
    #: Stands in for the rescale of the header.
    scale: Scale | None = None

    @property
    def units(self) -> str:
        """What its values are measured in unless they are the stored ones; empty where unknown."""
        if self.scale is not None:
            return self.scale.units
        if self.header.has_modality_lut:
            return modality_lut_type(self.dataset)
        return self.header.units

    def moved(self, corner: tuple[int, int] = (0, 0), **changes: Any) -> "Slice":
        """The same pixels, or a part of them, with other attributes."""
        values = {one.name: getattr(self.header, one.name) for one in fields(_PlainHeader)}
        header = _PlainHeader(**{**values, **changes})
        return Slice(header, self.dataset, self.header, corner, self.scale)


class Decoded(Protocol):
    """Images that were decoded before they are asked for; see `dicomnode.lib.arena`."""

    def headers(self, source: Source) -> list[ImageHeader] | None:
        """The headers of the frames of an image; None where it is not among these."""

    def take(
        self,
        headers: Sequence[ImageHeader],
        reading: Reading,
        shape: tuple[int, ...],
        dtype: numpy.dtype[Any],
    ) -> tuple[NDArray[Any], list[str]] | None:
        """The array of images with these very headers, and what `fill` noted of each.

        None where they are not here, or were decoded in another way than `reading`, or to another
        shape or dtype of each.
        """


#: Datasets, or the bytes of Part 10 objects.
Images: TypeAlias = Iterable[Dataset | bytes]


def read_slices(
    datasets: Images, extra_tags: Sequence[int] = (), values: Values = "rescaled"
) -> tuple[list[Slice], list[str]]:
    """The images among datasets, in their order, and a note for each object that is none.

    Each frame of a multi-frame object is an image of its own, in the order of the file. With
    `extra_tags` the headers that the core scanned keep the values of these, too.

    Lazy datasets of a node or of `dicomnode.lib.dicom.load` are scanned by the compiled core, in
    parallel, and so are the bytes of a Part 10 object; of any other dataset the attributes are read
    here.

    Raises InvalidDicom and InvalidDataset for an image whose attributes cannot be understood, or that
    lacks what `values` need.
    """
    if isinstance(datasets, str | bytes | os.PathLike) or not isinstance(datasets, Iterable):
        raise InvalidDataset(
            f"expected datasets, found {datasets!r:.80}; read files with dicomnode.lib.dicom.load, and "
            "give options of a grinder by name"
        )
    given: list[Dataset] = []
    for one in datasets:
        if isinstance(one, bytes):
            given.append(LazyDataset(one))
        elif isinstance(one, Dataset):
            given.append(one)
        else:
            raise InvalidDataset(
                f"expected a Dataset, found {type(one).__name__}; read files with "
                "dicomnode.lib.dicom.load"
            )
    tags = (*LAYOUT_TAGS, *extra_tags)
    sources = [to_scan(dataset, tags) for dataset in given]
    # What was decoded before was scanned without the values of extra tags.
    known = [
        None if extra_tags else _known_headers(*one) for one in zip(given, sources, strict=True)
    ]
    unknown = [
        source
        for source, headers in zip(sources, known, strict=True)
        if source is not None and headers is None
    ]
    scanned = iter(_core.scan_images(unknown, tags))
    slices: list[Slice] = []
    notes: list[str] = []
    for dataset, source, headers in zip(given, sources, known, strict=True):
        if headers is not None:
            slices += [Slice(header, dataset) for header in headers]
            continue
        header: ImageHeader = _header(dataset, tags) if source is None else next(scanned)
        if (
            isinstance(header, _core.Image)
            and header.pixel_tag
            and (header.number_of_frames > 1 or header.has_functional_groups)
        ):
            slices += [Slice(frame, dataset) for frame in header.frames()]
        elif header.pixel_tag or header.rows:
            slices.append(Slice(header, dataset))
        elif (
            header.sop_class_uid != MEDIA_STORAGE_DIRECTORY
            and "DirectoryRecordSequence" not in dataset
        ):
            notes.append(
                f"{header.sop_instance_uid} ({UID(header.sop_class_uid).name}) is no image, left out"
            )
    if values == "real_world":
        scales = real_world_scales([(item.dataset, item.header.frame) for item in slices])
    elif values == "suv":
        scales, told = suv_scales([item.dataset for item in slices])
        notes += told
    else:
        return slices, notes
    return [replace(item, scale=scale) for item, scale in zip(slices, scales, strict=True)], notes


def _header(dataset: Dataset, tags: Sequence[int]) -> ImageHeader:
    """The header of a dataset that a user made or changed.

    One plain frame is described by its attributes, and its pixels are borrowed; anything else is
    read from its encoding.
    """
    header = _plain_header(dataset)
    is_plain = (
        header.number_of_frames == 1
        and not header.has_functional_groups
        and header.samples_per_pixel == 1
        and header.photometric_interpretation in ("", "MONOCHROME1", "MONOCHROME2")
        and not header.has_modality_lut
        and header.bits_allocated > 1
        and header.pixel_tag == _PIXEL_DATA
    )
    if is_plain or not header.pixel_tag:
        return header
    (image,) = _core.scan_images([encode(dataset)[0]], tags)
    return image


def _decoded(dataset: Dataset) -> Decoded | None:
    return dataset.decoded if isinstance(dataset, LazyDataset) else None


def _known_headers(dataset: Dataset, source: object) -> list[ImageHeader] | None:
    decoded = _decoded(dataset)
    is_untouched = source is not None and isinstance(dataset, LazyDataset)
    return decoded.headers(dataset.source) if decoded and is_untouched else None


def called(header: ImageHeader) -> str:
    """What a message calls an image: its UID, and which frame it is where there are several."""
    frame = f" (frame {header.frame + 1})" if header.number_of_frames > 1 else ""
    return f"{header.sop_instance_uid}{frame}"


def read_array(
    slices: Sequence[Slice], reading: Reading, *, out: NDArray[Any] | None = None
) -> tuple[NDArray[Any], list[str]]:
    """The pixels of images, each one frame, in the order given, as (slice, row, column); and notes.

    Of colour there is a fourth axis, that of the samples. The compiled core reads and decodes all
    images in parallel, each straight into its place. A note tells where a codestream contradicts
    its header. With `out`, that array is filled; its dtype counts.

    Raises InconsistentSeries, UnsupportedImage, InvalidDataset, InvalidDicom, IncorrectlyConfigured
    for an `out` of another shape.
    """
    if not slices:
        raise InconsistentSeries("there is no image to make an array of")
    for item in slices:
        check_image(item.header)
    first = slices[0].header
    for item in slices:
        header = item.header
        if (header.rows, header.columns) != (first.rows, first.columns):
            raise InconsistentSeries(
                f"image {header.sop_instance_uid} has {header.rows} x "
                f"{header.columns} Rows x Columns, image {first.sop_instance_uid} has "
                f"{first.rows} x {first.columns}; images of one array need the same matrix"
            )
        if _kind(header) != _kind(first):
            raise InconsistentSeries(
                f"image {header.sop_instance_uid} is {_kind(header)}, image "
                f"{first.sop_instance_uid} is {_kind(first)}; images of one array have to be of one "
                "kind: narrow the input with required_values for PhotometricInterpretation"
            )
        is_free = reading.dtype is None and out is None and header.samples_per_pixel > 1
        if is_free and header.bits_stored != first.bits_stored:
            raise InconsistentSeries(
                f"image {header.sop_instance_uid} is colour of {header.bits_stored} BitsStored, image "
                f"{first.sop_instance_uid} of {first.bits_stored}, where the same number is another "
                "brightness; narrow the input with required_values, or choose a dtype"
            )
    if any(item.whole is not None for item in slices):
        return _read_parts(slices, reading, out)
    is_palette = first.photometric_interpretation == PALETTE
    wants_rgb = is_palette and reading.color == "palette"
    has_scale = reading.values != "stored" and any(item.scale is not None for item in slices)
    if has_scale and (wants_rgb or first.samples_per_pixel > 1):
        raise UnsupportedImage(
            f'image {first.sop_instance_uid} is to be colour, which has no values="{reading.values}"'
        )
    if wants_rgb:
        return _read_palette(slices, reading, out)
    shape, dtype = place_of(slices, reading)
    decoded = None if has_scale or out is not None else _decoded(slices[0].dataset)
    taken = decoded and decoded.take([item.header for item in slices], reading, shape, dtype)
    if taken:
        out, notes = taken
    else:
        out = _output(first.sop_instance_uid, (len(slices), *shape), dtype, out)
        is_direct = not has_scale or all(_maps_all(item) for item in slices)
        notes = fill(slices, reading, out) if is_direct else []
        # A codestream that contradicts its header may hold other stored values than that allows.
        if has_scale and (notes or not is_direct):
            notes = _map(slices, out)
    if is_palette:
        notes.append(
            f"{first.sop_instance_uid}: values are indices of a palette; color='palette' gives RGB"
        )
    return out, _merged(notes)


def _read_parts(
    slices: Sequence[Slice], reading: Reading, out: NDArray[Any] | None
) -> tuple[NDArray[Any], list[str]]:
    """The pixels of images that are a part of another, or tell another place than that."""
    wholes = [Slice(item.whole or item.header, item.dataset, scale=item.scale) for item in slices]
    numbers: dict[int, int] = {}
    for item in wholes:
        numbers.setdefault(id(item.header), len(numbers))
    first = {id(item.header): item for item in reversed(wholes)}
    if out is not None:
        reading = replace(reading, dtype=out.dtype)
    array, notes = read_array([first[number] for number in numbers], reading)
    rows, columns = slices[0].header.rows, slices[0].header.columns
    parts = [
        array[numbers[id(whole.header)], row : row + rows, column : column + columns]
        for whole, (row, column) in zip(wholes, (item.corner for item in slices), strict=True)
    ]
    if out is None:
        return numpy.stack(parts), notes
    shape = (len(parts), *parts[0].shape)
    if out.shape != shape:
        raise IncorrectlyConfigured(f"out has the shape {out.shape}, the images are {shape}")
    return numpy.stack(parts, out=out), notes


def read_padding(slices: Sequence[Slice]) -> NDArray[numpy.bool_]:
    """Where stored values are padding (PS3.3 C.7.5.1.1.2), as (slice, row, column).

    False throughout an image that declares no padding. `read_array` has accepted these slices.
    """
    first = slices[0].header
    if first.samples_per_pixel > 1:
        raise UnsupportedImage(f"image {first.sop_instance_uid} is colour, which has no padding")
    padding = numpy.zeros((len(slices), first.rows, first.columns), numpy.bool_)
    ranges = [padding_of(item.dataset) for item in slices]
    may_be_signed = False
    if any(found is not None for found in ranges):
        for k, stored, notes in _stored(slices):
            # A signed codestream counts more than the header, which tells how padding is written.
            may_be_signed |= _are_signed(notes)
            found = ranges[k]
            if may_be_signed and (stored.min() < 0 or stored.max() < 1 << 15):
                found = padding_of(slices[k].dataset, is_signed=True)
            if found is not None:
                numpy.logical_and(stored >= found[0], stored <= found[1], out=padding[k])
    return padding


def _stored(
    slices: Sequence[Slice],
) -> Iterator[tuple[int, NDArray[numpy.float64], list[str]]]:
    """Which slice, its stored values, and notes of its part; a few are in memory at a time."""
    first = slices[0].header
    step = max(1, _PART // (first.rows * first.columns))
    for start in range(0, len(slices), step):
        part = slices[start : start + step]
        values, notes = read_array(part, Reading(numpy.dtype(numpy.float64), "stored"))
        for k, one in enumerate(values):
            yield start + k, one, notes if k == 0 else []


def _maps_all(item: Slice) -> bool:
    """Whether each value that the header allows to be stored is mapped by one slope."""
    header, scale = item.header, item.scale
    if scale is None:
        return True
    if scale.table is not None or header.pixel_tag != _PIXEL_DATA:
        return False
    lowest = -(1 << header.bits_stored >> 1) if header.pixel_representation == 1 else 0
    highest = lowest + (1 << header.bits_stored) - 1
    return scale.first <= lowest and highest <= scale.last


def _map(slices: Sequence[Slice], out: NDArray[Any]) -> list[str]:
    """Fill `out` with values that are mapped by a table, or not all of them; and notes.

    What is not mapped is NaN; an integer dtype, which has none, raises InvalidDataset.
    """
    notes: list[str] = []
    unmapped = 0
    may_be_signed = False
    for k, stored, told in _stored(slices):
        notes += told
        may_be_signed |= _are_signed(told)
        header, scale = slices[k].header, slices[k].scale or Scale("")
        if may_be_signed and header.pixel_representation == 0:
            _check_limits(header, scale)
        is_mapped = (stored >= scale.first) & (stored <= scale.last)
        if scale.table is None:
            values = numpy.where(is_mapped, stored * scale.slope + scale.intercept, numpy.nan)
        else:
            places = numpy.where(is_mapped, stored - scale.first, 0).astype(numpy.intp)
            values = numpy.where(is_mapped, scale.values[places], numpy.nan)
        unmapped += values.size - int(numpy.count_nonzero(is_mapped))
        with numpy.errstate(invalid="ignore", over="ignore"):
            out[k] = values
        is_held = ~numpy.isinf(out[k]) if out.dtype.kind == "f" else out[k] == values
        if not is_held.all():
            raise InvalidDataset(
                f"image {called(header)} has real-world values that {out.dtype} cannot hold, or stored "
                "values without one; use float64"
            )
    if unmapped:
        notes.append(
            f"{called(slices[0].header)}: {unmapped} values of these images are NaN: the real-world "
            "value mapping leaves them out"
        )
    return notes


def _are_signed(notes: Sequence[str]) -> bool:
    """Whether the core told that a codestream has another sign than its header."""
    return any("values are taken as signed" in note for note in notes)


def _check_limits(header: ImageHeader, scale: Scale) -> None:
    """Of signed values whose header says unsigned, a limit with the sign bit may be either number."""
    half = 1 << min(header.bits_stored, 16) >> 1
    for limit in (scale.first, scale.last):
        if math.isfinite(limit) and limit >= half:
            raise InvalidDataset(
                f"image {called(header)}: PixelRepresentation (0028,0103) says unsigned, its codestream "
                f"signed, so that the limit {limit:g} of RealWorldValueMappingSequence (0040,9096) has "
                'two meanings; correct PixelRepresentation, or use values="rescaled"'
            )


def place_of(slices: Sequence[Slice], reading: Reading) -> tuple[tuple[int, ...], numpy.dtype[Any]]:
    """Shape and dtype of what each of these images is in their array."""
    first = slices[0].header
    samples = () if first.samples_per_pixel == 1 else (first.samples_per_pixel,)
    return (first.rows, first.columns, *samples), reading.dtype or _own_type(slices)


def fill(slices: Sequence[Slice], reading: Reading, out: NDArray[Any]) -> list[str]:
    """Read and decode the pixels of images into an array; a note for each that contradicts itself."""
    return _core.stack(
        [_core_image(item) for item in slices],
        out,
        reading.values != "stored",
        reading.color != "raw",
    )


def _output(
    uid: str, shape: tuple[int, ...], dtype: numpy.dtype[Any], out: NDArray[Any] | None
) -> NDArray[Any]:
    if out is None:
        try:
            return numpy.empty(shape, dtype)
        except MemoryError:
            raise InvalidDataset(
                f"image {uid} and those with it declare an array of {shape} {dtype}, for which "
                "there is no memory; have them processed in parts"
            ) from None
    if out.shape != shape:
        raise IncorrectlyConfigured(f"out has the shape {out.shape}, the images are {shape}")
    return out


def _kind(header: ImageHeader) -> str:
    """What must not be mixed in one array."""
    photometric = header.photometric_interpretation
    if header.samples_per_pixel > 1:
        return f"colour of {header.samples_per_pixel} samples"
    return photometric if photometric in (PALETTE, "MONOCHROME1") else "MONOCHROME2"


def _own_type(slices: Sequence[Slice]) -> numpy.dtype[Any]:
    """The dtype where a user asks for none."""
    headers = [item.header for item in slices]
    if any(header.pixel_tag == _DOUBLE_FLOAT_PIXEL_DATA for header in headers):
        return numpy.dtype(numpy.float64)
    if headers[0].samples_per_pixel == 1:
        return numpy.dtype(numpy.float32)
    if any(header.has_rescale or header.pixel_tag != _PIXEL_DATA for header in headers):
        return numpy.dtype(numpy.float32)
    # The core refuses colours of single bits.
    bits = max(8, *(header.bits_allocated for header in headers))
    sign = "i" if any(header.pixel_representation for header in headers) else "u"
    return numpy.dtype(f"{sign}{bits // 8}")


def _read_palette(
    slices: Sequence[Slice], reading: Reading, out: NDArray[Any] | None
) -> tuple[NDArray[Any], list[str]]:
    """Images of palette indices as RGB (PS3.3 C.7.9)."""
    indices, notes = read_array(slices, Reading(numpy.dtype("i4"), "stored", "raw"))
    array: NDArray[Any] | None = None
    depth: numpy.dtype[Any] | None = None
    for k, item in enumerate(slices):
        try:
            count, first, _ = map(int, item.dataset.RedPaletteColorLookupTableDescriptor)
            count = count or 1 << 16
            # pydicom counts indices in the type of the table, where they would wrap around.
            within = indices[k].clip(first, first + count - 1)
            colors = apply_color_lut(within, item.dataset)[..., :3]
            if count > 1 << 8 * colors.itemsize:
                raise ValueError(f"{count} entries of {8 * colors.itemsize} bits")
        except (*READ_ERRORS, AttributeError, KeyError, IndexError) as error:
            raise InvalidDataset(
                f"image {item.header.sop_instance_uid} has no palette that can be used "
                f"(RedPaletteColorLookupTableDescriptor and so on): {error}"
            ) from error
        uid, depth = item.header.sop_instance_uid, depth or colors.dtype
        if reading.dtype is None and out is None and colors.dtype != depth:
            raise InconsistentSeries(
                f"image {uid} has a palette of {colors.dtype}, image {slices[0].header.sop_instance_uid} "
                f"one of {depth}; narrow the input with required_values, or choose a dtype"
            )
        if array is None:
            dtype = reading.dtype or colors.dtype
            array = _output(uid, (len(slices), *colors.shape), dtype, out)
        array[k] = colors
        if not numpy.array_equal(array[k], colors):
            raise InvalidDataset(
                f"image {uid} has a palette of {colors.dtype} with values that {array.dtype} cannot "
                f"hold; choose dtype={colors.dtype} or float32"
            )
    assert array is not None
    return array, [note for note in notes if "palette" not in note]


def _merged(notes: Iterable[str]) -> list[str]:
    """Notes that say the same of several images, as one."""
    told: dict[str, list[str]] = {}
    for note in notes:
        uid, text = note.split(": ", 1)
        told.setdefault(text, []).append(uid)
    return [
        f"{uids[0]}{f' and {len(uids) - 1} more' if len(uids) > 1 else ''}: {text}"
        for text, uids in told.items()
    ]


def check_image(header: ImageHeader) -> None:
    uid = header.sop_instance_uid
    if not header.pixel_tag:
        raise InvalidDataset(f"image {uid} has Rows but no Pixel Data")
    if header.rows < 1 or header.columns < 1:
        raise InvalidDataset(
            f"image {uid} has {header.rows} x {header.columns} Rows x Columns, but Pixel Data"
        )
    is_float = header.pixel_tag != _PIXEL_DATA
    if not is_float and header.bits_allocated not in (1, 8, 16, 32):
        raise UnsupportedImage(
            f"image {uid} has BitsAllocated {header.bits_allocated}, which array grinders do not "
            "take (1, 8, 16 or 32); have it sent with another one"
        )
    if header.samples_per_pixel not in (1, 3, 4):
        raise UnsupportedImage(
            f"image {uid} has SamplesPerPixel {header.samples_per_pixel}, but images have 1, 3 or 4 "
            "(PS3.3 C.7.6.3.1.1); have it sent in another form"
        )
    if header.sop_class_uid == _WHOLE_SLIDE:
        raise UnsupportedImage(
            f"image {uid} is a whole slide microscopy image: its frames are tiles of one plane, and no "
            "volume; use list_grinder and a library for slides"
        )


def _core_image(item: Slice) -> _core.Image:
    """The image as the core reads it, with the scale in place of its rescale."""
    image = item.header if isinstance(item.header, _core.Image) else _borrowed(item)
    scale = item.scale
    return image if scale is None else image.with_values(scale.slope, scale.intercept)


def _borrowed(item: Slice) -> _core.Image:
    """An image whose pixels are those of a dataset that a user made or changed."""
    header, dataset = item.header, item.dataset
    big_endian = header.transfer_syntax == "1.2.840.10008.1.2.2"
    pixels = dataset.PixelData
    if not isinstance(pixels, bytes | bytearray | memoryview):
        raise InvalidDataset(f"image {header.sop_instance_uid} has an empty PixelData")
    if big_endian and header.bits_allocated == 8 and dataset["PixelData"].VR == "OW":
        pixels = numpy.frombuffer(pixels, ">u2").astype("<u2").tobytes()
    return _core.Image(
        pixels,
        rows=header.rows,
        columns=header.columns,
        bits_allocated=header.bits_allocated,
        bits_stored=header.bits_stored,
        high_bit=header.high_bit,
        pixel_representation=header.pixel_representation,
        slope=header.slope,
        intercept=header.intercept,
        big_endian=big_endian,
        sop_instance_uid=header.sop_instance_uid,
        transfer_syntax="" if header.is_native else header.transfer_syntax,
    )


def _units(text: Callable[[str], str], has_rescale: bool) -> str:
    """What rescaled values are measured in, as the core tells it (see `_core.Image.units`)."""
    for keyword in ("Units", "DoseUnits", "RescaleType"):
        if units := text(keyword).strip():
            return units
    is_hounsfield = (
        has_rescale
        and text("SOPClassUID") == "1.2.840.10008.5.1.4.1.1.2"
        and text("MultienergyCTAcquisition") != "YES"
        and text("ImageType").split("\\")[2:3] != ["LOCALIZER"]
    )
    return "HU" if is_hounsfield else ""


def _plain_header(dataset: Dataset) -> _PlainHeader:
    uid = str(dataset.get("SOPInstanceUID", ""))
    meta = getattr(dataset, "file_meta", None)
    syntax = str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""
    pixel_tag = next((tag for tag in PIXEL_TAGS if tag in dataset), 0)

    def text(keyword: str) -> str:
        value = dataset.get(keyword)
        if value is None:
            return ""
        return value if isinstance(value, str) else "\\".join(str(part) for part in value)

    def number(keyword: str, absent: int = 0) -> int:
        value = dataset.get(keyword)
        return absent if value is None or value == "" else int(value)

    def real(keyword: str) -> float | None:
        value = dataset.get(keyword)
        return None if value is None or value == "" else _finite(float(value))

    def reals(keyword: str, count: int) -> Any:
        value = dataset.get(keyword)
        if value is None or value == "" or len(value) == 0:
            return None
        if len(value) != count:
            raise ValueError(f"{keyword} has {len(value)} values instead of {count}")
        return tuple(_finite(float(part)) for part in value)

    try:
        bits_allocated = number("BitsAllocated")
        bits_stored = number("BitsStored", bits_allocated)
        slope, intercept = real("RescaleSlope"), real("RescaleIntercept")
        if slope is None:
            # The slope of an RT Dose (PS3.3 C.8.8.3).
            slope = real("DoseGridScaling")
        # As in the core: nothing depends on it unless a user asks for it.
        instance_number = str(dataset.get("InstanceNumber", "")).strip()
        return _PlainHeader(
            sop_class_uid=text("SOPClassUID"),
            sop_instance_uid=uid,
            series_instance_uid=text("SeriesInstanceUID"),
            frame_of_reference_uid=text("FrameOfReferenceUID"),
            transfer_syntax=syntax,
            modality=text("Modality"),
            image_type=text("ImageType"),
            photometric_interpretation=text("PhotometricInterpretation"),
            rows=number("Rows"),
            columns=number("Columns"),
            samples_per_pixel=number("SamplesPerPixel", 1),
            bits_allocated=bits_allocated,
            bits_stored=bits_stored,
            high_bit=number("HighBit", bits_stored - 1),
            pixel_representation=number("PixelRepresentation"),
            number_of_frames=number("NumberOfFrames", 1) or 1,
            slope=1.0 if slope is None else slope,
            intercept=0.0 if intercept is None else intercept,
            has_rescale=slope is not None or intercept is not None,
            units=_units(text, slope is not None or intercept is not None),
            position=reals("ImagePositionPatient", 3),
            orientation=reals("ImageOrientationPatient", 6),
            pixel_spacing=reals("PixelSpacing", 2),
            slice_thickness=real("SliceThickness"),
            spacing_between_slices=real("SpacingBetweenSlices"),
            instance_number=(
                int(instance_number) if re.fullmatch(r"[+-]?[0-9]{1,12}", instance_number) else None
            ),
            has_modality_lut="ModalityLUTSequence" in dataset,
            has_functional_groups=(
                "SharedFunctionalGroupsSequence" in dataset
                or "PerFrameFunctionalGroupsSequence" in dataset
            ),
            pixel_tag=pixel_tag,
            is_native=not (syntax and UID(syntax).is_transfer_syntax and UID(syntax).is_compressed)
            or syntax == "1.2.840.10008.1.2.1.99",
        )
    except READ_ERRORS as error:
        raise InvalidDataset(f"image {uid}: {error}") from error


def _finite(value: float) -> float:
    if not numpy.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    return value

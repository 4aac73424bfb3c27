"""Images: what a header says, and the pixels of many as one array.

Solves that the pixels of any single-frame image come out right, wherever it is: a file, received
bytes, or a dataset that a user made or changed. Uncompressed pixels go straight from their source
into the array, in the compiled core; compressed ones through pydicom's decoders.
"""

import os
import re
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
from numpy.typing import DTypeLike, NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from dicomnode import _core
from dicomnode.errors import InconsistentSeries, InvalidDataset, UnsupportedImage
from dicomnode.lib.dicom import MEDIA_STORAGE_DIRECTORY, PIXEL_TAGS, READ_ERRORS, untouched_source

_RLE_LOSSLESS = "1.2.840.10008.1.2.5"
# Which of pydicom's decoders reads what. GDCM ends the whole process with an assertion where a
# codestream contradicts its header, so it gets only what no other one reads, after a check.
_DECODER_PLUGINS = {
    _RLE_LOSSLESS: "pydicom",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
}
_CHECKED_JPEG = (
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81",
)  # fmt: skip


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


@dataclass(frozen=True)
class Slice:
    """One image on its way into an array: its header, and the dataset it came from."""

    header: ImageHeader
    dataset: Dataset


def read_slices(datasets: Iterable[Dataset]) -> tuple[list[Slice], list[str]]:
    """The images among datasets, in their order, and a note for each object that is none.

    Lazy datasets of a node or of `dicomnode.lib.dicom.load` are scanned by the compiled core, in
    parallel; of any other dataset the attributes are read here.

    Raises InvalidDicom and InvalidDataset for an image whose attributes cannot be understood.
    """
    if isinstance(datasets, str | os.PathLike) or not isinstance(datasets, Iterable):
        raise InvalidDataset(
            f"expected datasets, found {datasets!r}; read files with dicomnode.lib.dicom.load, and "
            "give options of a grinder by name"
        )
    given = list(datasets)
    for one in given:
        if not isinstance(one, Dataset):
            raise InvalidDataset(
                f"expected a Dataset, found {type(one).__name__}; read files with "
                "dicomnode.lib.dicom.load"
            )
    sources = [untouched_source(dataset) for dataset in given]
    scanned = iter(_core.scan_images([source for source in sources if source is not None]))
    slices: list[Slice] = []
    notes: list[str] = []
    for dataset, source in zip(given, sources, strict=True):
        header: ImageHeader = _plain_header(dataset) if source is None else next(scanned)
        if header.pixel_tag or header.rows:
            slices.append(Slice(header, dataset))
        elif header.sop_class_uid != MEDIA_STORAGE_DIRECTORY:
            notes.append(
                f"{header.sop_instance_uid} ({UID(header.sop_class_uid).name}) is no image, left out"
            )
    return slices, notes


def read_array(slices: Sequence[Slice], dtype: DTypeLike, *, rescale: bool = True) -> NDArray[Any]:
    """The pixels of single-frame images, in the order given, as (slice, row, column).

    Uncompressed pixels go from the file or the received bytes straight into the array, in the
    compiled core; compressed ones through pydicom's decoders, slice by slice.

    Raises UnsupportedImage, InvalidDataset, InvalidDicom.
    """
    if not slices:
        raise InconsistentSeries("there is no image to make an array of")
    for item in slices:
        check_image(item.header)
    first = slices[0].header
    for item in slices:
        if (item.header.rows, item.header.columns) != (first.rows, first.columns):
            raise InconsistentSeries(
                f"image {item.header.sop_instance_uid} has {item.header.rows} x "
                f"{item.header.columns} Rows x Columns, image {first.sop_instance_uid} has "
                f"{first.rows} x {first.columns}; images of one array need the same matrix"
            )
    out = numpy.empty((len(slices), first.rows, first.columns), dtype)
    direct = [_direct_image(item) for item in slices]
    if all(image is not None for image in direct):
        _core.stack([image for image in direct if image is not None], out, rescale)
        return out

    def decode(k: int) -> None:
        image = direct[k]
        _core.stack(
            [_decoded_image(slices[k]) if image is None else image], out[k : k + 1], rescale
        )

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for _ in pool.map(decode, range(len(slices))):
            pass
    return out


def check_image(header: ImageHeader) -> None:
    uid = header.sop_instance_uid
    if not header.pixel_tag:
        raise InvalidDataset(f"image {uid} has Rows but no Pixel Data")
    if header.rows < 1 or header.columns < 1:
        raise InvalidDataset(
            f"image {uid} has {header.rows} x {header.columns} Rows x Columns, but Pixel Data"
        )
    problem = ""
    if header.pixel_tag != PIXEL_TAGS[0]:
        problem = "Float or Double Float Pixel Data"
    elif header.number_of_frames != 1:
        problem = f"{header.number_of_frames} frames (multi-frame)"
    elif header.has_functional_groups:
        problem = "functional groups (an enhanced multi-frame object)"
    elif header.samples_per_pixel != 1:
        problem = f"SamplesPerPixel {header.samples_per_pixel} (colour)"
    elif header.photometric_interpretation == "PALETTE COLOR":
        problem = "PhotometricInterpretation PALETTE COLOR"
    elif header.has_modality_lut:
        problem = "a Modality LUT Sequence"
    elif header.bits_allocated not in (8, 16, 32):
        problem = f"BitsAllocated {header.bits_allocated}"
    if problem:
        raise UnsupportedImage(
            f"image {uid} has {problem}, which array grinders do not take; use list_grinder and "
            "pydicom's Dataset.pixel_array"
        )


def _direct_image(item: Slice) -> _core.Image | None:
    """The image as the core can read it without help; None for compressed pixels."""
    if not item.header.is_native:
        return None
    if isinstance(item.header, _core.Image):
        return item.header
    header, dataset = item.header, item.dataset
    big_endian = header.transfer_syntax == "1.2.840.10008.1.2.2"
    pixels = dataset.PixelData
    if pixels is None:
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
    )


def _decoded_image(item: Slice) -> _core.Image:
    """A compressed image, decoded by pydicom, as native pixels."""
    header = item.header
    syntax = UID(header.transfer_syntax)
    try:
        if syntax in _CHECKED_JPEG:
            _check_jpeg(get_frame(item.dataset.PixelData, 0, number_of_frames=1), header)
        stored, _ = get_decoder(syntax).as_array(
            item.dataset, raw=True, index=0, decoding_plugin=_DECODER_PLUGINS.get(syntax, "")
        )
    except InvalidDataset:
        raise
    except (*READ_ERRORS, RuntimeError, AttributeError) as error:
        raise UnsupportedImage(
            f"image {header.sop_instance_uid} in {syntax.name} cannot be decoded: {error}"
        ) from error
    if stored.shape != (header.rows, header.columns):
        raise InvalidDataset(
            f"image {header.sop_instance_uid} decodes to {stored.shape}, its header says "
            f"{header.rows} x {header.columns} Rows x Columns"
        )
    bits = stored.dtype.itemsize * 8
    # RLE carries the allocated words as they are; the other codecs give clean values.
    as_allocated = header.transfer_syntax == _RLE_LOSSLESS
    return _core.Image(
        numpy.ascontiguousarray(stored),
        rows=header.rows,
        columns=header.columns,
        bits_allocated=bits,
        bits_stored=header.bits_stored if as_allocated else bits,
        high_bit=header.high_bit if as_allocated else bits - 1,
        pixel_representation=1 if stored.dtype.kind == "i" else 0,
        slope=header.slope,
        intercept=header.intercept,
        sop_instance_uid=header.sop_instance_uid,
    )


def _check_jpeg(codestream: bytes, header: ImageHeader) -> None:
    """The markers (ISO 10918-1 annex B, also of JPEG-LS) are whole and say what the dataset says.

    The decoders hang, or end the process, on some codestreams that are not.
    """
    if b"\xff\xd9" not in codestream[-4:]:
        raise ValueError("its JPEG has no end")
    at, has_frame = 2, False
    while at + 10 <= len(codestream):
        if codestream[at] != 0xFF:
            break
        marker = codestream[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xDA:
            if has_frame:
                return
            break
        if codestream[at + 4 : at + 9] == b"JFIF\0" and codestream[at + 9] != 1:
            raise ValueError("its JPEG has a damaged JFIF header")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            precision, rows, columns, samples = struct.unpack_from(">BHHB", codestream, at + 4)
            if (rows, columns, samples) != (header.rows, header.columns, 1) or (
                precision > header.bits_allocated
            ):
                raise InvalidDataset(
                    f"image {header.sop_instance_uid} is a JPEG of {rows} x {columns} x {samples} "
                    f"with {precision} bits, its header says {header.rows} x {header.columns} Rows "
                    f"x Columns, 1 sample, {header.bits_allocated} bits allocated"
                )
            has_frame = True
        at += 2 + int.from_bytes(codestream[at + 2 : at + 4], "big")
    raise ValueError("its JPEG has no whole header")


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

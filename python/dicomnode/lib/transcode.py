"""From one transfer syntax to another, for a peer that does not take an object as it is stored.

Solves that conversion changes no pixel: uncompressed ones keep their bits, compressed ones become what
decoding gives, and the attributes that describe them change with them.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.tag import BaseTag
from pydicom.uid import UID

from dicomnode import _core
from dicomnode.errors import DicomnodeError, InvalidDataset, InvalidDicom, UnsupportedImage
from dicomnode.lib.dicom import PIXEL_TAGS, READ_ERRORS, LazyDataset, is_uid, scan

EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
# Whatever the codestream holds, what was compressed so is not what it was.
_LOSSY = frozenset({"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81"})
_PIXEL_DATA = PIXEL_TAGS[0]
_OFFSET_TABLES = frozenset({0x7FE00001, 0x7FE00002})
# The bytes of a number, by its VR: those of big endian are turned round.
_UNITS = {
    "US": 2, "SS": 2, "AT": 2, "OW": 2, "UL": 4, "SL": 4, "FL": 4, "OF": 4, "OL": 4, "FD": 8,
    "OD": 8, "OV": 8, "SV": 8, "UV": 8,
}  # fmt: skip
# VRs whose length has 32 bits (PS3.5 section 7.1.2).
_LONG = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_AMBIGUOUS = {"OB or OW": "OW", "US or OW": "OW", "US or SS or OW": "OW"}
# The longest value of an element with a length (PS3.5 section 7.1.1).
_MOST_BYTES = 0xFFFFFFFE


@dataclass(frozen=True)
class _Pixels:
    """What decoding gives: its place in a buffer is made first."""

    frames: list[_core.Image]
    shape: tuple[int, ...]
    dtype: str
    #: The attributes that describe the pixels, where they change: tag to VR and value.
    changes: dict[int, tuple[str, bytes]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return math.prod(self.shape) * int(self.dtype[-1])


def transcode(data: bytes, syntax: str) -> memoryview:
    """A Part 10 object as a dataset in Explicit or Implicit VR Little Endian, without file meta.

    Values keep their bytes, whatever they hold; private elements become UN where their VR is not known.
    Compressed pixels come from the compiled decoders: a colour image becomes RGB. LossyImageCompression
    stays, or becomes 01 where the codestream is always lossy.

    Raises UnsupportedImage for pixels that are not decoded, or whose codestream contradicts its
    header; InvalidDicom and InvalidDataset for what cannot be read.
    """
    if syntax not in (EXPLICIT, IMPLICIT):
        raise UnsupportedImage(f"nothing is converted to {syntax}")
    dataset = LazyDataset(data)
    source = str(dataset.file_meta.get("TransferSyntaxUID", "") or EXPLICIT)
    if not is_uid(source) or not UID(source).is_transfer_syntax:
        raise InvalidDicom(f"{source!r} is no transfer syntax that is known")
    uid = scan(data).text(0x00080018)
    pixels = _described(data) if UID(source).is_encapsulated else None
    writing = _Writing(data, syntax == EXPLICIT, not UID(source).is_little_endian)
    try:
        return _written(dataset, pixels, writing)
    except DicomnodeError:
        raise
    except (*READ_ERRORS, KeyError, AttributeError, struct.error) as error:
        raise InvalidDataset(
            f"{uid} cannot be converted to {UID(syntax).name}: {type(error).__name__}"
        ) from error


def _described(data: bytes) -> _Pixels | None:
    """What decoding will give, and which attributes change with it; None without pixels."""
    (image,) = _core.scan_images([data])
    if not image.pixel_tag:
        return None
    uid, bits, samples = image.sop_instance_uid, image.bits_allocated, image.samples_per_pixel
    if image.pixel_tag != _PIXEL_DATA or bits not in (8, 16, 32):
        raise UnsupportedImage(
            f"{uid} has pixels of {bits} BitsAllocated, or none that are integers"
        )
    frames = image.frames() if image.number_of_frames > 1 else [image]
    shape = (len(frames), image.rows, image.columns, *([samples] if samples > 1 else []))
    changes: dict[int, tuple[str, bytes]] = {
        0x00280102: ("US", struct.pack("<H", image.bits_stored - 1)),
    }
    if samples > 1:
        changes[0x00280006] = "US", b"\0\0"
        if image.photometric_interpretation.startswith("YBR"):
            changes[0x00280004] = "CS", b"RGB "
    if image.transfer_syntax in _LOSSY:
        changes[0x00282110] = "CS", b"01"
    kind = "i" if image.pixel_representation else "u"
    found = _Pixels(frames, shape, f"<{kind}{bits // 8}", changes)
    if found.size > _MOST_BYTES:
        raise UnsupportedImage(f"{uid} has {found.size} bytes of pixels, an element holds 4 GiB")
    return found


def _written(dataset: Dataset, pixels: _Pixels | None, writing: "_Writing") -> memoryview:
    """One buffer with the elements before the pixels, the pixels, and those after."""
    where = BaseTag(_PIXEL_DATA)
    tags = set(dataset.keys())
    changes = {} if pixels is None else pixels.changes
    if pixels is not None:
        tags = (tags | set(map(BaseTag, changes))) - set(map(BaseTag, _OFFSET_TABLES))
    before = writing.elements(dataset, sorted(tag for tag in tags if tag < where), changes)
    after = writing.elements(dataset, sorted(tag for tag in tags if tag > where), {})
    if where not in tags:
        return memoryview(before + after)
    bits = writing.number(dataset, 0x00280100) or 0
    if pixels is None:
        vr, value = writing.value(dataset, where)
        size, unit = len(value), max(2, bits // 8) if vr == "OW" else 1
    else:
        vr, size = "OW" if bits > 8 else "OB", pixels.size
    head = before + writing.head(where, vr, size + size % 2)
    # The pixels begin at a multiple of eight bytes, for the decoders.
    gap = -len(head) % 8
    start = gap + len(head)
    buffer = bytearray(start + size + size % 2 + len(after))
    buffer[gap:start] = head
    buffer[start + size + size % 2 :] = after
    if pixels is None:
        memoryview(buffer)[start : start + size] = writing.turned(value, unit)
    else:
        place = numpy.frombuffer(buffer, pixels.dtype, math.prod(pixels.shape), start)
        notes = _core.stack(pixels.frames, place.reshape(pixels.shape), rescale=False, rgb=True)
        if notes:
            raise UnsupportedImage(notes[0])
    return memoryview(buffer)[gap:]


@dataclass(frozen=True)
class _Writing:
    """Elements in another encoding: the heads change, the values keep their bytes."""

    #: The whole object, in which large values lie.
    data: bytes
    is_explicit: bool
    #: Whether the values are big endian.
    turns: bool

    def elements(
        self,
        dataset: Dataset,
        tags: Iterable[BaseTag],
        changes: Mapping[int, tuple[str, bytes]],
        signed: bool | None = None,
    ) -> bytes:
        out = bytearray()
        own = self.number(dataset, 0x00280103)
        signed = signed if own is None else own == 1
        for tag in tags:
            # Group lengths are retired, and would be wrong.
            if tag.element == 0:
                continue
            if tag in changes:
                vr, changed = changes[tag]
                out += self.head(tag, vr, len(changed)) + changed
                continue
            vr, value = self.value(dataset, tag, bool(signed))
            if vr == "SQ":
                items = b"".join(self._item(item, signed) for item in dataset[tag].value)
                out += self.head(tag, "SQ", len(items)) + items
                continue
            vr = "UN" if vr not in _LONG and len(value) > 0xFFFF else vr
            out += self.head(tag, vr, len(value) + len(value) % 2)
            out += self.turned(value, _UNITS.get(vr, 1))
            out += b"\0" * (len(value) % 2)
        return bytes(out)

    def _item(self, item: Dataset, signed: bool | None) -> bytes:
        content = self.elements(item, sorted(item.keys()), {}, signed)
        return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content

    def number(self, dataset: Dataset, tag: int) -> int | None:
        """A US element, which stays as it was read; None where absent or empty."""
        raw: Any = (
            dataset.get_item(BaseTag(tag), keep_deferred=True) if BaseTag(tag) in dataset else None
        )
        value = getattr(raw, "value", None)
        if not isinstance(value, bytes) or len(value) < 2:
            return None
        return int.from_bytes(value[:2], "big" if self.turns else "little")

    def value(self, dataset: Dataset, tag: BaseTag, signed: bool = False) -> tuple[str, memoryview]:
        """VR of an element, and its value as it is in the object; of a sequence none."""
        raw: Any = dataset.get_item(tag, keep_deferred=True)
        vr = str(raw.VR or "") or _vr_of(tag)
        vr = ("SS" if signed else "US") if vr == "US or SS" else _AMBIGUOUS.get(vr, vr)
        if vr == "SQ":
            return vr, memoryview(b"")
        if not isinstance(raw, RawDataElement):
            return vr, self._written(raw)
        if raw.value is None and raw.length:
            found = memoryview(self.data)[raw.value_tell : raw.value_tell + raw.length]
            if len(found) != raw.length:
                raise InvalidDicom(f"{tag} is cut off")
            return vr, found
        return vr, memoryview(raw.value or b"")

    def _written(self, element: DataElement) -> memoryview:
        """The value of an element that pydicom has decoded, as it is in the object."""
        encoded = DicomBytesIO()
        encoded.is_implicit_VR, encoded.is_little_endian = True, not self.turns
        write_data_element(encoded, element)
        return memoryview(encoded.getvalue())[8:]

    def head(self, tag: BaseTag, vr: str, length: int) -> bytes:
        """Tag, VR and length of an element (PS3.5 section 7.1)."""
        if not self.is_explicit:
            return struct.pack("<HHI", tag.group, tag.element, length)
        if vr in _LONG:
            return struct.pack("<HH2sHI", tag.group, tag.element, vr.encode(), 0, length)
        return struct.pack("<HH2sH", tag.group, tag.element, vr.encode(), length)

    def turned(self, value: memoryview, unit: int) -> memoryview:
        """A value of numbers of `unit` bytes as little endian."""
        if not self.turns or unit == 1 or len(value) % unit:
            return value
        return memoryview(numpy.frombuffer(value, f"<u{unit}").byteswap().tobytes())


def _vr_of(tag: BaseTag) -> str:
    if tag.is_private:
        return "LO" if tag.is_private_creator else "UN"
    try:
        return dictionary_VR(tag)
    except KeyError:
        return "UN"

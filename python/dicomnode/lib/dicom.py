"""Datasets without the waiting: lazy loading, safe reading of tags, safe names.

A `LazyDataset` is an ordinary pydicom dataset that reads its header when you first look at it and
its pixel data when you first ask for that. Grinders never look: they hand its *source* (a path or
bytes) to the compiled core.
"""

import hashlib
import io
import logging
import os
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydicom import dcmread
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import BytesLengthException
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_deferred_data_element
from pydicom.filewriter import write_dataset
from pydicom.tag import BaseTag, Tag, TagType
from pydicom.uid import UID

from dicomnode import _core
from dicomnode._core import Header as Header
from dicomnode._core import JournalFile as JournalFile
from dicomnode._core import Received as Received
from dicomnode._core import Receiver as Receiver
from dicomnode._core import digest as digest
from dicomnode._core import filesystem_type as filesystem_type
from dicomnode._core import is_dicom as is_dicom
from dicomnode._core import is_uid as is_uid
from dicomnode._core import link as link
from dicomnode._core import part10_prefix as part10_prefix
from dicomnode._core import scan as scan
from dicomnode._core import sync_filesystem as sync_filesystem
from dicomnode.errors import InvalidDataset, InvalidDicom

logger = logging.getLogger("dicomnode.dicom")

Source: TypeAlias = str | bytes

_EXPLICIT: Final = "1.2.840.10008.1.2.1"
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
# What pydicom raises for a value that does not fit its VR, on reading and on writing.
READ_ERRORS: Final = (
    ValueError, TypeError, NotImplementedError, OverflowError, BytesLengthException,
)  # fmt: skip
_WRITE_ERRORS: Final = (*READ_ERRORS, AttributeError, KeyError, OSError, struct.error)

PIXEL_TAGS: Final = (0x7FE00010, 0x7FE00008, 0x7FE00009)
MEDIA_STORAGE_DIRECTORY: Final = "1.2.840.10008.1.3.10"

# What stacking reads of a header (see `_core.Image`), pixel data and sequences apart.
_IMAGE_TAGS: Final = (
    0x00080008, 0x00080016, 0x00080018, 0x00080060, 0x00180050, 0x00180088, 0x0020000D,
    0x0020000E, 0x00200013, 0x00200032, 0x00200037, 0x00200052, 0x00280002, 0x00280004,
    0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280100, 0x00280101, 0x00280102,
    0x00280103, 0x00281052, 0x00281053, 0x00281054, 0x00189361, 0x00541001, 0x30040002,
    0x3004000C, 0x3004000E,
)  # fmt: skip
# What tells where frames lie, besides the attributes of ImageHeader: AnatomicalOrientationType,
# InConcatenationNumber, InConcatenationTotalNumber, ConcatenationUID, ConcatenationFrameOffsetNumber,
# ReferencedSegmentNumber.
LAYOUT_TAGS: Final = (
    0x00102210, 0x00209161, 0x00209162, 0x00209163, 0x00209228, 0x0062000B,
)  # fmt: skip
_IMAGE_SEQUENCES: Final = (0x00283000, 0x52009229, 0x52009230)
# What is a name as it is.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
# Text that is the same in every character set of DICOM: in some of them a backslash or a tilde is not.
_PLAIN_TEXT: Final = re.compile(rb"[ -\[\]-}]+")
# Values longer than this stay in the file until they are asked for.
_DEFER_BYTES: Final = 16 * 1024


class LazyDataset(FileDataset):
    """A pydicom dataset that is read when it is looked at.

    Behaves as the `FileDataset` that `pydicom.dcmread` returns. The header is read on the first
    access, pixel data on the first access to it. A change made to it is kept, and grinders see it.

    Parameters: `source` is the path of a Part 10 file, or the bytes of one. `image` is what the
    compiled core found in it, where it was scanned already; `decoded` may have its pixels (a
    `dicomnode.lib.images.Decoded`), and `uids` makes the UIDs of what is derived from it (a
    `dicomnode.lib.uids.Uids`).
    """

    # Not in `__dict__`, which is what is compared and copied: a copy is scanned and decoded again.
    __slots__ = ("_decoded", "_image", "_uids")
    _image: _core.Image | None
    _decoded: Any
    _uids: Any

    def __init__(
        self,
        source: Source,
        image: _core.Image | None = None,
        decoded: Any = None,
        uids: Any = None,
    ) -> None:
        self.__dict__["_source"] = source
        object.__setattr__(self, "_image", image)
        object.__setattr__(self, "_decoded", decoded)
        object.__setattr__(self, "_uids", uids)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __getattr__(self, name: str) -> Any:
        if name in ("_image", "_decoded", "_uids"):
            return None
        state = self.__dict__
        if "_dict" not in state and not name.startswith("__"):
            _read(self)
            if name in state:
                return state[name]
        return super().__getattr__(name)

    @property
    def source(self) -> Source:
        """The path or the bytes this dataset is read from."""
        return self.__dict__["_source"]  # type: ignore[no-any-return]

    @property
    def decoded(self) -> Any:
        """What may have the pixels of the source already; mostly None."""
        return self._decoded

    @property
    def uids(self) -> Any:
        """What makes the UIDs of results; None outside a node."""
        return self._uids


def forget_source(dataset: LazyDataset) -> None:
    """From now on what was not read of a dataset is an OSError: another file may have its path soon."""
    for name in ("_source", "filename"):
        if name in dataset.__dict__:
            dataset.__dict__[name] = "an image that was there during the call only"


def _read(dataset: LazyDataset) -> None:
    read = _dcmread(dataset.source, _DEFER_BYTES)
    if read.file_meta.get("TransferSyntaxUID") == _DEFLATED:
        # pydicom would look for deferred values in the deflated bytes.
        read = _dcmread(dataset.source, None)
    state = dataset.__dict__
    # What was set before the first look stays; `_dict` comes last, as the sign that all is there.
    for name, value in ({**read.__dict__, "_pristine": dict(read._dict)}).items():
        if name != "_dict":
            state.setdefault(name, value)
    state.setdefault("_dict", read._dict)


def _dcmread(source: Source, defer_size: int | None) -> FileDataset:
    opened = source if isinstance(source, str) else io.BytesIO(source)
    try:
        return dcmread(opened, defer_size=defer_size, force=True)
    except (*READ_ERRORS, OSError, EOFError, struct.error, zlib.error) as error:
        # pydicom raises it too, without the number that the operating system gives.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        named = source if isinstance(source, str) else f"an object of {len(source)} bytes"
        raise InvalidDicom(
            f"{named}: expected a dataset that pydicom can read, found one at which it fails with "
            f"{type(error).__name__}"
        ) from error


def untouched_source(dataset: Dataset, extra_tags: Iterable[int] = ()) -> Source | None:
    """The source of a lazy dataset whose image attributes, and `extra_tags`, are those of the source.

    None for any other dataset: its attributes have to be read from the dataset itself.
    """
    if not isinstance(dataset, LazyDataset):
        return None
    if "_dict" not in dataset.__dict__:
        return dataset.source
    current, pristine = dataset._dict, dataset.__dict__["_pristine"]
    if not _has_own_sequences(dataset):
        return None
    for tag in (*_IMAGE_TAGS, *PIXEL_TAGS, *extra_tags):
        now, was = current.get(BaseTag(tag)), pristine.get(BaseTag(tag))
        if now is was:
            continue
        if now is None or was is None:
            return None
        if isinstance(was, RawDataElement):
            if was.value is None and was.length != 0:
                origin: Any = dataset.buffer if dataset.filename is None else dataset.filename
                was = read_deferred_data_element(
                    dataset.fileobj_type, origin, dataset.timestamp, was
                )
            was = convert_raw_data_element(was, ds=dataset)
        if now.value != was.value:
            return None
    return dataset.source


def _has_own_sequences(dataset: LazyDataset) -> bool:
    """Whether the sequences that stacking reads are those of the source.

    One that was looked at may have been changed inside, which only reading it again can tell.
    """
    current, pristine = dataset._dict, dataset.__dict__["_pristine"]
    looked_at = []
    for tag in map(BaseTag, _IMAGE_SEQUENCES):
        now, was = current.get(tag), pristine.get(tag)
        if (now is None) != (was is None):
            return False
        if now is not None and not (now is was and isinstance(now, RawDataElement)):
            looked_at.append(tag)
    if not looked_at:
        return True
    source = dataset.source
    opened = source if isinstance(source, str) else io.BytesIO(source)
    fresh = dcmread(opened, stop_before_pixels=True, force=True)
    return all(tag in fresh and dataset[tag] == fresh[tag] for tag in looked_at)


def to_scan(dataset: Dataset, extra_tags: Iterable[int] = ()) -> Source | _core.Image | None:
    """What the compiled core has to scan instead of a dataset: its untouched source, or the image
    that was found in it before, whose file is looked at again.
    """
    source = untouched_source(dataset, extra_tags)
    if source is not None and isinstance(dataset, LazyDataset) and dataset._image is not None:
        return dataset._image
    return source


def load(
    paths_or_folder: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Dataset]:
    """Lazy datasets of files, for using grinders without a server.

    A folder is walked with everything below it, in the order of the names. A file in it that does
    not start as a DICOM object does, and a DICOMDIR, is left out. One that does and is damaged is
    an error, and so is one that is called like an image and is none, and one without a suffix that
    is empty or filled with one byte: a series without it would be another examination. A file that is named itself has to be DICOM.

    Raises FileNotFoundError and other OSErrors for what cannot be read, InvalidDicom for a damaged
    file and for a named one that is no DICOM object.
    """
    if isinstance(paths_or_folder, str | os.PathLike):
        paths_or_folder = [paths_or_folder]
    objects, left_out = _core.load([str(Path(given)) for given in paths_or_folder], LAYOUT_TAGS)
    for path in left_out:
        logger.debug("%s is no DICOM object, left out", path)
    return [LazyDataset(path, image) for path, image in objects]


def read(source: Source) -> Dataset:
    """A whole dataset, read now."""
    return _dcmread(source, None)


def tag_of(tag: TagType) -> int:
    """The number of a tag given as int, keyword, (group, element) or pydicom Tag.

    Raises ValueError for what is neither.
    """
    return int(Tag(tag))


def tag_name(tag: int) -> str:
    """For messages: `(0010,0020) PatientID`."""
    from pydicom.datadict import keyword_for_tag

    return f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {keyword_for_tag(tag)}".rstrip()


def header_element(header: Header, tag: int) -> DataElement | None:
    """A top-level element as pydicom would give it; None where absent or not held by the header."""
    found = header.get(tag)
    if found is None:
        return None
    vr, value = found
    if not vr:
        try:
            vr = dictionary_VR(tag)
        except KeyError:
            vr = "UN"
        is_signed = header_number(header, 0x00280103) == 1
        vr = {
            "US or SS": "SS" if is_signed else "US",
            "OB or OW": "OW",
            "US or SS or OW": "OW",
            "US or OW": "OW",
        }.get(vr, vr)
    text = ""
    if tag != 0x00080005 and 0x00080005 in header:
        found = header.get(0x00080005)
        text = found[1].decode("ascii", "replace").strip(" \0") if found else ""
    return raw_element(
        tag, vr, value, text, header.transfer_syntax == "1.2.840.10008.1.2", header.big_endian
    )


def raw_element(
    tag: int,
    vr: str,
    value: bytes,
    character_set: str = "",
    is_implicit: bool = False,
    big_endian: bool = False,
) -> DataElement:
    """An element out of its raw value, as pydicom would give it.

    Raises InvalidDicom for a value that does not fit the VR.
    """
    raw = RawDataElement(BaseTag(tag), vr, len(value), value, 0, is_implicit, not big_endian, True)
    charset = convert_encodings(character_set.split("\\")) if character_set else None
    try:
        return convert_raw_data_element(raw, encoding=charset)
    except READ_ERRORS as error:
        raise InvalidDicom(
            f"{tag_name(tag)} cannot be understood: {type(error).__name__}"
        ) from error


def header_number(header: Header, tag: int) -> int | None:
    """The first number of a US element (such as PixelRepresentation); None where absent."""
    found = header.get(tag)
    if found is None or len(found[1]) < 2:
        return None
    return int.from_bytes(found[1][:2], "big" if header.big_endian else "little")


def identifier_of(header: Header, tag: int) -> str:
    """The value that groups images into a case, as text; empty where absent, or all its values are.

    Bytes that are not of the character set that the object names stay apart, as `\\xNN`: two
    patients whose identifiers differ only in such bytes must not become one.
    """
    found = header.get(tag)
    if found is not None and (found[0] in ("LO", "SH") or (not found[0] and tag == 0x00100020)):
        plain = found[1].strip(b" \0")
        if _PLAIN_TEXT.fullmatch(plain) is not None:
            return plain.decode("ascii")
    element = header_element(header, tag)
    if element is None or element.value is None:
        return ""
    value = element.value
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = "\\".join(str(part) for part in value)
    text = str(value)
    if "\N{REPLACEMENT CHARACTER}" in text and found is not None:
        text = found[1].decode("ascii", "backslashreplace")
    if not text.strip(" \0\\"):
        return ""
    return text.strip(" \0").encode("utf-8", "backslashreplace").decode("utf-8")


def safe_name(text: str) -> str:
    """A text as one part of a path: never empty, never a dot, never with a separator.

    Letters, digits, `-`, `_` and inner dots stay; every other byte of its UTF-8 form becomes
    `%XX`. Names over 100 characters are cut and end in a digest of the whole. Different texts have
    different names.
    """
    if _PLAIN.fullmatch(text) is not None:
        return text
    escaped = "".join(
        chr(byte) if _is_plain(byte) else f"%{byte:02X}"
        for byte in text.encode("utf-8", "surrogateescape")
    )
    if escaped.startswith("."):
        escaped = "%2E" + escaped[1:]
    if len(escaped) > 100:
        short = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        escaped = f"{escaped[:80]}%%{short}"
    return escaped or "%"


def _is_plain(byte: int) -> bool:
    char = chr(byte)
    return byte < 128 and (char.isalnum() or char in "-_.")


def printable(text: str) -> str:
    """A text from outside on one line of a log or a message: control characters are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def dataset_of(data: bytes) -> memoryview:
    """The dataset in a Part 10 object, without preamble and file meta (PS3.10 section 7.1).

    Of bytes without `DICM`, all. Raises InvalidDicom where the file meta is damaged.
    """
    view = memoryview(data)
    if data[128:132] != b"DICM":
        return view
    position = 132
    while data[position : position + 2] == b"\x02\x00" and len(data) >= position + 8:
        if data[position + 4 : position + 6] in (b"OB", b"UN", b"SQ", b"UT", b"OW"):
            length = 12 + int.from_bytes(data[position + 8 : position + 12], "little")
        else:
            length = 8 + int.from_bytes(data[position + 6 : position + 8], "little")
        position += length
    if position > len(data):
        raise InvalidDicom("the file meta is cut off")
    return view[position:]


def encode(dataset: Dataset) -> tuple[bytes, str]:
    """A dataset as a Part 10 object, and its transfer syntax UID.

    That is the dataset's own, or Explicit VR Little Endian where it has none.

    Raises InvalidDataset, naming the attribute, for a dataset that cannot be written or lacks
    SOPClassUID or SOPInstanceUID.
    """
    uid = str(dataset.get("SOPInstanceUID", "") or "")
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        value = str(dataset.get(keyword, "") or "")
        if not is_uid(value):
            raise InvalidDataset(
                f"a result has no valid {keyword} ({value!r}; SOPInstanceUID {uid!r})"
            )
    given = getattr(dataset, "file_meta", None)
    syntax = UID((given.get("TransferSyntaxUID") if given is not None else None) or _EXPLICIT)
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise InvalidDataset(f"result {uid} has the TransferSyntaxUID {syntax}, which is none")
    if dataset.original_encoding[1] not in (None, syntax.is_little_endian):
        raise InvalidDataset(
            f"result {uid} was read in another byte order than that of its TransferSyntaxUID "
            f"{syntax.name}, and its PixelData cannot be turned round; make a new Dataset"
        )
    body = DicomBytesIO()
    body.is_implicit_VR, body.is_little_endian = syntax.is_implicit_VR, syntax.is_little_endian
    prefix = part10_prefix(str(dataset.SOPClassUID), uid, str(syntax))
    is_deflated = syntax == _DEFLATED
    if not is_deflated:
        body.write(prefix)
    try:
        for tag in dataset.keys():  # noqa: SIM118  (iterating a Dataset decodes every element)
            if tag >> 16 in (0x0000, 0x0002):
                raise ValueError(f"{tag_name(tag)} belongs into a command or the file meta")
        if "PixelData" in dataset:
            pixels = dataset["PixelData"]
            if not isinstance(pixels.value, bytes | bytearray | None) and not pixels.is_buffered:
                raise TypeError(f"PixelData (7FE0,0010) is {type(pixels.value)}, not bytes")
            pixels.is_undefined_length = syntax.is_compressed and not is_deflated
        write_dataset(body, dataset)
    except _WRITE_ERRORS as error:
        raise InvalidDataset(f"result {uid} cannot be written: {error}") from error
    if not is_deflated:
        return body.getvalue(), str(syntax)
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = compressor.compress(body.getvalue()) + compressor.flush()
    return prefix + deflated + b"\0" * (len(deflated) % 2), str(syntax)

"""Typed face of the compiled module.

Sources. Wherever a `Source` is taken, a `str` is the path of a DICOM Part 10 file and `bytes` are
the whole Part 10 object in memory. Neither is copied: a file is read in place when it is needed,
`bytes` are kept alive and borrowed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypeAlias, final

import numpy
from numpy.typing import NDArray

__all__ = [
    "Header",
    "Image",
    "JournalFile",
    "Received",
    "Receiver",
    "Source",
    "__version__",
    "codecs",
    "debug_build",
    "digest",
    "filesystem_type",
    "is_dicom",
    "is_uid",
    "jpeg_has_simd",
    "link",
    "load",
    "part10_prefix",
    "scan",
    "scan_images",
    "stack",
    "sync_filesystem",
]

Source: TypeAlias = str | bytes

__version__: str
debug_build: bool

@final
class Header:
    """Where every top-level element of one object lies (PS3.10 section 7, PS3.5 section 7).

    Holds the bytes up to the pixel data; the pixel data itself is never read.
    """

    @property
    def transfer_syntax(self) -> str:
        """Transfer Syntax UID of the dataset; guessed from the bytes where the file meta is absent."""

    @property
    def pixel_length(self) -> int | None:
        """Bytes of the (Float/Double) Pixel Data value, None without or with undefined length."""

    def __contains__(self, tag: int, /) -> bool: ...
    def get(self, tag: int) -> tuple[str, bytes] | None:
        """VR (empty where the encoding has none) and raw value bytes of a top-level element.

        Not the value of pixel data or of an undefined-length sequence: those give None, as do
        absent elements; `in` tells them apart.
        """

    def text(self, tag: int) -> str:
        """A short ASCII value (UI, CS, IS) without padding; empty where absent.

        What is no ASCII is a replacement character.
        """

    def missing_pixels(self) -> int:
        """How many bytes of uncompressed pixel data are missing by Rows, Columns, BitsAllocated, SamplesPerPixel and NumberOfFrames;
        0 where none are, or where the header does not tell.
        """

    def tags(self) -> list[int]:
        """The tags present, in the order of the file, group 0002 left out."""

    @property
    def big_endian(self) -> bool: ...

def link(descriptor: int, size: int, folder: str, name: str, flush: bool) -> bool:
    """Give an open file of `size` bytes a name in a folder, also one without any; false where the name is taken.

    With `flush` the file is durable before it has the name, and the name then, or it is not there. Raises
    OSError, also where it has another size.
    """

@final
class JournalFile:
    """A file that keeps records one behind another; `append` may be called by several threads at a time.

    They go to the open file from `start` on, each begins with `nonce`, of 16 bytes, and none ends behind
    `size`. With `flush` they survive a power cut. The file is duplicated.
    """

    def __new__(cls, descriptor: int, nonce: bytes, start: int, size: int, flush: bool) -> Self: ...
    def append(self, text: str) -> bool:
        """Keep a text.

        What comes at the same time is flushed at once. False, and nothing is done, where it does not fit; else `settle` has
        to be called in the end. Raises OSError.
        """

    def keep(
        self,
        text: str,
        descriptor: int,
        size: int,
        with_image: bool,
        folder: str | Path,
        name: str,
        request: Received | None = None,
        is_awaited: bool = False,
        name_ahead: str | None = None,
    ) -> bool | None:
        """Give an open file of `size` bytes a name in a folder as `link` does, keep a text and with `with_image` the file, and
        then, if it `is_awaited`, answer the request with 0x0000: all without the interpreter. Each NUL of the text becomes
        the digest of the request, which need not be there before the name is.

        Where records survive a power cut and this one has not the file, file and name are flushed; the name is not where
        the request has the `name_ahead` that is given, which then stays.

        False, and nothing is done, where the name is taken, and None where the record does not fit. Otherwise `settle` has
        to be called in the end. Raises OSError, where nothing is left of it.
        """

    @property
    def has_failed(self) -> bool:
        """Whether a write or flush of it has failed, so that it keeps nothing any more."""

    def settle(self) -> None:
        """What has to happen after a record was kept, and before its file is let go, has happened."""

    def finish(self) -> None:
        """Let nothing more fit, and wait until all that did has settled or has failed."""

def filesystem_type(descriptor: int) -> int:
    """What kind of file system an open file or folder is on: `f_type` of statfs(). Raises OSError."""

def sync_filesystem(descriptor: int) -> None:
    """Have the disk keep all that was written to the file system of an open file or folder.

    An error of any of it, since that was opened, shows once. Raises OSError.
    """

def part10_prefix(
    sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae_title: str = ""
) -> bytes:
    """Preamble, `DICM` and File Meta Information (PS3.10 section 7.1) for a received dataset."""

@final
class Receiver:
    """Parses one association's bytes into C-STORE requests (PS3.7 section 9.1.1).

    `contexts` are the accepted presentation contexts: ID and transfer syntax. `socket` is read by `receive` until `wake`
    can be read; both are duplicated, so that the caller may close them at any time. Of a dataset at most `memory` bytes are
    held. `digest_size` tells the kind of the digests, as in `digest`. With `folder` each image is written to a Part 10
    file there while it arrives, unless less than `least_free` bytes are free; `title` is the AE title of its sender.
    `identifier_tag` is the attribute that tells who an image belongs to. After two files of more
    bytes than `named_above` the next one has a `name_ahead`.

    Raises OSError where they cannot be duplicated.
    """

    def __new__(
        cls,
        contexts: Sequence[tuple[int, str]],
        pdu: int,
        dataset: int,
        memory: int,
        socket: int | None = None,
        wake: int | None = None,
        digest_size: int = 32,
        folder: Path | None = None,
        least_free: int = 0,
        title: str = "",
        identifier_tag: int = 0x00100020,
        named_above: int | None = None,
    ) -> Self: ...
    @property
    def arriving(self) -> int:
        """Bytes of the dataset that is arriving which are in memory."""

    @property
    def is_arriving(self) -> bool:
        """Whether an image has begun to arrive, or has arrived and is not dealt with."""

    @property
    def is_large(self) -> bool:
        """Whether the dataset that is arriving is too large for memory."""

    @property
    def total(self) -> int:
        """Bytes that ever came."""

    @property
    def is_within(self) -> bool:
        """Whether a message has begun and is not whole, or is here and was not asked for."""

    def unsent(self) -> bytes:
        """What of the last answers was not sent; all of it without a socket."""

    def answered(self) -> None:
        """The image that has arrived is dealt with, as it is also where more is read."""

    def discard(self, errno: int) -> None:
        """Keep no more of a dataset that is too large for memory; the request then tells `errno`."""

    def close(self) -> None:
        """Close the duplicates of socket and `wake`, and the files of what is being written and of what may come next."""

    def receive(self, seconds: float) -> Received | bytes | None:
        """Read from the socket until something is whole.

        After an answer, and with a folder, the file of the next image may be opened already. Where some of the answer is
        unsent, nothing is read. A request gives `Received`, any other PDU its bytes, a closed connection empty bytes. None
        after `seconds` or 32 MiB, or as soon as `wake` can be read.

        Raises InvalidDicom for what breaks the protocol or a limit, and OSError.
        """

    def offer(self, data: bytes) -> Received | bytes | None:
        """The same for bytes that the caller has read; None where they make nothing whole."""

@final
class Received:
    """A C-STORE request with its dataset."""

    @property
    def context_id(self) -> int:
        """Presentation context ID."""

    @property
    def sop_class_uid(self) -> str:
        """(0000,0002), whatever it may be."""

    @property
    def sop_instance_uid(self) -> str:
        """(0000,1000), whatever it may be."""

    @property
    def size(self) -> int:
        """Bytes of the dataset."""

    @property
    def digest(self) -> bytes:
        """The digest of the dataset."""

    @property
    def is_large(self) -> bool:
        """Whether the dataset was too large for memory, and is at best in its file."""

    @property
    def file(self) -> tuple[int, int] | None:
        """The descriptor of its file, until `close`, and how many bytes it has to have. None without a file."""

    @property
    def name_ahead(self) -> str | None:
        """The name in the folder of the `Receiver` that its file has, if that is on the disk; it is deleted by `close`, unless
        `JournalFile.keep` has said that it stays.
        """

    def close(self) -> None:
        """Close its file; unless it was linked nothing is left of it."""

    def known(self) -> tuple[Header, tuple[str, str] | None] | None:
        """Its header, and of an ordinary image identifier and name; once, and None where it has to be scanned.

        Ordinary is an image that is the one its sender said, has a UID, all its uncompressed pixels and no file meta
        information in the dataset, and plain values of the identifier, of Modality and of InstanceNumber. The name is
        `Image_<modality>_<instance number>`.
        """

    @property
    def errno(self) -> int | None:
        """The number of the error because of which its file is not whole."""

    def answer(self, status: int, comment: str = "", offending: int = 0) -> None:
        """Answer it, unless it was answered; `unsent` of its `Receiver` has what the socket did not take at once."""

    @property
    def status(self) -> int | None:
        """The status that it was answered with; None where it was not answered."""

    def response(self, status: int, comment: str = "", offending: int = 0) -> bytes:
        """The bytes of a C-STORE-RSP (PS3.7 section 9.3.1.2)."""

    @property
    def head(self) -> bytes:
        """The first eight bytes of the dataset, as far as it is in memory."""

    @property
    def data(self) -> memoryview:
        """The bytes of the dataset."""

def digest(source: Source | memoryview, size: int = 32, start: int = 0) -> bytes:
    """The digest of a file from `start` on, or of memory: SHA-256 (`size` 32), or BLAKE3 cut to 16 bytes.

    Raises OSError, and ValueError for any other size.
    """

def scan(source: Source | Received, transfer_syntax: str | None = None) -> Header:
    """Scan one object. With `transfer_syntax`, `source` is a bare dataset (as DIMSE carries it).

    Raises InvalidDicom (not DICOM, truncated, lying lengths, nested too deep) or OSError.
    """

@final
class Image:
    """What stacking needs to know of one single-frame or multi-frame image, and its source."""

    def __new__(
        cls,
        pixels: bytes | bytearray | memoryview | NDArray[numpy.generic],
        *,
        rows: int,
        columns: int,
        bits_allocated: int,
        bits_stored: int,
        high_bit: int,
        pixel_representation: int,
        slope: float = 1.0,
        intercept: float = 0.0,
        big_endian: bool = False,
        sop_instance_uid: str = "",
        transfer_syntax: str = "",
    ) -> Self:
        """An image from pixel bytes in memory (borrowed, C-contiguous, one frame, one sample).

        Native pixels, or with the UID of an encapsulated `transfer_syntax` the items of PixelData.
        """

    def with_values(
        self,
        slope: float,
        intercept: float,
        *,
        first: int = 0,
        values: list[float] | None = None,
    ) -> Image:
        """The same image with other values: `stored * slope + intercept`, or those of a table.

        `values[k]` is what the stored value `first + k` means; those below and above mean what the
        first and the last do.
        """

    def frames(self) -> list[Image]:
        """One Image for each frame, in the order of the file, with what functional groups say of it.

        Raises InvalidDicom for functional groups that cannot be understood, OSError.
        """

    @property
    def frame(self) -> int:
        """Which frame of its object this is, from 0."""

    @property
    def stack_id(self) -> str:
        """Stack ID of the frame, empty where absent."""

    @property
    def position_index(self) -> int | None:
        """Which slice of its stack the frame says it is: the dimension index of the position
        (PS3.3 C.7.6.17), or InStackPositionNumber."""

    def element(self, tag: int) -> tuple[str, bytes] | None:
        """VR (empty where the encoding has none) and raw value of a tag asked of `scan_images`.

        Of a frame, that of the functional groups counts more than that of the dataset.
        """

    @property
    def big_endian(self) -> bool:
        """The values of the dataset are big endian."""

    @property
    def sop_class_uid(self) -> str: ...
    @property
    def sop_instance_uid(self) -> str: ...
    @property
    def study_instance_uid(self) -> str: ...
    @property
    def series_instance_uid(self) -> str: ...
    @property
    def frame_of_reference_uid(self) -> str: ...
    @property
    def transfer_syntax(self) -> str: ...
    @property
    def modality(self) -> str: ...
    @property
    def image_type(self) -> str:
        """The whole value, backslash between the values, as in the file."""

    @property
    def photometric_interpretation(self) -> str: ...
    @property
    def rows(self) -> int:
        """0 where absent; likewise the other integers unless told otherwise."""

    @property
    def columns(self) -> int: ...
    @property
    def samples_per_pixel(self) -> int:
        """1 where absent."""

    @property
    def planar_configuration(self) -> int:
        """0 where absent."""

    @property
    def bits_allocated(self) -> int: ...
    @property
    def bits_stored(self) -> int:
        """BitsAllocated where absent."""

    @property
    def high_bit(self) -> int:
        """BitsStored - 1 where absent."""

    @property
    def pixel_representation(self) -> int: ...
    @property
    def number_of_frames(self) -> int:
        """1 where absent, empty or 0."""

    @property
    def slope(self) -> float:
        """Rescale Slope, 1.0 where absent."""

    @property
    def intercept(self) -> float: ...
    @property
    def has_rescale(self) -> bool:
        """Rescale Slope or Rescale Intercept is present and not empty."""

    @property
    def units(self) -> str:
        """What rescaled values are measured in, such as HU or BQML; empty where unknown.

        Units (0054,1001), Dose Units (3004,0002) or Rescale Type (0028,1054); HU where a CT Image has
        none of them, unless it is a localizer or multi-energy (PS3.3 C.8.2.1).
        """

    @property
    def position(self) -> tuple[float, float, float] | None:
        """Image Position (Patient), mm."""

    @property
    def orientation(self) -> tuple[float, float, float, float, float, float] | None:
        """Image Orientation (Patient)."""

    @property
    def pixel_spacing(self) -> tuple[float, float] | None:
        """Pixel Spacing, mm: between rows, between columns."""

    @property
    def slice_thickness(self) -> float | None: ...
    @property
    def spacing_between_slices(self) -> float | None: ...
    @property
    def instance_number(self) -> int | None:
        """None where absent, and where it is no whole number."""

    @property
    def has_modality_lut(self) -> bool:
        """A Modality LUT Sequence (0028,3000) is present."""

    @property
    def has_functional_groups(self) -> bool:
        """(5200,9229) or (5200,9230) is present."""

    @property
    def pixel_tag(self) -> int:
        """0x7FE00010, 0x7FE00008 or 0x7FE00009; 0 without pixel data."""

    @property
    def is_native(self) -> bool:
        """The pixel data is uncompressed."""

def codecs() -> list[tuple[str, str, str, str, str]]:
    """Every encapsulated transfer syntax: UID, name, decoder, its crate and version, its licence.

    The last three are empty for a syntax that is not decoded.
    """

def jpeg_has_simd() -> bool:
    """Whether the JPEG decoder was built with its SIMD code."""

def scan_images(sources: Sequence[Source | Image], extra_tags: Sequence[int] = ...) -> list[Image]:
    """Scan many objects in parallel with the GIL released; order and length as given.

    The images keep the values of `extra_tags`, and so do their frames, wherever in the functional
    groups these lie: see `Image.element`. An Image stands for its source, and is returned itself
    unless its file was changed since or it was scanned for other tags.

    Raises InvalidDicom or OSError for the first source that cannot be read; the message names it
    by SOPInstanceUID where known, else by its place in the list.
    """

def load(
    paths: list[str], extra_tags: Sequence[int] = ...
) -> tuple[list[tuple[str, Image | None]], list[str]]:
    """The objects in files, and in folders and everything below them; and the files left out.

    An object is its path and its Image, None where that has to be scanned when it is needed: its
    attributes cannot be understood, it is deflated, or its file was changed just now. A folder's
    files come in the order of their names, before those of the folders in it. `extra_tags` as in
    `scan_images`.

    Raises InvalidDicom for a damaged object, an empty file that is called like an image, and a file
    given by name that is no object; OSError.
    """

def is_uid(text: str) -> bool:
    """Whether a text is a UID (PS3.5 section 9.1): digits and dots, at most 64 characters.

    Leading zeros in a component are accepted, since objects in the field have them.
    """

def is_dicom(path: str) -> bool:
    """Whether a file starts like a DICOM object (a Part 10 prefix, or a plausible bare dataset)."""

def stack(
    images: list[Image], out: NDArray[numpy.generic], rescale: bool = True, rgb: bool = True
) -> list[str]:
    """Write the pixels of `images[k]` to `out[k]`, in parallel over images, the GIL released.

    `out` has shape (len(images), rows, columns), or with a fourth axis of as many samples as the
    images have; it is C-contiguous and writeable; dtype float32, float64, or an 8, 16 or 32 bit
    integer. Stored values are shifted by HighBit, masked to BitsStored and sign-extended, then, with
    `rescale`, looked up in the Modality LUT where there is one, or stored * slope + intercept is
    computed in float64 and rounded once to `out`'s dtype (PS3.3 C.11.1).

    Samples lie one pixel after the other, whatever PlanarConfiguration says; with `rgb`, YBR_FULL
    becomes RGB. Compressed frames are decoded first. Returns a text for each image whose codestream
    contradicts its header, or whose pixel data goes on after the last pixel.

    Raises UnsupportedImage where BitsAllocated is not 1, 8, 16 or 32, or a transfer syntax is not
    decoded; InvalidDicom where pixel data is damaged or shorter than Rows x Columns ask, or
    Rows/Columns/SamplesPerPixel differ from `out`, or bits are contradictory; InvalidDataset where an
    integer dtype cannot hold a rescaled value exactly, or a codestream has another size than its
    header; OSError. On an error `out` is undefined.
    """

"""Where the fuzzers start: headers, fragments and codestreams cut out of pydicom's test files.

Nothing of it is kept in the repository; `write` makes it in a moment. What pydicom's files lack
(small images of each codec) is encoded here.
"""

import hashlib
import io
import itertools
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames, parse_basic_offsets
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, CTImageStorage
from tests.e2e import wire
from tests.unit import test_codecs as known

from dicomnode.lib.dicom import part10_prefix

# Longer ones slow the fuzzers down and bring nothing that is new.
_MAX_HEADER, _MAX_OBJECT = 32 << 10, 48 << 10
# How `codestream` of rust/core/tests/hostile/targets.rs is told the codec.
_FAMILY, _DEFLATED, _RLE, _PLAIN = range(4)
_KINDS = {known.DEFLATED: _DEFLATED, known.RLE: _RLE, known.PLAIN: _PLAIN}


@cache
def files() -> list[bytes]:
    """All of pydicom's test files that came with it, damaged ones too."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    return [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]


@cache
def datasets() -> list[Dataset]:
    """Those with pixel data that pydicom can read."""
    read = []
    for data in files():
        try:
            dataset = pydicom.dcmread(io.BytesIO(data))
            if "PixelData" in dataset and "Rows" in dataset:
                read.append(dataset)
        except Exception:  # noqa: BLE001
            continue
    return read


@cache
def frames() -> list[tuple[str, bytes, tuple[int, int], int]]:
    """(transfer syntax, frame, rows and columns, bits stored): small ones of every codec."""
    made = []
    for syntax, encode, _ in known.LOSSLESS_CODECS.values():
        for cells, stored in known.random_images(False, 8):
            made.append((syntax, encode(cells, stored), cells.shape, stored))
    for syntax, bits, encode, *_ in known.LOSSY.values():
        ramp = numpy.add.outer(numpy.arange(40), numpy.arange(33)) * (1 << bits) / 80
        cells = ramp.astype("u1" if bits == 8 else "<u2")
        made.append((syntax, bytes(encode(cells)), (40, 33), bits))
    return made


def part10(syntax: str, frame: bytes, shape: tuple[int, int], stored: int) -> bytes:
    """A frame as the only one of an object."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, UID("1.2.3")
    dataset.ImagePositionPatient, dataset.PixelSpacing = [0, 0, 0], [1, 1]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = shape
    dataset.BitsAllocated, dataset.BitsStored = 8 if stored <= 8 else 16, stored
    dataset.HighBit, dataset.PixelRepresentation = stored - 1, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1024
    dataset.PixelData = known.items(frame)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    file = DicomBytesIO(part10_prefix(CTImageStorage, "1.2.3", syntax))
    file.seek(0, io.SEEK_END)
    # All of these are Explicit VR Little Endian.
    file.is_implicit_VR, file.is_little_endian = False, True
    write_dataset(file, dataset)
    return file.getvalue()


def objects() -> Iterator[bytes]:
    """Whole objects: for the whole way from bytes to an array."""
    yield from (data for data in files() if len(data) <= _MAX_OBJECT)
    for frame in frames():
        yield part10(*frame)


def _shaped(kind: int, shape: tuple[int, int], samples: int, bits: int, frame: bytes) -> bytes:
    return struct.pack("<BHHBB", kind, *shape, samples, bits) + frame


def _items() -> Iterator[tuple[Dataset, bytes]]:
    """The datasets with encapsulated pixel data, and its items."""
    for dataset in datasets():
        data = dataset.get("PixelData")
        if data is not None and dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            yield dataset, data


def _fragments() -> Iterator[bytes]:
    for dataset, data in _items():
        offsets = parse_basic_offsets(data)
        extended = struct.pack(f"<{len(offsets)}Q", *offsets)
        count = int(dataset.get("NumberOfFrames") or 1)
        for table in (b"", extended):
            yield struct.pack("<HB", count, len(table) // 8) + table + data[:_MAX_OBJECT]


def _codestreams() -> Iterator[bytes]:
    for syntax, frame, shape, stored in frames():
        bits = 8 if stored <= 8 else 16
        yield _shaped(_KINDS.get(syntax, _FAMILY), shape, 1, bits, frame)
    for dataset, data in _items():
        kind = _KINDS.get(dataset.file_meta.TransferSyntaxUID, _FAMILY)
        shape = dataset.Rows, dataset.Columns
        count = int(dataset.get("NumberOfFrames") or 1)
        for frame in itertools.islice(generate_frames(data, number_of_frames=count), 2):
            if len(frame) <= _MAX_OBJECT:
                yield _shaped(kind, shape, dataset.SamplesPerPixel, dataset.BitsAllocated, frame)


def _sessions() -> Iterator[bytes]:
    """What a peer sends once there is an association, and how long the pieces are."""
    end = wire.pdu(wire.RELEASE, bytes(4))
    for data in files():
        if len(data) <= _MAX_HEADER:
            session = wire.pdu(wire.DATA, wire.value(1, 3, wire.echo_command()))
            session += wire.store("1.2.3", data) + wire.store("1.2.4", data[:100]) + end
            yield struct.pack("<H", 1 + len(data) % 1000) + session
    command = wire.store_command()
    long = wire.pdu(wire.DATA, wire.value(3, 3, command))
    for control, size in ((0, 34_000), (0, 10_000), (2, 1000)):
        long += wire.pdu(wire.DATA, wire.value(3, control, bytes(size)))
    yield struct.pack("<H", 1000) + long + end
    values = [
        wire.value(3, 1 + 2 * (k + 1 == len(command)), command[k : k + 1])
        for k in range(len(command))
    ]
    yield (
        struct.pack("<H", 7) + wire.pdu(wire.DATA, b"".join(values) + wire.value(3, 2, b"x")) + end
    )


def seeds(target: str) -> Iterator[bytes]:
    """The seeds of one target of rust/core/tests/hostile/targets.rs."""
    match target:
        case "scan":
            yield from (data[:_MAX_HEADER] for data in files())
        case "groups":
            for dataset in datasets():
                if "PerFrameFunctionalGroupsSequence" in dataset or "NumberOfFrames" in dataset:
                    dataset.PixelData = dataset.PixelData[:_MAX_OBJECT]
                    file = io.BytesIO()
                    dataset.save_as(file)
                    yield file.getvalue()
        case "fragments":
            yield from _fragments()
        case "rle":
            yield from (one for one in _codestreams() if one[0] == _RLE)
        case "codestream":
            yield from _codestreams()
        case "receive":
            yield from _sessions()
        case _:
            yield from objects()


def write(target: str, folder: Path) -> int:
    """Write the seeds of a target into a folder, a file each; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {hashlib.sha1(seed).hexdigest(): seed for seed in seeds(target)}
    for name, seed in made.items():
        (folder / name).write_bytes(seed)
    return len(made)

"""Thousands of random small images through our grinder and through an independent decoder.

Each is a whole object, made by an encoder of another package; what pydicom and its plug-ins make of
it has to be what we make of it, to the last bit. The seed is fixed, so that a failure repeats.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import imagecodecs
import jpeg_ls
import numpy
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, CTImageStorage
from tests.unit import test_codecs as known

from dicomnode.lib.dicom import LazyDataset, part10_prefix
from dicomnode.lib.grinders import numpy_grinder

Array = NDArray[Any]
IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED_OBJECT = "1.2.840.10008.1.2.1.99"
_COUNT = 130


class Case(NamedTuple):
    """A transfer syntax, and who makes and who reads it."""

    syntax: str
    encode: Callable[[Dataset, Array], bytes]
    # Of a frame, where it is not pydicom that reads it.
    decode: Callable[[bytes, Array, int], Array] | None = None
    # What the encoder takes.
    smallest: int = 1


def by_pydicom(plugin: str, syntax: str) -> Callable[[Dataset, Array], bytes]:
    def encode(dataset: Dataset, cells: Array) -> bytes:
        dataset.compress(UID(syntax), encoding_plugin=plugin, generate_instance_uid=False)
        return bytes(dataset.PixelData)

    return encode


def by_imagecodecs(name: str) -> Callable[[Dataset, Array], bytes]:
    _, encode, takes_signed = known.LOSSLESS_CODECS[name]

    def encode_frame(dataset: Dataset, cells: Array) -> bytes:
        if cells.dtype.kind == "i" and not takes_signed:
            # The codestream has no sign: it holds the bits, and the header tells.
            cells = cells.view(f"u{cells.itemsize}") & ((1 << dataset.BitsStored) - 1)
            cells = cells.astype(f"<u{cells.itemsize}")
        return known.items(encode(cells, dataset.BitsStored))

    return encode_frame


def native(dataset: Dataset, cells: Array) -> bytes:
    return cells.tobytes() + b"\0" * (cells.nbytes % 2)


def big(dataset: Dataset, cells: Array) -> bytes:
    return native(dataset, cells.astype(cells.dtype.newbyteorder(">")))


def frombuffer(frame: bytes, cells: Array, stored: int) -> Array:
    return numpy.frombuffer(frame, cells.dtype, cells.size).reshape(cells.shape)


def inflated(frame: bytes, cells: Array, stored: int) -> Array:
    return frombuffer(zlib.decompress(frame, wbits=-15), cells, stored)


def by_pyjpegls(frame: bytes) -> Array:
    return numpy.asarray(jpeg_ls.decode(numpy.frombuffer(frame, "u1")))


def of_bits(decode: Callable[[bytes], Any]) -> Callable[[bytes, Array, int], Array]:
    """What a decoder that knows no sign found, with the sign of the header."""

    def signed(frame: bytes, cells: Array, stored: int) -> Array:
        found = numpy.asarray(decode(frame)).astype("i4")
        if cells.dtype.kind == "u":
            return found
        return numpy.where(found >> (stored - 1), found - (1 << stored), found)

    return signed


CASES = {
    "Implicit VR Little Endian": Case(IMPLICIT, native),
    "Explicit VR Little Endian": Case(EXPLICIT, native),
    "Explicit VR Big Endian": Case(BIG, big),
    "deflated object": Case(DEFLATED_OBJECT, native),
    "uncompressed": Case(known.PLAIN, by_imagecodecs("uncompressed"), frombuffer),
    "deflated frame": Case(known.DEFLATED, by_imagecodecs("deflated frame"), inflated),
    "RLE by pydicom": Case(known.RLE, by_pydicom("pydicom", known.RLE)),
    "JPEG-LS by pyjpegls": Case(known.JPEG_LS, by_pydicom("pyjpegls", known.JPEG_LS)),
    "JPEG 2000 by pylibjpeg": Case(known.J2K, by_pydicom("pylibjpeg", known.J2K), smallest=32),
    "JPEG-LS by imagecodecs": Case(known.JPEG_LS, by_imagecodecs("JPEG-LS"), of_bits(by_pyjpegls)),
    **{
        f"{name} by imagecodecs": Case(
            syntax, by_imagecodecs(name), of_bits(imagecodecs.jpegsof3_decode)
        )
        for name, (syntax, *_) in known.LOSSLESS_CODECS.items()
        if name.startswith("JPEG lossless")
    },
    **{
        f"{name} by imagecodecs": Case(known.LOSSLESS_CODECS[name][0], by_imagecodecs(name))
        for name in ("JPEG 2000", "JPEG 2000 in JP2", "HTJ2K")
    },
    "JPEG XL by imagecodecs": Case(
        known.JXL, by_imagecodecs("JPEG XL"), of_bits(imagecodecs.jpegxl_decode)
    ),
}


def image(cells: Array, stored: int) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, UID("1.2.3")
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = cells.shape
    dataset.BitsAllocated, dataset.BitsStored = 8 * cells.itemsize, stored
    dataset.HighBit, dataset.PixelRepresentation = stored - 1, int(cells.dtype.kind == "i")
    dataset.PixelData = native(dataset, cells)
    return dataset


def written(dataset: Dataset, syntax: str, pixels: bytes) -> bytes:
    """The dataset as an object in a syntax, of which pydicom may not know."""
    implicit, little = syntax == IMPLICIT, syntax != BIG
    dataset.PixelData = pixels
    element = dataset["PixelData"]
    is_native = syntax in (IMPLICIT, EXPLICIT, BIG, DEFLATED_OBJECT)
    element.VR = "OW" if is_native and dataset.BitsAllocated > 8 else "OB"
    element.is_undefined_length = not is_native
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = implicit, little
    write_dataset(file, dataset)
    body = file.getvalue()
    if syntax == DEFLATED_OBJECT:
        machine = zlib.compressobj(wbits=-15)
        body = machine.compress(body) + machine.flush()
        body += b"\0" * (len(body) % 2)
    return part10_prefix(CTImageStorage, "1.2.3", syntax) + body


def random_cells(random: numpy.random.Generator, signed: bool, smallest: int) -> tuple[Array, int]:
    """Noise, a ramp, few values or a constant; and BitsStored."""
    stored = int(random.choice([8, 12, 16, random.integers(2, 17)]))
    shape = tuple(int(n) for n in random.integers(smallest, smallest + 17, 2))
    low = -(1 << (stored - 1)) if signed else 0
    high = low + (1 << stored)
    kind = random.integers(4)
    if kind == 0:
        cells = random.integers(low, high, shape)
    elif kind == 1:
        ramp = numpy.add.outer(numpy.arange(shape[0]), numpy.arange(shape[1]))
        cells = low + (ramp * int(random.integers(1, 50))) % (high - low)
    elif kind == 2:
        cells = random.choice([low, high - 1, 0], shape)
    else:
        cells = numpy.full(shape, random.integers(low, high))
    letter: Literal["i", "u"] = "i" if signed else "u"
    return cells.astype(f"<{letter}{1 if stored <= 8 else 2}"), stored


@pytest.mark.parametrize("name", CASES)
def test_p24_our_values_are_those_of_an_independent_decoder(name: str) -> None:
    case = CASES[name]
    random = numpy.random.default_rng(20261125)
    done = 0
    for k in range(_COUNT):
        cells, stored = random_cells(random, bool(k % 2), case.smallest)
        dataset = image(cells, stored)
        slope, intercept = random.choice([1, 2, 0.25, -1]), random.choice([0, -1024, 0.5])
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        try:
            pixels = case.encode(dataset, cells)
        except RuntimeError:
            # Some encoders refuse some of the very small images.
            continue
        data = written(dataset, case.syntax, pixels)
        read = dcmread(io.BytesIO(data))
        if case.decode is None:
            theirs = read.pixel_array
        else:
            frame = next(generate_frames(read.PixelData, number_of_frames=1))
            theirs = case.decode(frame, cells, stored)
        what = f"image {k}: {cells.shape}, {cells.dtype}, {stored} bits"
        numpy.testing.assert_array_equal(theirs, cells, f"{what}: theirs")
        ours = numpy_grinder([LazyDataset(data)], order="given", values="stored")
        numpy.testing.assert_array_equal(ours[0], theirs, what)
        ours = numpy_grinder([LazyDataset(data)], order="given", dtype=numpy.float64)
        numpy.testing.assert_array_equal(ours[0], theirs * float(slope) + float(intercept), what)
        done += 1
    assert done > _COUNT / 2

"""Every codec against an independent one: thousands of small random images, odd sizes, all depths.

What compresses here is imagecodecs (its own builds of libjpeg-turbo, CharLS, OpenJPEG, OpenJPH and
libjxl), or a slow, obvious Python version; lossless codecs have to give back what went in, and lossy
ones what the same package decodes.
"""

import itertools
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy
import pytest
from numpy.typing import NDArray

from dicomnode import _core
from dicomnode.errors import DicomnodeError, InvalidDataset, InvalidDicom, UnsupportedImage

Array = NDArray[Any]
RLE, DEFLATED, PLAIN = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.1.98"
BASELINE, EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
LOSSLESS, SV1 = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
JPEG_LS, NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
J2K, J2K_LOSSY = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
HTJ2K, RPCL, HTJ2K_LOSSY = (f"1.2.840.10008.1.2.4.20{k}" for k in (1, 2, 3))
JXL, JXL_LOSSY = "1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.112"


def item(data: bytes) -> bytes:
    data += b"\0" * (len(data) % 2)
    return b"\xfe\xff\x00\xe0" + struct.pack("<I", len(data)) + data


def items(*fragments: bytes, table: bytes = b"") -> bytes:
    return item(table) + b"".join(map(item, fragments)) + b"\xfe\xff\xdd\xe0\0\0\0\0"


def decode(
    pixels: bytes, syntax: str, rows: int, columns: int, stored: int, signed: bool = False,
    allocated: int = 0,
) -> Array:  # fmt: skip
    image = _core.Image(
        pixels,
        rows=rows,
        columns=columns,
        bits_allocated=allocated or (8 if stored <= 8 else 16 if stored <= 16 else 32),
        bits_stored=stored,
        high_bit=stored - 1,
        pixel_representation=int(signed),
        sop_instance_uid="1.2.3",
        transfer_syntax=syntax,
    )
    out = numpy.full((1, rows, columns), -77, "i4")
    _core.stack([image], out)
    return out[0]


def rle(cells: Array) -> bytes:
    """PackBits written out plainly: runs of three and more, else literals."""
    planes = cells.astype(cells.dtype.newbyteorder(">")).tobytes()
    size = cells.dtype.itemsize
    segments = [pack(planes[k::size]) for k in range(size)]
    offsets = list(itertools.accumulate(map(len, segments[:-1]), initial=64))
    header = struct.pack("<16I", size, *offsets, *[0] * (15 - size))
    return header + b"".join(segments)


def pack(plane: bytes) -> bytes:
    packed, literal = bytearray(), bytearray()

    def flush() -> None:
        for at in range(0, len(literal), 128):
            part = literal[at : at + 128]
            packed.append(len(part) - 1)
            packed.extend(part)
        literal.clear()

    for value, group in itertools.groupby(plane):
        run = len(list(group))
        while run:
            count = min(run, 128)
            if count >= 3:
                flush()
                packed.extend((257 - count, value))
            else:
                literal.extend([value] * count)
            run -= count
    flush()
    return bytes(packed) + b"\0" * (len(packed) % 2)


def deflate(cells: Array) -> bytes:
    machine = zlib.compressobj(wbits=-15)
    return machine.compress(cells.tobytes()) + machine.flush()


def lossless_jpeg(predictor: int) -> Callable[[Array, int], bytes]:
    def encode(cells: Array, stored: int) -> bytes:
        return bytes(
            imagecodecs.jpeg8_encode(
                cells, lossless=True, predictor=predictor, bitspersample=max(stored, 2)
            )
        )

    return encode


LOSSLESS_CODECS: dict[str, tuple[str, Callable[[Array, int], bytes], bool]] = {
    # name: transfer syntax, encoder of (cells, bits stored), whether it takes signed cells
    "RLE": (RLE, lambda cells, _: rle(cells), True),
    "deflated frame": (DEFLATED, lambda cells, _: deflate(cells), True),
    "uncompressed": (PLAIN, lambda cells, _: cells.tobytes(), True),
    **{f"JPEG lossless {k}": (LOSSLESS, lossless_jpeg(k), False) for k in range(2, 8)},
    "JPEG lossless SV1": (SV1, lossless_jpeg(1), False),
    "JPEG-LS": (JPEG_LS, lambda cells, _: bytes(imagecodecs.jpegls_encode(cells)), False),
    "JPEG 2000": (
        J2K,
        lambda cells, _: bytes(
            imagecodecs.jpeg2k_encode(cells, level=0, reversible=True, codecformat="j2k")
        ),
        True,
    ),
    "JPEG 2000 in JP2": (
        J2K,
        lambda cells, _: bytes(
            imagecodecs.jpeg2k_encode(cells, level=0, reversible=True, codecformat="jp2")
        ),
        True,
    ),
    "HTJ2K": (
        HTJ2K,
        lambda cells, _: bytes(imagecodecs.htj2k_encode(cells, reversible=True)),
        True,
    ),
    "JPEG XL": (
        JXL,
        lambda cells, _: bytes(imagecodecs.jpegxl_encode(cells, lossless=True)),
        False,
    ),
    "JPEG XL, boxed": (
        JXL,
        lambda cells, _: bytes(imagecodecs.jpegxl_encode(cells, lossless=True, usecontainer=True)),
        False,
    ),
}


def random_images(signed: bool, count: int) -> Iterator[tuple[Array, int]]:
    """Cells and their BitsStored: noise, ramps, constants, and extremes."""
    random = numpy.random.default_rng(20261124)
    for k in range(count):
        stored = int(random.integers(2 if k % 3 else 9, 17))
        shape = tuple(int(n) for n in random.integers(1, 33, 2))
        low = -(1 << (stored - 1)) if signed else 0
        high = low + (1 << stored)
        kind = k % 4
        if kind == 0:
            cells = random.integers(low, high, shape)
        elif kind == 1:
            ramp = numpy.add.outer(numpy.arange(shape[0]), numpy.arange(shape[1]))
            cells = low + (ramp * int(random.integers(1, 50))) % (high - low)
        elif kind == 2:
            cells = numpy.full(shape, random.integers(low, high))
        else:
            cells = random.choice([low, high - 1], shape)
        width = "1" if stored <= 8 else "2"
        yield cells.astype(("<i" if signed else "<u") + width), stored


@pytest.mark.parametrize("codec", LOSSLESS_CODECS)
@pytest.mark.parametrize("signed", [False, True])
def test_p24_lossless_codecs_give_back_what_went_in(codec: str, signed: bool) -> None:
    syntax, encode, takes_signed = LOSSLESS_CODECS[codec]
    for cells, stored in random_images(signed, 150):
        if signed and not takes_signed:
            # The codestream has no sign: it holds the bits, and the header tells.
            unsigned = cells.view(cells.dtype.str.replace("i", "u")) & ((1 << stored) - 1)
            frame = encode(unsigned.astype(cells.dtype.str.replace("i", "u")), stored)
        else:
            frame = encode(cells, stored)
        found = decode(items(frame), syntax, *cells.shape, stored, signed)
        numpy.testing.assert_array_equal(found, cells, f"{cells.shape} {stored} bits")


@pytest.mark.parametrize("allocated", [8, 16, 32])
def test_p4_rle_of_every_cell(allocated: int) -> None:
    random = numpy.random.default_rng(1)
    cells = random.integers(0, 1 << (allocated - 1), (7, 9)).astype(f"<u{allocated // 8}")
    numpy.testing.assert_array_equal(decode(items(rle(cells)), RLE, 7, 9, allocated), cells)


LOSSY = {
    "JPEG baseline": (
        BASELINE,
        8,
        lambda cells: imagecodecs.jpeg8_encode(cells, level=90),
        imagecodecs.jpeg8_decode,
        0,
    ),
    "JPEG extended": (
        EXTENDED,
        12,
        lambda cells: imagecodecs.jpeg8_encode(cells, level=95, bitspersample=12),
        imagecodecs.jpeg8_decode,
        0,
    ),
    "JPEG-LS near-lossless": (
        NEAR,
        12,
        lambda cells: imagecodecs.jpegls_encode(cells, level=3),
        imagecodecs.jpegls_decode,
        0,
    ),
    "JPEG 2000 lossy": (
        J2K_LOSSY,
        12,
        lambda cells: imagecodecs.jpeg2k_encode(
            cells, level=60, reversible=False, codecformat="j2k"
        ),
        imagecodecs.jpeg2k_decode,
        1,
    ),
    "HTJ2K lossy": (
        HTJ2K_LOSSY,
        12,
        lambda cells: imagecodecs.htj2k_encode(cells, level=0.001, reversible=False),
        imagecodecs.htj2k_decode,
        1,
    ),
    "JPEG XL lossy": (
        JXL_LOSSY,
        8,
        lambda cells: imagecodecs.jpegxl_encode(cells, level=90),
        imagecodecs.jpegxl_decode,
        1,
    ),
}


@pytest.mark.parametrize("codec", LOSSY)
def test_p24_lossy_codecs_agree_with_another_decoder(codec: str) -> None:
    syntax, bits, encode, reference, tolerance = LOSSY[codec]
    random = numpy.random.default_rng(3)
    for _ in range(60):
        rows, columns = (int(n) for n in random.integers(9, 50, 2))
        smooth = numpy.add.outer(numpy.arange(rows), numpy.arange(columns)) * (1 << bits) / 110
        cells = numpy.clip(smooth + random.normal(0, 3, (rows, columns)), 0, (1 << bits) - 1)
        frame = bytes(encode(cells.astype("u1" if bits == 8 else "<u2")))
        expected = reference(frame).astype("i4")
        found = decode(items(frame), syntax, rows, columns, bits, allocated=8 if bits == 8 else 16)
        assert numpy.abs(found - expected).max() <= tolerance


def small(codec: str) -> tuple[str, bytes, Array]:
    syntax, encode, _ = LOSSLESS_CODECS[codec]
    random = numpy.random.default_rng(5)
    cells = random.integers(0, 4096, (31, 29)).astype("<u2")
    return syntax, encode(cells, 12), cells


@pytest.mark.parametrize("codec", LOSSLESS_CODECS)
def test_p22_a_codestream_that_is_cut_off_is_an_error(codec: str) -> None:
    syntax, frame, _ = small(codec)
    for length in range(0, len(frame) * 9 // 10, 37):
        with pytest.raises(DicomnodeError, match=r"1\.2\.3: .*PixelData"):
            decode(items(frame[:length]), syntax, 31, 29, 12)


@pytest.mark.parametrize("codec", LOSSLESS_CODECS)
@pytest.mark.parametrize(("rows", "columns"), [(30, 29), (31, 30), (29, 31), (400, 400)])
def test_p23_a_codestream_of_another_size_is_an_error(codec: str, rows: int, columns: int) -> None:
    syntax, frame, _ = small(codec)
    if codec in ("RLE", "deflated frame", "uncompressed") and rows * columns <= 31 * 29:
        # These do not say their size, and what is too much is padding.
        return
    with pytest.raises(DicomnodeError, match=r"1\.2\.3: .*PixelData"):
        decode(items(frame), syntax, rows, columns, 12)


@pytest.mark.parametrize("codec", LOSSLESS_CODECS)
def test_p19_a_frame_may_lie_in_several_fragments(codec: str) -> None:
    syntax, frame, cells = small(codec)
    frame += b"\0" * (len(frame) % 2)
    parts = [frame[at : at + 100] for at in range(0, len(frame), 100)]
    for table in (b"", b"\0\0\0\0", b"\x09\0\0\0", b"\0\0\0\0\x05\0\0\0"):
        found = decode(items(*parts, table=table), syntax, 31, 29, 12)
        numpy.testing.assert_array_equal(found, cells)


def test_p19_two_images_where_the_header_says_one_are_an_error() -> None:
    syntax, frame, _ = small("JPEG-LS")
    with pytest.raises(InvalidDicom, match="expected 1 frame"):
        decode(items(frame, frame), syntax, 31, 29, 12)


def test_a_codestream_in_another_syntax_of_its_family_is_read_by_its_own_start() -> None:
    for codec, syntax in (
        ("JPEG-LS", BASELINE),
        ("JPEG lossless SV1", NEAR),
        ("JPEG 2000", SV1),
        ("HTJ2K", J2K),
        ("JPEG XL", J2K),
    ):
        _, frame, cells = small(codec)
        numpy.testing.assert_array_equal(decode(items(frame), syntax, 31, 29, 12), cells)


@pytest.mark.parametrize("codec", LOSSLESS_CODECS)
def test_p26_what_is_no_frame_of_the_codec_is_an_error(codec: str) -> None:
    syntax = LOSSLESS_CODECS[codec][0]
    for junk in (b"", b"\0\0", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"junk" * 20, b"\xff\x4f\xff\x51"):
        with pytest.raises(DicomnodeError, match=r"1\.2\.3: .*PixelData"):
            decode(items(junk), syntax, 31, 29, 12)


def stacked(frame: bytes, syntax: str, stored: int, signed: bool) -> tuple[Array, list[str]]:
    image = _core.Image(
        items(frame), rows=31, columns=29, bits_allocated=16, bits_stored=stored,
        high_bit=stored - 1, pixel_representation=int(signed), sop_instance_uid="1.2.3",
        transfer_syntax=syntax,
    )  # fmt: skip
    out = numpy.empty((1, 31, 29), "i4")
    notes = _core.stack([image], out)
    return out[0], notes


def test_p17_the_sign_of_a_jpeg_2000_that_its_header_denies_is_told() -> None:
    _, frame, cells = small("JPEG 2000")
    found, notes = stacked(frame, J2K, 12, signed=False)
    numpy.testing.assert_array_equal(found, cells)
    assert notes == []
    found, notes = stacked(frame, J2K, 16, signed=True)
    assert "1.2.3: PixelRepresentation says signed, the codestream unsigned" in notes[0]
    # Its 16 bits are read as two's complement, as the header says.
    numpy.testing.assert_array_equal(found, cells.astype("i2"))


@pytest.mark.parametrize("codec", ["JPEG-LS", "JPEG lossless SV1"])
def test_p18_bits_that_the_header_denies_are_told_and_kept(codec: str) -> None:
    syntax, encode, _ = LOSSLESS_CODECS[codec]
    random = numpy.random.default_rng(5)
    cells = random.integers(0, 1 << 16, (31, 29)).astype("<u2")
    frame = encode(cells, 16)
    found, notes = stacked(frame, syntax, 12, signed=False)
    numpy.testing.assert_array_equal(found, cells)
    assert "BitsStored is 12, the codestream has 16 bits and uses them" in notes[0]


@pytest.mark.parametrize("codec", ["JPEG-LS", "JPEG lossless SV1"])
@pytest.mark.parametrize("extended", [False, True])
def test_p18_signed_cells_that_were_coded_whole_have_their_sign_at_bits_stored(
    codec: str, extended: bool
) -> None:
    syntax, encode, _ = LOSSLESS_CODECS[codec]
    random = numpy.random.default_rng(5)
    cells = random.integers(-2048, 2048, (31, 29)).astype("<i2")
    coded = cells.view("<u2") if extended else cells.view("<u2") & 0x0FFF
    found, notes = stacked(encode(numpy.ascontiguousarray(coded), 16), syntax, 12, signed=True)
    numpy.testing.assert_array_equal(found, cells)
    assert notes == []


def test_video_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedImage, match=r"H\.264.*1\.2\.840\.10008\.1\.2\.4\.102"):
        decode(items(b"\0\0\0\1"), "1.2.840.10008.1.2.4.102", 31, 29, 8)


def test_an_image_that_says_another_number_of_samples_is_an_error() -> None:
    colours = numpy.zeros((31, 29, 3), "u1")
    frame = bytes(imagecodecs.jpeg8_encode(colours))
    with pytest.raises(InvalidDataset, match=r"31 x 29 x 1 .*, found 31 x 29 x 3"):
        decode(items(frame), BASELINE, 31, 29, 8)


def test_a_jpeg_ls_without_its_end_marker_is_an_error_within_a_moment() -> None:
    """CharLS alone reads on after the last byte for seconds. Found by the fuzzer."""
    frame = bytes.fromhex(
        "ffd8ffe80020535049464600020000010000001b000000040a0806010000012c0000012cffe8000800000001"
        "ffd8fff7000b08001b000401011100ffda00080101000000000000017c8000002fa7d8000002fa000002fb41"
        "90f83c82000002fb4fa3cc384000005f218e8000005f0758611d8e22bcc91f1d8f"
    )
    start = time.process_time()
    with pytest.raises(InvalidDicom, match="JPEG-LS is damaged"):
        decode(items(frame), JPEG_LS, 27, 4, 8)
    assert time.process_time() - start < 1


def test_p26_a_small_jpeg_2000_of_a_huge_image_is_refused_at_once() -> None:
    frame = bytearray(LOSSLESS_CODECS["JPEG 2000"][1](numpy.zeros((8, 8), "u1"), 8))
    at = frame.index(b"\xff\x51") + 6
    for place in (0, 4, 16, 20):
        frame[at + place : at + place + 4] = (20_000).to_bytes(4, "big")
    start = time.process_time()
    image = _core.Image(
        items(bytes(frame)),
        rows=20_000,
        columns=20_000,
        bits_allocated=8,
        bits_stored=8,
        high_bit=7,
        pixel_representation=0,
        sop_instance_uid="1.2.3",
        transfer_syntax=J2K,
    )
    with pytest.raises(InvalidDicom, match="20000 x 20000 x 1"):
        _core.stack([image], numpy.empty((1, 20_000, 20_000), "u1"))
    assert time.process_time() - start < 0.1

"""Pixels that are not one integer a voxel: colour, palettes, floats, single bits, tables.

What decides is a slow, obvious Python version, or pydicom's own reading.
"""

import itertools
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut
from pydicom.uid import UID

from dicomnode.errors import (
    DicomnodeError,
    InconsistentSeries,
    IncorrectlyConfigured,
    InvalidDataset,
    InvalidDicom,
    UnsupportedImage,
)
from dicomnode.lib.dicom import LazyDataset, encode, load
from dicomnode.lib.grinders import numpy_grinder, volume_grinder
from dicomnode.testing import make_series

Array = NDArray[Any]
FILES = Path(str(pydicom.__file__)).parent / "data" / "test_files"
grind = numpy_grinder(order="given")
raw = numpy_grinder(order="given", color="raw")


def lazy(datasets: Iterable[Dataset]) -> list[Dataset]:
    return [LazyDataset(encode(one)[0]) for one in datasets]


@pytest.fixture(params=[list, lazy], ids=["plain", "lazy"])
def kind(request: pytest.FixtureRequest) -> Callable[[Iterable[Dataset]], list[Dataset]]:
    """As pydicom datasets, and as the lazy ones of a node."""
    return request.param


def colored(
    pixels: Array, photometric: str = "RGB", planar: int = 0, syntax: str = "1.2.840.10008.1.2.1"
) -> Dataset:
    """An image of (frame, row, column, sample)."""
    (one,) = make_series(1, *pixels.shape[1:3])
    one.SamplesPerPixel, one.PhotometricInterpretation = pixels.shape[3], photometric
    one.PlanarConfiguration, one.NumberOfFrames = planar, pixels.shape[0]
    one.BitsAllocated = one.BitsStored = 8 * pixels.dtype.itemsize
    one.HighBit = one.BitsStored - 1
    del one.RescaleSlope, one.RescaleIntercept
    order = ">" if syntax == "1.2.840.10008.1.2.2" else "<"
    cells = pixels.transpose(0, 3, 1, 2) if planar else pixels
    data = cells.astype(pixels.dtype.newbyteorder(order)).tobytes()
    one.add_new(
        0x7FE00010, "OB" if one.BitsAllocated == 8 else "OW", data + b"\0" * (len(data) % 2)
    )
    one.file_meta.TransferSyntaxUID = UID(syntax)
    return one


def compressed(pixels: Array, photometric: str, syntax: str, *frames: bytes) -> Dataset:
    one = colored(pixels, photometric)
    one.PixelData = encapsulate(list(frames))
    one["PixelData"].VR = "OB"
    one["PixelData"].is_undefined_length = True
    one.file_meta.TransferSyntaxUID = UID(syntax)
    return one


def noise(*shape: int, dtype: str = "u1", seed: int = 1) -> Array:
    random = numpy.random.default_rng(seed)
    return random.integers(0, 1 << (8 * numpy.dtype(dtype).itemsize), shape).astype(dtype)


def slow_rgb(pixels: Array) -> Array:
    """PS3.3 C.7.6.3.1.2, YBR_FULL, turned round; one pixel after the other."""
    bits = 8 * pixels.dtype.itemsize
    found = numpy.empty_like(pixels)
    for place in numpy.ndindex(pixels.shape[:-1]):
        y, b, r = (int(sample) for sample in pixels[place])
        b, r = b - (1 << (bits - 1)), r - (1 << (bits - 1))
        sums = (y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b)
        found[place] = [min(max(int(numpy.floor(s + 0.5)), 0), (1 << bits) - 1) for s in sums]
    return found


NATIVE = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
)


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("shape", [(1, 7, 9, 3), (1, 1, 1, 3), (2, 6, 8, 3), (3, 5, 7, 3)])
def test_p15_p21_uncompressed_colour_is_one_pixel_after_the_other_in_its_own_type(
    kind: Callable, syntax: str, planar: int, dtype: str, shape: tuple
) -> None:
    pixels = noise(*shape, dtype=dtype)
    given = kind([colored(pixels, "RGB", planar, syntax)])
    found = grind(given)
    assert found.dtype == numpy.dtype(dtype)
    numpy.testing.assert_array_equal(found, pixels)
    numpy.testing.assert_array_equal(raw(given), pixels)
    numpy.testing.assert_array_equal(
        numpy_grinder(order="given", dtype="f4")(given), pixels.astype("f4")
    )


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("planar", [0, 1])
def test_p15_ybr_full_becomes_rgb_unless_raw_is_wanted(
    kind: Callable, planar: int, dtype: str
) -> None:
    pixels = noise(2, 5, 8, 3, dtype=dtype)
    given = kind([colored(pixels, "YBR_FULL", planar)])
    numpy.testing.assert_array_equal(grind(given), slow_rgb(pixels))
    numpy.testing.assert_array_equal(raw(given), pixels)


def test_p15_shared_chrominance_is_given_to_both_pixels(kind: Callable) -> None:
    pixels = noise(2, 5, 8, 3)
    pixels[:, :, 1::2, 1:] = pixels[:, :, ::2, 1:]
    one = colored(pixels, "YBR_FULL_422")
    pairs = pixels.reshape(-1, 2, 3)
    shared = numpy.stack([pairs[:, 0, 0], pairs[:, 1, 0], pairs[:, 0, 1], pairs[:, 0, 2]], axis=1)
    one.PixelData = shared.tobytes()
    given = kind([one])
    numpy.testing.assert_array_equal(raw(given), pixels)
    numpy.testing.assert_array_equal(grind(given), slow_rgb(pixels))
    one.Columns, one.Rows = 5, 8
    with pytest.raises(InvalidDicom, match="even number"):
        grind(kind([one]))


JPEG, SV1, LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.57"
JPEG_LS, J2K, HTJ2K = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201"


def rle(pixels: Array) -> bytes:
    """Literal runs only."""
    segments = []
    for sample in range(pixels.shape[2]):
        for byte in reversed(range(pixels.dtype.itemsize)):
            plane = ((pixels[..., sample] >> (8 * byte)) & 255).astype("u1").tobytes()
            parts = [plane[at : at + 128] for at in range(0, len(plane), 128)]
            packed = b"".join(bytes([len(part) - 1]) + part for part in parts)
            segments.append(packed + b"\x80" * (len(packed) % 2))
    offsets = list(itertools.accumulate(map(len, segments[:-1]), initial=64))
    header = numpy.zeros(16, "<u4")
    header[0], header[1 : 1 + len(offsets)] = len(offsets), offsets
    return header.tobytes() + b"".join(segments)


LOSSLESS_CODECS: dict[str, tuple[str, str, Callable[[Array], bytes]]] = {
    "RLE": ("1.2.840.10008.1.2.5", "RGB", rle),
    "uncompressed": ("1.2.840.10008.1.2.1.98", "RGB", lambda pixels: pixels.tobytes()),
    "JPEG lossless": (
        SV1,
        "RGB",
        lambda pixels: imagecodecs.jpeg8_encode(
            pixels, lossless=True, predictor=1, bitspersample=8 * pixels.dtype.itemsize,
            colorspace="rgb", outcolorspace="rgb",
        ),
    ),
    "JPEG-LS": (JPEG_LS, "RGB", imagecodecs.jpegls_encode),
    "JPEG 2000, transformed": (
        J2K,
        "YBR_RCT",
        lambda pixels: imagecodecs.jpeg2k_encode(
            pixels, level=0, reversible=True, mct=True, codecformat="j2k"
        ),
    ),
    "JPEG 2000, not transformed": (
        J2K,
        "RGB",
        lambda pixels: imagecodecs.jpeg2k_encode(
            pixels, level=0, reversible=True, mct=False, codecformat="j2k"
        ),
    ),
    "HTJ2K": (HTJ2K, "YBR_RCT", lambda pixels: imagecodecs.htj2k_encode(pixels, reversible=True)),
    "JPEG XL": (
        "1.2.840.10008.1.2.4.110",
        "RGB",
        lambda pixels: imagecodecs.jpegxl_encode(pixels, lossless=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("codec", LOSSLESS_CODECS)
def test_p15_p24_compressed_colour_is_what_was_compressed(codec: str, dtype: str) -> None:
    syntax, photometric, code = LOSSLESS_CODECS[codec]
    for k, shape in enumerate([(1, 1), (7, 9), (8, 16), (31, 33)]):
        pixels = noise(2, *shape, 3, dtype=dtype, seed=k)
        one = compressed(pixels, photometric, syntax, *(bytes(code(frame)) for frame in pixels))
        for grinder in (grind, raw):
            numpy.testing.assert_array_equal(grinder(lazy([one])), pixels)


@pytest.mark.parametrize("planar", [0, 1])
def test_p15_planes_count_for_fragments_that_are_not_compressed_only(planar: int) -> None:
    pixels = noise(1, 6, 8, 3)
    cells = pixels[0].transpose(2, 0, 1) if planar else pixels[0]
    one = compressed(pixels, "RGB", "1.2.840.10008.1.2.1.98", cells.tobytes())
    one.PlanarConfiguration = planar
    numpy.testing.assert_array_equal(grind(lazy([one])), pixels)
    one = compressed(pixels, "RGB", "1.2.840.10008.1.2.5", rle(pixels[0]))
    one.PlanarConfiguration = planar
    numpy.testing.assert_array_equal(grind(lazy([one])), pixels)


def test_p15_ybr_in_codecs_that_do_not_know_it_becomes_rgb() -> None:
    pixels = noise(1, 9, 10, 3)
    for name in ("RLE", "JPEG-LS", "uncompressed", "JPEG 2000, not transformed"):
        syntax, _, code = LOSSLESS_CODECS[name]
        given = lazy([compressed(pixels, "YBR_FULL", syntax, bytes(code(pixels[0])))])
        numpy.testing.assert_array_equal(grind(given), slow_rgb(pixels))
        numpy.testing.assert_array_equal(raw(given), pixels)


def smooth(rows: int = 33, columns: int = 47) -> Array:
    row, column = numpy.mgrid[:rows, :columns]
    return numpy.stack([row * 5, column * 4, 255 - row * 3 - column], -1).clip(0, 255).astype("u1")


def jpeg(pixels: Array, space: str, **options: Any) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(pixels, level=95, colorspace=space, outcolorspace=space, **options)
        if space == "rgb"
        else imagecodecs.jpeg8_encode(pixels, level=95, **options)
    )


def told(one: Dataset, grinder: Any = grind, caplog: Any = None) -> tuple[Array, str]:
    caplog.clear()
    found = grinder(lazy([one]))
    return found, caplog.text


def without(frame: bytes, marker: bytes) -> bytes:
    """A JPEG without its first segment of a kind."""
    at = frame.index(marker)
    return frame[:at] + frame[at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "YBR_FULL", "RGB"])
def test_p16_a_jpeg_that_tells_its_colours_counts_more_than_its_header(
    photometric: str, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = smooth()[None]
    frame = jpeg(pixels[0], "ycbcr")
    assert b"JFIF" in frame
    expected = imagecodecs.jpeg8_decode(frame)
    found, note = told(compressed(pixels, photometric, JPEG, frame), caplog=caplog)
    numpy.testing.assert_array_equal(found[0], expected)
    assert ("the codestream counts" in note) == (photometric == "RGB")
    planes = imagecodecs.jpeg8_decode(frame, colorspace="ycbcr", outcolorspace="ycbcr")
    found, _ = told(compressed(pixels, photometric, JPEG, frame), raw, caplog)
    numpy.testing.assert_array_equal(found[0], planes)

    frame = jpeg(pixels[0], "rgb")
    assert b"Adobe" in frame
    found, note = told(compressed(pixels, photometric, JPEG, frame), caplog=caplog)
    assert numpy.abs(found[0].astype(int) - pixels[0]).max() <= 8
    assert ("the codestream counts" in note) == (photometric != "RGB")


def test_p16_a_jpeg_that_does_not_tell_its_colours_has_those_of_its_header(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pixels = smooth()[None]
    for space, photometric, marker in (
        ("rgb", "RGB", b"\xff\xee"),
        ("ycbcr", "YBR_FULL_422", b"\xff\xe0"),
    ):
        frame = without(jpeg(pixels[0], space), marker)
        # Names of components that tell nothing.
        at = frame.index(b"\xff\xc0") + 10
        names = frame[at : at + 9 : 3]
        frame = bytearray(frame)
        scan = frame.index(b"\xff\xda") + 5
        for k, name in enumerate(names):
            frame[at + 3 * k] = frame[scan + 2 * k] = k + 1
            assert name
        found, note = told(compressed(pixels, photometric, JPEG, bytes(frame)), caplog=caplog)
        assert numpy.abs(found[0].astype(int) - pixels[0]).max() <= 8
        assert note == ""


def test_p16_a_transform_in_jpeg_2000_is_undone_whatever_the_header_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pixels = noise(1, 12, 11, 3)
    frame = bytes(LOSSLESS_CODECS["JPEG 2000, transformed"][2](pixels[0]))
    for photometric in ("YBR_RCT", "YBR_ICT", "RGB", "YBR_FULL"):
        found, note = told(compressed(pixels, photometric, J2K, frame), caplog=caplog)
        numpy.testing.assert_array_equal(found, pixels)
        assert ("the codestream counts" in note) == (photometric == "YBR_FULL")


@pytest.mark.parametrize(
    ("photometric", "samples"),
    [("RGB", 1), ("MONOCHROME2", 3), ("YBR_RCT", 3), ("PALETTE COLOR", 3), ("YBR_FULL", 1)],
)
def test_p15_samples_that_contradict_the_interpretation_are_an_error(
    kind: Callable, photometric: str, samples: int
) -> None:
    one = colored(noise(1, 6, 8, samples), photometric)
    with pytest.raises(InvalidDicom, match="0028,0004") as error:
        grind(kind([one]))
    assert one.SOPInstanceUID in str(error.value)


def test_p15_the_colours_of_videos_are_refused_by_name(kind: Callable) -> None:
    with pytest.raises(UnsupportedImage, match="YBR_PARTIAL_420"):
        grind(kind([colored(noise(1, 6, 8, 3), "YBR_PARTIAL_420")]))


def test_p15_colours_are_not_mixed_with_grey(kind: Callable) -> None:
    grey = make_series(2, 6, 8)
    for other in (colored(noise(1, 6, 8, 3)), *make_series(1, 6, 8)):
        if other.SamplesPerPixel == 1:
            other.PhotometricInterpretation = "MONOCHROME1"
        with pytest.raises(InconsistentSeries, match="PhotometricInterpretation") as error:
            grind(kind([*grey, other]))
        assert other.SOPInstanceUID in str(error.value)


def test_p15_a_stack_of_colour_images_is_a_volume(kind: Callable) -> None:
    series = make_series(3, 6, 8)
    pixels = noise(3, 6, 8, 3)
    for one, values in zip(series, pixels, strict=True):
        one.SamplesPerPixel, one.PhotometricInterpretation = 3, "RGB"
        one.PlanarConfiguration, one.BitsAllocated, one.BitsStored, one.HighBit = 0, 8, 8, 7
        del one.RescaleSlope, one.RescaleIntercept
        one.PixelData = values.tobytes()
    volume = volume_grinder(kind(series[::-1]))
    assert volume.shape == (3, 6, 8, 3) and volume.array.dtype == numpy.uint8
    numpy.testing.assert_array_equal(volume.array, pixels)


def pydicom_files(*samples: int) -> list[Any]:
    found = []
    for path in sorted(FILES.glob("*.dcm")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        if header.get("SamplesPerPixel") in samples and "Rows" in header:
            found.append(pytest.param(path, id=path.name))
    return found


@pytest.mark.parametrize("path", pydicom_files(3))
def test_p15_colour_images_of_pydicom_are_what_pydicom_decodes(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        try:
            # RGB, by plugins of their own.
            expected = pydicom.pixels.pixel_array(dataset, raw=False)
        except Exception:  # noqa: BLE001  (whatever pydicom's decoders raise)
            with pytest.raises(DicomnodeError):
                grind(load(path))
            return
    found = grind(load(path))
    # Decoders differ in how chrominance is interpolated.
    tolerance = 0 if dataset.file_meta.TransferSyntaxUID != JPEG else 3
    shape = (dataset.get("NumberOfFrames") or 1, dataset.Rows, dataset.Columns, 3)
    off = numpy.abs(found.astype(int) - expected.reshape(shape))
    assert off.max() <= tolerance, off.max()


def test_p15_a_palette_is_indices_with_a_warning_and_rgb_on_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = FILES / "examples_palette.dcm"
    dataset = pydicom.dcmread(path)
    indices = grind(load(path))
    assert "color='palette' gives RGB" in caplog.text
    numpy.testing.assert_array_equal(indices[0], dataset.pixel_array)
    caplog.clear()
    found = numpy_grinder(order="given", color="palette")(load(path))
    assert caplog.text == ""
    expected = apply_color_lut(dataset.pixel_array, dataset)
    assert found.dtype == expected.dtype
    numpy.testing.assert_array_equal(found[0], expected)


def test_colour_of_another_depth_is_told_unless_there_is_a_dtype() -> None:
    made = make_series(2, 6, 8)
    for one, bits in zip(made, (8, 16), strict=True):
        del one.RescaleSlope, one.RescaleIntercept
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
        one.BitsAllocated, one.BitsStored, one.HighBit = bits, bits, bits - 1
        one.PixelData = bytes(6 * 8 * 3 * bits // 8)
    with pytest.raises(InconsistentSeries, match="BitsStored") as told:
        numpy_grinder(made)
    assert all(one.SOPInstanceUID in str(told.value) for one in made)
    assert numpy_grinder(made, dtype="u2").shape == (2, 6, 8, 3)


def palettes(cells: numpy.ndarray, places: list[float]) -> list[Dataset]:
    """Slices with a palette of 8 bits, one of 16 entries in which red rises by ten."""
    made = make_series(*cells.shape)
    for one, slice_, place in zip(made, cells, places, strict=True):
        one.PhotometricInterpretation = "PALETTE COLOR"
        del one.RescaleSlope, one.RescaleIntercept
        one.BitsAllocated = one.BitsStored = 8
        one.HighBit, one.PixelRepresentation = 7, int(cells.dtype.kind == "i")
        one.PixelData = slice_.tobytes()
        one.ImagePositionPatient[2] = place
        for k, name in enumerate(("Red", "Green", "Blue")):
            vr = "SS" if one.PixelRepresentation else "US"
            first = -8 if one.PixelRepresentation else 0
            one.add_new(f"{name}PaletteColorLookupTableDescriptor", vr, [16, first, 8])
            table = bytes(range(100 * (k == 0), 100 * (k == 0) + 160, 10))
            one.add_new(f"{name}PaletteColorLookupTableData", "OW", table)
    return made


def test_p15_rgb_of_a_palette_has_the_dtype_that_is_asked_for() -> None:
    cells = numpy.random.default_rng(2).integers(-8, 8, (2, 6, 8)).astype("i1")
    made = palettes(cells, [0, 2])
    expected = numpy.stack([apply_color_lut(one.pixel_array, one) for one in made])
    for dtype in (None, "u1", "i2", "f4", "f8"):
        found = numpy_grinder(made, color="palette", dtype=dtype)
        assert found.dtype == (dtype or "u1")
        numpy.testing.assert_array_equal(found, expected)
    with pytest.raises(InvalidDataset, match="int8 cannot hold") as told:
        numpy_grinder(made, color="palette", dtype="i1")
    assert made[0].SOPInstanceUID in str(told.value)


@pytest.mark.parametrize("options", [{"gaps": "resample"}, {"tilt": "resample"}])
def test_p15_between_colours_there_are_colours_and_between_indices_there_are_none(
    options: Any,
) -> None:
    cells = numpy.random.default_rng(2).integers(0, 16, (3, 6, 8)).astype("u1")
    made = palettes(cells, [0, 2, 6] if "gaps" in options else [0, 2, 4])
    if "tilt" in options:
        for k, one in enumerate(made):
            one.ImagePositionPatient[0] += k
    with pytest.raises(IncorrectlyConfigured, match='color="palette"') as told:
        volume_grinder(made, **options)
    assert made[0].SOPInstanceUID in str(told.value)
    volume = volume_grinder(made, color="palette", dtype="f4", **options)
    rgb = numpy.stack([apply_color_lut(one.pixel_array, one) for one in made])
    if "gaps" in options:
        between = (rgb[1].astype("f8") + rgb[2]) / 2
        expected = numpy.stack([rgb[0], rgb[1], between, rgb[2]])
        numpy.testing.assert_array_equal(volume.array, expected)
    else:
        numpy.testing.assert_array_equal(volume.array[0, :6, :8], rgb[0])


def test_p15_a_palette_that_is_not_there_is_an_error() -> None:
    dataset = pydicom.dcmread(FILES / "examples_palette.dcm")
    del dataset.RedPaletteColorLookupTableDescriptor
    with pytest.raises(InvalidDataset, match="Palette") as error:
        numpy_grinder(order="given", color="palette")([dataset])
    assert dataset.SOPInstanceUID in str(error.value)
    grey = make_series(1, 6, 8)
    numpy.testing.assert_array_equal(numpy_grinder(color="palette")(grey), numpy_grinder(grey))


# Floats


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("syntax", NATIVE)
def test_p5_floats_are_the_values(kind: Callable, double: bool, syntax: str) -> None:
    random = numpy.random.default_rng(1)
    own = numpy.float64 if double else numpy.float32
    values = random.normal(0, 1e3, (2, 7, 9)).astype(own)
    values[0, 0, :3] = [numpy.nan, numpy.inf, -numpy.inf]
    (one,) = make_series(1, 7, 9)
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope"):
        delattr(one, name)
    del one.RescaleIntercept
    one.NumberOfFrames, one.BitsAllocated = 2, 64 if double else 32
    order = ">" if syntax == "1.2.840.10008.1.2.2" else "<"
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    setattr(one, "DoubleFloatPixelData" if double else "FloatPixelData", data)
    one.file_meta.TransferSyntaxUID = UID(syntax)
    given = kind([one])
    found = grind(given)
    assert found.dtype == own
    numpy.testing.assert_array_equal(found, values)
    numpy.testing.assert_array_equal(
        numpy_grinder(order="given", dtype="f8")(given), values.astype("f8")
    )
    with pytest.raises(InvalidDataset, match="use float32"):
        numpy_grinder(order="given", dtype="i2")(given)


def test_p5_a_double_that_float32_cannot_hold_is_an_error(kind: Callable) -> None:
    (one,) = make_series(1, 2, 2)
    del one.PixelData
    one.BitsAllocated, one.DoubleFloatPixelData = 64, numpy.array([0, 1, 1e300, 2]).tobytes()
    with pytest.raises(InvalidDataset, match="use float64") as error:
        numpy_grinder(dtype="f4")(kind([one]))
    assert one.SOPInstanceUID in str(error.value)


# Single bits


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 9), (4, 3, 5), (2, 8, 8), (9, 1, 3)])
@pytest.mark.parametrize("syntax", [*NATIVE[:2], NATIVE[3]])
def test_p4_g62_bits_follow_each_other_across_frames(
    kind: Callable, shape: tuple, syntax: str
) -> None:
    values = numpy.random.default_rng(2).integers(0, 2, shape).astype("u1")
    (one,) = make_series(1, *shape[1:])
    del one.RescaleSlope, one.RescaleIntercept
    one.NumberOfFrames = shape[0]
    one.BitsAllocated, one.BitsStored, one.HighBit = 1, 1, 0
    packed = numpy.packbits(values.ravel(), bitorder="little").tobytes()
    one.PixelData = packed + b"\0" * (len(packed) % 2)
    one["PixelData"].VR = "OB"
    one.file_meta.TransferSyntaxUID = UID(syntax)
    numpy.testing.assert_array_equal(grind(kind([one])), values)
    numpy.testing.assert_array_equal(numpy_grinder(order="given", dtype="u1")(kind([one])), values)
    one.NumberOfFrames = shape[0] + 17
    with pytest.raises(InvalidDicom, match="expected"):
        grind(kind([one]))


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2.1.98", "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.5"]
)
def test_p4_bits_in_fragments(syntax: str) -> None:
    values = numpy.random.default_rng(2).integers(0, 2, (3, 7, 9)).astype("u1")
    (one,) = make_series(1, 7, 9)
    one.NumberOfFrames = 3
    one.BitsAllocated, one.BitsStored, one.HighBit = 1, 1, 0
    del one.RescaleSlope, one.RescaleIntercept
    frames = []
    for value in values:
        packed = numpy.packbits(value.ravel(), bitorder="little")
        machine = zlib.compressobj(wbits=-15)
        frames.append(
            {
                "98": packed.tobytes(),
                ".1": machine.compress(packed.tobytes()) + machine.flush(),
                ".5": rle(packed[None, :, None]),
            }[syntax[-2:]]
        )
    one.PixelData = encapsulate(frames)
    one["PixelData"].VR = "OB"
    one["PixelData"].is_undefined_length = True
    one.file_meta.TransferSyntaxUID = UID(syntax)
    numpy.testing.assert_array_equal(grind(lazy([one])), values)


# Tables


def lut_of(first: int, values: list[int], bits: int = 16) -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, "SS" if first < 0 else "US", [len(values) % 65536, first, bits])
    item.ModalityLUTType = "OD"
    item.add_new(0x00283006, "OW", numpy.array(values, "<u2").tobytes())
    return item


@pytest.mark.parametrize("signed", [0, 1])
def test_p9_a_modality_lut_counts_instead_of_the_slope(kind: Callable, signed: int) -> None:
    series = make_series(2, 6, 8)
    for one in series:
        one.PixelRepresentation = signed
        first = -20 if signed else 10
        one.ModalityLUTSequence = [lut_of(first, [k * k for k in range(60)])]
        stored = numpy.arange(48) * 2 - (40 if signed else 0)
        one.PixelData = stored.astype("<i2").tobytes()
        one.BitsStored, one.HighBit = 16, 15
    expected = apply_modality_lut(stored.astype("i2" if signed else "u2"), series[0])
    given = kind(series)
    found = numpy_grinder(given)
    numpy.testing.assert_array_equal(found[0].ravel(), expected)
    numpy.testing.assert_array_equal(numpy_grinder(given, values="stored")[0].ravel(), stored)
    with pytest.raises(InvalidDataset, match="int8"):
        numpy_grinder(given, dtype="i1")


@pytest.mark.parametrize("big", [False, True])
def test_p9_a_table_of_packed_bytes(big: bool) -> None:
    (one,) = make_series(1, 4, 4)
    item = Dataset()
    item.add_new(0x00283002, "US", [16, 0, 8])
    item.ModalityLUTType = "OD"
    values = bytes(range(100, 116))
    words = numpy.frombuffer(values, "<u2")
    item.add_new(0x00283006, "OW", (words.astype(">u2") if big else words).tobytes())
    one.ModalityLUTSequence = [item]
    cells = numpy.arange(16).astype(">u2" if big else "<u2")
    one.PixelData = cells.tobytes()
    one.file_meta.TransferSyntaxUID = UID(NATIVE[2] if big else NATIVE[1])
    numpy.testing.assert_array_equal(numpy_grinder(lazy([one])).ravel(), numpy.arange(100, 116))


@pytest.mark.parametrize("damage", ["descriptor", "data", "item", "short"])
def test_p9_a_table_that_is_damaged_is_an_error(kind: Callable, damage: str) -> None:
    (one,) = make_series(1, 6, 8)
    item = lut_of(0, [1, 2, 3])
    if damage == "descriptor":
        del item[0x00283002]
    elif damage == "data":
        del item[0x00283006]
    elif damage == "short":
        item[0x00283002].value = [300, 0, 16]
    one.ModalityLUTSequence = [Dataset() if damage == "item" else item]
    with pytest.raises(InvalidDicom, match="0028,3000") as error:
        numpy_grinder(kind([one]))
    assert one.SOPInstanceUID in str(error.value)


def test_p20_surplus_bytes_are_told() -> None:
    made = make_series(2, 7, 9)
    made[0].PixelData += bytes(10)
    (warning,) = volume_grinder(made).warnings
    assert made[0].SOPInstanceUID in warning and "10 bytes after the last pixel" in warning


@pytest.mark.parametrize(("dtype", "stored", "junk"), [("u2", 12, 0xA000), ("u1", 6, 0xC0)])
def test_p1_p15_bits_above_bits_stored_have_no_influence_on_colours(
    kind: Callable, dtype: str, stored: int, junk: int
) -> None:
    pixels = noise(1, 5, 8, 3, dtype=dtype) & ((1 << stored) - 1)
    found = []
    for values in (pixels, pixels | junk):
        one = colored(values.astype(dtype), "YBR_FULL")
        one.BitsStored, one.HighBit = stored, stored - 1
        found.append(grind(kind([one])))
    numpy.testing.assert_array_equal(*found)
    assert len(numpy.unique(found[0])) > 20


def test_p9_words_are_not_read_as_packed_bytes() -> None:
    (one,) = make_series(1, 4, 4)
    one.ModalityLUTSequence = [lut_of(0, [10 * k for k in range(10)])]
    one.ModalityLUTSequence[0][0x00283002].value = [20, 0, 16]
    with pytest.raises(InvalidDicom, match="20 entries"):
        numpy_grinder([one])
    one.ModalityLUTSequence = [lut_of(0, [1, 2]), lut_of(0, [3, 4])]
    with pytest.raises(InvalidDicom, match="2 items"):
        numpy_grinder([one])


@pytest.mark.parametrize(("photometric", "samples"), [("HSV", 3), ("CMYK", 4), ("ARGB", 4)])
def test_p15_retired_colours_are_refused_by_name(
    kind: Callable, photometric: str, samples: int
) -> None:
    with pytest.raises(UnsupportedImage, match=photometric):
        grind(kind([colored(noise(1, 6, 8, samples), photometric)]))


def test_p5_floats_that_are_none_are_told_as_such(kind: Callable) -> None:
    (one,) = make_series(1, 2, 2)
    del one.PixelData
    one.BitsAllocated, one.FloatPixelData = 32, numpy.full(4, numpy.nan, "f4").tobytes()
    with pytest.raises(InvalidDataset, match="no numbers"):
        numpy_grinder(dtype="i2")(kind([one]))


def palette_of(entries: int) -> Dataset:
    """16 bit indices into a palette of 8 bit entries."""
    (one,) = make_series(1, 2, 3)
    one.PhotometricInterpretation = "PALETTE COLOR"
    one.PixelData = numpy.array([0, 1, 255, 256, 300, 4000], "<u2").tobytes()
    for name in ("Red", "Green", "Blue"):
        descriptor = f"{name}PaletteColorLookupTableDescriptor"
        setattr(one, descriptor, [entries, 0, 8])
        table = (numpy.arange(entries) * 7 % 251).astype("u1").tobytes()
        setattr(one, f"{name}PaletteColorLookupTableData", table)
    return one


def test_p15_c15_indices_beyond_a_palette_have_its_last_colour_and_never_wrap() -> None:
    found = numpy_grinder([palette_of(256)], color="palette")[0]
    table = numpy.arange(256) * 7 % 251
    expected = table[[0, 1, 255, 255, 255, 255]].reshape(2, 3, 1).repeat(3, axis=2)
    numpy.testing.assert_array_equal(found, expected)
    with pytest.raises(InvalidDataset, match="300 entries of 8 bits"):
        numpy_grinder([palette_of(300)], color="palette")

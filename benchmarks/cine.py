"""How long does a colour cine take from its file to one uint8 array (frame, row, column, RGB)?

One multi-frame ultrasound object in JPEG Baseline. Decoders of JPEG may differ: each value may be
off by `TOLERANCE`, and by 0.5 in the mean.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.utils import pixel_array
from pydicom.uid import JPEGBaseline8Bit, UltrasoundMultiFrameImageStorage

from benchmarks.series import paths_of
from benchmarks.timing import Peer
from dicomnode.lib.dicom import load
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.testing import make_series, write_series

Colours = NDArray[numpy.uint8]

TITLE = "Colour cine in JPEG Baseline, one file, to uint8 RGB"
TOLERANCE = 4


def write(folder: Path, frames: int, rows: int, columns: int) -> Path:
    """A fan of speckle with a coloured jet that moves, 4:2:2."""
    import imagecodecs

    noise = numpy.random.default_rng(1).normal(0, 12, (rows, columns))
    y, x = numpy.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    encoded = []
    for k in range(frames):
        grey = 90 + 60 * numpy.sin(9 * y + 0.1 * k) * numpy.cos(7 * x) + numpy.roll(noise, k, 0)
        jet = numpy.exp(-((x - 0.4 * numpy.sin(0.1 * k)) ** 2 + y**2) / 0.05)
        colours = numpy.stack([grey + 110 * jet, grey - 60 * jet, grey - 80 * jet], axis=-1)
        pixels = colours.clip(0, 255).astype(numpy.uint8)
        encoded.append(imagecodecs.jpeg8_encode(pixels, level=90, subsampling="422"))
    (one,) = make_series(1, rows, columns, modality="US")
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
        "RescaleSlope", "RescaleIntercept", "RescaleType", "FrameOfReferenceUID", "KVP",
    ):  # fmt: skip
        delattr(one, keyword)
    one.SOPClassUID = UltrasoundMultiFrameImageStorage
    one.NumberOfFrames, one.FrameTime = frames, "33.3"
    one.FrameIncrementPointer = 0x00181063
    one.SamplesPerPixel, one.PlanarConfiguration = 3, 0
    one.PhotometricInterpretation = "YBR_FULL_422"
    one.BitsAllocated, one.BitsStored, one.HighBit = 8, 8, 7
    one.PixelData = encapsulate(encoded)
    one["PixelData"].VR = "OB"
    one["PixelData"].is_undefined_length = True
    one.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    write_series([one], folder)
    return folder


def peers(folder: Path) -> list[Peer]:
    """Ours first."""
    datasets = load(folder)
    (path,) = paths_of(folder)
    return [
        Peer(
            "dicomnode numpy_grinder(load(folder))",
            lambda: numpy_grinder(load(folder), order="given"),
        ),
        Peer("dicomnode numpy_grinder(datasets)", lambda: numpy_grinder(datasets, order="given")),
        *_imagecodecs(path),
        *_dicomsdl(path),
        Peer("pydicom pixel_array, pillow", lambda: pixel_array(path, decoding_plugin="pillow")),
        *_simpleitk(path),
    ]


def reference(folder: Path) -> Colours:
    """Frame by frame, by Pillow."""
    import PIL.Image

    dataset = pydicom.dcmread(paths_of(folder)[0])
    frames = generate_frames(dataset.PixelData, number_of_frames=dataset.NumberOfFrames)
    return numpy.array(
        [numpy.asarray(PIL.Image.open(io.BytesIO(one)).convert("RGB")) for one in frames]
    )


def same(result: object, reference: Colours) -> bool:
    """Whether a result is uint8, of the same shape, and as equal as JPEG allows."""
    if not isinstance(result, numpy.ndarray) or result.dtype != numpy.uint8:
        return False
    if result.shape != reference.shape:
        return False
    off = numpy.abs(result.astype(numpy.int16) - reference)
    return bool(off.max() <= TOLERANCE and off.mean() <= 0.5)


def _imagecodecs(path: Path) -> list[Peer]:
    try:
        import imagecodecs
    except ImportError:
        return []

    def run(threads: int) -> Colours:
        dataset = pydicom.dcmread(path)
        frames = list(generate_frames(dataset.PixelData, number_of_frames=dataset.NumberOfFrames))
        out = numpy.empty((len(frames), dataset.Rows, dataset.Columns, 3), numpy.uint8)

        def read(k: int) -> None:
            imagecodecs.jpeg8_decode(frames[k], out=out[k])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(len(frames))))
        return out

    return [
        Peer("imagecodecs, loop by hand, 2 threads", lambda: run(2)),
        Peer("imagecodecs, loop by hand", lambda: run(1)),
    ]


def _dicomsdl(path: Path) -> list[Peer]:
    try:
        import dicomsdl
    except ImportError:
        return []

    def run() -> Colours:
        one: Any = dicomsdl.open(str(path))
        out = numpy.empty((one.NumberOfFrames, one.Rows, one.Columns, 3), numpy.uint8)
        for k in range(len(out)):
            one.copyFrameData(k, out[k])
        return out

    return [Peer("dicomsdl, loop by hand", run)]


def _simpleitk(path: Path) -> list[Peer]:
    try:
        import SimpleITK
    except ImportError:
        return []

    def run() -> Colours:
        array: Colours = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        return array

    return [Peer("SimpleITK ReadImage(file)", run)]

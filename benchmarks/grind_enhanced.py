"""How long does one Enhanced CT object take from its file to a rescaled float32 volume?"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pydicom

from benchmarks.series import Array, along_normal, paths_of, same_volume
from benchmarks.timing import Peer
from dicomnode.lib.dicom import load
from dicomnode.lib.grinders import numpy_grinder, volume_grinder

TITLE = "Enhanced CT, one file, to float32, rescaled, in slice order"

same = same_volume


def peers(folder: Path) -> list[Peer]:
    """Ours first."""
    datasets = load(folder)
    (path,) = paths_of(folder)
    first = pydicom.dcmread(path, stop_before_pixels=True)
    reused = numpy.ones((first.NumberOfFrames, first.Rows, first.Columns), numpy.float32)
    return [
        Peer("dicomnode volume_grinder(load(folder))", lambda: volume_grinder(load(folder))),
        Peer("dicomnode volume_grinder(datasets)", lambda: volume_grinder(datasets)),
        Peer("dicomnode numpy_grinder(datasets)", lambda: numpy_grinder(datasets)),
        Peer(
            "dicomnode volume_grinder(datasets, out=...)",
            lambda: volume_grinder(datasets, out=reused),
        ),
        Peer("pydicom + numpy.frombuffer by hand, 2 threads", lambda: _by_hand(path, 2)),
        Peer("pydicom + numpy.frombuffer by hand", lambda: _by_hand(path, 1)),
        Peer("pydicom pixel_array", lambda: _pydicom(path)),
        *_dicomsdl(path),
        *_highdicom(path),
        *_simpleitk(path),
    ]


def reference(folder: Path) -> Array:
    """Frame by frame, in float64, rounded once."""
    dataset = pydicom.dcmread(paths_of(folder)[0])
    stored = dataset.pixel_array
    frames = [
        stored[k].astype(numpy.float64) * slope + intercept
        for k, slope, intercept in _planned(dataset)
    ]
    return numpy.array(frames).astype(numpy.float32)


def _planned(dataset: pydicom.Dataset) -> list[tuple[int, float, float]]:
    """The frames by position along the normal, each with its slope and intercept."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    found = []
    for k, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        rescale = groups.PixelValueTransformationSequence[0]
        distance = along_normal(orientation, position)
        found.append((distance, k, float(rescale.RescaleSlope), float(rescale.RescaleIntercept)))
    return [(k, slope, intercept) for _, k, slope, intercept in sorted(found)]


def _by_hand(path: Path, threads: int) -> Array:
    dataset = pydicom.dcmread(path)
    shape = (dataset.NumberOfFrames, dataset.Rows, dataset.Columns)
    stored = numpy.frombuffer(dataset.PixelData, "<u2").reshape(shape)
    out = numpy.empty(shape, numpy.float32)
    planned = list(enumerate(_planned(dataset)))

    def read(part: list[tuple[int, tuple[int, float, float]]]) -> None:
        for k, (frame, slope, intercept) in part:
            numpy.multiply(stored[frame], numpy.float32(slope), out=out[k])
            out[k] += numpy.float32(intercept)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [planned[k::threads] for k in range(threads)]))
    return out


def _pydicom(path: Path) -> Array:
    dataset = pydicom.dcmread(path)
    stored = dataset.pixel_array
    out = numpy.empty(stored.shape, numpy.float32)
    for k, (frame, slope, intercept) in enumerate(_planned(dataset)):
        numpy.multiply(stored[frame], numpy.float32(slope), out=out[k])
        out[k] += numpy.float32(intercept)
    return out


def _dicomsdl(path: Path) -> list[Peer]:
    try:
        import dicomsdl
    except ImportError:
        return []

    def run(threads: int) -> Array:
        one: Any = dicomsdl.open(str(path))
        told = one.getPixelDataInfo()
        shape = (told["NumberOfFrames"], told["Rows"], told["Cols"])
        shared = "SharedFunctionalGroupsSequence.0.PlaneOrientationSequence.0."
        orientation = one[f"{shared}ImageOrientationPatient"]
        place = "PerFrameFunctionalGroupsSequence.{}.PlanePositionSequence.0.ImagePositionPatient"
        order = sorted(
            range(shape[0]), key=lambda k: along_normal(orientation, one[place.format(k)])
        )
        slopes, intercepts = told["RescaleSlope"], told["RescaleIntercept"]
        out = numpy.empty(shape, numpy.float32)

        def read(part: range) -> None:
            stored = numpy.empty(shape[1:], told["dtype"])
            for k in part:
                one.copyFrameData(order[k], stored)
                numpy.multiply(stored, numpy.float32(slopes[order[k]]), out=out[k])
                out[k] += numpy.float32(intercepts[order[k]])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, [range(k, shape[0], threads) for k in range(threads)]))
        return out

    return [
        Peer("dicomsdl, loop by hand, 2 threads", lambda: run(2)),
        Peer("dicomsdl, loop by hand", lambda: run(1)),
    ]


def _highdicom(path: Path) -> list[Peer]:
    try:
        import highdicom
    except ImportError:
        return []

    def run() -> Array:
        volume = highdicom.imread(path).get_volume(dtype=numpy.float32)
        array: Array = volume.array
        return array[::-1] if volume.affine[2, 0] < 0 else array

    return [Peer("highdicom imread(file).get_volume()", run)]


def _simpleitk(path: Path) -> list[Peer]:
    try:
        import SimpleITK
    except ImportError:
        return []

    def run() -> Array:
        array: Array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        return array.astype(numpy.float32)

    return [Peer("SimpleITK ReadImage(file)", run)]

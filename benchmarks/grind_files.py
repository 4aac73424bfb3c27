"""How long does a series take from files to a rescaled float32 volume in slice order?"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pydicom

from benchmarks import floor
from benchmarks.series import (
    Array,
    along_normal,
    in_slice_order,
    paths_of,
    reference_volume,
    same_volume,
)
from benchmarks.timing import Peer
from dicomnode.lib.dicom import load
from dicomnode.lib.grinders import numpy_grinder, volume_grinder
from dicomnode.lib.volume import Volume

TITLE = "CT series from files to float32, rescaled, in slice order"

reference = reference_volume
same = same_volume


def peers(folder: Path) -> list[Peer]:
    """Ours first."""
    datasets = load(folder)
    ordered = in_slice_order(folder)
    first = pydicom.dcmread(ordered[0], stop_before_pixels=True)
    reused = numpy.ones((len(ordered), first.Rows, first.Columns), numpy.float32)
    return [
        Peer("dicomnode volume_grinder(load(folder))", lambda: volume_grinder(load(folder))),
        Peer("dicomnode volume_grinder(datasets)", lambda: volume_grinder(datasets)),
        Peer("dicomnode numpy_grinder(datasets)", lambda: numpy_grinder(datasets)),
        Peer("dicomnode volume_grinder(datasets, out=...)", lambda: _into(datasets, reused)),
        *_dicomsdl(folder),
        *_by_hand(folder),
        Peer("pydicom pixel_array, preallocated", lambda: _pydicom_preallocated(folder)),
        Peer("pydicom pixel_array, numpy.stack", lambda: _pydicom_naive(folder)),
        *_simpleitk(folder),
        *_floors(ordered, reused),
    ]


def _into(datasets: list[pydicom.Dataset], out: Array) -> Volume:
    return volume_grinder(datasets, out=out)


def _by_hand(folder: Path) -> list[Peer]:
    """Headers by pydicom, pixels as they are: no other bits, no other byte order, no codec."""

    def run(threads: int) -> Array:
        datasets = _pydicom_sorted(folder)
        first = datasets[0]
        kind = "<i2" if first.PixelRepresentation else "<u2"
        out = numpy.empty((len(datasets), first.Rows, first.Columns), numpy.float32)

        def read(part: range) -> None:
            for k in part:
                stored = numpy.frombuffer(datasets[k].PixelData, kind).reshape(out[k].shape)
                numpy.multiply(stored, numpy.float32(datasets[k].RescaleSlope), out=out[k])
                out[k] += numpy.float32(datasets[k].RescaleIntercept)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, [range(k, len(datasets), threads) for k in range(threads)]))
        return out

    return [Peer("pydicom + numpy.frombuffer by hand, 2 threads", lambda: run(2))]


def _pydicom_sorted(folder: Path) -> list[pydicom.FileDataset]:
    datasets = [pydicom.dcmread(path) for path in paths_of(folder)]
    return sorted(
        datasets,
        key=lambda one: along_normal(one.ImageOrientationPatient, one.ImagePositionPatient),
    )


def _pydicom_naive(folder: Path) -> Array:
    datasets = _pydicom_sorted(folder)
    return numpy.stack(
        [
            one.pixel_array.astype(numpy.float32) * numpy.float32(one.RescaleSlope)
            + numpy.float32(one.RescaleIntercept)
            for one in datasets
        ]
    )


def _pydicom_preallocated(folder: Path) -> Array:
    datasets = _pydicom_sorted(folder)
    out = numpy.empty((len(datasets), datasets[0].Rows, datasets[0].Columns), numpy.float32)
    for k, one in enumerate(datasets):
        numpy.multiply(one.pixel_array, numpy.float32(one.RescaleSlope), out=out[k])
        out[k] += numpy.float32(one.RescaleIntercept)
    return out


def _dicomsdl(folder: Path) -> list[Peer]:
    try:
        import dicomsdl
    except ImportError:
        return []

    def run(threads: int) -> Array:
        """By hand, as its users do: open all, order, then frame by frame into its place."""
        files: list[Any] = [dicomsdl.open(str(path)) for path in paths_of(folder)]
        files.sort(
            key=lambda one: along_normal(one.ImageOrientationPatient, one.ImagePositionPatient)
        )
        rows, columns = files[0].Rows, files[0].Columns
        out = numpy.empty((len(files), rows, columns), numpy.float32)

        def read(part: range) -> None:
            stored = numpy.empty((rows, columns), files[0].getPixelDataInfo()["dtype"])
            for k in part:
                files[k].copyFrameData(0, stored)
                numpy.multiply(stored, numpy.float32(files[k].RescaleSlope), out=out[k])
                out[k] += numpy.float32(files[k].RescaleIntercept)

        if threads == 1:
            read(range(len(files)))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, [range(k, len(files), threads) for k in range(threads)]))
        return out

    return [
        Peer("dicomsdl, loop by hand, 2 threads", lambda: run(2)),
        Peer("dicomsdl, loop by hand", lambda: run(1)),
    ]


def _simpleitk(folder: Path) -> list[Peer]:
    try:
        import SimpleITK
    except ImportError:
        return []
    ordered = [str(path) for path in in_slice_order(folder)]

    def read(names: Callable[[], Any]) -> Array:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(names())
        array: Array = SimpleITK.GetArrayFromImage(reader.Execute()).astype(numpy.float32)
        return array

    def sort() -> Any:
        return SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))

    return [
        Peer("SimpleITK, files in order already", lambda: read(lambda: ordered)),
        Peer("SimpleITK, sorts the folder itself", lambda: read(sort)),
    ]


def _floors(ordered: list[Path], reused: Array) -> list[Peer]:
    """Readers in C that know order and offsets, and one copy of as much memory as the result."""
    copy = floor.memcpy(max(1, reused.nbytes >> 20))
    found = [
        ("floor: C, 2 threads", floor.stacker(ordered, 2)),
        ("floor: C, 1 thread", floor.stacker(ordered, 1)),
        ("floor: C, 2 threads, into reused memory", floor.stacker(ordered, 2, reused)),
    ]
    floors = [Peer(name, run) for name, run in found if run is not None]
    if copy is not None:
        floors.append(Peer("floor: memcpy of the result, warm", copy, checked=False))
    return floors

"""How long does a series take from received bytes to a rescaled float32 volume in slice order?"""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pydicom
from pydicom.pixels.utils import pixel_array

from benchmarks.series import (
    Array,
    along_normal,
    paths_of,
    reference_volume,
    same_volume,
)
from benchmarks.timing import Peer
from dicomnode.lib.dicom import LazyDataset
from dicomnode.lib.grinders import numpy_grinder, volume_grinder

TITLE = "CT series from memory to float32, rescaled, in slice order"

reference = reference_volume
same = same_volume


def peers(folder: Path) -> list[Peer]:
    """Ours first."""
    objects = [path.read_bytes() for path in paths_of(folder)]
    lazy = [LazyDataset(one) for one in objects]
    read = [pydicom.dcmread(io.BytesIO(one)) for one in objects]
    return [
        Peer("dicomnode volume_grinder(lazy datasets of bytes)", lambda: volume_grinder(lazy)),
        Peer("dicomnode numpy_grinder(lazy datasets of bytes)", lambda: numpy_grinder(lazy)),
        Peer("dicomnode volume_grinder(pydicom datasets)", lambda: volume_grinder(read)),
        Peer("numpy.frombuffer by hand, preallocated, 2 threads", lambda: _by_hand(read, 2)),
        Peer("numpy.frombuffer by hand, preallocated", lambda: _by_hand(read, 1)),
        Peer("pydicom pixel_array, numpy.stack", lambda: _naive(read)),
    ]


def _sorted(datasets: list[pydicom.FileDataset]) -> list[pydicom.FileDataset]:
    return sorted(
        datasets,
        key=lambda one: along_normal(one.ImageOrientationPatient, one.ImagePositionPatient),
    )


def _by_hand(datasets: list[pydicom.FileDataset], threads: int) -> Array:
    """Knows that the pixels are unsigned 16 bit, little endian, without foreign bits."""
    ordered = _sorted(datasets)
    rows, columns = ordered[0].Rows, ordered[0].Columns
    out = numpy.empty((len(ordered), rows, columns), numpy.float32)

    def read(part: range) -> None:
        for k in part:
            stored = numpy.frombuffer(ordered[k].PixelData, "<u2").reshape(rows, columns)
            numpy.multiply(stored, numpy.float32(ordered[k].RescaleSlope), out=out[k])
            out[k] += numpy.float32(ordered[k].RescaleIntercept)

    if threads == 1:
        read(range(len(ordered)))
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, [range(k, len(ordered), threads) for k in range(threads)]))
    return out


def _naive(datasets: list[pydicom.FileDataset]) -> Array:
    # The function, not the property of the dataset, which would keep the array of the last run.
    return numpy.stack(
        [
            pixel_array(one).astype(numpy.float32) * numpy.float32(one.RescaleSlope)
            + numpy.float32(one.RescaleIntercept)
            for one in _sorted(datasets)
        ]
    )

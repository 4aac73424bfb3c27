"""The input of all questions: series in a folder, and the obvious way to read one."""

import random
from collections.abc import Collection
from pathlib import Path

import numpy
import pydicom
from numpy.typing import NDArray

from dicomnode.testing import make_series, write_series

Array = NDArray[numpy.float32]


def write(folder: Path, slices: int, rows: int, columns: int) -> Path:
    """A generated CT series; the names of the files do not tell the order of the slices."""
    datasets = make_series(slices, rows, columns)
    random.Random(1).shuffle(datasets)
    write_series(datasets, folder)
    return folder


def paths_of(folder: Path) -> list[Path]:
    """The files by name."""
    return sorted(folder.iterdir())


def in_slice_order(folder: Path) -> list[Path]:
    """The files by position along the slice normal."""
    return [path for _, path in sorted((_distance(path), path) for path in paths_of(folder))]


def _distance(path: Path) -> float:
    head = pydicom.dcmread(path, stop_before_pixels=True)
    return float(along_normal(head.ImageOrientationPatient, head.ImagePositionPatient))


def along_normal(orientation: list[float], position: list[float]) -> float:
    """How far a slice lies along the slice normal, mm."""
    a, b, c, d, e, f = map(float, orientation)
    x, y, z = map(float, position)
    return x * (b * f - c * e) + y * (c * d - a * f) + z * (a * e - b * d)


def reference_volume(folder: Path, names: Collection[str] = ()) -> Array:
    """Slice by slice, in float64, rounded once; with `names` of these files only."""
    slices = []
    for path in in_slice_order(folder):
        if names and path.name not in names:
            continue
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array.astype(numpy.float64)
        slices.append(stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept))
    return numpy.array(slices).astype(numpy.float32)


def same_volume(result: object, reference: Array) -> bool:
    """Whether a result (an array, or something with `array`) is float32 and equal, voxel by voxel."""
    array = getattr(result, "array", result)
    return (
        isinstance(array, numpy.ndarray)
        and array.dtype == numpy.float32
        and array.shape == reference.shape
        and bool((array == reference).all())
    )

"""The input of all questions: series in a folder, and the obvious way to read one."""

import random
from collections.abc import Collection
from pathlib import Path

import numpy
import pydicom
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage

from benchmarks.awkward_cases import enhanced
from dicomnode.testing import make_series, write_series

SOP_CLASSES = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}
Array = NDArray[numpy.float32]


def write(folder: Path, slices: int, rows: int, columns: int, kind: str = "CT") -> Path:
    """A generated series; the names of the files do not tell the order of the slices.

    A "PT" has a slope of its own in every slice, and the intercept 0 (PS3.3 C.8.9.4).
    """
    datasets = make_series(slices, rows, columns, modality=kind, sop_class_uid=SOP_CLASSES[kind])
    for k, one in enumerate(datasets):
        if kind != "CT":
            one.RescaleIntercept, one.RescaleType = "0", "US"
        if kind == "PT":
            one.RescaleSlope, one.Units = f"{0.37 + 0.0013 * k:.6g}", "BQML"
    random.Random(1).shuffle(datasets)
    write_series(datasets, folder)
    return folder


def write_enhanced(folder: Path, frames: int, rows: int, columns: int) -> Path:
    """The slices of a generated CT as one Enhanced CT object, in their order."""
    write_series([enhanced(make_series(frames, rows, columns))], folder)
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


def close_volume(result: object, reference: Array) -> bool:
    """As `same_volume`, for slopes that are not exact in float32: within two units in the last place.

    Most peers multiply in float32 and are one such unit off; dicomnode's values are the reference's.
    """
    array = getattr(result, "array", result)
    return (
        isinstance(array, numpy.ndarray)
        and array.dtype == numpy.float32
        and array.shape == reference.shape
        and bool((numpy.abs(array - reference) <= 2 * numpy.spacing(numpy.abs(reference))).all())
    )

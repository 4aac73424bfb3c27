"""Regrid: the slices of a volume that its images do not give as they are.

Solves that a gap is filled or interpolated, and that a tilted stack becomes a straight one. Nothing
here is done unless a policy of the input asks for it.
"""

from typing import Any

import numpy
from numpy.typing import NDArray

from dicomnode.errors import InconsistentSeries
from dicomnode.lib.images import called
from dicomnode.lib.stack import MOST_FILLED, Plane, Stack, is_tilted

# Shift in pixels below which a slice counts as in its place.
_SHIFT = 0.01


def shifts(stack: Stack) -> NDArray[numpy.float64] | None:
    """How far each slice lies from straight above the first, (row, column) in pixels; None for none.

    Raises InconsistentSeries where a grid that holds all of them would be many times larger.
    """
    plane, positions = stack.plane, stack.positions_mm
    is_regular = not numpy.isnan(stack.step).any()
    if len(positions) < 2 or (is_regular and not is_tilted(positions, plane.normal)):
        return None
    way = positions - positions[0]
    if is_regular:
        way = numpy.arange(len(positions))[:, None] * stack.step
    pixels = numpy.stack(
        [way @ plane.along_column / plane.row_mm, way @ plane.along_row / plane.column_mm], axis=1
    )
    nearest = numpy.rint(pixels)
    shifts = numpy.where(numpy.abs(pixels - nearest) < _SHIFT, nearest, pixels)
    first, last = stack.slices[0].header, stack.slices[-1].header
    down, right = numpy.ptp(shifts, axis=0)
    if (first.rows + down) * (first.columns + right) > MOST_FILLED * first.rows * first.columns:
        raise InconsistentSeries(
            f"the slices from {called(first)} to {called(last)} are shifted against each other by "
            f"{down:.4g} rows and {right:.4g} columns, and a straight grid would have over "
            f'{MOST_FILLED} times their pixels; tilt="keep" gives a sheared affine'
        )
    return shifts if shifts.any() else None


def straightened(
    array: NDArray[Any],
    shifts: NDArray[numpy.float64],
    plane: Plane,
    origin: NDArray[numpy.float64],
) -> tuple[NDArray[Any], NDArray[numpy.float64]]:
    """All slices on one grid straight above each other, and the place of its first voxel."""
    low, high = numpy.floor(shifts.min(axis=0)), numpy.ceil(shifts.max(axis=0))
    slices, rows, columns = array.shape[:3]
    size = (slices, rows + int(high[0] - low[0]), columns + int(high[1] - low[1]))
    out = numpy.full((*size, *array.shape[3:]), numpy.nan, array.dtype)
    for k, offset in enumerate(shifts - low):
        whole = numpy.floor(offset)
        row_part, column_part = (offset - whole).tolist()
        row, column = int(whole[0]), int(whole[1])
        values = array[k].astype(numpy.float64)
        if row_part:
            values, row = values[1:] * (1 - row_part) + values[:-1] * row_part, row + 1
        if column_part:
            values = values[:, 1:] * (1 - column_part) + values[:, :-1] * column_part
            column += 1
        out[k, row : row + values.shape[0], column : column + values.shape[1]] = values
    down, right = plane.along_column * plane.row_mm, plane.along_row * plane.column_mm
    return out, origin + low[0] * down + low[1] * right


def on_grid(array: NDArray[Any], grid: NDArray[numpy.float64]) -> NDArray[Any]:
    """The slices of a volume out of those of its images: copied, interpolated or NaN."""
    out = numpy.full((len(grid), *array.shape[1:]), numpy.nan, array.dtype)
    for k, where in enumerate(grid):
        if numpy.isnan(where):
            continue
        below = int(where)
        part = float(where) - below
        if part:
            out[k] = array[below].astype("f8") * (1 - part) + array[below + 1].astype("f8") * part
        else:
            out[k] = array[below]
    return out

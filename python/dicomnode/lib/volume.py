"""A volume: an array, where each voxel is in the patient, and which image each slice came from.

Solves the question that every reader of a series has to answer: which images belong together, in
which order, and how far apart. Strict: what does not form one regular stack raises
`InconsistentSeries` with the instances and the remedy, because a volume that is silently wrong is
worse than none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from dicomnode.errors import InconsistentSeries
from dicomnode.lib.images import ImageHeader, Reading, Slice, called, check_image, read_array

# Tolerances in millimetres, and for direction cosines and relative spacing without unit.
_POSITION_MM = 1e-3
_SPACING_RELATIVE = 0.01
_DIRECTION = 1e-4


@dataclass(frozen=True, eq=False)
class Volume:
    """A regular stack of slices.

    `array` has the axes (slice, row, column), is C-contiguous and yours to write to. `affine` is
    4x4 float64 and maps (column, row, slice, 1) to patient coordinates in millimetres, LPS, at the
    voxel's centre (PS3.3 C.7.6.2.1.1). `spacing_mm` is (slice, row, column): the distance between
    neighbours along each axis of the array; NaN for the slice axis where a lone slice does not
    tell. `sop_instance_uids[k]` is the image that `array[k]` came from, and
    `frame_numbers[k]` the frame in it, from 1. `warnings` tells what was tolerated or left out.
    """

    array: NDArray[Any]
    affine: NDArray[numpy.float64]
    spacing_mm: tuple[float, float, float]
    sop_instance_uids: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    frame_numbers: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape, (slice, row, column)."""
        return self.array.shape


def read_volume(
    slices: Sequence[Slice],
    reading: Reading,
    *,
    notes: Sequence[str] = (),
    out: NDArray[Any] | None = None,
) -> Volume:
    """One volume of all images, in the order of their position along the slice normal.

    `notes` go before the volume's own warnings.

    Raises InconsistentSeries where the images are not one regular stack.
    """
    if not slices:
        raise InconsistentSeries(f"there is no image to make a volume of{_listed(notes)}")
    for item in slices:
        check_image(item.header)
    order, affine, spacing_mm, tolerated = plan([item.header for item in slices])
    ordered = [slices[k] for k in order]
    array, told = read_array(ordered, reading, out=out)
    return Volume(
        array=array,
        affine=affine,
        spacing_mm=spacing_mm,
        sop_instance_uids=tuple(item.header.sop_instance_uid for item in ordered),
        warnings=(*notes, *tolerated, *told),
        frame_numbers=tuple(item.header.frame + 1 for item in ordered),
    )


def plan(
    headers: Sequence[ImageHeader],
) -> tuple[list[int], NDArray[numpy.float64], tuple[float, float, float], list[str]]:
    """Order, affine, spacing (slice, row, column) in mm and warnings of one regular stack.

    The order is that of the position along the normal row x column of the orientation, ascending,
    so that the affine is right-handed; InstanceNumber and SliceLocation have no influence. The step
    from slice to slice comes from the positions (PS3.3 C.7.6.2.1.1); with a tilted gantry it is not
    parallel to the normal, and the affine is sheared.

    Raises InconsistentSeries naming the instances.
    """
    first = headers[0]
    warnings: list[str] = []
    for header in headers:
        if header.position is None or header.orientation is None or header.pixel_spacing is None:
            missing = [
                name
                for name, value in (
                    ("ImagePositionPatient", header.position),
                    ("ImageOrientationPatient", header.orientation),
                    ("PixelSpacing", header.pixel_spacing),
                )
                if value is None
            ]
            raise InconsistentSeries(
                f"image {called(header)} has no {' and no '.join(missing)}: it has no "
                "place in a volume; take it out with required_tags, or use list_grinder"
            )
        for attribute, name in (
            ("series_instance_uid", "SeriesInstanceUID"),
            ("frame_of_reference_uid", "FrameOfReferenceUID"),
            ("rows", "Rows"),
            ("columns", "Columns"),
            ("modality", "Modality"),
            ("has_rescale", "whether they have a RescaleSlope"),
            ("stack_id", "StackID"),
        ):
            mine, theirs = getattr(header, attribute), getattr(first, attribute)
            if mine != theirs:
                raise InconsistentSeries(
                    f"images {called(first)} and {called(header)} differ in "
                    f"{name} ({theirs!r} and {mine!r}); narrow the input with required_values so that "
                    "it holds one series"
                )
        if _kind(header) != _kind(first):
            raise InconsistentSeries(
                f"images {called(first)} and {called(header)} differ in ImageType "
                f"({first.image_type!r} and {header.image_type!r}); narrow the input with "
                "required_values for ImageType"
            )

    orientations = numpy.array([header.orientation for header in headers], numpy.float64)
    positions = numpy.array([header.position for header in headers], numpy.float64)
    spacings = numpy.array([header.pixel_spacing for header in headers], numpy.float64)
    _same_for_all(headers, orientations, _DIRECTION, "ImageOrientationPatient")
    _same_for_all(headers, spacings, 1e-4 * float(spacings[0].max()), "PixelSpacing")
    row_mm, column_mm = float(spacings[0][0]), float(spacings[0][1])
    if row_mm <= 0 or column_mm <= 0:
        raise InconsistentSeries(
            f"image {called(first)} has PixelSpacing {row_mm}\\{column_mm}, which has to be "
            "greater than zero"
        )

    along_row, along_column = orientations[0][:3], orientations[0][3:]
    lengths = float(numpy.linalg.norm(along_row)), float(numpy.linalg.norm(along_column))
    off = max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(along_row @ along_column)))
    if off > 1e-2:
        raise InconsistentSeries(
            f"image {called(first)} has an ImageOrientationPatient that is not two "
            f"perpendicular unit vectors: {orientations[0].tolist()}"
        )
    if off > _DIRECTION:
        warnings.append(f"ImageOrientationPatient {orientations[0].tolist()} was normalised")
    along_row = along_row / lengths[0]
    along_column = along_column / lengths[1]
    normal = numpy.cross(along_row, along_column)
    normal /= numpy.linalg.norm(normal)

    distances = positions @ normal
    order = [int(k) for k in numpy.argsort(distances, kind="stable")]
    step = _step(headers, positions, distances, order, normal, warnings)

    affine = numpy.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = step
    affine[:3, 3] = positions[order[0]]
    return order, affine, (float(numpy.linalg.norm(step)), row_mm, column_mm), warnings


def _step(
    headers: Sequence[ImageHeader],
    positions: NDArray[numpy.float64],
    distances: NDArray[numpy.float64],
    order: list[int],
    normal: NDArray[numpy.float64],
    warnings: list[str],
) -> NDArray[numpy.float64]:
    """The vector in mm from one slice to the next, after all steps were found equal."""
    if len(order) == 1:
        header = headers[0]
        for value, name in (
            (header.spacing_between_slices, "SpacingBetweenSlices"),
            (header.slice_thickness, "SliceThickness"),
        ):
            if value is not None and abs(value) > 0:
                warnings.append(f"one slice: its extent along the normal is its {name}")
                return normal * abs(value)
        warnings.append("one slice without SpacingBetweenSlices and SliceThickness: step is NaN")
        return numpy.full(3, numpy.nan)

    gaps = numpy.diff(distances[order])
    usual = float(numpy.median(gaps))
    duplicates = numpy.flatnonzero(gaps < max(_POSITION_MM, 1e-3 * usual))
    if duplicates.size:
        pairs = [
            f"{called(headers[order[k]])} and {called(headers[order[k + 1]])}" for k in duplicates
        ]
        raise InconsistentSeries(
            f"{len(pairs)} pairs of images lie at the same position: {_some(pairs)}; several time "
            "points, echoes or reconstructions in one input? Narrow it with required_values"
        )
    tolerance = max(_POSITION_MM, _SPACING_RELATIVE * usual)
    odd = numpy.flatnonzero(numpy.abs(gaps - usual) > tolerance)
    if odd.size:
        places = [_gap(headers, order, int(k), float(gaps[k]), usual) for k in odd]
        raise InconsistentSeries(
            f"slices are {usual:.4g} mm apart, but {_some(places)}; an image is missing, or the "
            "input holds more than one stack: wait for the whole series in validate(), or send the "
            "missing images"
        )
    ordered = positions[order]
    step: NDArray[numpy.float64] = (ordered[-1] - ordered[0]) / (len(order) - 1)
    expected = ordered[0] + numpy.arange(len(order))[:, None] * step
    drift = numpy.linalg.norm(ordered - expected, axis=1)
    worst = int(numpy.argmax(drift))
    if drift[worst] > max(_POSITION_MM, _SPACING_RELATIVE * usual) * 2:
        raise InconsistentSeries(
            f"image {called(headers[order[worst]])} lies {drift[worst]:.4g} mm off the "
            "straight line through the stack; these images are not one regular volume"
        )
    return step


def _gap(headers: Sequence[ImageHeader], order: list[int], k: int, gap: float, usual: float) -> str:
    missing = round(gap / usual) - 1
    told = f" ({missing} missing)" if missing > 0 and abs(gap / usual - missing - 1) < 0.1 else ""
    before, after = headers[order[k]], headers[order[k + 1]]
    return f"{gap:.4g} mm between {called(before)} and {called(after)}{told}"


def _same_for_all(
    headers: Sequence[ImageHeader], values: NDArray[numpy.float64], tolerance: float, name: str
) -> None:
    off = numpy.abs(values - values[0]).max(axis=1)
    worst = int(numpy.argmax(off))
    if off[worst] > tolerance:
        raise InconsistentSeries(
            f"images {called(headers[0])} and {called(headers[worst])} differ in "
            f"{name} ({values[0].tolist()} and {values[worst].tolist()}); a localizer in the series? "
            "Narrow the input with required_values"
        )


def _kind(header: ImageHeader) -> tuple[str, ...]:
    """Values 1 to 3 of Image Type: original or derived, primary or secondary, what it shows."""
    return tuple(part.strip() for part in header.image_type.split("\\")[:3])


def _some(parts: Sequence[str], most: int = 5) -> str:
    rest = len(parts) - most
    return "; ".join(parts[:most]) + (f"; and {rest} more" if rest > 0 else "")


def _listed(notes: Sequence[str]) -> str:
    return f": {_some(notes)}" if notes else ""

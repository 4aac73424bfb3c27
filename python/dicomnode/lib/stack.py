"""A stack: which images form one, in which order, and how far apart.

Solves that a series may hold what is not one regular stack: gaps, duplicates, localizers, tilt. Each
is an error that names the instances and the remedy, unless a policy says what to do.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy
from numpy.typing import NDArray

from dicomnode.errors import InconsistentSeries
from dicomnode.lib.dicom import READ_ERRORS
from dicomnode.lib.images import ImageHeader, Reading, Slice, called, check_image, read_array
from dicomnode.lib.layouts import place
from dicomnode.lib.splits import differing, element_value

# Tolerances in millimetres, and for direction cosines and relative spacing without unit.
_POSITION_MM = 1e-3
SAME_PLACE_MM = 1e-2
_SPACING_RELATIVE = 0.01
_SAME_DIRECTION, _UNIT, _ROUNDED = 1e-5, 1.0001e-4, 2e-6
# Shear of a stack relative to its length, above which it counts as tilted.
_TILT = 1e-3
# Slices, or pixels, of a filled or resampled volume for each that is there.
MOST_FILLED = 16
_ANATOMICAL_ORIENTATION_TYPE = 0x00102210
_SEGMENTATION, _SEGMENT = "1.2.840.10008.5.1.4.1.1.66.4", 0x0062000B

#: What happens with slices that are not equally far apart.
Gaps: TypeAlias = Literal["error", "fill", "resample", "keep"]
#: What happens with several images at one place.
Duplicates: TypeAlias = Literal["identical", "error", "last"]
#: What happens with localizers among the images.
Localizers: TypeAlias = Literal["error", "drop"]
#: What happens with a stack whose slices do not lie straight above each other.
Tilt: TypeAlias = Literal["keep", "error", "resample"]


@dataclass(frozen=True)
class Policies:
    """What is done with images that are not one plain stack, instead of an error.

    `gaps`: "fill" puts slices of NaN where images are missing, if all distances are whole multiples
    of the smallest. "resample" computes slices at the smallest distance, each linear between its two
    neighbours. "keep" leaves the slices as they are; then the affine's third column and
    `spacing_mm[0]` are NaN, and only `positions_mm` tells where each slice is.

    `duplicates`: "identical" keeps one of several images with equal pixels; "error" does not; "last"
    keeps the one that was given last of those at one place or with one SOPInstanceUID, whatever its
    pixels.

    `localizers`: "drop" leaves out images whose ImageType says LOCALIZER or SCOUT.

    `tilt`: "keep" gives a sheared affine; "error" refuses it; "resample" shifts each slice within its
    plane, linear between pixels, on a grid that is as much larger as all slices need; NaN where no
    image was.
    """

    gaps: Gaps = "error"
    duplicates: Duplicates = "identical"
    localizers: Localizers = "error"
    tilt: Tilt = "keep"

    @property
    def needs_nan(self) -> str:
        """The policy that may put NaN or new values into an array, as it is written; else empty."""
        if self.gaps in ("fill", "resample"):
            return f'gaps="{self.gaps}"'
        return 'tilt="resample"' if self.tilt == "resample" else ""


@dataclass(frozen=True, eq=False)
class Plane:
    """What all slices of a stack share: directions as unit vectors, and the spacing in the plane."""

    along_row: NDArray[numpy.float64]
    along_column: NDArray[numpy.float64]
    row_mm: float
    column_mm: float

    @property
    def normal(self) -> NDArray[numpy.float64]:
        normal: NDArray[numpy.float64] = numpy.cross(self.along_row, self.along_column)
        return normal / float(numpy.linalg.norm(normal))

    def affine(
        self, origin: NDArray[numpy.float64], step: NDArray[numpy.float64]
    ) -> NDArray[numpy.float64]:
        affine = numpy.eye(4)
        affine[:3, 0] = self.along_row * self.column_mm
        affine[:3, 1] = self.along_column * self.row_mm
        affine[:3, 2] = step
        affine[:3, 3] = origin
        return affine


@dataclass(frozen=True, eq=False)
class Stack:
    """Images in the order of their position, and the grid of the volume that they make.

    `grid` tells for each slice of the volume which image it is: a whole number, or between two
    images a fraction; NaN where none is.
    """

    slices: list[Slice]
    grid: NDArray[numpy.float64]
    positions_mm: NDArray[numpy.float64]
    plane: Plane
    step: NDArray[numpy.float64]
    warnings: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Every image is one slice of the volume."""
        return numpy.array_equal(self.grid, numpy.arange(len(self.slices)))


def arrange(slices: Sequence[Slice], reading: Reading, policies: Policies) -> Stack:
    """The order, the places and the grid of one stack.

    The order is that of the position along the normal row x column of the orientation, ascending,
    so that the affine is right-handed; InstanceNumber and SliceLocation have no influence. The step
    from slice to slice comes from the positions (PS3.3 C.7.6.2.1.1); with a tilted gantry it is not
    parallel to the normal, and the affine is sheared.

    Raises InconsistentSeries naming the instances.
    """
    warnings: list[str] = []
    if policies.localizers == "drop":
        slices = without_localizers(slices, warnings)
    for item in slices:
        check_image(item.header)
    slices = without_older(place(slices), policies, warnings)
    plane = _plane(slices, warnings)
    normal = plane.normal
    positions = numpy.array([item.header.position for item in slices], numpy.float64)
    distances = positions @ normal
    order = [int(k) for k in numpy.argsort(distances, kind="stable")]
    order = _without_duplicates(slices, positions, distances, order, reading, policies, warnings)
    slices = [slices[k] for k in order]
    positions, distances = positions[order], distances[order]
    _check_indices(slices, warnings)
    if element_value(slices[0], _ANATOMICAL_ORIENTATION_TYPE) == "QUADRUPED":
        warnings.append(
            "AnatomicalOrientationType is QUADRUPED: the affine is in the axes of PS3.3 C.7.6.2.1.1 "
            "for quadrupeds, not in LPS"
        )
    count = len(slices)
    grid = numpy.arange(count, dtype=numpy.float64)
    if count == 1:
        step = _lone_step(slices[0].header, normal, warnings)
        return Stack(slices, grid, positions, plane, step, tuple(warnings))
    problem, drifts = irregular(slices, positions, distances)
    if not problem:
        step = (positions[-1] - positions[0]) / (count - 1)
    elif policies.gaps == "keep":
        step = numpy.full(3, numpy.nan)
        warnings.append(f"the slices are kept as they are: {problem}")
    elif drifts:
        raise InconsistentSeries(problem)
    elif policies.gaps == "error":
        raise InconsistentSeries(
            f"{problem}; an image is missing, or the input holds more than one stack: wait for the "
            "whole series in validate(), send the missing images, or choose gaps="
            '"fill", "resample" or "keep"'
        )
    else:
        grid = _regular(slices, positions, distances, policies, problem)
        step = (positions[-1] - positions[0]) / (len(grid) - 1)
        positions = positions[0] + numpy.arange(len(grid))[:, None] * step
        missing = int((grid != numpy.rint(numpy.nan_to_num(grid, nan=0.5))).sum())
        done = "are NaN" if policies.gaps == "fill" else "were interpolated"
        warnings.append(f"{missing} of {len(grid)} slices {done}: {problem}")
    _check_tilt(slices, positions, normal, policies)
    return Stack(slices, grid, positions, plane, step, tuple(warnings))


def _plane(slices: Sequence[Slice], warnings: list[str]) -> Plane:
    """What all images share, after it was found to be the same."""
    headers = [item.header for item in slices]
    first = headers[0]
    for item in slices:
        header = item.header
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
                f"{_other_spacing(item.dataset) if 'PixelSpacing' in missing else ''}"
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
                    f"it holds one series{_split_remedy(name)}"
                )
        if _kind(header) != _kind(first):
            raise InconsistentSeries(
                f"images {called(first)} and {called(header)} differ in ImageType "
                f"({first.image_type!r} and {header.image_type!r}); narrow the input with "
                "required_values for ImageType"
                f"{_localizer_remedy(first, header) or _split_remedy('ImageType')}"
            )

        if header.sop_class_uid == _SEGMENTATION:
            theirs, mine = (element_value(one, _SEGMENT) for one in (slices[0], item))
            if mine != theirs:
                raise InconsistentSeries(
                    f"images {called(first)} and {called(header)} are of different segments "
                    f"({theirs!r} and {mine!r}); use "
                    'series_grinder(split_by="ReferencedSegmentNumber", gaps="fill", '
                    'incomplete="keep"), which gives a volume for each'
                )

    orientations = numpy.array([header.orientation for header in headers], numpy.float64)
    spacings = numpy.array([header.pixel_spacing for header in headers], numpy.float64)
    _same_for_all(headers, orientations, _SAME_DIRECTION, "ImageOrientationPatient")
    _same_for_all(headers, spacings, 1e-4 * float(spacings[0].max()), "PixelSpacing")
    row_mm, column_mm = float(spacings[0][0]), float(spacings[0][1])
    if row_mm <= 0 or column_mm <= 0:
        raise InconsistentSeries(
            f"image {called(first)} has PixelSpacing {row_mm}\\{column_mm}, which has to be "
            "greater than zero"
        )

    orientation = orientations.mean(axis=0)
    along_row, along_column = orientation[:3], orientation[3:]
    lengths = float(numpy.linalg.norm(along_row)), float(numpy.linalg.norm(along_column))
    off = max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(along_row @ along_column)))
    if off > _UNIT:
        raise InconsistentSeries(
            f"image {called(first)} has an ImageOrientationPatient that is not two "
            f"perpendicular unit vectors (it is off by {off:.2g}, {1e-4:g} is accepted): "
            f"{orientations[0].tolist()}; correct it where it was written"
        )
    if off > _ROUNDED:
        warnings.append(f"ImageOrientationPatient {orientations[0].tolist()} was normalised")
    along_row = along_row / lengths[0]
    along_column = along_column / lengths[1]
    return Plane(along_row, along_column, row_mm, column_mm)


def without_localizers(slices: Sequence[Slice], warnings: list[str]) -> list[Slice]:
    """The images that are no localizers, with a warning that names the others (PS3.3 C.7.6.1.1.2)."""
    kept: list[Slice] = []
    left: list[Slice] = []
    for item in slices:
        kinds = item.header.image_type.upper().split("\\")
        (left if {"LOCALIZER", "SCOUT"}.intersection(kinds) else kept).append(item)
    if left:
        warnings.append(f"localizers left out: {_named([item.header for item in left])}")
    if not kept:
        raise InconsistentSeries(f"all images are localizers: {_named([i.header for i in left])}")
    return kept


def without_older(slices: Sequence[Slice], policies: Policies, warnings: list[str]) -> list[Slice]:
    """The images, none of which has the SOPInstanceUID and the frame of one at another place.

    Raises InconsistentSeries, unless the one that was given last counts.
    """
    latest = {image_key(item): item for item in slices}
    kept: list[Slice] = []
    left: list[str] = []
    for item in slices:
        header, last = item.header, latest[image_key(item)].header
        if _lies_with(header, last):
            kept.append(item)
        elif policies.duplicates == "last":
            left.append(f"{called(header)} at {header.position}")
        else:
            raise same_uid(header, f"lies at {header.position} and at {last.position}")
    if left:
        warnings.append(one_uid(left))
    return kept


def image_key(item: Slice) -> tuple[str, str | int, int]:
    """What no other image has: its UIDs and its frame."""
    header = item.header
    return header.series_instance_uid, header.sop_instance_uid or id(item), header.frame


def one_uid(left: Sequence[str]) -> str:
    """The warning that images with the UID of a later one were left out."""
    return (
        "of several images with one SOPInstanceUID the one given last was kept; left out: "
        f"{some(left)}"
    )


def same_uid(header: ImageHeader, problem: str) -> InconsistentSeries:
    """The error that two different images have one UID."""
    return InconsistentSeries(
        f"image {called(header)} {problem}: different images with one SOPInstanceUID; have them "
        'sent with UIDs of their own, or choose duplicates="last" where the later one is a correction'
    )


def _lies_with(one: ImageHeader, other: ImageHeader) -> bool:
    if one is other or (one.position, one.orientation) == (other.position, other.orientation):
        return True
    mine, theirs = (
        numpy.array([*(header.position or ()), *(header.orientation or ())])
        for header in (one, other)
    )
    return mine.shape == theirs.shape and bool((abs(mine - theirs) <= 2 * _POSITION_MM).all())


def _without_duplicates(
    slices: Sequence[Slice],
    positions: NDArray[numpy.float64],
    distances: NDArray[numpy.float64],
    order: list[int],
    reading: Reading,
    policies: Policies,
    warnings: list[str],
) -> list[int]:
    """The order with one image at each place, as the policy wants it."""
    groups = [group for group in same_places(distances, order) if len(group) > 1]
    if not groups:
        return order
    dropped: set[int] = set()
    told: list[str] = []
    for group in groups:
        given = sorted(group)
        kept = given[-1] if policies.duplicates == "last" else given[0]
        for other in given:
            if numpy.linalg.norm(positions[kept] - positions[other]) > SAME_PLACE_MM:
                raise _side_by_side(slices[kept], slices[other])
        if policies.duplicates == "error":
            raise _at_one_place(slices, groups, slices[given[0]], slices[given[1]])
        for other in given:
            if other == kept:
                continue
            one, two = slices[kept].header, slices[other].header
            again = (one.sop_instance_uid, one.frame) == (two.sop_instance_uid, two.frame)
            if policies.duplicates == "identical":
                off = numpy.linalg.norm(positions[kept] - positions[other])
                if off > 2 * _POSITION_MM or not _equal(slices[kept], slices[other], reading):
                    raise _at_one_place(slices, groups, slices[kept], slices[other])
            dropped.add(other)
            if not (again and policies.duplicates == "identical"):
                told.append(called(two))
    if told:
        why = "given last" if policies.duplicates == "last" else "with equal pixels"
        warnings.append(
            f"of several images at one place the one {why} was kept; left out: {some(told)}"
        )
    return [k for k in order if k not in dropped]


def _median(values: NDArray[numpy.float64]) -> float:
    # That of numpy imports numpy.ma at its first call, which takes longer than all else here.
    ordered = numpy.sort(values)
    return float(ordered[[(len(values) - 1) // 2, len(values) // 2]].mean())


def same_places(distances: NDArray[numpy.float64], order: Sequence[int]) -> list[list[int]]:
    """The images along the normal, those at the same distance together."""
    gaps = numpy.diff(distances[list(order)])
    apart = gaps[gaps > _POSITION_MM]
    usual = _median(apart) if apart.size else 0.0
    groups = [[order[0]]]
    for k, gap in zip(order[1:], gaps, strict=True):
        if gap < max(_POSITION_MM, min(_SPACING_RELATIVE * usual, SAME_PLACE_MM)):
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def _equal(one: Slice, other: Slice, reading: Reading) -> bool:
    """Whether two images have the same values, and the same stored ones."""
    if one.dataset is other.dataset and one.header.frame == other.header.frame:
        return True
    exact = replace(reading, dtype=numpy.dtype("f8"))
    pair = read_array([one, other], exact)[0]
    return numpy.array_equal(pair[0], pair[1], equal_nan=True)


def _at_one_place(
    slices: Sequence[Slice], groups: Sequence[list[int]], one: Slice, other: Slice
) -> InconsistentSeries:
    headers = [item.header for item in slices]
    pairs = [
        f"{called(headers[first])} and {called(headers[second])}"
        for group in groups
        for first, second in zip(sorted(group), sorted(group)[1:], strict=False)
    ]
    names = differing(one, other)
    if names:
        told = (
            f"{called(one.header)} and {called(other.header)} differ in {', '.join(names)}: several "
            "time points, echoes or reconstructions in one input? Narrow it with required_values, or "
            f'use series_grinder(split_by="{names[0]}"), which gives a volume for each'
        )
    else:
        told = (
            "no attribute tells them apart that tells time points, echoes or reconstructions apart; "
            'narrow the input with required_values, or choose duplicates="last"'
        )
    return InconsistentSeries(
        f"{len(pairs)} pairs of images lie at the same position: {some(pairs)}; {told}"
    )


def _side_by_side(one: Slice, other: Slice) -> InconsistentSeries:
    names = differing(one, other)
    remedy = f', or use series_grinder(split_by="{names[0]}")' if names else ""
    return InconsistentSeries(
        f"images {called(one.header)} and {called(other.header)} lie side by side in one plane, at "
        f"{one.header.position} and {other.header.position}: two stacks in one input? Narrow it with "
        f"required_values, so that it holds one{remedy}"
    )


def _lone_step(
    header: ImageHeader, normal: NDArray[numpy.float64], warnings: list[str]
) -> NDArray[numpy.float64]:
    """The extent of a single slice along the normal, NaN where nothing tells it."""
    for value, name in (
        (header.spacing_between_slices, "SpacingBetweenSlices"),
        (header.slice_thickness, "SliceThickness"),
    ):
        if value is not None and abs(value) > 0:
            warnings.append(f"one slice: its extent along the normal is its {name}")
            return normal * abs(value)
    warnings.append("one slice without SpacingBetweenSlices and SliceThickness: step is NaN")
    return numpy.full(3, numpy.nan)


def irregular(
    slices: Sequence[Slice],
    positions: NDArray[numpy.float64],
    distances: NDArray[numpy.float64],
) -> tuple[str, bool]:
    """What is not regular in a stack, empty where nothing is; and whether slices drift sideways."""
    headers = [item.header for item in slices]
    gaps = numpy.diff(distances)
    # Of two distances the lower: an image is missing more often than there is one too many.
    usual = float(numpy.sort(gaps)[(len(gaps) - 1) // 2])
    tolerance = max(_POSITION_MM, _SPACING_RELATIVE * usual)
    odd = numpy.flatnonzero(numpy.abs(gaps - usual) > tolerance)
    if odd.size:
        places = [_gap(headers, int(k), float(gaps[k]), usual) for k in odd]
        return f"slices are {usual:.4g} mm apart, but {some(places)}", False
    expected = numpy.linspace(positions[0], positions[-1], len(slices))
    problem = _drift(headers, positions, expected, usual)
    return problem, bool(problem)


def _drift(
    headers: Sequence[ImageHeader],
    positions: NDArray[numpy.float64],
    expected: NDArray[numpy.float64],
    usual: float,
) -> str:
    """Which slice is not where a straight stack has it; empty where all are."""
    drift = numpy.linalg.norm(positions - expected, axis=1)
    worst = int(numpy.argmax(drift))
    if drift[worst] <= max(_POSITION_MM, _SPACING_RELATIVE * usual) * 2:
        return ""
    return (
        f"image {called(headers[worst])} lies {drift[worst]:.4g} mm off the straight line through "
        'the stack; these images are not one regular volume (gaps="keep" gives each its own place)'
    )


def _regular(
    slices: Sequence[Slice],
    positions: NDArray[numpy.float64],
    distances: NDArray[numpy.float64],
    policies: Policies,
    problem: str,
) -> NDArray[numpy.float64]:
    """The grid of a stack with gaps, filled or resampled: see `Stack.grid`."""
    headers = [item.header for item in slices]
    gaps = numpy.diff(distances)
    smallest, extent = float(gaps.min()), float(distances[-1] - distances[0])
    if extent / smallest > MOST_FILLED * len(slices):
        raise InconsistentSeries(
            f"the volume would have over {MOST_FILLED} slices for each image that is there: {problem}"
        )
    if policies.gaps == "resample":
        where = (distances - distances[0]) / extent
        drift = _drift(
            headers,
            positions,
            positions[0] + where[:, None] * (positions[-1] - positions[0]),
            smallest,
        )
        if drift:
            raise InconsistentSeries(drift)
        wanted = numpy.linspace(0.0, 1.0, int(numpy.rint(extent / smallest)) + 1)
        grid = numpy.interp(wanted, where, numpy.arange(len(slices)))
        nearest = numpy.rint(grid)
        is_there = numpy.abs(wanted - where[nearest.astype(int)]) * extent <= _POSITION_MM
        return numpy.where(is_there, nearest, grid)
    for unit in (smallest, abs(headers[0].spacing_between_slices or 0.0)):
        multiples = numpy.rint(gaps / unit) if unit > _POSITION_MM else numpy.zeros_like(gaps)
        off = numpy.abs(gaps - multiples * unit)
        size = int(multiples.sum()) + 1
        fits = (off <= max(_POSITION_MM, _SPACING_RELATIVE * unit)).all() and multiples.all()
        if fits and size <= MOST_FILLED * len(slices):
            index = numpy.concatenate([[0], numpy.cumsum(multiples)]).astype(int)
            step = (positions[-1] - positions[0]) / (size - 1)
            drift = _drift(headers, positions, positions[0] + index[:, None] * step, unit)
            if drift:
                raise InconsistentSeries(drift)
            grid = numpy.full(size, numpy.nan)
            grid[index] = numpy.arange(len(slices))
            return grid
    raise InconsistentSeries(
        f"the distances are no whole multiples of the smallest, {smallest:.4g} mm, so there is no "
        f'place for missing slices (gaps="resample" needs none): {problem}'
    )


def _sideways(
    positions: NDArray[numpy.float64], normal: NDArray[numpy.float64]
) -> tuple[float, float]:
    """How far the last slice lies from straight above the first, and how high, in mm."""
    way = positions[-1] - positions[0]
    height = float(way @ normal)
    return float(numpy.linalg.norm(way - height * normal)), height


def is_tilted(positions: NDArray[numpy.float64], normal: NDArray[numpy.float64]) -> bool:
    sideways, height = _sideways(positions, normal)
    return sideways > max(_TILT * height, 2 * _POSITION_MM)


def _check_tilt(
    slices: Sequence[Slice],
    positions: NDArray[numpy.float64],
    normal: NDArray[numpy.float64],
    policies: Policies,
) -> None:
    if policies.tilt == "error" and is_tilted(positions, normal):
        degrees = numpy.degrees(numpy.arctan2(*_sideways(positions, normal)))
        raise InconsistentSeries(
            f"the slices from {called(slices[0].header)} to {called(slices[-1].header)} are tilted by "
            f"{degrees:.1f} degrees (gantry tilt), and the axes are to be perpendicular; "
            'tilt="resample" straightens them, tilt="keep" gives a sheared affine'
        )


def _check_indices(slices: Sequence[Slice], warnings: list[str]) -> None:
    """The order that the frames of an object claim, beside that of their positions."""
    first = slices[0].header
    if not first.has_functional_groups:
        return
    found = [
        item.header.position_index
        for item in slices
        if item.header.sop_instance_uid == first.sop_instance_uid
    ]
    indices = [index for index in found if index is not None]
    if len(indices) != len(slices):
        return
    steps = numpy.diff(indices)
    if (steps > 0).all() or (steps < 0).all():
        return
    usual = 1 if (steps > 0).sum() * 2 >= len(steps) else -1
    k = int(numpy.flatnonzero(steps * usual <= 0)[0])
    warnings.append(
        f"the positions of {called(slices[k].header)} and {called(slices[k + 1].header)} contradict "
        f"their dimension indices {indices[k]} and {indices[k + 1]}; the positions count"
    )


def _other_spacing(dataset: Any) -> str:
    """What else a dataset says of the distance of its pixels, which is not that in the patient."""
    names = ("ImagerPixelSpacing", "NominalScannedPixelSpacing")
    found = []
    for name in names:
        # It only serves for a message, so one that cannot be understood counts as absent.
        with suppress(*READ_ERRORS):
            if value := dataset.get(name):
                found.append(f"{name} {list(map(float, value))}")
    if not found:
        return ""
    return (
        f"; its {' and '.join(found)} is at the detector or on the film, and is not used for the "
        "patient: where it is right, set PixelSpacing of the datasets to it, divided by "
        "EstimatedRadiographicMagnificationFactor"
    )


def _gap(headers: Sequence[ImageHeader], k: int, gap: float, usual: float) -> str:
    missing = round(min(gap / usual, 1e9)) - 1
    told = f" ({missing} missing)" if missing > 0 and abs(gap / usual - missing - 1) < 0.1 else ""
    before, after = headers[k], headers[k + 1]
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
            f"Narrow the input with required_values{_localizer_remedy(headers[0], headers[worst])}"
        )


def _split_remedy(name: str) -> str:
    if name not in ("SeriesInstanceUID", "StackID", "ImageType", "Rows", "Columns"):
        return ""
    return f', or use series_grinder(split_by="{name}")'


def _localizer_remedy(*headers: ImageHeader) -> str:
    is_one = any("LOCALIZER" in header.image_type for header in headers)
    return ', or leave localizers out with localizers="drop"' if is_one else ""


def _kind(header: ImageHeader) -> tuple[str, ...]:
    """Values 1 to 3 of Image Type: original or derived, primary or secondary, what it shows."""
    return tuple(part.strip() for part in header.image_type.split("\\")[:3])


def _named(headers: Sequence[ImageHeader]) -> str:
    return some([called(header) for header in headers])


def some(parts: Sequence[str], most: int = 5) -> str:
    rest = len(parts) - most
    return "; ".join(parts[:most]) + (f"; and {rest} more" if rest > 0 else "")

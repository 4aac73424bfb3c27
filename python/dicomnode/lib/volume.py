"""A volume: an array, where each voxel is in the patient, and which image each slice came from.

Solves the question that every reader of a series has to answer: which images belong together, in
which order, and how far apart. Strict: what does not form one regular stack raises
`InconsistentSeries` with the instances and the remedy, because a volume that is silently wrong is
worse than none. `Policies` say where a user wants something else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy
from numpy.typing import NDArray

from dicomnode.errors import InconsistentSeries, IncorrectlyConfigured
from dicomnode.lib.images import (
    PALETTE,
    Reading,
    Slice,
    called,
    check_image,
    read_array,
    read_padding,
)
from dicomnode.lib.layouts import check_concatenations, place
from dicomnode.lib.regrid import on_grid, shifts, straightened
from dicomnode.lib.splits import counts, in_some, split, value_of
from dicomnode.lib.stack import (
    SAME_PLACE_MM,
    Stack,
    arrange,
    image_key,
    one_uid,
    same_places,
    same_uid,
    some,
    without_localizers,
    without_older,
)
from dicomnode.lib.stack import Duplicates as Duplicates
from dicomnode.lib.stack import Gaps as Gaps
from dicomnode.lib.stack import Localizers as Localizers
from dicomnode.lib.stack import Policies as Policies
from dicomnode.lib.stack import Tilt as Tilt

#: What happens with volumes of one series that have different numbers of places.
Incomplete: TypeAlias = Literal["error", "drop", "keep"]

# What tells stacks apart that may lie anywhere, and not the times, echoes and so on of one stack.
_OWN_PLACES = frozenset(
    ("StackID", "SeriesInstanceUID", "ReferencedSegmentNumber", "DetectorVector", "Rows", "Columns")
)


@dataclass(frozen=True, eq=False)
class Volume:
    """A regular stack of slices.

    `array` has the axes (slice, row, column), is C-contiguous and yours to write to. `affine` is
    4x4 float64 and maps (column, row, slice, 1) to patient coordinates in millimetres, LPS, at the
    voxel's centre (PS3.3 C.7.6.2.1.1). `spacing_mm` is (slice, row, column): the distance between
    neighbours along each axis of the array; NaN for the slice axis where a lone slice does not
    tell. `sop_instance_uids[k]` is the image that `array[k]` came from, and
    `frame_numbers[k]` the frame in it (of a mosaic, the tile), from 1; "" and 0 for a slice that no
    image gave. `positions_mm[k]` is where the first voxel of `array[k]` is, LPS, as the image says.
    `warnings` tells what was tolerated or left out.

    `units` is what the values are measured in: HU, BQML, GY, a UCUM code; empty where the images do not
    say, and for stored values. `padding` is True where a stored value is padding (PS3.3
    C.7.5.1.1.2), with the axes of `array`; None unless it was asked for.
    """

    array: NDArray[Any]
    affine: NDArray[numpy.float64]
    spacing_mm: tuple[float, float, float]
    sop_instance_uids: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    frame_numbers: tuple[int, ...] = ()
    positions_mm: NDArray[numpy.float64] = field(default_factory=lambda: numpy.empty((0, 3)))
    units: str = ""
    padding: NDArray[numpy.bool_] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape, (slice, row, column)."""
        return self.array.shape


def read_volume(
    slices: Sequence[Slice],
    reading: Reading,
    policies: Policies | None = None,
    *,
    notes: Sequence[str] = (),
    out: NDArray[Any] | None = None,
    padding: bool = False,
) -> Volume:
    """One volume of all images, in the order of their position along the slice normal.

    `notes` go before the volume's own warnings.

    Raises InconsistentSeries where the images are not one regular stack and no policy allows it.
    """
    policies = policies or Policies()
    if not slices:
        raise InconsistentSeries(f"there is no image to make a volume of{_listed(notes)}")
    check_concatenations(slices)
    stack = arrange(slices, reading, policies)
    return read_stack(stack, reading, policies, notes=notes, out=out, padding=padding)


def read_stack(
    stack: Stack,
    reading: Reading,
    policies: Policies,
    *,
    notes: Sequence[str] = (),
    out: NDArray[Any] | None = None,
    padding: bool = False,
) -> Volume:
    """The volume of images that were arranged; `padding` needs policies that add no slices."""
    plane, step, positions = stack.plane, stack.step, stack.positions_mm
    moves = shifts(stack) if policies.tilt == "resample" else None
    as_read = stack.is_plain and moves is None
    is_mixed = moves is not None or (policies.gaps == "resample" and not stack.is_plain)
    header = stack.slices[0].header
    if is_mixed and reading.color != "palette" and header.photometric_interpretation == PALETTE:
        raise IncorrectlyConfigured(
            f"image {called(header)} holds indices of a palette, between which {policies.needs_nan} "
            'finds no values; choose color="palette", which gives RGB'
        )
    units = "" if reading.values == "stored" else _units(stack.slices)
    array, told = read_array(stack.slices, reading, out=out if as_read else None)
    if not as_read:
        if array.dtype.kind != "f":
            raise IncorrectlyConfigured(
                f"{policies.needs_nan} needs a float dtype, because it puts NaN or values between "
                f"two images into the array; not {array.dtype}"
            )
        if not stack.is_plain:
            array = on_grid(array, stack.grid)
        origin = positions[0]
        if moves is not None:
            array, origin = straightened(array, moves, plane, positions[0])
            along = (positions - positions[0]) @ plane.normal
            positions = origin + along[:, None] * plane.normal
            step = plane.normal * float(step @ plane.normal)
        if out is not None:
            if out.shape != array.shape:
                raise IncorrectlyConfigured(
                    f"out has the shape {out.shape}, the volume has {array.shape}"
                )
            numpy.copyto(out, array)
            array = out
    whole = [int(k) if k == int(k) else None for k in numpy.nan_to_num(stack.grid, nan=0.5)]
    sources = [None if k is None else stack.slices[k].header for k in whole]
    return Volume(
        array=array,
        affine=plane.affine(positions[0], step),
        spacing_mm=(float(numpy.linalg.norm(step)), plane.row_mm, plane.column_mm),
        sop_instance_uids=tuple("" if one is None else one.sop_instance_uid for one in sources),
        warnings=(*notes, *stack.warnings, *told),
        frame_numbers=tuple(0 if one is None else one.frame + 1 for one in sources),
        positions_mm=positions,
        units=units,
        padding=read_padding(stack.slices) if padding else None,
    )


def _units(slices: Sequence[Slice]) -> str:
    first = slices[0]
    for item in slices:
        if item.units != first.units:
            raise InconsistentSeries(
                f"images {called(first.header)} and {called(item.header)} differ in the units of "
                f"their values ({first.units!r} and {item.units!r}: RescaleType, Units or DoseUnits); "
                "narrow the input with required_values"
            )
    return first.units


def read_volumes(
    slices: Sequence[Slice],
    keywords: tuple[str, ...] | None,
    reading: Reading,
    policies: Policies,
    incomplete: Incomplete = "error",
    notes: Sequence[str] = (),
) -> dict[Any, Volume]:
    """A volume for each value, or tuple of values, of the attributes `keywords`, in their order.

    With None the attribute is looked for; where all images have places of their own, the one volume
    has the key None.

    Raises InconsistentSeries.
    """
    warnings = list(notes)
    if not slices:
        raise InconsistentSeries(f"there is no image to make a volume of{_listed(notes)}")
    if policies.localizers == "drop":
        slices = without_localizers(slices, warnings)
    check_concatenations(slices)
    for item in slices:
        check_image(item.header)
    slices = without_older(place(slices), policies, warnings)
    if keywords is None:
        try:
            keyword = _separating(slices)
        except InconsistentSeries as error:
            # Images that are there twice need no attribute; whatever else they are is told as this.
            try:
                return {None: read_volume(slices, reading, policies, notes=warnings)}
            except InconsistentSeries:
                raise error from None
        if keyword is None:
            return {None: read_volume(slices, reading, policies, notes=warnings)}
        keywords = (keyword,)
        warnings.append(f"split by {keyword}, which separates images at the same position")
    told = " and ".join(keywords)
    groups = _each_in_one(split(slices, keywords), slices, told, policies, warnings)
    if incomplete != "keep":
        groups = _of_same_places(groups, keywords, incomplete, warnings)
    stacks = {}
    for key, group in groups.items():
        try:
            stacks[key] = arrange(group, reading, policies)
        except InconsistentSeries as error:
            raise InconsistentSeries(f"{told} {key!r}: {error}") from error
    return {
        key: read_stack(stack, reading, policies, notes=warnings) for key, stack in stacks.items()
    }


def _each_in_one(
    groups: dict[Any, list[Slice]],
    slices: Sequence[Slice],
    told: str,
    policies: Policies,
    warnings: list[str],
) -> dict[Any, list[Slice]]:
    """The groups, none of which has an image that is in another, too.

    Raises InconsistentSeries, unless the one that was given last counts.
    """
    latest = {image_key(item): item for item in slices}
    key_of = {id(item): key for key, group in groups.items() for item in group}
    left: list[str] = []
    kept: dict[Any, list[Slice]] = {}
    for key, group in groups.items():
        for item in group:
            last = key_of[id(latest[image_key(item)])]
            if last == key:
                kept.setdefault(key, []).append(item)
            elif policies.duplicates == "last":
                left.append(f"{called(item.header)} with {key!r}")
            else:
                raise same_uid(item.header, f"has the {told} {key!r} and {last!r}")
    if left:
        warnings.append(one_uid(left))
    return kept


def _of_same_places(
    groups: dict[Any, list[Slice]],
    keywords: tuple[str, ...],
    incomplete: Incomplete,
    warnings: list[str],
) -> dict[Any, list[Slice]]:
    """The groups that have as many places as most, and the same ones where planes are parallel.

    Raises InconsistentSeries where there are others that are not to be dropped.
    """
    told = " and ".join(keywords)
    is_one_scan = not _OWN_PLACES.intersection(keywords)
    places = {key: _places(group) for key, group in groups.items()}
    alike: list[list[Any]] = []
    for key, mine in places.items():
        for keys in alike:
            if not _contradict(mine, places[keys[0]], is_one_scan):
                keys.append(key)
                break
        else:
            alike.append([key])
    if len(alike) == 1:
        return groups
    sizes = {key: len(mine) for key, mine in places.items()}
    alike.sort(key=lambda keys: (len(keys), sizes[keys[0]]), reverse=True)
    usual, second = alike[0], alike[1]
    is_open = (len(usual), sizes[usual[0]]) == (len(second), sizes[second[0]])
    if incomplete == "error" or is_open:
        if len(set(sizes.values())) > 1:
            problem = "have different numbers of slices"
            each = [f"{key!r}: {size}" for key, size in sizes.items()]
        else:
            problem = "lie at different places along the normal"
            each = [
                f"{key!r}: {mine[0][-1]:.6g} to {mine[-1][-1]:.6g} mm"
                for key, mine in places.items()
            ]
        remedy = '"keep"' if is_open else '"drop" or "keep"'
        raise InconsistentSeries(
            f"the volumes by {told} {problem} ({some(each, 20)}): an examination "
            "that was stopped, or images that are missing? Wait for the whole series in "
            f"validate(), choose incomplete={remedy}, or split by another attribute"
        )
    left = [f"{key!r} ({size} slices)" for key, size in sizes.items() if key not in usual]
    warnings.append(
        f"volumes with another number of slices than {sizes[usual[0]]}, or at other places, left out: "
        f"{some(left)}"
    )
    return {key: group for key, group in groups.items() if key in usual}


def _contradict(
    one: Sequence[tuple[Any, ...]], other: Sequence[tuple[Any, ...]], is_one_scan: bool
) -> bool:
    """Whether two volumes have other numbers of places, or other places in the same planes."""
    if len(one) != len(other):
        return True
    pairs = list(zip(one, other, strict=True))
    is_parallel = is_one_scan and all(mine[1:-1] == theirs[1:-1] for mine, theirs in pairs)
    return is_parallel and any(abs(mine[-1] - theirs[-1]) > SAME_PLACE_MM for mine, theirs in pairs)


def _places(slices: Sequence[Slice]) -> list[tuple[Any, ...]]:
    """The places that images lie at: orientation and the position of the first image of each."""
    by_plane: dict[Any, list[tuple[float, ...]]] = {}
    for item in slices:
        header = item.header
        if header.position is None or header.orientation is None:
            return [(k,) for k in range(len(slices))]
        plane = tuple(round(value, 3) + 0.0 for value in header.orientation)
        by_plane.setdefault((header.series_instance_uid, plane), []).append(header.position)
    places: list[tuple[Any, ...]] = []
    for (series, plane), positions in by_plane.items():
        normal = numpy.cross(plane[:3], plane[3:])
        distances = numpy.array(positions) @ normal
        order = [int(k) for k in numpy.argsort(distances, kind="stable")]
        groups = same_places(distances, order)
        places += [(series, plane, float(distances[group[0]])) for group in groups]
    return places


def _separating(slices: Sequence[Slice]) -> str | None:
    """The attribute that splits images into stacks of the same places; None where none is needed.

    Attributes that split them in the same way count as one: the first of `CANDIDATES`.

    Raises InconsistentSeries where there is no such attribute, or several.
    """
    unique = list({image_key(item): item for item in slices}.values())
    if len(_places(unique)) == len(unique):
        return None
    values = counts(unique)
    found: dict[frozenset[frozenset[int]], str] = {}
    for keyword in values:
        groups = split(unique, (keyword,))
        first, *others = (_places(group) for group in groups.values())
        apart = sum(len(group) for group in groups.values()) == len(first) * len(groups)
        if apart and all(_same_places(first, other) for other in others):
            partition = frozenset(frozenset(map(id, group)) for group in groups.values())
            found.setdefault(partition, keyword)
    if len(found) == 1:
        return next(iter(found.values()))
    told = ", ".join(f"{keyword} ({count} values)" for keyword, count in values.items())
    if found:
        problem = f"several attributes would separate them: {', '.join(found.values())}"
    else:
        problem = "no single attribute separates them into stacks of the same places"
    raise InconsistentSeries(
        f"{len(unique)} images from {called(unique[0].header)} on lie at {len(_places(unique))} places, "
        f"and {problem}; choose split_by, a keyword or a tuple of keywords: those that differ are "
        f"{told or 'none'}{_partial(unique)}"
    )


def _partial(slices: Sequence[Slice]) -> str:
    """What an error tells of attributes that only some images have."""
    found = []
    for keyword in in_some(slices):
        lacking = [called(item.header) for item in slices if value_of(item, keyword) is None]
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        found.append(f"{keyword} (not in {lacking[0]}{more})")
    return f"; only some images have {', '.join(found)}" if found else ""


def _same_places(one: Sequence[tuple[Any, ...]], other: Sequence[tuple[Any, ...]]) -> bool:
    return len(one) == len(other) and all(
        mine[:-1] == theirs[:-1] and abs(mine[-1] - theirs[-1]) <= SAME_PLACE_MM
        for mine, theirs in zip(one, other, strict=True)
    )


def _listed(notes: Sequence[str]) -> str:
    return f": {some(notes)}" if notes else ""

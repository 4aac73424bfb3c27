"""Gaps: which slices a series lacks, as far as the positions of the others can tell.

Solves that a node can see before it grinds that images are still on their way. The first and the last
slice of a stack cannot be missed in this way, and neither can every second one.
"""

from collections.abc import Iterable, Sequence

import numpy
from pydicom.dataset import Dataset

from dicomnode.lib.images import Slice, called, read_slices
from dicomnode.lib.layouts import place
from dicomnode.lib.stack import irregular, same_places

# Cosines that differ by less are the same orientation.
_COSINE_DIGITS = 3


def find_gap(datasets: Iterable[Dataset]) -> str:
    """What keeps the images from being regular stacks; empty where nothing does.

    The images of one series, orientation and size form a stack. Its places have to be equally far
    apart, and each has to have as many images as the others: several time points, echoes or phases
    are complete where the last is. Objects that are no images are not looked at.

    Raises InvalidDicom for a header that cannot be understood.
    """
    slices, _ = read_slices(datasets)
    stacks: dict[tuple[object, ...], list[Slice]] = {}
    for item in place(slices):
        header = item.header
        if header.position is None or header.orientation is None:
            return f"image {called(header)} has no position in the patient"
        key = (
            header.series_instance_uid,
            header.stack_id,
            header.rows,
            header.columns,
            # A zero without a sign.
            *(round(value, _COSINE_DIGITS) + 0.0 for value in header.orientation),
        )
        stacks.setdefault(key, []).append(item)
    for stack in stacks.values():
        if found := _gap_in(stack):
            return found
    return ""


def _gap_in(slices: Sequence[Slice]) -> str:
    orientation = numpy.array(slices[0].header.orientation, numpy.float64)
    positions = numpy.array([item.header.position for item in slices], numpy.float64)
    distances = positions @ numpy.cross(orientation[:3], orientation[3:])
    order = [int(k) for k in numpy.argsort(distances, kind="stable")]
    groups = same_places(distances, order)
    most = max(groups, key=len)
    for group in groups:
        if len(group) < len(most):
            return f"{len(group)} of {len(most)} images lie where {called(slices[group[0]].header)} does"
    if len(groups) < 3:
        return ""
    firsts = [group[0] for group in groups]
    return irregular([slices[k] for k in firsts], positions[firsts], distances[firsts])[0]

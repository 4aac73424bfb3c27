"""Layouts: objects that tell in a way of their own where their slices lie.

Solves the three that a scanner's archive is full of: one enhanced object that was cut into several
(concatenations), reconstructed nuclear medicine, and the mosaics of Siemens, which show all slices of
a time point as one picture.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from dicomnode.errors import DicomnodeError, InconsistentSeries, InvalidDataset
from dicomnode.lib.dicom import READ_ERRORS
from dicomnode.lib.images import ImageHeader, Slice, called
from dicomnode.lib.splits import element_value

_NUCLEAR_MEDICINE = ("1.2.840.10008.5.1.4.1.1.20", "1.2.840.10008.5.1.4.1.1.5")
_CSA_CREATOR = "SIEMENS CSA HEADER"
_MOST_CSA_TAGS, _MOST_CSA_ITEMS = 1024, 4096


def place(slices: Sequence[Slice]) -> list[Slice]:
    """The slices with their places in the patient: mosaics are cut, vectors are followed.

    Raises InconsistentSeries for a mosaic without its CSA header and for a vector or an attribute
    that is missing, InvalidDataset for one that cannot be understood.
    """
    placed: list[Slice] = []
    for item in slices:
        header = item.header
        try:
            if item.whole is not None:
                placed.append(item)
            elif "MOSAIC" in header.image_type:
                placed += _tiles(item)
            elif header.sop_class_uid in _NUCLEAR_MEDICINE and header.position is None:
                placed.append(_nuclear(item))
            else:
                placed.append(item)
        except (*READ_ERRORS, AttributeError, KeyError, IndexError) as error:
            if isinstance(error, DicomnodeError):
                raise
            raise InvalidDataset(
                f"image {called(header)} has a layout that cannot be understood (CSA header, or "
                f"DetectorInformationSequence): {type(error).__name__}"
            ) from error
    return placed


def check_concatenations(slices: Sequence[Slice]) -> None:
    """All parts of each concatenation among all images of an input are there.

    Raises InconsistentSeries that names what is missing.
    """
    parts: dict[str, dict[str, Slice]] = {}
    for item in slices:
        header = item.header
        if header.has_functional_groups and header.frame == 0:
            concatenation = element_value(item, 0x00209161)
            if concatenation:
                parts.setdefault(concatenation, {})[header.sop_instance_uid] = item
    for one in parts.values():
        _check_parts(list(one.values()))


def _check_parts(parts: Sequence[Slice]) -> None:
    """All parts of a concatenation are there, and their frames follow on each other (PS3.3 C.7.6.16.1)."""
    numbers = {element_value(part, 0x00209162): part for part in parts}
    totals = {element_value(part, 0x00209163) for part in parts} - {None}
    uids = ", ".join(part.header.sop_instance_uid for part in parts)
    if None in numbers or len(numbers) != len(parts):
        raise InconsistentSeries(
            f"images {uids} are parts of one concatenation, without an InConcatenationNumber of their "
            "own each"
        )
    count = max(totals, default=max(numbers))
    missing = [str(number) for number in range(1, count + 1) if number not in numbers]
    if missing:
        raise InconsistentSeries(
            f"images {uids} are {len(parts)} of {count} parts of a concatenation; InConcatenationNumber "
            f"{', '.join(missing)} is missing: wait for the whole series in validate(), or send it"
        )
    frames = 0
    for number in sorted(numbers):
        part = numbers[number]
        offset = element_value(part, 0x00209228)
        if offset is not None and offset != frames:
            raise InconsistentSeries(
                f"image {part.header.sop_instance_uid} has the ConcatenationFrameOffsetNumber {offset}, "
                f"but the parts before it have {frames} frames"
            )
        frames += part.header.number_of_frames


def _nuclear(item: Slice) -> Slice:
    """A frame of a reconstruction, placed by its detector and slice vector (PS3.3 C.8.4.15)."""
    header, dataset = item.header, item.dataset
    if "TOMO" not in header.image_type or "RECON" not in header.image_type:
        # A planar image or a projection has no place as a slice: `plan` tells what is missing.
        return item
    detectors = dataset.get("DetectorInformationSequence") or []
    number = int(_of_frame(dataset.get("DetectorVector"), header) or 1)
    detector = detectors[number - 1] if 0 < number <= len(detectors) else None
    if detector is None:
        raise InconsistentSeries(
            f"image {called(header)} has no item {number} of DetectorInformationSequence, which tells "
            "where it lies"
        )
    position, orientation = detector.get("ImagePositionPatient"), header.orientation
    orientation = detector.get("ImageOrientationPatient") or orientation
    slice_number = _of_frame(dataset.get("SliceVector"), header)
    if not position or not orientation:
        return item
    if slice_number is None and header.number_of_frames > 1:
        raise InconsistentSeries(
            f"image {called(header)} has no SliceVector with a value for each of its "
            f"{header.number_of_frames} frames, which tells where they lie"
        )
    first = numpy.array([float(value) for value in position])
    axes = numpy.array([float(value) for value in orientation])
    if header.number_of_frames > 1:
        if not header.spacing_between_slices:
            raise InconsistentSeries(
                f"image {called(header)} has no SpacingBetweenSlices, so its slices have no place; "
                "set it in the dataset, negative where the slices go against the normal"
            )
        # Its sign tells on which side of the first slice the others lie.
        step = numpy.cross(axes[:3], axes[3:]) * header.spacing_between_slices
        first = first + step * (int(slice_number or 1) - 1)
    return item.moved(position=tuple(first.tolist()), orientation=tuple(axes.tolist()))


def _of_frame(vector: Any, header: ImageHeader) -> Any:
    """The value of a frame in a vector with one for each; a single one counts for a single frame."""
    values = [] if vector is None or vector == "" else vector
    values = list(values) if isinstance(values, Sequence) else [values]
    return values[header.frame] if len(values) == header.number_of_frames else None


def _tiles(item: Slice) -> list[Slice]:
    """The slices that a mosaic shows, in the order of their tiles.

    Position and SpacingBetweenSlices are those of a single picture of that size around the same
    centre; the CSA header tells how many tiles there are and in which direction they are stacked.
    """
    header = item.header
    fields = _csa(item)
    try:
        count = int(fields["NumberOfImagesInMosaic"][0])
        normal = numpy.array([float(text) for text in fields["SliceNormalVector"][:3]])
    except (KeyError, IndexError, ValueError) as error:
        raise InconsistentSeries(
            f"image {called(header)} is a Siemens mosaic without a CSA header (0029,1010) that tells "
            "NumberOfImagesInMosaic and SliceNormalVector, so its slices have no place; send the "
            "series with its private elements, or export it without mosaics"
        ) from error
    across = math.ceil(math.sqrt(max(count, 1)))
    rows, columns = header.rows // across, header.columns // across
    if count < 1 or (rows * across, columns * across) != (header.rows, header.columns):
        raise InconsistentSeries(
            f"image {called(header)} is a Siemens mosaic of {count} slices in {header.rows} x {header.columns} "
            "Rows x Columns, which do not divide into equal tiles"
        )
    if header.position is None or header.orientation is None or header.pixel_spacing is None:
        return [item]
    axes = numpy.array(header.orientation)
    along_row, along_column = axes[:3], axes[3:]
    across_planes = abs(float(numpy.cross(along_row, along_column) @ normal))
    if abs(across_planes - 1) > 1e-2:
        raise InconsistentSeries(
            f"image {called(header)} has a SliceNormalVector {normal.tolist()} that is not "
            f"perpendicular to its ImageOrientationPatient {axes.tolist()}"
        )
    if count > 1 and not header.spacing_between_slices:
        raise InconsistentSeries(
            f"image {called(header)} is a mosaic without SpacingBetweenSlices, so its slices have no "
            "place; set it in the dataset"
        )
    row_mm, column_mm = header.pixel_spacing
    corner = (
        numpy.array(header.position)
        + along_column * row_mm * (header.rows - rows) / 2
        + along_row * column_mm * (header.columns - columns) / 2
    )
    step: NDArray[numpy.float64] = normal * (header.spacing_between_slices or 0.0)
    return [
        item.moved(
            (k // across * rows, k % across * columns),
            rows=rows,
            columns=columns,
            position=tuple((corner + k * step).tolist()),
            frame=k,
        )
        for k in range(count)
    ]


def _csa(item: Slice) -> dict[str, list[str]]:
    """The fields of the CSA image header; empty where it is absent or damaged."""
    try:
        value = item.dataset.private_block(0x0029, _CSA_CREATOR)[0x10].value
    except KeyError:
        return {}
    try:
        return csa_fields(bytes(value))
    except (struct.error, ValueError, TypeError):
        return {}


def csa_fields(data: bytes) -> dict[str, list[str]]:
    """Name and texts of each field of a Siemens CSA header, in its older or its newer form.

    Both are a count of fields, and for each a name of 64 bytes, four numbers and a VR, and items of
    a length of four numbers and a text, padded to four bytes. In the older form the length counts the
    items of the first field, too.

    Raises ValueError or struct.error for what does not hold together; never reads beyond the end.
    """
    is_newer = data[:4] == b"SV10"
    at = 8 if is_newer else 0
    (count,) = struct.unpack_from("<I", data, at)
    at += 8
    if not 0 < count <= _MOST_CSA_TAGS:
        raise ValueError(f"a CSA header of {count} fields is none")
    found: dict[str, list[str]] = {}
    first_items = None
    for _ in range(count):
        name, multiplicity, _vr, _, items, _ = struct.unpack_from("<64si4siii", data, at)
        at += 84
        if not 0 <= items <= _MOST_CSA_ITEMS:
            raise ValueError(f"a CSA field of {items} items is none")
        first_items = items if first_items is None else first_items
        texts = []
        for number in range(items):
            lengths = struct.unpack_from("<4i", data, at)
            at += 16
            length = lengths[1] if is_newer else lengths[0] - first_items
            if length < 0 or at + length > len(data):
                if not is_newer:
                    break
                raise ValueError("a CSA item goes beyond the end")
            if number < (multiplicity or items):
                text = data[at : at + length].split(b"\0", 1)[0]
                texts.append(text.decode("latin-1").strip())
            at += length + -length % 4
        found[name.split(b"\0", 1)[0].decode("latin-1")] = texts
    return found

"""Splits: which images of an input belong to which volume.

Solves that one series often holds several volumes (time points, echoes, b-values, segments), and that
DICOM tells them apart in many places: at the top level, in functional groups, and in private elements.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from typing import Any, TypeAlias

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.valuerep import DA, DT, TM, PersonName

from dicomnode import _core
from dicomnode.errors import InconsistentSeries, IncorrectlyConfigured, InvalidDicom
from dicomnode.lib.dicom import READ_ERRORS, raw_element, tag_name
from dicomnode.lib.images import Slice, called, read_slices

#: One attribute, or several, whose values tell volumes apart.
SplitBy: TypeAlias = str | tuple[str, ...]

# Sequences and bytes have no value to compare, and a name has no place in a message.
_NOT_SPLIT_BY = ("SQ", "OB", "OW", "OB or OW", "OF", "OD", "OL", "OV", "UN", "PN")
_CHARACTER_SET = 0x00080005
_B_VALUE, _DIRECTION, _DIRECTIONALITY = 0x00189087, 0x00189089, 0x00189075
_DATE_TIME, _FRAME_DATE_TIME, _TIME_ZONE = 0x0008002A, 0x00189074, 0x00080201
_DATE, _TIME = 0x00080022, 0x00080032


@dataclass(frozen=True)
class _Private:
    """A private element that says what a public one should: where it is, and whose it is."""

    tag: int
    vr: str
    creator: str

    @property
    def creator_tag(self) -> int:
        return self.tag & 0xFFFF0000 | self.tag >> 8 & 0xFF


_PHILIPS = "Philips MR Imaging DD 001"
_PRIVATE_B_VALUES = (
    _Private(0x0019100C, "IS", "SIEMENS MR HEADER"),
    _Private(0x00431039, "IS", "GEMS_PARM_01"),
    _Private(0x20011003, "FL", "Philips Imaging DD 001"),
)
_SIEMENS_DIRECTION = _Private(0x0019100E, "FD", "SIEMENS MR HEADER")
# Right to left, anterior to posterior, feet to head.
_PHILIPS_DIRECTION = tuple(_Private(0x200510B0 + k, "FL", _PHILIPS) for k in range(3))

# One value for each frame of an NM image (PS3.3 C.8.4.8).
_FRAME_VECTORS = frozenset(
    (0x00540010, 0x00540020, 0x00540030, 0x00540050, 0x00540060, 0x00540070, 0x00540080, 0x00540090,
     0x00540100)
)  # fmt: skip

#: What is looked at, in this order, where `split_by` is None, and where images lie at one place.
CANDIDATES = (
    "TemporalPositionIdentifier", "TemporalPositionIndex", "FrameReferenceTime",
    "NominalCardiacTriggerDelayTime", "TriggerTime", "EchoTime", "EffectiveEchoTime",
    "EchoNumbers", "DiffusionBValue", "DiffusionGradientOrientation", "InversionTime", "FlipAngle",
    "ImageType", "ComplexImageComponent", "KVP", "ConvolutionKernel", "ReceiveCoilName",
    "ReferencedSegmentNumber", "StackID", "EnergyWindowVector", "DetectorVector", "TimeSlotVector", "RRIntervalVector",
    "PhaseVector", "AcquisitionNumber", "AcquisitionDateTime", "SeriesInstanceUID",
)  # fmt: skip


def tags_of(keywords: Iterable[str]) -> list[int]:
    """The tags that the values of keywords are read from.

    Raises IncorrectlyConfigured for what is no keyword of an attribute.
    """
    tags = {_CHARACTER_SET}
    for keyword in keywords:
        tag = tag_for_keyword(keyword) if isinstance(keyword, str) else None
        if tag is None or dictionary_VR(tag) in _NOT_SPLIT_BY:
            raise IncorrectlyConfigured(
                f"split_by takes keywords of attributes that have a value, such as EchoTime, not "
                f"{keyword!r}"
            )
        tags.add(tag)
        if keyword == "DiffusionBValue":
            tags.update(tag for one in _PRIVATE_B_VALUES for tag in (one.tag, one.creator_tag))
        elif keyword == "DiffusionGradientOrientation":
            private = (_SIEMENS_DIRECTION, *_PHILIPS_DIRECTION)
            tags.update(tag for one in private for tag in (one.tag, one.creator_tag))
            tags.update((_DIRECTIONALITY, *tags_of(["DiffusionBValue"])))
        elif keyword == "AcquisitionDateTime":
            tags.update((_FRAME_DATE_TIME, _TIME_ZONE, _DATE, _TIME))
    return sorted(tags)


def keywords_of(split_by: object) -> tuple[str, ...]:
    """The keywords of a `split_by`. Raises IncorrectlyConfigured for what is none."""
    keywords = (split_by,) if isinstance(split_by, str) else split_by
    if not isinstance(keywords, tuple) or not keywords:
        raise IncorrectlyConfigured(
            f"split_by is a keyword, a tuple of keywords or None, not {split_by!r}"
        )
    tags_of(keywords)
    return keywords


def value_of(item: Slice, keyword: str) -> Any:
    """The value of an attribute for one image, as a plain Python value; None where it has none.

    Numbers are float or int, times are those of `datetime`, several values a tuple. Of a frame, what
    its functional groups say counts more than what the dataset says. The slice has to come from
    `read_slices` with the tags of `tags_of([keyword])`.

    Raises InvalidDicom for a value that cannot be understood.
    """
    if keyword == "DiffusionBValue":
        return _b_value(item)
    if keyword == "DiffusionGradientOrientation":
        return _direction(item)
    if keyword == "AcquisitionDateTime":
        return _date_time(item)
    tag = tag_for_keyword(keyword)
    value = element_value(item, tag or 0)
    if keyword == "ImageType" and item.header.has_functional_groups:
        # Of a frame, its Frame Type.
        value = tuple(item.header.image_type.split("\\"))
    header = item.whole or item.header
    if tag in _FRAME_VECTORS and isinstance(value, tuple) and len(value) == header.number_of_frames:
        value = value[header.frame]
    return value


def element_value(item: Slice, tag: int, vr: str = "") -> Any:
    """The value of one element as a plain Python value; `vr` counts where the encoding has none."""
    header = item.whole or item.header
    try:
        if not isinstance(header, _core.Image):
            if tag not in item.dataset:
                return None
            element = item.dataset[tag]
            if element.VR == "UN" and vr and isinstance(element.value, bytes):
                element = raw_element(tag, vr, element.value)
            return None if element.VR == "SQ" else _plain(element.value, element.VR)
        found = header.element(tag)
        if found is None:
            return None
        written, raw = found
        if written in ("", "UN"):
            written = vr or (dictionary_VR(tag) if tag >> 16 & 1 == 0 else "UN")
        if written == "SQ":
            return None
        charset = header.element(_CHARACTER_SET)
        named = charset[1].decode("ascii", "replace").strip(" \0") if charset else ""
        is_implicit = header.transfer_syntax == "1.2.840.10008.1.2"
        return _decoded(tag, written, raw, named, is_implicit, header.big_endian)
    except (InvalidDicom, *READ_ERRORS) as error:
        raise InvalidDicom(f"image {called(header)}: {tag_name(tag)}: {error}") from error


@lru_cache(maxsize=1 << 14)
def _decoded(
    tag: int, vr: str, raw: bytes, charset: str, is_implicit: bool, big_endian: bool
) -> Any:
    vr = {"US or SS": "US"}.get(vr, vr)
    return _plain(raw_element(tag, vr, raw, charset, is_implicit, big_endian).value, vr)


def _plain(value: Any, vr: str) -> Any:
    """A value of pydicom as a number, text, date or time of Python, or a tuple of them."""
    if isinstance(value, str | PersonName):
        text = str(value).strip(" \0")
        return _FROM_TEXT[vr](text) if text and vr in _FROM_TEXT else text or None
    if isinstance(value, Decimal | float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no finite number")
        return float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return tuple(_plain(one, vr) for one in value) or None
    return value or None


def _date(text: str) -> date:
    return date(*_known(DA(text), text).timetuple()[:3])


def _known(found: Any, text: str) -> Any:
    """What pydicom made of a text; of some that say nothing it makes None."""
    if found is None:
        raise ValueError(f"{text!r} is none")
    return found


def _time(text: str) -> time:
    found = _known(TM(text), text)
    return time(found.hour, found.minute, found.second, found.microsecond)


def _whole_time(text: str) -> datetime:
    found = _known(DT(text), text)
    return datetime(
        found.year, found.month, found.day, found.hour, found.minute, found.second,
        found.microsecond, found.tzinfo,
    )  # fmt: skip


# What pydicom leaves a text is no number where it should be one.
_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "DS": lambda text: _plain(float(text), ""),
    "IS": int,
    "DA": _date,
    "TM": _time,
    "DT": _whole_time,
}


def _of_kind(item: Slice, tag: int, kind: type) -> Any:
    """The value of an element; one of another kind, whatever VR it was written with, is an error."""
    value = element_value(item, tag)
    if value is not None and not isinstance(value, kind):
        raise InvalidDicom(
            f"image {called(item.header)}: {tag_name(tag)}: expected one {kind.__name__}, found {value!r}"
        )
    return value


def _private_value(item: Slice, private: _Private) -> Any:
    """The value of a private element, if the block is that of its maker (PS3.5 section 7.8.1)."""
    if element_value(item, private.creator_tag, "LO") != private.creator:
        return None
    return element_value(item, private.tag, private.vr)


def _b_value(item: Slice) -> float | None:
    value = element_value(item, _B_VALUE)
    for private in _PRIVATE_B_VALUES:
        if value is None:
            value = _private_value(item, private)
            if isinstance(value, tuple):
                # GE writes four numbers, and adds 10^9 to the first.
                value = value[0] % 100_000 if isinstance(value[0], int) else value[0]
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise InvalidDicom(
            f"image {called(item.header)} has the b-value {value!r}, which is no number"
        ) from error


def _direction(item: Slice) -> tuple[float, ...] | None:
    """The gradient's direction in patient coordinates; (0, 0, 0) where there is none."""
    value = element_value(item, _DIRECTION) or _private_value(item, _SIEMENS_DIRECTION)
    if value is None:
        parts = tuple(_private_value(item, one) for one in _PHILIPS_DIRECTION)
        value = None if None in parts else parts
    if value is None and (
        element_value(item, _DIRECTIONALITY) in ("NONE", "ISOTROPIC") or _b_value(item) == 0
    ):
        return (0.0, 0.0, 0.0)
    if value is None:
        return None
    if not isinstance(value, tuple) or not all(isinstance(one, int | float) for one in value):
        raise InvalidDicom(
            f"image {called(item.header)} has the gradient direction {value!r}, which is none"
        )
    return value


def _date_time(item: Slice) -> datetime | None:
    """When an image was acquired, as a whole: no midnight lies between two of them."""
    value = _of_kind(item, _FRAME_DATE_TIME, datetime) or _of_kind(item, _DATE_TIME, datetime)
    if value is None:
        day, hour = _of_kind(item, _DATE, date), _of_kind(item, _TIME, time)
        if day is None or hour is None:
            return None
        value = datetime.combine(day, hour)
    zone = _of_kind(item, _TIME_ZONE, str)
    if value.tzinfo is None and zone is not None:
        found = re.fullmatch(r"([+-])([01]\d|2[0-3])([0-5]\d)", zone)
        if found is None:
            raise InvalidDicom(
                f"image {called(item.header)} has the TimezoneOffsetFromUTC {zone!r}, which is none"
            )
        sign, hours, minutes = found.groups()
        offset = timedelta(hours=int(hours), minutes=int(minutes))
        value = value.replace(tzinfo=timezone(-offset if sign == "-" else offset))
    found_time: datetime = value
    return found_time


def split(slices: Sequence[Slice], keywords: tuple[str, ...]) -> dict[Any, list[Slice]]:
    """The images of each value, or tuple of values, in ascending order of these.

    Raises InconsistentSeries for an image without a value, and for values that have no order.
    """
    groups: dict[Any, list[Slice]] = {}
    for item in slices:
        values = tuple(value_of(item, keyword) for keyword in keywords)
        if None in values:
            raise InconsistentSeries(
                f"image {called(item.header)} has no {keywords[values.index(None)]} to split by; "
                "take it out with required_tags, or split by another attribute"
            )
        groups.setdefault(values if len(keywords) > 1 else values[0], []).append(item)
    try:
        return {key: groups[key] for key in sorted(groups)}
    except TypeError as error:
        raise InconsistentSeries(
            f"the values of {' and '.join(keywords)} have no common order: {error}"
        ) from error


def counts(slices: Sequence[Slice], keywords: Iterable[str] = CANDIDATES) -> dict[str, int]:
    """How many values each attribute has that all images have, where they are several."""
    found = {}
    for keyword in keywords:
        values = {value_of(item, keyword) for item in slices}
        if len(values) > 1 and None not in values:
            found[keyword] = len(values)
    return found


def in_some(slices: Sequence[Slice], keywords: Iterable[str] = CANDIDATES) -> list[str]:
    """The attributes that some of the images have, and others have not."""
    return [
        keyword
        for keyword in keywords
        if len({value_of(item, keyword) is None for item in slices}) > 1
    ]


def differing(one: Slice, other: Slice) -> list[str]:
    """The candidates whose values differ between two images; the headers are read again."""
    tags = tags_of(CANDIDATES)

    def again(item: Slice) -> Slice:
        frame = (item.whole or item.header).frame
        slices = read_slices([item.dataset], tags)[0]
        return next(found for found in slices if found.header.frame == frame)

    return list(counts([again(one), again(other)]))

"""Quantities: what the pixels of an image measure, where that is more than its rescale.

Solves that a number has to be what its unit says: real-world values (PS3.3 C.7.6.16.2.11) and SUV by
body weight of PET (PS3.3 C.8.9.1; the vendor-neutral rules of QIBA). Pure functions, from a dataset to
a few numbers. Nothing is assumed: an attribute that is missing or contradicts another raises
InvalidDataset, which names the instance, the attribute and the remedy.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from dicomnode.errors import InconsistentSeries, InvalidDataset, UnsupportedImage
from dicomnode.lib.dicom import READ_ERRORS


@dataclass(frozen=True)
class Scale:
    """From the stored values of one frame to a quantity: `slope * stored + intercept`.

    Or with a `table`, `table[stored - first]`. Stored values outside `first` to `last`, both
    included, have no meaning. `units` is empty where the object does not say.
    """

    units: str
    slope: float = 1.0
    intercept: float = 0.0
    first: float = -math.inf
    last: float = math.inf
    table: tuple[float, ...] | None = None

    @cached_property
    def values(self) -> NDArray[numpy.float64]:
        """The table as an array."""
        return numpy.array(self.table or (), numpy.float64)


def signed(value: Any, bits_stored: int, is_signed: bool) -> int:
    """A US or SS value that is compared with stored ones, by its 16 bits and the pixels' sign.

    Writers disagree with PixelRepresentation about its VR: -2000 is found as 63536, and the other way
    round. What the bits say counts.
    """
    pattern = int(value) & 0xFFFF
    bits = min(bits_stored, 16)
    if is_signed:
        width = bits if pattern < 1 << bits else 16
        pattern -= (pattern >> (width - 1)) << width
    return pattern


def modality_lut_type(dataset: Dataset) -> str:
    """What the Modality LUT of an image gives, such as HU or OD (PS3.3 C.11.1.1.2); empty if unsaid."""
    items = dataset.get("ModalityLUTSequence")
    first = items[0] if isinstance(items, Items) and items else Dataset()
    return str(first.get("ModalityLUTType", "") or "")


def padding_of(dataset: Dataset, is_signed: bool = False) -> tuple[float, float] | None:
    """Lowest and highest stored value that is padding (PS3.3 C.7.5.1.1.2); None without any.

    The pixels are signed where PixelRepresentation or `is_signed` says so.

    Raises InvalidDataset where these are no numbers.
    """
    # Pixel Padding is of integers; of floats it has names of its own.
    kind = next((k for k in ("DoubleFloat", "Float") if f"{k}PixelData" in dataset), "")
    try:
        value = dataset.get(f"{kind}PixelPaddingValue")
        if value is None:
            return None
        limit = dataset.get(f"{kind}PixelPaddingRangeLimit")
        ends = [value] if limit is None else [value, limit]
        if not kind:
            bits = int(dataset.get("BitsStored") or dataset.get("BitsAllocated") or 16)
            is_signed = is_signed or dataset.get("PixelRepresentation") == 1
            ends = [signed(end, bits, is_signed) for end in ends]
        ends = [_finite(end) for end in ends]
    except READ_ERRORS as error:
        raise InvalidDataset(
            f"image {dataset.get('SOPInstanceUID', '')}, PixelPaddingValue (0028,0120): {error}; "
            "correct it, or leave padding=True out"
        ) from error
    return min(ends), max(ends)


# Real-world values


def real_world_scales(frames: Sequence[tuple[Dataset, int]]) -> list[Scale]:
    """For each frame (its object, its number from 0) the real-world value mapping.

    Where there are several to choose from, the one whose units all the frames have. Raises
    InvalidDataset where a frame has none or the choice is open, InconsistentSeries where the frames
    have no units in common.
    """
    parsed: dict[int, _Maps] = {}
    offered: list[list[tuple[str, Scale]]] = []
    for dataset, frame in frames:
        if id(dataset) not in parsed:
            parsed[id(dataset)] = _Maps(dataset)
        offered.append(parsed[id(dataset)].of_frame(frame))
    lacking = [
        parsed[id(dataset)].uid
        for (dataset, _), found in zip(frames, offered, strict=True)
        if not found
    ]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InvalidDataset(
            f"image {lacking[0]}{more} of {len(frames)}: no RealWorldValueMappingSequence "
            '(0040,9096); use values="rescaled", or take such images out with required_tags'
        )
    if not frames:
        return []
    common = set.intersection(*({scale.units for _, scale in found} for found in offered))
    first = parsed[id(frames[0][0])].uid
    if not common:
        told = sorted({scale.units for found in offered for _, scale in found})
        raise InconsistentSeries(
            f"the real-world values of image {first} and others have no units in common ({told}); "
            "narrow the input with required_values"
        )
    chosen: list[Scale] = []
    for (dataset, _), found in zip(frames, offered, strict=True):
        fitting = {scale: label for label, scale in found if scale.units in common}
        if len(fitting) > 1:
            listed = ", ".join(f"{label!r} in {scale.units!r}" for scale, label in fitting.items())
            raise InvalidDataset(
                f"image {parsed[id(dataset)].uid} has several real-world value mappings ({listed}); "
                "leave the one to use in its RealWorldValueMappingSequence (0040,9096)"
            )
        chosen += fitting
    return chosen


class _Maps:
    """The mappings of one object, each sequence read once."""

    def __init__(self, dataset: Dataset) -> None:
        self.uid = str(dataset.get("SOPInstanceUID", ""))
        try:
            self._bits = int(dataset.get("BitsStored") or dataset.get("BitsAllocated") or 16)
            self._is_signed = dataset.get("PixelRepresentation") == 1
            self._per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
            shared = dataset.get("SharedFunctionalGroupsSequence") or []
            self._shared = [self._maps(item) for item in (*shared[:1], dataset)]
        except READ_ERRORS as error:
            raise self._invalid(error) from error

    def of_frame(self, frame: int) -> list[tuple[str, Scale]]:
        """Label and scale of each: what a frame's own group says counts more than what is shared."""
        try:
            own = self._maps(self._per_frame[frame]) if frame < len(self._per_frame) else []
        except READ_ERRORS as error:
            raise self._invalid(error) from error
        return next((found for found in (own, *self._shared) if found), [])

    def _maps(self, item: Dataset) -> list[tuple[str, Scale]]:
        maps = item.get("RealWorldValueMappingSequence") or []
        if maps and not isinstance(maps, Items):
            raise ValueError("RealWorldValueMappingSequence is no sequence")
        return [(str(one.get("LUTLabel", "") or ""), self._scale(one)) for one in maps]

    def _scale(self, item: Dataset) -> Scale:
        codes = item.get("MeasurementUnitsCodeSequence") or []
        units = str(codes[0].get("CodeValue", "") or "") if codes else ""
        first, last = (self._limit(item, end) for end in ("First", "Last"))
        if first > last:
            raise ValueError(f"it maps stored values from {first:g} to {last:g}, which are none")
        table = item.get("RealWorldValueLUTData")
        if table is None:
            slope, intercept = (
                _finite(_present(item, f"RealWorldValue{name}")) for name in ("Slope", "Intercept")
            )
            if slope == 0:
                raise ValueError("RealWorldValueSlope is 0, which maps everything to one value")
            return Scale(units, slope, intercept, first, last)
        numbers = numpy.atleast_1d(numpy.asarray(table, numpy.float64)).tolist()
        if len(numbers) != last - first + 1:
            raise ValueError(
                f"expected {last - first + 1:g} values of RealWorldValueLUTData, found {len(numbers)}"
            )
        return Scale(units, first=first, last=last, table=tuple(numbers))

    def _limit(self, item: Dataset, end: str) -> float:
        value = item.get(f"DoubleFloatRealWorldValue{end}ValueMapped")
        if value is not None:
            return _finite(value)
        value = _present(item, f"RealWorldValue{end}ValueMapped")
        return signed(value, self._bits, self._is_signed)

    def _invalid(self, error: Exception) -> InvalidDataset:
        return InvalidDataset(
            f"image {self.uid}, RealWorldValueMappingSequence (0040,9096): {error}; correct it, or use "
            'values="rescaled"'
        )


def _present(item: Dataset, keyword: str) -> Any:
    value = item.get(keyword)
    if value is None:
        raise ValueError(f"an item has no {keyword}")
    return value


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no finite number")
    return number


# SUV by body weight

_SUV_UNITS = "g/ml"
# After so many half-lives nothing is left to measure: dates that were changed, or another half-life.
_MOST_HALF_LIVES = 10
# Images of one series whose reference times differ by more half-lives than this contradict each other.
_AGREEMENT = 0.01
_MOMENT = re.compile(r"(\d{8})(\d{4})(\d{2})?(\.\d+)?([+-]\d{4})?")


def suv_scales(datasets: Sequence[Dataset]) -> tuple[list[Scale], list[str]]:
    """For each PET image the scale from stored values to SUV by body weight in g/ml; and notes.

    All images of a series are decay-corrected to one time (PS3.3 C.8.9.1.1.5), which may follow from
    the earliest of them: give them all.

    Raises InvalidDataset for an attribute that is missing or contradicts another, UnsupportedImage for
    what is no single-frame PET image.
    """
    images = [_Pet(dataset) for dataset in datasets]
    series: dict[str, list[_Pet]] = {}
    for image in images:
        series.setdefault(str(image.dataset.get("SeriesInstanceUID", "")), []).append(image)
    times: dict[str, datetime] = {}
    notes: list[str] = []
    for uid, those in series.items():
        if any(image.decays for image in those):
            times[uid], told = _reference_time(those)
            notes += told
    scales = []
    for image in images:
        uid = str(image.dataset.get("SeriesInstanceUID", ""))
        factor = image.factor(times.get(uid))
        image.check_alike(series[uid][0], times.get(uid))
        slope = image.number("RescaleSlope")
        intercept = image.number("RescaleIntercept", or_else=0.0)
        scales.append(Scale(_SUV_UNITS, slope * factor, intercept * factor))
    return scales, notes


class _Pet:
    """One PET image, and its attributes with their errors."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.uid = str(dataset.get("SOPInstanceUID", ""))
        if self.text("Modality") != "PT":
            raise UnsupportedImage(
                f'image {self.uid} has the Modality {self.text("Modality")!r}; values="suv" is for '
                "PET (PT): narrow the input with required_values"
            )
        if (
            self.number("NumberOfFrames", or_else=1) > 1
            or "SharedFunctionalGroupsSequence" in dataset
        ):
            raise UnsupportedImage(
                f'image {self.uid} is a multi-frame object, of which values="suv" is not computed; '
                'values="real_world" gives SUV where the object has such a mapping'
            )
        corrections = self.needed("CorrectedImage").split("\\")
        for correction in ("ATTN", "DECY"):
            if correction not in corrections:
                raise self.wrong("CorrectedImage", f"{correction} among {corrections}")
        self.units = self.needed("Units")
        if self.units not in ("BQML", "CNTS", "GML"):
            raise self.wrong("Units", f"BQML, CNTS or GML, not {self.units}")
        # Factors of Philips, from rescaled counts to SUV and to Bq/ml.
        self.suv_factor = self.activity_factor = 1.0
        self.needs_dose = self.units == "BQML"
        if self.units == "CNTS":
            self.suv_factor = self._philips(0x00)
            self.needs_dose = not self.suv_factor
            if self.needs_dose:
                self.activity_factor = self._philips(0x09)
                if not self.activity_factor:
                    raise self.wrong(
                        "Units",
                        "BQML or GML; CNTS need one of the private (7053,1000) and (7053,1009) of "
                        "Philips",
                    )
        elif self.units == "GML" and self.text("SUVType") not in ("", "BW"):
            raise self.wrong("SUVType", f"BW, not {self.text('SUVType')}")
        if self.needs_dose and self.needed("DecayCorrection") not in ("START", "ADMIN"):
            raise self.wrong(
                "DecayCorrection", f"START or ADMIN, not {self.text('DecayCorrection')}"
            )

    @property
    def decays(self) -> bool:
        """Whether the injected dose has to be taken to the time of the scan."""
        return self.needs_dose and self.text("DecayCorrection") == "START"

    def factor(self, reference: datetime | None) -> float:
        """From rescaled values to SUV; `reference` is the time of decay correction."""
        if not self.needs_dose:
            return self.suv_factor
        weight_kg = self.positive("PatientWeight")
        if weight_kg > 1000:
            raise self.wrong("PatientWeight", f"kilograms, not {weight_kg:g}")
        administered = self.administration
        dose = self.positive("RadionuclideTotalDose", administered)
        if dose < 1e4:
            raise self.wrong("RadionuclideTotalDose", f"becquerels, not {dose:g}")
        if self.decays and reference is not None:
            half_life = self.half_life
            seconds = (reference - self._injected(reference)).total_seconds()
            if not 0 <= seconds <= _MOST_HALF_LIVES * half_life:
                raise self.wrong(
                    "RadiopharmaceuticalStartDateTime",
                    f"a time up to {_MOST_HALF_LIVES} half-lives ({half_life:g} s) before the time of "
                    f"decay correction, not one {seconds:g} s before it",
                )
            dose *= 2 ** (-seconds / half_life)
        return self.activity_factor * weight_kg * 1000 / dose

    def check_alike(self, first: "_Pet", reference: datetime | None) -> None:
        """One patient was given one dose: another in an image of the same series is wrong."""
        mine, theirs = (image._given(reference) for image in (self, first))
        for keyword in mine:
            if keyword in theirs and mine[keyword] != theirs[keyword]:
                raise self.wrong(
                    keyword,
                    f"{theirs[keyword]} as in image {first.uid} of the series, not {mine[keyword]}",
                )

    def _given(self, reference: datetime | None) -> dict[str, Any]:
        units = {"Units": self.text("Units")}
        if not self.needs_dose:
            return units
        item = self.administration
        found: dict[str, Any] = {
            **units,
            "DecayCorrection": self.text("DecayCorrection"),
            "PatientWeight": self.number("PatientWeight"),
            "RadionuclideTotalDose": self.number("RadionuclideTotalDose", item),
        }
        if self.decays and reference is not None:
            found["RadionuclideHalfLife"] = self.half_life
            found["RadiopharmaceuticalStartTime"] = self._injected(reference)
        return found

    @property
    def administration(self) -> Dataset:
        """The one item of RadiopharmaceuticalInformationSequence."""
        items = self._get("RadiopharmaceuticalInformationSequence", self.dataset) or []
        if len(items) != 1:
            raise self.wrong(
                "RadiopharmaceuticalInformationSequence", f"one item, not {len(items)}"
            )
        found: Dataset = items[0]
        return found

    @property
    def half_life(self) -> float:
        """Of the radionuclide, in seconds."""
        return self.positive("RadionuclideHalfLife", self.administration)

    def _injected(self, reference: datetime) -> datetime:
        """When the radiopharmaceutical was given.

        A time without a date is within the day before the scan, where of the radionuclide nothing
        would be left after longer; others are imaged days later and need the date.
        """
        item = self.administration
        whole = self.text("RadiopharmaceuticalStartDateTime", item)
        if not whole and _MOST_HALF_LIVES * self.half_life >= 24 * 3600:
            whole = self.needed("RadiopharmaceuticalStartDateTime", item)
        if whole:
            return self.moment("RadiopharmaceuticalStartDateTime", whole)
        time = self.needed("RadiopharmaceuticalStartTime", item)
        injected = self.moment("RadiopharmaceuticalStartTime", f"{reference:%Y%m%d}{time}")
        return reference - (reference - injected) % timedelta(days=1)

    @property
    def acquired(self) -> datetime:
        """When the acquisition of this image started."""
        date, time = self.text("AcquisitionDate"), self.text("AcquisitionTime")
        if date and time:
            return self.moment("AcquisitionTime", date + time)
        return self.moment("AcquisitionDateTime", self.needed("AcquisitionDateTime"))

    @property
    def back_computed(self) -> datetime | None:
        """The reference time by FrameReferenceTime, which counts to the time of the average activity.

        That time is a little before the middle of the frame: the activity falls meanwhile.
        """
        offset = self.number("FrameReferenceTime", or_else=0.0) / 1000
        duration = self.number("ActualFrameDuration", or_else=0.0) / 1000
        if offset <= 0 or duration <= 0:
            return None
        decay = math.log(2) / self.half_life
        average = math.log(decay * duration / -math.expm1(-decay * duration)) / decay
        return self.acquired + timedelta(seconds=average - offset)

    def private(self, group: int, creator: str, element: int) -> Any:
        """The value of a private element, None where absent."""
        try:
            return self.dataset.private_block(group, creator)[element].value
        except KeyError:
            return None

    def _philips(self, element: int) -> float:
        value = self.private(0x7053, "Philips PET Private Group", element)
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace").strip(" \0")
        try:
            return _finite(value) if value else 0.0
        except (ValueError, TypeError) as error:
            raise self.wrong(
                "Units", f"a factor of Philips (7053,10{element:02X}): {error}"
            ) from error

    def moment(self, keyword: str, text: str) -> datetime:
        """A date and time; with TimezoneOffsetFromUTC (0008,0201) in UTC, else as the clock showed."""
        found = _MOMENT.fullmatch(text.strip(" \0"))
        here = self.text("TimezoneOffsetFromUTC")
        if found is None:
            raise self.wrong(keyword, f"a date and time, not {text!r}")
        day, minutes, seconds, fraction, zone = found.groups()
        if zone and not here:
            raise self.wrong(
                "TimezoneOffsetFromUTC", f"one, since {keyword} {text!r} has a time zone"
            )
        zone = zone or here
        try:
            moment = datetime.strptime(day + minutes + (seconds or "00"), "%Y%m%d%H%M%S")
            moment += timedelta(seconds=float(fraction or 0))
            if zone:
                offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[3:]))
                moment -= offset if zone[0] == "+" else -offset
        except (ValueError, OverflowError) as error:
            raise self.wrong(keyword, f"a date and time, not {text!r} {zone or ''}") from error
        return moment

    def _get(self, keyword: str, item: Dataset) -> Any:
        try:
            return item.get(keyword)
        except READ_ERRORS as error:
            raise InvalidDataset(f"image {self.uid}: {keyword}: {error}") from error

    def text(self, keyword: str, item: Dataset | None = None) -> str:
        """A value as text, backslash between several; empty where absent."""
        value = self._get(keyword, self.dataset if item is None else item)
        if value is None:
            return ""
        if isinstance(value, str) or not isinstance(value, Iterable):
            return str(value).strip(" \0")
        return "\\".join(str(part) for part in value)

    def needed(self, keyword: str, item: Dataset | None = None) -> str:
        """The same; an absent one is an error."""
        text = self.text(keyword, item)
        if not text:
            units = self.text("Units") or "no Units"
            raise InvalidDataset(
                f'image {self.uid} has no {keyword}, which values="suv" needs; add it to required_tags '
                f'of the input, or use values="rescaled" ({units})'
            )
        return text

    def number(
        self, keyword: str, item: Dataset | None = None, *, or_else: float | None = None
    ) -> float:
        """A value as a number; an absent one is an error unless there is something else."""
        if or_else is not None and not self.text(keyword, item):
            return or_else
        text = self.needed(keyword, item)
        try:
            return _finite(text)
        except ValueError as error:
            raise self.wrong(keyword, f"a number, not {text!r}") from error

    def positive(self, keyword: str, item: Dataset | None = None) -> float:
        number = self.number(keyword, item)
        if number <= 0:
            raise self.wrong(keyword, f"a number over 0, not {number:g}")
        return number

    def wrong(self, keyword: str, expected: str) -> InvalidDataset:
        return InvalidDataset(
            f'image {self.uid}: expected for values="suv" as {keyword} {expected}; correct the '
            'dataset, or use values="rescaled"'
        )


def _reference_time(series: Sequence[_Pet]) -> tuple[datetime, list[str]]:
    """The time that all images of a series are decay-corrected to, and notes.

    SeriesTime, unless it was altered, that is, lies after the acquisition. Then it is what GE writes
    (0009,100D), what follows from FrameReferenceTime, or the start of the earliest acquisition.
    """
    first = series[0]
    if len({image.needed("SeriesDate") + image.needed("SeriesTime") for image in series}) > 1:
        raise first.wrong("SeriesTime", "the same in all images of the series")
    started = first.moment("SeriesTime", first.needed("SeriesDate") + first.needed("SeriesTime"))
    earliest = min(image.acquired for image in series)
    if started <= earliest:
        return started, []
    private = first.private(0x0009, "GEMS_PETD_01", 0x0D)
    if private:
        if isinstance(private, bytes):
            private = private.decode("ascii", "replace")
        return first.moment("(0009,100D) of GE", str(private)), []
    found = [image.back_computed for image in series]
    times = [time for time in found if time is not None]
    if times and len(times) == len(series):
        spread = (max(times) - min(times)).total_seconds()
        if spread > _AGREEMENT * first.half_life:
            raise first.wrong(
                "FrameReferenceTime",
                f"the same time of decay correction in all images, not one {spread:g} s apart",
            )
        return min(times), []
    return earliest, [
        f"SeriesTime of {first.uid} lies after AcquisitionTime; SUV take the start of the earliest "
        f"acquisition ({earliest:%H:%M:%S}) as the time of decay correction"
    ]

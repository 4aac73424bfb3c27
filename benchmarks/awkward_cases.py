"""Awkward series: what scanners and archives really send, made small, with the truth known.

A case is a folder of objects, and the planes that a right reader puts into the patient. The cells
of a plane are a pattern without symmetry, plus a part that grows evenly along the stack: a swapped
axis, a wrong spacing or a shifted slice changes the value at every position, while a reader that
interpolates between slices still finds the right one.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedCTImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

from dicomnode.testing import make_series

Vector = tuple[float, float, float]
Cells = NDArray[numpy.int64]

SIZE = 8
ORIGIN: Vector = (-30.0, 40.0, 100.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
REGULAR = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Plane:
    """The right values of one slice, and where in the patient they are.

    `values` are (row, column); `to_patient` is 4x4, (column, row, 0, 1) to mm, LPS.
    """

    values: NDArray[numpy.float64]
    to_patient: NDArray[numpy.float64]


@dataclass(frozen=True)
class Case:
    """A series and its truth: each of `stacks` has to be found whole in one returned volume."""

    number: str
    name: str
    datasets: Sequence[Dataset]
    stacks: Sequence[Sequence[Plane]]
    # How far a value may be off; in most cases stored integers are 1 apart.
    tolerance: float = 0.5


Made = tuple[Dataset, Plane]
# Short, and the same every time, for the sake of messages.
_ROOT = "1.2.826.0.1.3680043.8.498"


def cells(mm: float, rows: int = SIZE, columns: int = SIZE, base: int = 1000) -> Cells:
    """Stored values of a slice that lies `mm` along its stack."""
    pattern = numpy.random.default_rng(7).permutation(rows * columns).reshape(rows, columns)
    return pattern * 9 + base + round(20 * mm)


def one_slice(
    uid: str,
    mm: float,
    stored: Cells | None = None,
    *,
    orientation: Sequence[float] = AXIAL,
    spacing: tuple[float, float] = (0.75, 0.75),
    along: Vector | None = None,
    slope: float = 1.0,
    intercept: float = -1024.0,
    signed: bool = False,
    bits: int = 12,
    junk: int = 0,
    **attributes: Any,
) -> Made:
    """A slice `mm` along its stack, and its plane.

    `along` is the direction from slice to slice, else the normal; the UID of the series ends in
    `uid`, that of the image in `uid` and tenths of a mm; `junk` goes into the bits above `bits`.
    """
    stored = cells(mm) if stored is None else stored
    one = copy.deepcopy(_template())
    row, column = numpy.array(orientation[:3]), numpy.array(orientation[3:])
    direction = numpy.cross(row, column) if along is None else numpy.array(along)
    position = numpy.array(ORIGIN) + direction * mm
    one.SeriesInstanceUID = f"{_ROOT}.{int(uid)}"
    one.SOPInstanceUID = f"{_ROOT}.{int(uid)}.{round(mm * 10)}"
    one.InstanceNumber = round(mm * 10) + 1
    one.ImagePositionPatient = [f"{value:.9g}" for value in position]
    one.ImageOrientationPatient = [f"{value:.12g}" for value in orientation]
    one.PixelSpacing = [f"{value:g}" for value in spacing]
    one.Rows, one.Columns = stored.shape
    one.BitsStored, one.HighBit, one.PixelRepresentation = bits, bits - 1, int(signed)
    one.RescaleSlope, one.RescaleIntercept = f"{slope:g}", f"{intercept:g}"
    one.PixelData = ((stored & ((1 << bits) - 1)) | junk << bits).astype("<u2").tobytes()
    for keyword, value in attributes.items():
        setattr(one, keyword, value)
    to_patient = numpy.eye(4)
    to_patient[:3, 0] = row * spacing[1]
    to_patient[:3, 1] = column * spacing[0]
    to_patient[:3, 3] = position
    return one, Plane(stored * slope + intercept, to_patient)


def _template() -> Dataset:
    (one,) = make_series(1, SIZE, SIZE, spacing_mm=(2.0, 0.75, 0.75))
    one.StudyInstanceUID = f"{_ROOT}.100"
    one.FrameOfReferenceUID = f"{_ROOT}.101"
    return one


def _stack(uid: str, places: Sequence[float] = REGULAR, **options: Any) -> list[Made]:
    return [one_slice(uid, mm, **options) for mm in places]


def _case(number: str, name: str, *stacks: Sequence[Made], **options: Any) -> Case:
    """A case of all slices of its stacks; `extra` objects belong to none."""
    extra = options.pop("extra", ())
    return Case(
        number,
        name,
        [*(dataset for stack in stacks for dataset, _ in stack), *extra],
        [[plane for _, plane in stack] for stack in stacks],
        **options,
    )


def cases() -> list[Case]:
    """All of them, in the order of the table."""
    return [*_single_frame(), *_enhanced()]


def _single_frame() -> list[Case]:
    return [
        _case("01", "baseline axial", _stack("01")),
        _case(
            "02",
            "InstanceNumber reversed",
            [one_slice("02", mm, InstanceNumber=20 - round(mm)) for mm in REGULAR],
        ),
        _case("03", "InstanceNumber constant", _stack("03", InstanceNumber=1)),
        _case("04", "sagittal", _stack("04", orientation=SAGITTAL)),
        _case("05", "PixelSpacing of rows and columns differ", _stack("05", spacing=(0.5, 1.25))),
        _case("06", "one slice missing inside", _stack("06", (0, 2, 4, 8, 10))),
        _case("07", "variable spacing", _stack("07", (0, 2, 4, 7, 10, 13))),
        _duplicate_position(),
        _sent_again(),
        _tilt(),
        _localizer(),
        _pet(),
        _first_slice_positive(),
        _mixed_sign(),
        _case("15", "junk above BitsStored", _stack("15", junk=0b1010)),
        _mixed_matrix(),
        _case(
            "17",
            "positions off by 0.001 mm",
            [
                one_slice("17", mm + off, cells(mm))
                for mm, off in zip(REGULAR, (0, 1e-3, -1e-3, 1e-3, 0, -1e-3), strict=True)
            ],
        ),
        _two_times(),
        _case(
            "19",
            "signed, 12 bits stored",
            [
                one_slice("19", mm, cells(mm) - 1500, signed=True, intercept=0, slope=1)
                for mm in REGULAR
            ],
        ),
        _case("20", "single slice", _stack("20", (0,))),
        _case("21", "axes flipped (-x, -y)", _stack("21", orientation=FLIPPED)),
    ]


def _duplicate_position() -> Case:
    """One slice twice, the same pixels under another SOPInstanceUID."""
    stack = _stack("08")
    again, _ = one_slice("08", 4.0, SOPInstanceUID=f"{_ROOT}.8.999", InstanceNumber=99)
    return _case("08", "duplicate position, new SOPInstanceUID", stack, extra=[again])


def _sent_again() -> Case:
    stack = _stack("09")
    return _case("09", "same SOPInstanceUID sent again", stack, extra=[copy.deepcopy(stack[2][0])])


def _tilt() -> Case:
    """The table moves along z, the image planes are tilted.

    Values grow evenly in all directions, so that a reader may also resample to an upright volume.
    """
    angle = math.radians(-20)
    orientation = (1.0, 0.0, 0.0, 0.0, math.cos(angle), math.sin(angle))
    column, row = numpy.meshgrid(numpy.arange(SIZE), numpy.arange(SIZE))
    stack = []
    for mm in REGULAR:
        y, z = 0.75 * row * math.cos(angle), mm + 0.75 * row * math.sin(angle)
        stored = numpy.rint(1500 + 40 * 0.75 * column + 90 * y + 60 * z).astype(numpy.int64)
        stack.append(
            one_slice(
                "10",
                mm,
                stored,
                orientation=orientation,
                along=(0, 0, 1),
                GantryDetectorTilt="-20",
            )
        )
    return _case("10", "gantry tilt of 20 degrees", stack, tolerance=2.0)


def _localizer() -> Case:
    scout, _ = one_slice(
        "11", 30.0, orientation=CORONAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    return _case("11", "localizer inside the series", _stack("11"), extra=[scout])


def _pet() -> Case:
    """The first slice has slope 1, so that a reader which looks at it alone decides for integers."""
    slopes = (1, 0.75, 0.5, 1.25, 0.3, 0.9)
    stack = [
        one_slice(
            "12",
            mm,
            cells(mm, base=1),
            slope=slope,
            intercept=0,
            bits=16,
            Modality="PT",
            SOPClassUID=PositronEmissionTomographyImageStorage,
            Units="BQML",
            RescaleType="BQML",
        )
        for mm, slope in zip(REGULAR, slopes, strict=True)
    ]
    return _case("12", "slope of each slice, the first is 1 (PET)", stack, tolerance=1e-3)


def _first_slice_positive() -> Case:
    stack = [one_slice("13", 0.0, cells(0.0, base=1100))]
    stack += [one_slice("13", mm, cells(mm, base=0)) for mm in REGULAR[1:]]
    return _case("13", "CT, only the first slice above 0 HU", stack)


def _mixed_sign() -> Case:
    stack = [
        one_slice("14", mm, cells(mm, base=60000), bits=16, intercept=0)
        if k % 2 == 0
        else one_slice("14", mm, cells(mm, base=-5000), bits=16, intercept=0, signed=True)
        for k, mm in enumerate(REGULAR)
    ]
    return _case("14", "mixed PixelRepresentation", stack)


def _mixed_matrix() -> Case:
    small = _stack("16", REGULAR[:3])
    large = [one_slice("16", mm, cells(mm, 10, 12)) for mm in REGULAR[3:]]
    return _case("16", "mixed matrix size", small, large)


def _two_times() -> Case:
    stacks = [
        [
            one_slice(
                "18",
                mm,
                cells(mm, base=500 + 700 * time),
                SOPInstanceUID=f"{_ROOT}.18.{time}.{round(mm * 10)}",
                InstanceNumber=round(mm) + 100 * time,
                AcquisitionNumber=time + 1,
                TemporalPositionIdentifier=time + 1,
                NumberOfTemporalPositions=2,
                AcquisitionTime=f"12000{time}",
                ContentTime=f"12000{time}",
            )
            for mm in REGULAR
        ]
        for time in range(2)
    ]
    return _case("18", "two time points at the same positions", *stacks)


def _enhanced() -> list[Case]:
    shuffled = (6.0, 0.0, 10.0, 4.0, 2.0, 8.0)
    ordered, mixed, gap = (
        _stack("30"),
        _stack("31", shuffled),
        _stack("33", (0, 2, 4, 8, 10)),
    )
    slopes = (1, 2, 0.5, 1.5, 0.25, 3)
    scaled = [one_slice("32", mm, slope=slope) for mm, slope in zip(REGULAR, slopes, strict=True)]
    return [
        _one_object("30", "enhanced CT, frames in order", ordered),
        _one_object("31", "enhanced CT, frames shuffled", mixed),
        _one_object("32", "enhanced CT, rescale of each frame", scaled, tolerance=1e-2),
        _one_object("33", "enhanced CT, one frame missing", gap),
    ]


def _one_object(number: str, name: str, stack: list[Made], **options: Any) -> Case:
    made = _case(number, name, stack, **options)
    return Case(number, name, [enhanced(made.datasets)], made.stacks, made.tolerance)


def enhanced(slices: Sequence[Dataset]) -> Dataset:
    """Axial slices as the frames of one Enhanced CT object, in their order (PS3.3 A.38.1)."""
    first = slices[0]
    one = copy.deepcopy(first)
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
        "RescaleSlope", "RescaleIntercept", "RescaleType",
    ):  # fmt: skip
        delattr(one, keyword)
    one.SOPClassUID = EnhancedCTImageStorage
    one.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    one.NumberOfFrames = len(slices)
    organization = generate_uid(entropy_srcs=[str(first.SOPInstanceUID)])
    one.DimensionOrganizationSequence = [_item(DimensionOrganizationUID=organization)]
    one.DimensionIndexSequence = [
        _item(
            DimensionOrganizationUID=organization,
            DimensionIndexPointer=pointer,
            FunctionalGroupPointer=0x00209111,
        )
        for pointer in (0x00209056, 0x00209057)
    ]
    one.SharedFunctionalGroupsSequence = [
        _item(
            PixelMeasuresSequence=[
                _item(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)
            ],
            PlaneOrientationSequence=[_item(ImageOrientationPatient=first.ImageOrientationPatient)],
            CTImageFrameTypeSequence=[
                _item(
                    FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
                    PixelPresentation="MONOCHROME",
                    VolumetricProperties="VOLUME",
                    VolumeBasedCalculationTechnique="NONE",
                )
            ],
        )
    ]
    places = sorted(float(each.ImagePositionPatient[2]) for each in slices)
    one.PerFrameFunctionalGroupsSequence = [_frame(each, places) for each in slices]
    one.PixelData = b"".join(each.PixelData for each in slices)
    return one


def _frame(one: Dataset, places: list[float]) -> Dataset:
    number = places.index(float(one.ImagePositionPatient[2])) + 1
    return _item(
        FrameContentSequence=[
            _item(StackID="1", InStackPositionNumber=number, DimensionIndexValues=[1, number])
        ],
        PlanePositionSequence=[_item(ImagePositionPatient=one.ImagePositionPatient)],
        PixelValueTransformationSequence=[
            _item(
                RescaleSlope=one.RescaleSlope,
                RescaleIntercept=one.RescaleIntercept,
                RescaleType="HU",
            )
        ],
    )


def _item(**values: Any) -> Dataset:
    one = Dataset()
    for keyword, value in values.items():
        setattr(one, keyword, value)
    return one

"""Several volumes in one series: each image in the volume of its value."""

import copy
import itertools
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta, timezone
from typing import Any

import numpy
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ImplicitVRLittleEndian, generate_uid
from tests.unit.test_multiframe import enhanced, item
from tests.unit.test_volume import distinct

from dicomnode.errors import InconsistentSeries, IncorrectlyConfigured, InvalidDicom
from dicomnode.lib.dicom import LazyDataset, encode
from dicomnode.lib.grinders import series_grinder, volume_grinder
from dicomnode.lib.volume import Volume
from dicomnode.testing import make_series


def lazy(datasets: Iterable[Dataset]) -> list[Dataset]:
    return [LazyDataset(encode(one)[0]) for one in datasets]


def implicit(datasets: Iterable[Dataset]) -> list[Dataset]:
    given = [copy.deepcopy(one) for one in datasets]
    for one in given:
        one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return lazy(given)


@pytest.fixture(params=[list, lazy, implicit])
def kind(request: pytest.FixtureRequest) -> Callable[[Iterable[Dataset]], list[Dataset]]:
    return request.param


def repeated(times: int, slices: int = 4) -> list[list[Dataset]]:
    """The same places several times, each image with pixels of its own."""
    first = make_series(slices, 5, 7)
    made = [copy.deepcopy(first) for _ in range(times)]
    for k, series in enumerate(made):
        distinct(series, k)
        for one in series:
            one.SOPInstanceUID = generate_uid()
    return made


def tagged(keyword: str, values: list[Any], slices: int = 4) -> dict[Any, list[Dataset]]:
    made = repeated(len(values), slices)
    for series, value in zip(made, values, strict=True):
        for one in series:
            setattr(one, keyword, value)
    return dict(zip(values, made, strict=True))


def mixed(made: Iterable[list[Dataset]]) -> list[Dataset]:
    """Position by position, the last time first."""
    return [one for group in zip(*list(made)[::-1], strict=True) for one in group]


def same(found: Volume, series: list[Dataset]) -> None:
    expected = volume_grinder(series)
    numpy.testing.assert_array_equal(found.array, expected.array)
    numpy.testing.assert_array_equal(found.affine, expected.affine)
    assert found.sop_instance_uids == expected.sop_instance_uids


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("TemporalPositionIdentifier", [1, 2, 10]),
        ("EchoTime", [2.46, 4.92, 10.0]),
        ("AcquisitionNumber", [1, 2]),
        ("FrameReferenceTime", [0.0, 900.5, 10000.0]),
        ("TriggerTime", [9.5, 100.25]),
        ("KVP", [80.0, 140.0]),
        ("DiffusionBValue", [0.0, 50.0, 1000.0]),
        ("ReceiveCoilName", ["A", "B"]),
        ("TriggerWindow", [5.0, 10.0]),
        ("AcquisitionTime", ["093000", "093000.5"]),
        ("ContentDate", ["20251231", "20260101"]),
    ],
)
def test_g42_g43_g45_g46_g47_g49_series_are_split_by_any_keyword(
    kind: Callable, keyword: str, values: list[Any]
) -> None:
    made = tagged(keyword, values)
    found = series_grinder(kind(mixed(made.values())), split_by=keyword)
    if keyword == "AcquisitionTime":
        assert list(found) == [time(9, 30), time(9, 30, 0, 500_000)]
    elif keyword == "ContentDate":
        assert list(found) == [date(2025, 12, 31), date(2026, 1, 1)]
    else:
        assert list(found) == values
    for volume, series in zip(found.values(), made.values(), strict=True):
        same(volume, series)
        assert volume.warnings == ()
    assert {type(key) for key in found} <= {int, float, str, date, time}


def test_several_keywords_give_tuples(kind: Callable) -> None:
    made = repeated(6)
    keys = list(itertools.product((1, 2, 3), (2.5, 5.0)))
    for series, (position, echo) in zip(made, keys, strict=True):
        for one in series:
            one.TemporalPositionIdentifier, one.EchoTime = position, echo
    grinder = series_grinder(split_by=("TemporalPositionIdentifier", "EchoTime"))
    found = grinder(kind(mixed(made)))
    assert list(found) == keys
    for volume, series in zip(found.values(), made, strict=True):
        same(volume, series)


@pytest.mark.parametrize("third", ["P", "R", "I"])
def test_g4_g49_magnitude_and_phase_are_split_by_image_type(third: str) -> None:
    made = repeated(2)
    for one in made[0]:
        one.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    for one in made[1]:
        one.ImageType = ["ORIGINAL", "PRIMARY", third, "ND"]
    found = series_grinder(lazy(mixed(made)), split_by="ImageType")
    assert set(found) == {("ORIGINAL", "PRIMARY", one, "ND") for one in ("M", third)}
    same(found["ORIGINAL", "PRIMARY", "M", "ND"], made[0])


def test_g5_g11_series_are_kept_apart_even_with_equal_instance_uids(kind: Callable) -> None:
    first, second = repeated(2)
    series = generate_uid()
    for one, other in zip(first, second, strict=True):
        other.SOPInstanceUID, other.SeriesInstanceUID = one.SOPInstanceUID, series
    found = series_grinder(kind([*first, *second]), split_by="SeriesInstanceUID")
    assert set(found) == {first[0].SeriesInstanceUID, series}
    same(found[series], second)
    same(found[first[0].SeriesInstanceUID], first)


def test_g41_g42_times_are_compared_with_their_date_and_zone(kind: Callable) -> None:
    made = repeated(3)
    for series, (day, hour, zone) in zip(
        made,
        [("20251231", "235900", "+0000"), ("20260101", "000100", "+0000"),
         ("20260101", "010200.25", "+0100")],
        strict=True,
    ):  # fmt: skip
        for one in series:
            one.AcquisitionDate, one.AcquisitionTime, one.TimezoneOffsetFromUTC = day, hour, zone
    found = series_grinder(kind(mixed(made)), split_by="AcquisitionDateTime")
    assert list(found) == [
        datetime(2025, 12, 31, 23, 59, tzinfo=UTC),
        datetime(2026, 1, 1, 0, 1, tzinfo=UTC),
        datetime(2026, 1, 1, 1, 2, 0, 250_000, tzinfo=timezone(timedelta(hours=1))),
    ]
    for volume, series in zip(found.values(), made, strict=True):
        same(volume, series)
    # As one value, where it is there; without a zone in some of them there is no order.
    for one in made[1]:
        one.AcquisitionDateTime = "20260101000100+0000"
        one.AcquisitionDate = ""
    assert list(series_grinder(kind(mixed(made)), split_by="AcquisitionDateTime")) == list(found)
    for one in made[1]:
        one.AcquisitionDateTime, one.TimezoneOffsetFromUTC = "20260101000100", ""
    with pytest.raises(InconsistentSeries, match="no common order"):
        series_grinder(kind(mixed(made)), split_by="AcquisitionDateTime")


def siemens(one: Dataset, value: float, direction: list[float]) -> None:
    block = one.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0C, "IS", str(int(value)))
    if value:
        block.add_new(0x0E, "FD", direction)


def ge(one: Dataset, value: float, _: list[float]) -> None:
    block = one.private_block(0x0043, "GEMS_PARM_01", create=True)
    block.add_new(0x39, "IS", [str(int(value) + 1_000_000_000), "8", "0", "0"])


def philips(one: Dataset, value: float, direction: list[float]) -> None:
    one.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x03, "FL", value)
    block = one.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
    for k, part in enumerate(direction):
        block.add_new(0xB0 + k, "FL", part)


def public(one: Dataset, value: float, direction: list[float]) -> None:
    one.DiffusionBValue = value
    one.DiffusionDirectionality = "DIRECTIONAL" if value else "NONE"
    if value:
        one.DiffusionGradientOrientation = direction


@pytest.mark.parametrize("maker", [public, siemens, ge, philips])
@pytest.mark.parametrize("unknown", [False, True])
def test_g44_b_values_and_directions_wherever_they_are_written(
    kind: Callable, maker: Callable, unknown: bool
) -> None:
    made = repeated(3)
    wanted = [(0.0, [0.0, 0.0, 0.0]), (800.0, [0.0, 0.0, 1.0]), (1000.0, [1.0, 0.0, 0.0])]
    for series, (value, direction) in zip(made, wanted, strict=True):
        for one in series:
            maker(one, value, direction)
            for element in one:
                if unknown and element.tag.is_private and not element.tag.is_private_creator:
                    if element.VR == "IS":
                        text = element.value if isinstance(element.value, str) else (
                            "\\".join(map(str, element.value))
                            if not isinstance(element.value, int) else str(element.value)
                        )  # fmt: skip
                        raw = text.encode()
                        raw += b" " * (len(raw) % 2)
                    else:
                        parts = element.value
                        parts = [parts] if isinstance(parts, float) else list(parts)
                        size = "<f8" if element.VR == "FD" else "<f4"
                        raw = numpy.array(parts, size).tobytes()
                    one.add_new(element.tag, "UN", raw)
    given = kind(mixed(made))
    found = series_grinder(given, split_by="DiffusionBValue")
    assert list(found) == [0.0, 800.0, 1000.0]
    for volume, series in zip(found.values(), made, strict=True):
        same(volume, series)
    if maker is not ge:
        both = series_grinder(given, split_by=("DiffusionBValue", "DiffusionGradientOrientation"))
        assert list(both) == [(value, tuple(direction)) for value, direction in wanted]


def test_g44_a_private_element_of_another_maker_is_no_b_value() -> None:
    made = repeated(2)
    for k, series in enumerate(made):
        for one in series:
            one.private_block(0x0019, "SOMEBODY", create=True).add_new(0x0C, "IS", str(k))
    with pytest.raises(InconsistentSeries, match="DiffusionBValue") as told:
        series_grinder(lazy(mixed(made)), split_by="DiffusionBValue")
    assert made[1][0].SOPInstanceUID in str(told.value)


# Frames


def frames_of(made: list[list[Dataset]], place: Callable[[Dataset, int], None]) -> Dataset:
    """Frames of one object, the times mixed; `place` writes the number of the time into its item."""
    order = [(k, time_) for k in range(len(made[0])) for time_ in range(len(made))][::-1]
    one = enhanced([made[time_][k] for k, time_ in order])
    for group, (_, time_) in zip(one.PerFrameFunctionalGroupsSequence, order, strict=True):
        place(group, time_)
    return one


def content(keyword: str) -> Callable[[Dataset, int], None]:
    def write(group: Dataset, number: int) -> None:
        setattr(group.FrameContentSequence[0], keyword, number + 1)

    return write


def echo(group: Dataset, number: int) -> None:
    group.MREchoSequence = [item(EffectiveEchoTime=2.5 * (number + 1))]


def diffusion(group: Dataset, number: int) -> None:
    if number == 0:
        group.MRDiffusionSequence = [item(DiffusionDirectionality="NONE", DiffusionBValue=0.0)]
        return
    group.MRDiffusionSequence = [
        item(
            DiffusionBValue=500.0 * number,
            DiffusionGradientDirectionSequence=[item(DiffusionGradientOrientation=[0.0, 1.0, 0.0])],
        )
    ]


def converted(group: Dataset, number: int) -> None:
    group.UnassignedPerFrameConvertedAttributesSequence = [item(EchoTime=str(5 * (number + 1)))]


def frame_time(group: Dataset, number: int) -> None:
    group.FrameContentSequence[0].FrameAcquisitionDateTime = f"2026010112000{number}"


@pytest.mark.parametrize("defined", [True, False])
@pytest.mark.parametrize(
    ("place", "split_by", "keys"),
    [
        (content("TemporalPositionIndex"), "TemporalPositionIndex", [1, 2, 3]),
        (echo, "EffectiveEchoTime", [2.5, 5.0, 7.5]),
        (diffusion, "DiffusionBValue", [0.0, 500.0, 1000.0]),
        (diffusion, "DiffusionGradientOrientation", None),
        (
            diffusion, ("DiffusionBValue", "DiffusionGradientOrientation"),
            [(0.0, (0.0, 0.0, 0.0)), (500.0, (0.0, 1.0, 0.0)), (1000.0, (0.0, 1.0, 0.0))],
        ),
        (converted, "EchoTime", [5.0, 10.0, 15.0]),
        (frame_time, "AcquisitionDateTime", [datetime(2026, 1, 1, 12, 0, k) for k in range(3)]),
    ],
)  # fmt: skip
def test_g42_g43_g44_g57_frames_are_split_by_their_functional_groups(
    kind: Callable, place: Callable, split_by: Any, keys: list[Any] | None, defined: bool
) -> None:
    made = repeated(3)
    one = frames_of(made, place)
    if not defined:
        for element in one.iterall():
            if element.VR == "SQ":
                element.is_undefined_length = True
                for one_item in element.value:
                    one_item.is_undefined_length_sequence_item = True
    if keys is None:
        with pytest.raises(InconsistentSeries, match=r"different numbers of slices|same position"):
            series_grinder(kind([one]), split_by=split_by)
        return
    found = series_grinder(kind([one]), split_by=split_by)
    assert list(found) == keys
    for volume, series in zip(found.values(), made, strict=True):
        expected = volume_grinder(series)
        numpy.testing.assert_array_equal(volume.array, expected.array)
        numpy.testing.assert_allclose(volume.affine, expected.affine)


def test_what_all_frames_share_counts_and_references_to_others_do_not(kind: Callable) -> None:
    made = repeated(2)
    one = frames_of(made, content("TemporalPositionIndex"))
    one.EchoTime = "99"
    shared = one.SharedFunctionalGroupsSequence[0]
    shared.DerivationImageSequence = [item(SourceImageSequence=[item(EchoTime="1")])]
    found = series_grinder(kind([one]), split_by=("EchoTime", "TemporalPositionIndex"))
    assert list(found) == [(99.0, 1), (99.0, 2)]
    shared.MRTimingAndRelatedParametersSequence = [item(EchoTime="7")]
    found = series_grinder(kind([one]), split_by=("EchoTime", "TemporalPositionIndex"))
    assert list(found) == [(7.0, 1), (7.0, 2)]


def test_g63_what_is_private_never_counts_more_than_what_is_public(kind: Callable) -> None:
    made = repeated(2)
    one = frames_of(made, echo)
    for group in one.PerFrameFunctionalGroupsSequence:
        block = group.private_block(0x2005, "Philips MR Imaging DD 005", create=True)
        other = item(ImagePositionPatient=[9, 9, 9], EffectiveEchoTime=1.0, EchoTime="3")
        other.PlanePositionSequence = [item(ImagePositionPatient=[8, 8, 8])]
        block.add_new(0x0F, "SQ", Sequence([other]))
    found = series_grinder(kind([one]), split_by="EffectiveEchoTime")
    assert list(found) == [2.5, 5.0]
    numpy.testing.assert_allclose(found[2.5].affine, volume_grinder(made[0]).affine)
    with pytest.raises(InconsistentSeries, match="no EchoTime"):
        series_grinder(kind([one]), split_by="EchoTime")


def test_g48_stacks_of_different_planes_are_volumes_of_their_own(kind: Callable) -> None:
    series = make_series(7, 5, 7)
    other = make_series(5, 5, 7, orientation=(0, 1, 0, 0, 0, -1), seed=2)
    one = enhanced([*series, *other])
    for group, single in zip(one.PerFrameFunctionalGroupsSequence, [*series, *other], strict=True):
        group.FrameContentSequence[0].StackID = "1" if single in series else "2"
        group.PlaneOrientationSequence = [
            item(ImageOrientationPatient=single.ImageOrientationPatient)
        ]
    del one.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    with pytest.raises(InconsistentSeries, match=r"different numbers of slices.*'1': 7"):
        series_grinder(kind([one]), split_by="StackID")
    found = series_grinder(kind([one]), split_by="StackID", incomplete="keep")
    assert list(found) == ["1", "2"]
    for volume, expected in zip(found.values(), (series, other), strict=True):
        same_grid = volume_grinder(expected)
        numpy.testing.assert_array_equal(volume.array, same_grid.array)
        numpy.testing.assert_allclose(volume.affine, same_grid.affine)


# The attribute is looked for


@pytest.mark.parametrize(
    "keyword", ["TemporalPositionIdentifier", "EchoTime", "AcquisitionNumber", "KVP"]
)
def test_g35_g46_the_one_attribute_that_separates_is_found(kind: Callable, keyword: str) -> None:
    made = tagged(keyword, [1, 2, 3])
    found = series_grinder(kind(mixed(made.values())))
    assert list(found) == [1, 2, 3]
    for volume, series in zip(found.values(), made.values(), strict=True):
        same(volume, series)
        assert keyword in volume.warnings[0]


def test_attributes_that_split_alike_count_as_one() -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    for number, series in enumerate(made.values()):
        for one in series:
            one.AcquisitionNumber = 7 - number
    assert list(series_grinder(mixed(made.values()))) == [2.5, 5.0]


def test_g46_acquisitions_at_places_of_their_own_are_one_volume(kind: Callable) -> None:
    made = distinct(make_series(6, 5, 7))
    for k, one in enumerate(made):
        one.AcquisitionNumber = k // 3
    found = series_grinder(kind(made))
    assert list(found) == [None]
    same(found[None], made)
    same(volume_grinder(kind(made)), made)


def test_what_no_attribute_separates_lists_the_candidates() -> None:
    made = repeated(4)
    for k, series in enumerate(made):
        for one in series:
            one.EchoTime, one.FlipAngle = k % 2, k // 2
    with pytest.raises(InconsistentSeries) as told:
        series_grinder(mixed(made))
    assert "EchoTime (2 values)" in str(told.value)
    assert "FlipAngle (2 values)" in str(told.value)
    assert len(series_grinder(mixed(made), split_by=("EchoTime", "FlipAngle"))) == 4
    made = repeated(2)
    with pytest.raises(InconsistentSeries, match="differ are none"):
        series_grinder(mixed(made))


def test_two_attributes_that_separate_differently_are_the_users_choice() -> None:
    made = repeated(2)
    for k, series in enumerate(made):
        for number, one in enumerate(series):
            one.EchoTime, one.FlipAngle = k, (k + number) % 2
    with pytest.raises(InconsistentSeries, match="several attributes"):
        series_grinder(mixed(made))


@pytest.mark.parametrize("duplicates", ["identical", "last"])
def test_g9_an_image_that_is_there_twice_needs_no_attribute(
    kind: Callable, duplicates: Any
) -> None:
    made = distinct(make_series(4, 5, 7))
    other = copy.deepcopy(made[1])
    other.SOPInstanceUID = generate_uid()
    if duplicates == "last":
        distinct([other], 9)
    found = series_grinder(kind([*made, other]), duplicates=duplicates)
    assert list(found) == [None]
    assert len(found[None].array) == 4
    with pytest.raises(InconsistentSeries, match="choose split_by"):
        series_grinder(kind([*made, other]), duplicates="error")


# What is missing


def test_a_missing_value_names_the_image(kind: Callable) -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    one = made[5.0][2]
    for empty in (True, False):
        one.EchoTime = None
        if not empty:
            del one.EchoTime
        with pytest.raises(InconsistentSeries, match="no EchoTime") as told:
            series_grinder(kind(mixed(made.values())), split_by="EchoTime")
        assert one.SOPInstanceUID in str(told.value)


@pytest.mark.parametrize("text", [b"x.5 ", b"nan ", b"inf "])
def test_a_value_that_is_none_names_the_image(text: bytes) -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    data = [encode(one)[0] for one in mixed(made.values())]
    start = b"\x18\x00\x81\x00DS\x04\x00"
    data[1] = data[1].replace(start + b"2.5 ", start + text)
    with pytest.raises(InvalidDicom, match="EchoTime") as told:
        series_grinder([LazyDataset(one) for one in data], split_by="EchoTime")
    assert mixed(made.values())[1].SOPInstanceUID in str(told.value)


@pytest.mark.parametrize(
    ("split_by", "tag", "vr", "value"),
    [
        ("AcquisitionDateTime", 0x00080022, "LO", "20260101"),
        ("AcquisitionDateTime", 0x0008002A, "LO", "20260101000000"),
        ("AcquisitionDateTime", 0x00080022, "DA", ["20260101", "20260102"]),
        ("AcquisitionDateTime", 0x00080201, "SH", "+9900"),
        ("AcquisitionDateTime", 0x00080032, "TM", "\r"),
        ("DiffusionBValue", 0x00189087, "LO", "strong"),
        ("DiffusionGradientOrientation", 0x00189089, "LO", "left"),
    ],
)
def test_g41_g44_a_value_written_as_another_kind_names_the_image(
    split_by: str, tag: int, vr: str, value: Any
) -> None:
    made = make_series(2, 4, 5)
    for one in made:
        one.AcquisitionDate, one.AcquisitionTime = "20260101", "000000"
    made[1].add_new(tag, vr, value)
    if split_by.startswith("Diff"):
        made[0].DiffusionBValue, made[0].DiffusionGradientOrientation = 0.0, [0.0, 0.0, 1.0]
    given = [LazyDataset(encode(one)[0]) for one in made]
    with pytest.raises(InvalidDicom, match=str(made[1].SOPInstanceUID)):
        series_grinder(split_by=split_by)(given)


def test_g42_g50_volumes_of_unequal_length_are_told_or_left_out(kind: Callable) -> None:
    made = tagged("TemporalPositionIdentifier", [1, 2, 3])
    given = kind([one for one in mixed(made.values()) if one is not made[3][-1]])
    with pytest.raises(InconsistentSeries, match=r"different numbers of slices.*1: 4; 2: 4; 3: 3"):
        series_grinder(given, split_by="TemporalPositionIdentifier")
    found = series_grinder(given, split_by="TemporalPositionIdentifier", incomplete="drop")
    assert list(found) == [1, 2]
    for volume, series in zip(found.values(), list(made.values())[:2], strict=True):
        same(volume, series)
        assert "3 (3 slices)" in volume.warnings[0]
    kept = series_grinder(given, split_by="TemporalPositionIdentifier", incomplete="keep")
    assert [len(volume.array) for volume in kept.values()] == [4, 4, 3]


def test_g50_volumes_of_equal_length_at_other_places_are_told_or_left_out(kind: Callable) -> None:
    made = tagged("TemporalPositionIdentifier", [1, 2, 3], slices=5)
    whole = [made[1][:-1], made[2][1:], made[3][:-1]]
    split = series_grinder(split_by="TemporalPositionIdentifier")
    with pytest.raises(InconsistentSeries, match="different places along the normal"):
        split(kind(mixed(whole)))
    dropping = series_grinder(split_by="TemporalPositionIdentifier", incomplete="drop")
    found = dropping(kind(mixed(whole)))
    assert list(found) == [1, 3]
    same(found[3], whole[2])
    assert "2 (4 slices)" in found[1].warnings[0]
    # Of two there is none that most are like.
    with pytest.raises(InconsistentSeries, match='incomplete="keep"'):
        dropping(kind(mixed(whole[:2])))
    keeping = series_grinder(split_by="TemporalPositionIdentifier", incomplete="keep")
    for volume, series in zip(keeping(kind(mixed(whole))).values(), whole, strict=True):
        same(volume, series)


def test_an_attribute_that_only_some_images_have_is_named(kind: Callable) -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    del made[5.0][2].EchoTime
    with pytest.raises(InconsistentSeries, match="only some images have EchoTime") as told:
        series_grinder(kind(mixed(made.values())))
    assert made[5.0][2].SOPInstanceUID in str(told.value)


def test_g8_g50_an_image_sent_twice_does_not_make_a_volume_longer(kind: Callable) -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    found = series_grinder(kind([*mixed(made.values()), made[5.0][1]]), split_by="EchoTime")
    same(found[5.0], made[5.0])
    assert list(series_grinder(kind([*mixed(made.values()), made[5.0][1]]))) == [2.5, 5.0]


def test_g8_one_uid_in_two_volumes_is_an_error_that_names_it(kind: Callable) -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    older = copy.deepcopy(made[2.5][1])
    older.EchoTime = 5.0
    given = kind([older, *mixed(made.values())])
    with pytest.raises(InconsistentSeries, match=r"one SOPInstanceUID") as told:
        series_grinder(given, split_by="EchoTime")
    assert older.SOPInstanceUID in str(told.value)
    found = series_grinder(given, split_by="EchoTime", duplicates="last")
    same(found[2.5], made[2.5])
    same(found[5.0], made[5.0])
    assert older.SOPInstanceUID in found[5.0].warnings[0]


def test_g29_a_gap_in_one_volume_names_its_key() -> None:
    made = tagged("EchoTime", [2.5, 5.0], slices=6)
    for series in made.values():
        del series[3]
    with pytest.raises(InconsistentSeries, match=r"EchoTime 2\.5: .*1 missing"):
        series_grinder(mixed(made.values()), split_by="EchoTime")
    found = series_grinder(mixed(made.values()), split_by="EchoTime", gaps="fill")
    assert [volume.shape for volume in found.values()] == [(6, 5, 7)] * 2


def test_options_are_those_of_each_volume() -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    found = series_grinder(split_by="EchoTime", values="stored", dtype="u2")(mixed(made.values()))
    for volume, series in zip(found.values(), made.values(), strict=True):
        numpy.testing.assert_array_equal(
            volume.array, volume_grinder(series, values="stored", dtype="u2").array
        )


@pytest.mark.parametrize(
    "split_by",
    ["EchoTimes", "PixelData", "PatientName", "SourceImageSequence", (), ["EchoTime"], 0x00180081],
)
def test_what_is_no_keyword_is_told_when_the_grinder_is_made(split_by: Any) -> None:
    with pytest.raises(IncorrectlyConfigured, match="split_by"):
        series_grinder(split_by=split_by)


def test_an_unknown_word_for_incomplete_is_told_at_once() -> None:
    with pytest.raises(IncorrectlyConfigured, match="incomplete"):
        series_grinder(incomplete="pad")  # type: ignore[call-overload]


def test_nothing_to_split_is_an_error() -> None:
    with pytest.raises(InconsistentSeries, match="no image"):
        series_grinder([], split_by="EchoTime")


def test_a_change_made_to_a_lazy_dataset_counts() -> None:
    made = tagged("EchoTime", [2.5, 5.0])
    given = lazy([*made[2.5], *made[5.0]])
    for one in given[4:]:
        one.EchoTime = "7.5"
    found = series_grinder(given, split_by="EchoTime")
    assert list(found) == [2.5, 7.5]
    same(found[7.5], made[5.0])

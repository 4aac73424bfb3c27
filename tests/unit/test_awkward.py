"""Awkward series: dicomnode gives the truth or refuses, and the judge of it can tell the difference."""

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from benchmarks import awkward
from benchmarks.awkward import Reading, Verdict
from benchmarks.awkward_cases import Case, cases

from dicomnode import errors
from dicomnode.testing import write_series

CASES = {case.number: case for case in cases()}
# Those that the strict default may refuse; it has to read all others.
REFUSED = {"06", "07", "11", "16", "18", "33"}
OURS = awkward.readers()["dicomnode"]


def verdict(case: Case, folder: Path, read: awkward.Reader) -> Verdict:
    write_series(case.datasets, folder)
    return awkward.judge(case, folder, read)


@pytest.mark.parametrize("number", CASES)
def test_awkward_series_are_right_or_refused_with_their_instances(
    number: str, tmp_path: Path
) -> None:
    case = CASES[number]
    found = verdict(case, tmp_path, OURS)
    assert found.word in ({"PASS", "ERR"} if number in REFUSED else {"PASS"}), found
    # Nothing besides what is right, where others return a wrong volume as well.
    assert found.word == "ERR" or not found.why
    assert (found.word == "ERR") == (number in awkward.OPTIONS)
    if found.word == "ERR":
        assert issubclass(getattr(errors, found.why), errors.DicomnodeError)
        assert any(str(one.SOPInstanceUID) in found.message for one in case.datasets)
        assert found.remedy() and found.remedy() != found.message
    if number in awkward.OPTIONS:
        _, read = awkward.OPTIONS[number]
        assert awkward.judge(case, tmp_path, read) == Verdict("PASS")


def _moved(one: Reading) -> Reading:
    assert one.affine is not None
    affine = one.affine.copy()
    affine[2, 3] += 0.1
    return Reading(one.array, affine)


def _stretched(one: Reading) -> Reading:
    assert one.affine is not None
    return Reading(one.array, one.affine * numpy.array([1, 1, 1.01, 1]))


def _swapped(one: Reading) -> Reading:
    assert one.affine is not None
    return Reading(one.array, one.affine[:, [1, 0, 2, 3]])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda one: Reading(one.array + 1, one.affine), "384 of 384 values"),
        (lambda one: Reading(one.array[:, ::-1], one.affine), "values"),
        (lambda one: Reading(one.array[::-1], one.affine), "values"),
        (lambda one: Reading(one.array[1:], one.affine), "64 of 384 outside"),
        (lambda one: Reading(one.array * numpy.nan, one.affine), "384 of 384 values"),
        (lambda one: Reading(one.array, None), "no affine"),
        (lambda one: Reading(one.array, one.affine * numpy.nan), "no affine"),
        (_moved, "64 of 384 outside"),
        (_stretched, "step 2.02 for 2 mm"),
        (_swapped, "values"),
    ],
)
def test_the_judge_finds_a_damaged_volume(
    damage: Callable[[Reading], Reading], why: str, tmp_path: Path
) -> None:
    def read(folder: Path) -> list[Reading]:
        return [damage(one) for one in OURS(folder)]

    found = verdict(CASES["01"], tmp_path, read)
    assert found.word == "WRONG" and why in found.why


def test_the_judge_misses_a_time_point_that_was_dropped(tmp_path: Path) -> None:
    case = CASES["18"]

    def first_only(folder: Path) -> list[Reading]:
        planes = case.stacks[0]
        affine = planes[0].to_patient.copy()
        affine[:3, 2] = planes[1].to_patient[:3, 3] - planes[0].to_patient[:3, 3]
        return [Reading(numpy.array([plane.values for plane in planes]), affine)]

    found = verdict(case, tmp_path, first_only)
    assert found.word == "WRONG" and "1 of 2 stacks is lost" in found.why


def test_a_resampled_volume_with_the_right_values_passes(tmp_path: Path) -> None:
    case = CASES["07"]

    def resampled(folder: Path) -> list[Reading]:
        """One slice for each mm, linear between those that are there."""
        planes = sorted(case.stacks[0], key=lambda plane: plane.to_patient[2, 3])
        affine = planes[0].to_patient.copy()
        affine[2, 2] = 1.0
        z = numpy.array([plane.to_patient[2, 3] for plane in planes])
        at = numpy.arange(z[0], z[-1] + 0.5)
        values = numpy.array([plane.values for plane in planes]).reshape(len(z), -1)
        array = numpy.array([numpy.interp(at, z, cell) for cell in values.T]).T
        return [Reading(array.reshape(len(at), 8, 8), affine)]

    assert verdict(case, tmp_path, resampled).word == "PASS"


def test_what_a_reader_raises_is_a_refusal(tmp_path: Path) -> None:
    def broken(folder: Path) -> list[Reading]:
        raise OverflowError("no")

    assert verdict(CASES["01"], tmp_path, broken) == Verdict("ERR", "OverflowError", "no")


def test_the_table_has_a_row_for_each_case_and_a_column_for_each_reader() -> None:
    rows, ours = awkward.table({"dicomnode": OURS, "again": OURS})
    assert [row[0] for row in rows[1:]] == list(CASES) == list(ours)
    assert rows[0][2:] == ["dicomnode", "again"]
    assert all(len(row) == 4 for row in rows)
    words = [one.word for one in ours.values()]
    told = f"{words.count('PASS')} / {words.count('ERR')} / 0"
    assert awkward.summary(rows)[2:] == [told, told]
    assert not [number for number, one in ours.items() if one.word == "WRONG"]

"""What do readers make of awkward series? `python -m benchmarks.awkward` prints the table.

Every case of `awkward_cases` is written to a folder and read by dicomnode and its peers. The verdict
is never taken from a reader: every true value is looked up in what was returned, at its position in
the patient, through the affine that was returned with it.

PASS: all values are where they belong. ERR: refused. WRONG: anything else. Exits with 1 where
dicomnode is WRONG.
"""

import contextlib
import io
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from benchmarks.awkward_cases import Case, Plane, cases
from dicomnode.lib.dicom import load
from dicomnode.lib.grinders import series_grinder, volume_grinder
from dicomnode.lib.volume import Volume
from dicomnode.testing import write_series

# A voxel centre this close counts as met: its value is taken as it is.
_CENTRE_MM = 0.02
_RAS = numpy.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Reading:
    """A volume as a reader returned it.

    `array` is (slice, row, column), `affine` maps (column, row, slice, 1) to mm, LPS; None where
    the reader gives no geometry.
    """

    array: NDArray[Any]
    affine: NDArray[numpy.float64] | None


Reader = Callable[[Path], list[Reading]]


class Refused(Exception):
    """A reader that is a program wrote nothing."""


@dataclass(frozen=True)
class Verdict:
    """PASS, ERR or WRONG, and what there is to say about it."""

    word: str
    why: str = ""
    message: str = ""

    def cell(self) -> str:
        shown = f"**{self.word}**" if self.word == "WRONG" else self.word
        return f"{shown} {self.why}".strip()

    def remedy(self) -> str:
        """What a message of ours tells to do: its last clause."""
        return re.split(r"[;:?] ", self.message)[-1]


def _ours(grinder: Callable[[list[Dataset]], Volume | dict[Any, Volume]]) -> Reader:
    def read(folder: Path) -> list[Reading]:
        found = grinder(load(folder))
        volumes = [found] if isinstance(found, Volume) else found.values()
        return [Reading(one.array, one.affine) for one in volumes]

    return read


# What of ours gives the right result where the strict default refuses: by the number of the case,
# how it is called in the table, and the grinder.
OPTIONS: dict[str, tuple[str, Reader]] = {
    "06": ('`gaps="fill"`', _ours(volume_grinder(gaps="fill"))),
    "07": ('`gaps="resample"`', _ours(volume_grinder(gaps="resample"))),
    "11": ('`localizers="drop"`', _ours(volume_grinder(localizers="drop"))),
    "16": ('`series_grinder(split_by="Rows")`', _ours(series_grinder(split_by="Rows"))),
    "18": ("`series_grinder()`", _ours(series_grinder())),
    "33": ('`gaps="fill"`', _ours(volume_grinder(gaps="fill"))),
}


def readers() -> dict[str, Reader]:
    """All that are installed, ours first."""
    found: dict[str, Reader] = {
        "dicomnode": _ours(volume_grinder),
    }
    for make in (_simpleitk, _dcm2niix, _dicom2nifti, _dicom_numpy, _highdicom):
        with contextlib.suppress(ImportError):
            found.update(make())
    return found


def _simpleitk() -> dict[str, Reader]:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)

    def read(folder: Path) -> list[Reading]:
        found = []
        for series in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
            one = SimpleITK.ReadImage(names if len(names) > 1 else names[0])
            affine = numpy.eye(4)
            directions = numpy.array(one.GetDirection()).reshape(3, 3)
            affine[:3, :3] = directions * numpy.array(one.GetSpacing())
            affine[:3, 3] = one.GetOrigin()
            found.append(Reading(SimpleITK.GetArrayFromImage(one), affine))
        return found

    return {f"SimpleITK {version('SimpleITK')}": read}


def _dcm2niix() -> dict[str, Reader]:
    import nibabel

    program = shutil.which("dcm2niix", path=str(Path(sys.executable).parent)) or shutil.which(
        "dcm2niix"
    )
    if program is None:
        return {}
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)

    def read(folder: Path) -> list[Reading]:
        with tempfile.TemporaryDirectory() as out:
            command = [program, "-b", "n", "-z", "n", "-o", out, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            names = sorted(Path(out).glob("*.nii"))
            if not names:
                raise Refused(" ".join(done.stdout.split()[-20:]))
            return [each for name in names for each in _nifti(nibabel.load(name))]

    return {f"dcm2niix {told.stdout.split()[-1].removeprefix('v')}": read}


def _dicom2nifti() -> dict[str, Reader]:
    import dicom2nifti
    import nibabel

    def read(folder: Path) -> list[Reading]:
        with tempfile.TemporaryDirectory() as out:
            target = Path(out, "one.nii")
            dicom2nifti.dicom_series_to_nifti(str(folder), str(target), reorient_nifti=False)
            return _nifti(nibabel.load(target))

    return {f"dicom2nifti {version('dicom2nifti')}": read}


def _nifti(image: Any) -> list[Reading]:
    """NIfTI is (column, row, slice), RAS; with a fourth axis each of its volumes is one."""
    array = numpy.asarray(image.get_fdata())
    array = array.reshape((*array.shape, *[1] * (4 - array.ndim)))
    return [
        Reading(array[..., k].transpose(2, 1, 0), _RAS @ image.affine)
        for k in range(array.shape[3])
    ]


def _dicom_numpy() -> dict[str, Reader]:
    import dicom_numpy

    def read(folder: Path) -> list[Reading]:
        datasets = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
        array, affine = dicom_numpy.combine_slices(datasets, rescale=True)
        return [Reading(array.transpose(2, 1, 0), affine)]

    return {f"dicom-numpy {version('dicom-numpy')}": read}


def _highdicom() -> dict[str, Reader]:
    import highdicom

    def read(folder: Path) -> list[Reading]:
        paths = sorted(folder.iterdir())
        datasets = [pydicom.dcmread(path) for path in paths]
        if "NumberOfFrames" in datasets[0]:
            volume = highdicom.imread(paths[0]).get_volume()
        else:
            volume = highdicom.get_volume_from_series(datasets)
        # Its affine takes the indices in the order of the array.
        return [Reading(volume.array, volume.affine[:, [2, 1, 0, 3]])]

    return {f"highdicom {version('highdicom')}": read}


def judge(case: Case, folder: Path, read: Reader) -> Verdict:
    """Let a reader read the folder of a case, and look up every true value in the result."""
    try:
        with _silence():
            found = read(folder)
    except Exception as error:  # noqa: BLE001 - whatever a reader raises is its result
        return Verdict("ERR", type(error).__name__, " ".join(str(error).split()))
    problems = []
    for stack in case.stacks:
        told = [_compared(stack, one, case.tolerance) for one in found]
        # Of several volumes, that which is wrong in the fewest places.
        wrong, what = min(told, key=lambda one: one[0], default=(1, "no volume"))
        if wrong:
            problems.append(what)
    if not problems:
        wrong = len(found) - len(case.stacks)
        return Verdict("PASS", f"({len(found)} volumes)" if wrong > 0 else "")
    most = "; ".join(dict.fromkeys(problems))
    if len(case.stacks) > 1 and len(problems) < len(case.stacks):
        most = f"{len(problems)} of {len(case.stacks)} stacks is lost: {most}"
    return Verdict("WRONG", f"({most})")


def _compared(stack: Sequence[Plane], found: Reading, tolerance: float) -> tuple[int, str]:
    """How many values of a stack are not where they belong, and in words what is wrong."""
    total = sum(plane.values.size for plane in stack)
    to_index = _to_index(found)
    if to_index is None:
        return total, "no affine"
    outside, off, worst = 0, 0, (0.0, 0.0, 0.0)
    for plane in stack:
        for row, column in numpy.ndindex(plane.values.shape):
            value = _at(found, to_index, plane.to_patient @ (column, row, 0, 1))
            wanted = float(plane.values[row, column])
            if value is None:
                outside += 1
            elif not abs(value - wanted) <= tolerance:
                off += 1
                worst = max(worst, (abs(value - wanted), value, wanted))
    parts = [f"{off} of {total} values, {worst[1]:g} for {worst[2]:g}"] if off else []
    parts += [f"{outside} of {total} outside"] if outside else []
    return outside + off, ", ".join([*parts, *_step(stack, found)])


def _to_index(found: Reading) -> NDArray[numpy.float64] | None:
    """From mm to (column, row, slice), 4x4; None where the affine tells no place in the patient."""
    if found.affine is None or found.array.ndim != 3:
        return None
    affine = found.affine.copy()
    if len(found.array) == 1:
        # A lone slice need not know its extent along the normal.
        affine[:3, 2] = numpy.cross(affine[:3, 0], affine[:3, 1])
    is_known = numpy.isfinite(affine).all() and abs(numpy.linalg.det(affine)) > 1e-9
    return numpy.linalg.inv(affine) if is_known else None


def _step(stack: Sequence[Plane], found: Reading) -> list[str]:
    """The distance from slice to slice, where it is not the true one."""
    if len(stack) < 2 or found.affine is None:
        return []
    places = numpy.array([plane.to_patient[:3, 3] for plane in stack])
    true = float(numpy.linalg.norm(numpy.diff(places, axis=0), axis=1).min())
    step = float(numpy.linalg.norm(found.affine[:3, 2]))
    return [f"step {step:.4g} for {true:.4g} mm"] if abs(step - true) > 1e-3 * true else []


def _at(
    found: Reading, to_index: NDArray[numpy.float64], place: NDArray[numpy.float64]
) -> float | None:
    """The value at a position in the patient, linear between voxel centres; None outside."""
    index = (to_index @ place)[:3]
    nearest = numpy.rint(index)
    centre_mm = numpy.linalg.norm(numpy.linalg.inv(to_index)[:3, :3] @ (index - nearest))
    if centre_mm <= _CENTRE_MM:
        index = nearest
    low = numpy.floor(index).astype(int)
    part = index - low
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        weight = float(numpy.prod(numpy.where(corner, part, 1 - part)))
        if weight == 0:
            continue
        at = (low + corner)[::-1]
        if (at < 0).any() or (at >= found.array.shape).any():
            return None
        total += weight * float(found.array[tuple(at)])
    return total


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Readers print; what they return is all that counts here."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def table(columns: dict[str, Reader]) -> tuple[list[list[str]], dict[str, Verdict]]:
    """The cells of the table with its head, and the verdict on dicomnode for each case."""
    rows = [["", "case", *columns]]
    ours: dict[str, Verdict] = {}
    with tempfile.TemporaryDirectory() as parent:
        for case in cases():
            folder = Path(parent, case.number)
            write_series(case.datasets, folder)
            verdicts = {name: judge(case, folder, read) for name, read in columns.items()}
            cells = [verdict.cell() for verdict in verdicts.values()]
            ours[case.number] = verdicts["dicomnode"]
            if ours[case.number].word == "ERR":
                cells[0] += f": {ours[case.number].remedy()}"
            if case.number in OPTIONS:
                label, read = OPTIONS[case.number]
                chosen = judge(case, folder, read)
                cells[0] += f"; with {label} {chosen.cell()}"
                if chosen.word == "WRONG":
                    ours[case.number] = chosen
            rows.append([case.number, case.name, *cells])
    return rows, ours


def summary(rows: Sequence[Sequence[str]]) -> list[str]:
    """How often each reader is right, refuses and is wrong: a last row of the table."""
    counts = []
    for column in zip(*rows[1:], strict=True):
        words = [cell.split(" ", 1)[0].strip("*:;") for cell in column]
        counts.append(" / ".join(str(words.count(word)) for word in ("PASS", "ERR", "WRONG")))
    return ["", "PASS / ERR / WRONG", *counts[2:]]


def main() -> None:
    """Print the table and dicomnode's messages."""
    rows, ours = table(readers())
    head, *lines = [*rows, summary(rows)]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print("\nWhat dicomnode says where it refuses:\n")
    for number, verdict in ours.items():
        if verdict.word == "ERR":
            print(f"- {number}: `{verdict.why}`: {verdict.message}")
    sys.exit(any(verdict.word == "WRONG" for verdict in ours.values()))


if __name__ == "__main__":
    main()

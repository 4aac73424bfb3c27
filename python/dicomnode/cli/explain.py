"""`dicomnode explain`: what a pipeline does with each image, and what each case waits for.

No node has to run. What decides is the node's own code: the rules of `server.routing`, the
pipeline's `filter`, and `validate` of its inputs.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer
from pydicom.datadict import dictionary_VR

from dicomnode.cli.cases import open_ledger
from dicomnode.cli.edge import CommandFailed, counted, printable
from dicomnode.cli.pipeline import blaming, pipeline_in
from dicomnode.errors import InvalidDicom
from dicomnode.lib.dicom import (
    Header,
    LazyDataset,
    is_dicom,
    is_uid,
    scan,
    tag_of,
)
from dicomnode.lib.redaction import patient_words, patient_words_of, redacted
from dicomnode.server.input import Datasets, waits_for
from dicomnode.server.node import AbstractPipeline
from dicomnode.server.routing import compile_rules, route
from dicomnode.storage.layout import digest_of_file, input_folder
from dicomnode.storage.ledger import OVER, Case, Ledger, State
from dicomnode.storage.outbox import Delivery, Outbox
from dicomnode.storage.waits import Waits

ALL_READY = 0
#: An image is taken by no input, but no case waits.
SOME_REFUSED = 3
#: A case waits for something, or there is none.
SOME_WAIT = 4

_DIRECTORY_RECORD_SEQUENCE = 0x00041220
_MOST_REASONS = 3
_PROGRESS_SECONDS = 0.2
_UNFINISHED = tuple(state for state in State if state not in OVER)


@dataclass(frozen=True)
class _Verdict:
    """What becomes of one image. `problem` is why no input is asked at all."""

    identifier: str
    accepted: tuple[str, ...]
    refused: Mapping[str, str]
    problem: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        if self.problem:
            return (f"refused: {self.problem}",)
        taken = [(name, "accepted") for name in self.accepted]
        not_taken = [(name, f"refused: {reason}") for name, reason in self.refused.items()]
        rows = taken + not_taken or [("", "refused: the pipeline has no inputs")]
        width = max(len(name) for name, _ in rows)
        return tuple(f"{name:{width}}  {told}".strip() for name, told in rows)


@dataclass
class _Group:
    """The images of one identifier: {verdict: files}, and what each input holds."""

    files: dict[_Verdict, list[Path]] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)


def explain_files(paths: Sequence[Path], where: str, each: bool) -> int:
    """Tell what becomes of each image of files and folders; the exit code."""
    with pipeline_in(where) as kind:
        with blaming(where):
            node = kind(start=False)
        judge = _Judge(node)
        groups: dict[str, _Group] = {}
        left_out = 0
        for path, is_object in _walk(paths):
            if not is_object:
                left_out += 1
                continue
            verdict = judge.verdict(path)
            if verdict is None:
                left_out += 1
                continue
            group = groups.setdefault(verdict.identifier, _Group())
            group.files.setdefault(verdict, []).append(path)
            for name in verdict.accepted:
                group.sources.setdefault(name, {})[judge.uid] = str(path)
        if not groups:
            raise CommandFailed(f"no DICOM object in {', '.join(map(str, paths))}")
        code = _tell(node, groups, each)
    if left_out:
        typer.echo(f"{counted(left_out, 'file')} left out: no DICOM object, or a DICOMDIR")
    return code


def explain_cases(root: Path, number: int | None, where: str) -> int:
    """Tell what the cases in the root_data_directory of a node wait for; the exit code."""
    with pipeline_in(where) as kind, open_ledger(root) as ledger:
        with blaming(where):
            node = kind(start=False)
        cases = ledger.cases(*_UNFINISHED) if number is None else [ledger.case(number)]
        waiting = 0
        for case in cases:
            waits = list(_waits_of(node, root, ledger, case))
            _tell_case(node, case.identifier, f"case {case.id} of", case.state.value)
            if case.state not in OVER:
                _tell_waits(waits)
            waiting += bool(waits)
    if not cases:
        typer.echo("no case that waits")
    return SOME_WAIT if waiting else ALL_READY


# What becomes of an image


class _Judge:
    """Says of one file after the other what the node would answer."""

    def __init__(self, node: AbstractPipeline) -> None:
        self._node = node
        self._rules = compile_rules(node.input)
        self._tag = tag_of(node.patient_identifier_tag)
        self._has_filter = type(node).filter is not AbstractPipeline.filter
        self._known: dict[tuple[str, str], Path] = {}
        #: SOPInstanceUID of the last file.
        self.uid = ""

    def verdict(self, path: Path) -> _Verdict | None:
        """None for a DICOMDIR, which nobody sends."""
        self.uid = ""
        try:
            header = scan(str(path))
        except InvalidDicom as error:
            return _refusal(f"0xC000 dataset cannot be understood: {error}")
        if _DIRECTORY_RECORD_SEQUENCE in header:
            return None
        self.uid = header.text(0x00080018)
        for tag, name in ((0x00080018, "SOPInstanceUID"), (0x00080016, "SOPClassUID")):
            if not is_uid(header.text(tag)):
                return _refusal(f"it has no valid {name}, so that it cannot be sent")
        try:
            if self._has_filter and not self._node.filter(LazyDataset(str(path))):
                return _refusal("0xB006 by filter()", self._identifier(header))
            target = route(header, self._rules, self._tag)
        except InvalidDicom as error:
            return _refusal(f"0xC000 dataset cannot be understood: {error}")
        except Exception as error:  # noqa: BLE001  (filter() and functions in required_values)
            told = redacted(f"{type(error).__name__}: {error}", patient_words(header))
            return _refusal(f"0xC000 the pipeline's own code raised {told}")
        if not target.identifier:
            return _refusal(f"0xB007 no patient identifier: {_tag_text(self._tag)} is not there")
        if target.accepted:
            first = self._known.setdefault((target.identifier, self.uid), path)
            if first != path and not _same_content(first, path):
                return _refusal(
                    f"0x0111 {first} has the same SOPInstanceUID and other content",
                    target.identifier,
                )
        return _Verdict(target.identifier, target.accepted, _Frozen(target.refused))

    def _identifier(self, header: Header) -> str:
        return route(header, (), self._tag).identifier


class _Frozen(dict[str, str]):
    """Reasons that can be compared and counted."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def _refusal(problem: str, identifier: str = "") -> _Verdict:
    return _Verdict(identifier, (), _Frozen(), problem)


def _same_content(first: Path, second: Path) -> bool:
    digests = [digest_of_file(path) or path.read_bytes() for path in (first, second)]
    return digests[0] == digests[1]


# What a case waits for


def _what_waits(
    node: AbstractPipeline,
    sources: Mapping[str, Mapping[str, str]],
    refusals: Mapping[str, Counter[str]],
) -> Iterator[str]:
    """A text for each input that does not validate."""
    if not node.input:
        yield "the pipeline has no inputs"
    for name, kind in node.input.items():
        held = sources.get(name, {})
        try:
            told, _ = waits_for(kind(Datasets(held)))
            if not told:
                continue
        except Exception as error:  # noqa: BLE001  (validate is the user's code)
            words = patient_words_of(held.values())
            told = f"its validate() raised {redacted(f'{type(error).__name__}: {error}', words)}"
        yield f"input {name!r} has {counted(len(held), 'image')} and {told}"
        for reason, count in refusals.get(name, Counter()).most_common(_MOST_REASONS):
            yield f"    it refused {counted(count, 'image')}: {reason}"


def _waits_of(node: AbstractPipeline, root: Path, ledger: Ledger, case: Case) -> Iterator[str]:
    """What a case of a node waits for."""
    if case.state in OVER:
        return
    if case.state is State.PROCESSING:
        yield "it is being processed"
        return
    if case.state is State.EXPORTING:
        for export in Outbox(ledger).exports(case.id):
            if export.state is not Delivery.SENT:
                yield f"{export.endpoint} has yet to take its results. {export.problem}".strip()
        return
    sources: dict[str, dict[str, str]] = {}
    for row in ledger.instances(case.id):
        if row.damaged:
            again = "the series again, it forms a new case" if case.sealed else "it again"
            yield f"instance {row.uid} is damaged and was set aside; send {again}"
        else:
            path = root / input_folder(case.folder, row.input) / row.file
            sources.setdefault(row.input, {})[row.uid] = str(path)
    for name in sources:
        if name not in node.input:
            yield f"it holds images of an input {name!r}, which this pipeline lacks"
    yield from _what_waits(node, sources, {})
    reason = Waits(ledger).of(case.id).reason
    if case.state is State.RECEIVING and reason and not reason.startswith("input "):
        # Quiet time, open associations and conflicts are the node's own.
        yield f"the node says: {reason}"
    if case.state is State.FAILED:
        last = (case.error.strip().splitlines() or ["no reason was kept"])[-1].strip()
        yield f"it FAILED, and waits for a retry: {last}"


# Output


def _tell(node: AbstractPipeline, groups: Mapping[str, _Group], each: bool) -> int:
    refused = waiting = cases = 0
    for identifier, group in groups.items():
        count = sum(map(len, group.files.values()))
        if identifier:
            _tell_case(node, identifier, "case", counted(count, "image"))
        else:
            typer.echo(f"{counted(count, 'image')} of no case")
        for verdict, files in group.files.items():
            refused += 0 if verdict.accepted else len(files)
            _tell_files(files, verdict, each)
        if identifier and group.sources:
            cases += 1
            waits = list(_what_waits(node, group.sources, _refusals(group)))
            _tell_waits(waits)
            waiting += bool(waits)
    if waiting or not cases:
        return SOME_WAIT
    return SOME_REFUSED if refused else ALL_READY


def _tell_case(node: AbstractPipeline, identifier: str, what: str, more: str) -> None:
    try:
        is_name = dictionary_VR(tag_of(node.patient_identifier_tag)) == "PN"
    except KeyError:
        is_name = False
    typer.echo(f"{what} {'***' if is_name else printable(identifier)}: {more}")


def _tell_files(files: Sequence[Path], verdict: _Verdict, each: bool) -> None:
    if each:
        for path in files:
            typer.echo(f"  {printable(str(path))}: {printable('; '.join(verdict.lines))}")
        return
    first = printable(str(files[0]))
    more = "" if len(files) == 1 else f" and {len(files) - 1} more"
    typer.echo(f"  {first}{more}")
    for line in verdict.lines:
        typer.echo(f"    {printable(line)}")


def _tell_waits(waits: Sequence[str]) -> None:
    if not waits:
        typer.echo("  complete: all inputs validate")
    for line in waits:
        typer.echo(f"  waits: {printable(line)}" if line[0] != " " else f"    {printable(line)}")


def _refusals(group: _Group) -> dict[str, Counter[str]]:
    """{input: {reason: how many images}}."""
    found: dict[str, Counter[str]] = {}
    for verdict, files in group.files.items():
        for name, reason in verdict.refused.items():
            found.setdefault(name, Counter())[reason] += len(files)
    return found


def _tag_text(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


# Files


def _walk(paths: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Each file below the paths, and whether it is a DICOM object; with progress on a terminal."""
    shown = time.monotonic()
    count = 0
    is_terminal = sys.stderr.isatty()
    for path in paths:
        for file in _files(path):
            is_object = is_dicom(str(file))
            if not is_object and not path.is_dir():
                raise CommandFailed(f"{file} is no DICOM object")
            yield file, is_object
            count += 1
            if is_terminal and time.monotonic() - shown > _PROGRESS_SECONDS:
                shown = time.monotonic()
                typer.echo(f"\r{counted(count, 'file')} ", nl=False, err=True)
    if is_terminal:
        typer.echo("\r\x1b[K", nl=False, err=True)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            yield Path(folder, name)

"""A power cut at any moment (S2): what was flushed is there, of the rest some, and nothing is lost.

A node receives, processes and sends under strace. Then what a power cut could have left of its folder
is written down, for every moment of that run, and a node is started on it.
"""

import os
import random
import runpy
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from tests.e2e.programs import Command, pipeline_file
from tests.faults import power
from tests.faults.endpoint import digest_of_values, values_of

from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import send
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage import journal, journal_file
from dicomnode.storage.ledger import OVER, State
from dicomnode.testing import StoringNode, address_of, make_series, running_node

PATIENTS, IMAGES = 2, 2
FINISHED = (*OVER, State.FAILED)
NODE = """
from dicomnode.storage import journal, journal_file

# Two or three images: one file follows the other.
journal_file.FILE_BYTES = 6 << 10
{more}
class Three(Two):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    def validate(self):
        return self.images >= {images}

class Node(Base):
    input = {{"ct": Three}}
    durability = {durability!r}
    endpoints = [Address("127.0.0.1", {port}, "STORE")]
    export_retry_seconds = 0.1
    def process(self, input_data):
        images, array = input_data["ct"]
        return derive_series(array + 1, images)

print("PID", os.getpid(), flush=True)
"""


@dataclass
class Run:
    """What happened while the node ran."""

    node: type[AbstractPipeline]
    root: Path
    port: int
    sent: list[list[Dataset]]
    calls: list[power.Call]
    #: Results as the endpoint got them, by SOPInstanceUID.
    results: dict[str, Dataset]

    @cached_property
    def images(self) -> dict[str, Dataset]:
        """What was sent, by SOPInstanceUID."""
        return {str(one.SOPInstanceUID): one for series in self.sent for one in series}

    @cached_property
    def answered(self) -> dict[str, int]:
        """The line of the trace at which each image began to be answered."""
        found: dict[str, int] = {}
        for call in self.calls:
            # (0000,0100) of a C-STORE-RSP is 0x8001.
            if call.name == "sendto" and b"\0\0\0\1\2\0\0\0\1\x80" in call.strings[0]:
                uid = _named(self.images, call)
                assert uid is not None
                found[uid] = call.begin
        return found

    @cached_property
    def delivered(self) -> dict[str, tuple[int, int]]:
        """Of each result: the line where it began to be sent, and one where it was acknowledged.

        A result is sent after the one before it was acknowledged, and the release after the last.
        """
        found: dict[str, tuple[int, int]] = {}
        sending: dict[int, str] = {}
        for call in self.calls:
            if call.name not in ("sendto", "sendmsg") or "<socket:" not in call.text:
                continue
            uid, last = _named(self.results, call), sending.get(call.descriptor)
            is_release = b"".join(call.strings)[:1] == b"\5"
            if last and (is_release or uid not in (None, last)):
                found[last] = (found[last][0], call.begin)
                del sending[call.descriptor]
            if uid is not None and uid != last:
                found[uid] = (call.begin, sys.maxsize)
                sending[call.descriptor] = uid
        return found


def _named(uids: Iterable[str], call: power.Call) -> str | None:
    said = b"".join(call.strings)
    return next((uid for uid in uids if uid.encode() in said), None)


def source_of(result: Dataset) -> str:
    """The image that a result was made from."""
    return str(result.SourceImageSequence[0].ReferencedSOPInstanceUID)


@contextmanager
def traced(
    folder: Path, strace: str, durability: str, port: int, more: str = "", images: int = IMAGES
) -> Iterator[Command]:
    """A node whose system calls are written to `trace`, stopped in the end."""
    settings = {"images": images, "durability": durability, "port": port, "more": more}
    file = pipeline_file(folder, NODE.format(**settings))
    trace = str(folder / f"trace-{durability}")
    with Command("run", file, prefix=[strace, *power.OPTIONS, "-o", trace]) as node:
        yield node
        os.kill(int(node.until(r"PID (\d+)")), signal.SIGTERM)
        node.ended()


def run_traced(
    folder: Path,
    strace: str,
    durability: str = "power",
    per_patient: int | None = None,
    more: str = "",
    images: int = IMAGES,
) -> Run:
    """Two patients at once; where they are complete, to the end."""
    series = [make_series(images, 16, 16, patient_id=f"P{k}", seed=k) for k in range(PATIENTS)]
    with running_node(StoringNode, log_level="ERROR") as store:
        with traced(folder, strace, durability, store.port, more, images) as node:
            address = node.address("NODE")
            with ThreadPoolExecutor(PATIENTS) as pool:
                for answers in pool.map(lambda one: send(address, one[:per_patient]), series):
                    assert {one.status for one in answers} == {0x0000}
            if per_patient is None:
                for k in range(PATIENTS):
                    node.until(f"case {k + 1} is done")
        results = {str(one.SOPInstanceUID): one for one in store.received}
        with pytest.MonkeyPatch.context() as own:
            # What it changes is for the node under strace.
            own.setattr(journal_file, "FILE_BYTES", journal_file.FILE_BYTES)
            own.setattr(journal, "MOST_BYTES", journal.MOST_BYTES)
            kind = runpy.run_path(str(folder / "pipeline.py"))["Node"]
        calls = power.calls_of(folder / f"trace-{durability}")
        return Run(kind, folder / "root", store.port, series, calls, results)


def check(run: Run, line: int, left: Path) -> None:
    """Start a node on what a power cut left at a line of the trace, and have it finish."""
    answered = {uid for uid, begin in run.answered.items() if begin < line}
    sent = {uid for uid, (begin, _) in run.delivered.items() if begin < line}
    acknowledged = {uid for uid, (_, end) in run.delivered.items() if end < line}
    if answered:
        # If the ledger were broken, it would be made anew from the files.
        copy = shutil.copytree(left / ".dicomnode", left.with_name("ledger"))
        with closing(sqlite3.connect(copy / "ledger.sqlite")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert database.execute("SELECT count(*) FROM cases").fetchone() > (0,)
        shutil.rmtree(copy)
    with (
        running_node(StoringNode, port=run.port, log_level="CRITICAL") as store,
        running_node(run.node, root_data_directory=left, log_level="CRITICAL") as node,
    ):
        for series in run.sent:
            missing = [one for one in series if one.SOPInstanceUID not in answered]
            if missing:
                answers = send(address_of(node), missing)
                assert {one.status for one in answers} == {0x0000}
        assert node.wait(lambda: all(one.state in FINISHED for one in node.cases()), 60)
        # What was sent again, since its last answer may not have arrived, waits for an operator.
        failed = [one for one in node.cases() if one.state is State.FAILED]
        assert all("it was sent again" in one.error for one in failed), failed
        made = {str(one.SOPInstanceUID): one for one in store.received}
        assert len(made) == len(store.received)
    for uid, result in made.items():
        image = run.images[source_of(result)]
        assert digest_of_values(values_of(result)) == digest_of_values(values_of(image) + 1)
        # What the endpoint may have is the same.
        assert uid not in sent or encode(result) == encode(run.results[uid])
    known = {uid: source_of(run.results[uid]) for uid in run.results}
    delivered = {known[uid] for uid in acknowledged} | {source_of(one) for one in made.values()}
    assert delivered == set(run.images)
    # No image has two results.
    uids = {*made, *sent}
    assert len({known.get(uid) or source_of(made[uid]) for uid in uids}) == len(uids)


def states(run: Run, folder: Path, keep: power.Keeps) -> Iterator[tuple[int, Path]]:
    """What a power cut may leave, and the last line of the trace where it leaves that."""
    disk = power.Disk(run.root)
    last, now, until = folder / "last", folder / "now", 0
    for line in disk.moments(run.calls):
        disk.write(now, keep)
        if last.exists() and content(last) != content(now):
            yield line, last
        shutil.rmtree(last, ignore_errors=True)
        now.rename(last)
        until = line
    yield until + 1, last


def content(place: Path) -> dict[str, bytes | None]:
    """All below a folder."""
    return {
        str(one.relative_to(place)): one.read_bytes() if one.is_file() else None
        for one in place.rglob("*")
    }


@pytest.fixture(scope="module", params=["small", "large"])
def run(
    tmp_path_factory: pytest.TempPathFactory,
    peer: Callable[[str], str],
    request: pytest.FixtureRequest,
) -> Run:
    """Small images are flushed with the journal, large ones by themselves, and after two of them not their names."""
    folder, strace = tmp_path_factory.mktemp("run"), peer("strace")
    if request.param == "small":
        return run_traced(folder, strace)
    # Each has a record of one block.
    more = "journal.MOST_BYTES, journal_file.FILE_BYTES = 0, 3 << 10"
    run = run_traced(folder, strace, more=more, images=2 * IMAGES)
    linked = [one for one in run.calls if one.name == "linkat" and "Image_CT_" in one.text]
    named = [one for one in linked if ".ahead" in one.text]
    assert len(named) >= PATIENTS * (2 * IMAGES - 2) and len(named) < len(linked), linked
    return run


def test_s2_the_model_of_the_disk_is_right(run: Run, tmp_path: Path) -> None:
    disk = power.Disk(run.root)
    assert len(list(disk.moments(run.calls))) > 100
    disk.write(tmp_path / "all", power.keeps_all)
    for name in power.NOT_KEPT:
        (run.root / ".dicomnode" / name).unlink(missing_ok=True)
    assert content(tmp_path / "all") == content(run.root)
    assert len(run.answered) == len(run.delivered) == len(run.images)
    assert all(begin < end < sys.maxsize for begin, end in run.delivered.values())


@pytest.mark.timeout(600)
def test_s2_nothing_is_lost_where_a_disk_keeps_only_what_was_flushed(
    run: Run, tmp_path: Path
) -> None:
    first = min(run.answered.values())
    checked = 0
    for number, (line, left) in enumerate(states(run, tmp_path, power.keeps_nothing)):
        # Before that nothing was promised but to start.
        if line > first or number % 4 == 0:
            check(run, line, left)
            checked += 1
    assert checked > 20


@pytest.mark.timeout(600)
def test_s2_nothing_is_lost_where_a_disk_keeps_some_of_what_was_not_flushed(
    run: Run, tmp_path: Path
) -> None:
    moments = list(power.Disk(run.root).moments(run.calls))
    first = next(k for k, line in enumerate(moments) if line > min(run.answered.values()))
    chance = random.Random(1)
    for number, wanted in enumerate(sorted(chance.sample(range(first, len(moments)), 25))):
        disk = power.Disk(run.root)
        for _ in zip(range(wanted + 1), disk.moments(run.calls), strict=False):
            pass
        left = tmp_path / str(number)
        disk.write(left, power.keeps_some(number))
        check(run, moments[wanted] + 1, left)


@pytest.mark.parametrize("is_started_again", [False, True])
def test_s2_what_was_kept_without_flushing_is_flushed_when_a_node_starts_with_it(
    is_started_again: bool, tmp_path: Path, peer: Callable[[str], str]
) -> None:
    run = run_traced(tmp_path, peer("strace"), "process", per_patient=1)
    assert len(run.answered) == PATIENTS
    if is_started_again:
        with traced(tmp_path, peer("strace"), "power", run.port) as node:
            node.address("NODE")
        run.calls += power.calls_of(tmp_path / "trace-power", run.calls[-1].end + 1)
    disk = power.Disk(run.root)
    *_, last = disk.moments(run.calls)
    disk.write(tmp_path / "left", power.keeps_nothing)
    if is_started_again:
        check(run, last + 1, tmp_path / "left")
        return
    # Else this could not fail.
    with pytest.raises(AssertionError):
        check(run, last + 1, tmp_path / "left")

"""How soon after the last image does `process` start, with and without `eager`, in threads and workers?

dcmtk's dcmsend sends a series over one association. Its log tells when it got the last C-STORE response
and when it asked for the release; the node tells, by the same clock, when it called `process`. The
array that `process` got is compared with that of the other way of reading.

`python -m benchmarks.eager KIND COUNT FOLDER` is the node, in a process of its own.
"""

import hashlib
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pydicom

from benchmarks import compressed, receive
from benchmarks.series import in_slice_order
from benchmarks.timing import Row, Table, scratch
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import running_node

#: None is uncompressed.
SYNTAXES = ("JPEG 2000 Lossless", "RLE Lossless", None)
#: When it is decoded, and where it is processed.
KINDS = ("eager", "later", "eager, in a worker process", "later, in a worker process")
# Half as much again as a slice takes.
_AT_HAND_BYTES = 3 << 19
# What a step of the node ends with, in its log.
_STEPS = (
    ("closed:", "the association ends"),
    ("is ready", "it is ready"),
    ("ground in", "it is ground"),
)


def lengthen(source: Path, folder: Path, slices: int) -> Path:
    """A series with so many slices: those of another, again and again, each at a place of its own."""
    folder.mkdir(parents=True)
    found = in_slice_order(source)
    first = pydicom.dcmread(found[0])
    across = numpy.cross(*numpy.reshape(first.ImageOrientationPatient, (2, 3)).astype(float))
    start = numpy.array(first.ImagePositionPatient, float)
    for k in range(slices):
        dataset = pydicom.dcmread(found[k % len(found)])
        dataset.SOPInstanceUID = f"{first.SOPInstanceUID[:50]}.{k}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = k + 1
        dataset.ImagePositionPatient = [f"{value:.6f}" for value in start + across * k]
        dataset.save_as(folder / f"{k:04}.dcm")
    return folder


def compress(native: Path, folder: Path, name: str | None, slices: int) -> Path:
    """The series in a transfer syntax."""
    if name is None:
        return native
    return compressed.write(native, folder, replace(compressed.SYNTAXES[name], slices=slices))


@dataclass(frozen=True)
class Run:
    """What one sending took, in seconds, and what came out."""

    after_response: float
    after_release: float
    whole: float
    steps: dict[str, float]
    digest: str


def answer(title: str, folder: Path, repeats: int) -> list[Table]:
    """All kinds of node, in turn; and where the time goes. Nothing without dcmsend."""
    sender = receive.program("dcmsend")
    if sender is None:
        return []
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            runs[kind].append(_run(kind, sender, folder))
    digests = {run.digest for one in runs.values() for run in one}
    wrong = "" if len(digests) == 1 else "the kinds give other values"
    rows = [_row(kind, runs[kind], wrong) for kind in KINDS]
    parts = [
        Row(f"{kind}: until {step}", tuple(run.steps[step] for run in runs[kind]))
        for kind in KINDS
        for step in runs[kind][0].steps
    ]
    return [
        Table(
            f"{title}: from the last C-STORE response to process()",
            tuple(rows),
            ("after release ms", "whole s"),
        ),
        Table(f"{title}: where that time goes", tuple(parts)),
    ]


def _row(kind: str, runs: list[Run], wrong: str) -> Row:
    release = 1000 * statistics.median(run.after_release for run in runs)
    whole = statistics.median(run.whole for run in runs)
    seconds = tuple(run.after_response for run in runs)
    return Row(kind, seconds, None, (f"{release:.1f}", f"{whole:.2f}"), wrong)


def _run(kind: str, sender: str, folder: Path) -> Run:
    paths = in_slice_order(folder)
    place = scratch()
    node = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.eager", kind, str(len(paths)), f"{place}/root"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert node.stdout is not None
    try:
        port = int(node.stdout.readline())
        started, response, release = _send(sender, port, paths, place)
        told = json.loads(node.stdout.readline())
    finally:
        node.stdout.close()
        node.wait(60)
    entered, steps = told["process"], {}
    last = response
    for name, when in [*told["steps"], ("process() is called", entered)]:
        steps[name] = when - last
        last = when
    return Run(entered - response, entered - release, entered - started, steps, told["digest"])


def _send(sender: str, port: int, paths: list[Path], place: Path) -> tuple[float, float, float]:
    """When dcmsend asked for the association, got the last response, and asked for the release."""
    config = place / "log.cfg"
    config.write_text(receive.LOG)
    done = subprocess.run(
        [sender, "-lc", str(config), "127.0.0.1", str(port), *map(str, paths)],
        env=receive.environment(no_delay=True),
        capture_output=True,
        text=True,
        check=True,
    )
    said: dict[str, float] = {}
    for line in done.stderr.splitlines():
        clock, _, message = line.partition(" ")
        for start in (
            "requesting association",
            "received c-store response",
            "releasing association",
        ):
            if message.lower().startswith(start):
                today = datetime.combine(datetime.now().date(), datetime.min.time())
                since = datetime.strptime(clock, "%H:%M:%S.%f") - datetime(1900, 1, 1)
                said[start] = (today + since).timestamp()
    started, response, release = said.values()
    return started, response, release


class Series(AbstractInput):
    """Complete once the last image has come."""

    image_grinder = numpy_grinder
    count = 0
    #: What the system has for the result, so that no kind gets what another one let go: a virtual machine
    #: that gives unused memory back takes seconds to get it again. It is held until it is needed.
    at_hand: ClassVar[list[Any]] = []

    def validate(self) -> bool:
        if self.images < self.count:
            return False
        self.at_hand.clear()
        return True


class EagerSeries(Series):
    eager = True


class Node(AbstractPipeline):
    """At module level, so that a worker process can import it."""

    ae_title = "ANY-SCP"
    told = ""

    def process(self, input_data: dict[str, Any]) -> Iterable[pydicom.Dataset]:
        entered = time.time()
        digest = hashlib.sha256(memoryview(input_data["series"]).cast("B")).hexdigest()
        Path(self.told).write_text(json.dumps({"process": entered, "digest": digest}))
        return []


class Later(Node):
    input = {"series": Series}


class Eager(Node):
    input = {"series": EagerSeries}


def serve(kind: str, count: int, root: str) -> None:
    """A node that processes one case and tells when."""

    class Steps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for text, name in _STEPS:
                message = record.getMessage()
                if text == "ground in" and text in message:
                    seconds = float(message.split()[-2])
                    steps.append(("it is claimed", record.created - seconds))
                if text in message:
                    steps.append((name, record.created))

    steps: list[tuple[str, float]] = []
    Series.count = count
    Series.at_hand.append(numpy.ones(_AT_HAND_BYTES * count, numpy.uint8))
    told = Path(f"{root}.told")
    settings = {
        "log_path": f"{root}.log",
        "told": str(told),
        "isolation": "process" if "worker" in kind else "thread",
    }
    with running_node(
        Eager if kind.startswith("eager") else Later, root_data_directory=root, **settings
    ) as node:
        node.logger.addHandler(Steps())
        print(node.port, flush=True)
        node.wait(lambda: bool(node.cases()) and node.cases()[0].state.value == "DONE", 600)
    print(json.dumps({"steps": steps, **json.loads(told.read_text())}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])

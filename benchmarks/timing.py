"""Fair timing: every result is checked first, the peers run in turn, memory has its own process.

What is timed is one whole call, with a warm page cache. The result is freed after the clock has
stopped, for every peer alike.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_SCRATCH = tempfile.TemporaryDirectory()


def scratch() -> Path:
    """A new folder that stays until this process ends.

    ext4 gives the inodes of deleted files away again only minutes later, and looks at each of them
    whenever a file is made near them: the deletions of one run would slow the next one.
    """
    return Path(tempfile.mkdtemp(dir=_SCRATCH.name))


@dataclass(frozen=True)
class Peer:
    """One way to get the result. `checked` is False for a floor that has another result."""

    name: str
    run: Callable[[], Any]
    checked: bool = True


class Question(Protocol):
    """What a module of this package has to have."""

    TITLE: str

    def peers(self, folder: Path) -> list[Peer]:
        """All peers over a folder of DICOM files; ours first."""

    def reference(self, folder: Path) -> Any:
        """The right result, by slow and obvious means."""

    def same(self, result: Any, reference: Any) -> bool:
        """Whether a peer's result is the right one."""


@dataclass(frozen=True)
class Row:
    """What was measured of one peer; `wrong` tells why there is nothing."""

    name: str
    seconds: tuple[float, ...] = ()
    peak_mb: float | None = None
    extra: tuple[str, ...] = ()
    wrong: str = ""

    @property
    def median(self) -> float:
        """Median of all runs, seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Table:
    """The rows of one question; ratios are to the first row."""

    title: str
    rows: tuple[Row, ...]
    extra_columns: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """Head and rows as text."""
        head = ["", "median ms", "min ms", "ratio", *self.extra_columns, "peak MB"]
        return [head, *(self._line(row) for row in self.rows)]

    def _line(self, row: Row) -> list[str]:
        if row.wrong or not row.seconds:
            return [row.name, row.wrong or "not measured", *[""] * (3 + len(self.extra_columns))]
        base = self.rows[0]
        ratio = f"{row.median / base.median:.2f}" if base.seconds else ""
        extra = row.extra or ("",) * len(self.extra_columns)
        peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        return [row.name, _ms(row.median), _ms(min(row.seconds)), ratio, *extra, peak]

    def text(self) -> str:
        """Aligned columns."""
        cells = self.cells()
        widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
        lines = [
            "  ".join(
                [line[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            ).rstrip()
            for line in cells
        ]
        return "\n".join([self.title, *lines])

    def markdown(self) -> str:
        """A table for the documentation."""
        head, *rows = self.cells()
        lines = [
            f"**{self.title}**",
            "",
            "| " + " | ".join(head) + " |",
            "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
        return "\n".join(lines)


def answer(question: Question, folder: Path, repeats: int, tiny: Path | None) -> Table:
    """Check and time all peers of one question; with `tiny`, measure their memory as well.

    `tiny` is a small series: each peer reads it first in its own process, so that what it imports
    and loads once does not count.
    """
    peers = question.peers(folder)
    wanted = question.reference(folder)
    wrong: dict[str, str] = {}
    for peer in peers:
        try:
            if peer.checked and not question.same(peer.run(), wanted):
                wrong[peer.name] = "wrong values"
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            wrong[peer.name] = f"fails: {type(error).__name__}"
    del wanted
    runs: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(repeats):
        for peer in peers:
            if peer.name not in wrong:
                runs[peer.name].append(_time(peer.run))
    peaks: dict[str, float | None] = {}
    if tiny is not None:
        name = getattr(question, "__name__", "")
        peaks = {one: _peak(name, one, folder, tiny) for one in runs if one not in wrong}
    return Table(
        question.TITLE,
        tuple(
            Row(one, tuple(seconds), peaks.get(one), wrong=wrong.get(one, ""))
            for one, seconds in runs.items()
        ),
    )


def _time(run: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _peak(module: str, name: str, folder: Path, tiny: Path) -> float | None:
    command = [sys.executable, "-m", "benchmarks.peak", module, name, str(folder), str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def memory_mb(field: str, process: int | str = "self") -> float:
    """`VmRSS` or `VmHWM` (its peak) of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def cpu_seconds(process: int) -> float:
    """User and system time of a process so far, from 10 ms ticks."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:.0f}"

"""`dicomnode cases` and `dicomnode retry`: the ledger of a node, which may be running."""

import fcntl
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from dicomnode.cli.edge import CommandFailed, printable
from dicomnode.storage.ledger import OVER, Case, Ledger, State
from dicomnode.storage.waits import Wait, Waits

_HEAD = ("CASE", "IDENTIFIER", "STATE", "IMAGES", "ATTEMPTS", "AGE", "WHY")
_UNFINISHED = tuple(state for state in State if state not in OVER)


def list_cases(root: Path, show_all: bool) -> None:
    """A table of the cases that are not over, or of all."""
    with open_ledger(root) as ledger:
        found = ledger.cases(*(State if show_all else _UNFINISHED))
        waits = Waits(ledger)
        rows = [_row(case, _images(ledger, case), waits.of(case.id)) for case in found]
        hidden = 0 if show_all else len(ledger.cases(*OVER))
    if rows:
        table(_HEAD, rows)
    else:
        typer.echo("no case" if show_all else "no unfinished case")
    if hidden:
        typer.echo(f"{hidden} more {'is' if hidden == 1 else 'are'} over: --all shows them")


def show_case(root: Path, number: int) -> None:
    """One case with the whole of its error."""
    with open_ledger(root) as ledger:
        case = ledger.case(number)
        images = _images(ledger, case)
        wait = Waits(ledger).of(number)
    for name, value in (
        ("case", str(case.id)),
        ("identifier", case.identifier),
        ("state", case.state.value),
        ("images", images),
        ("attempts", str(case.attempts)),
        ("folder", str(root / case.folder)),
        ("first image", _moment(case.created)),
        ("last change", _moment(case.changed)),
        *([("why", why)] if (why := _why(case, wait, "")) else []),
    ):
        typer.echo(f"{name:12} {printable(value)}")
    if case.error:
        typer.echo("")
        for line in case.error.rstrip().splitlines():
            typer.echo(printable(line))


def retry_case(root: Path, number: int) -> None:
    """FAILED -> READY or EXPORTING, and when that happens."""
    with open_ledger(root) as ledger:
        state = ledger.retry(number)
    if node_runs(root):
        when = "the running node takes it up now"
    else:
        when = "it runs at the next start of the node"
    typer.echo(f"case {number} is {state.value}: {when}")


def complete_case(root: Path, number: int) -> None:
    """Have a case processed as it is, and tell when that happens."""
    with open_ledger(root) as ledger:
        Waits(ledger).force(number)
    if node_runs(root):
        when = "the running node takes it up now"
    else:
        when = "at the next start of the node"
    typer.echo(f"case {number} is processed as it is: {when}")


@contextmanager
def open_ledger(root: Path) -> Iterator[Ledger]:
    """The ledger below a root. Nothing is made where there is none."""
    path = root / ".dicomnode" / "ledger.sqlite"
    if not path.is_file():
        raise CommandFailed(
            f"{root} holds no ledger: --root has to be the root_data_directory of a node"
        )
    try:
        ledger = Ledger(path)
        try:
            yield ledger
        finally:
            ledger.close()
    except sqlite3.Error as error:
        raise CommandFailed(f"the ledger {path} cannot be used: {error}") from error


def node_runs(root: Path) -> bool:
    """Whether a node holds the lock of this root."""
    try:
        with (root / ".dicomnode" / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _why(case: Case, wait: Wait, error: str) -> str:
    """Why a case is where it is."""
    parts = []
    if wait.revises:
        parts.append(f"revision of case {wait.revises}")
    if wait.too_late_for:
        parts.append(f"came after case {wait.too_late_for} was done")
    if wait.forced:
        parts.append("processed as it is")
    if error:
        parts.append(error)
    elif wait.reason and (wait.forced or case.state is State.RECEIVING):
        parts.append(wait.reason)
    return "; ".join(parts)


def _row(case: Case, images: str, wait: Wait) -> tuple[str, ...]:
    lines = case.error.strip().splitlines() or [""]
    return (
        str(case.id), case.identifier, case.state.value, images, str(case.attempts),
        _age(time.time() - case.created), _why(case, wait, lines[-1].strip()),
    )  # fmt: skip


def _images(ledger: Ledger, case: Case) -> str:
    """`ct: 140, pet: 96 (1 damaged)`."""
    parts = []
    for name, (total, damaged) in ledger.counts(case.id).items():
        parts.append(f"{name}: {total}" + (f" ({damaged} damaged)" if damaged else ""))
    return ", ".join(parts) or "-"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Show rows below a head, each column as wide as it needs."""
    cells = [head, *[tuple(map(printable, row)) for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head) - 1)]
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        typer.echo("  ".join([*padded, row[-1]]).rstrip())


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

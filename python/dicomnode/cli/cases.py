"""`dicomnode cases` and `dicomnode retry`: the ledger of a node, which may be running."""

import fcntl
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from dicomnode.cli.edge import CommandFailed, printable
from dicomnode.storage.ledger import Case, Ledger, State

_HEAD = ("CASE", "IDENTIFIER", "STATE", "IMAGES", "ATTEMPTS", "AGE", "ERROR")
_UNFINISHED = tuple(state for state in State if state is not State.DONE)


def list_cases(root: Path, show_all: bool) -> None:
    """A table of the cases that are not DONE, or of all."""
    with open_ledger(root) as ledger:
        found = ledger.cases(*(State if show_all else _UNFINISHED))
        rows = [_row(case, _images(ledger, case)) for case in found]
        hidden = 0 if show_all else len(ledger.cases(State.DONE))
    if rows:
        table(_HEAD, rows)
    else:
        typer.echo("no case" if show_all else "no unfinished case")
    if hidden:
        typer.echo(f"{hidden} more {'is' if hidden == 1 else 'are'} DONE: --all shows them")


def show_case(root: Path, number: int) -> None:
    """One case with the whole of its error."""
    with open_ledger(root) as ledger:
        case = ledger.case(number)
        images = _images(ledger, case)
    for name, value in (
        ("case", str(case.id)),
        ("identifier", case.identifier),
        ("state", case.state.value),
        ("images", images),
        ("attempts", str(case.attempts)),
        ("folder", str(root / case.folder)),
        ("first image", _moment(case.created)),
        ("last change", _moment(case.changed)),
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


def _row(case: Case, images: str) -> tuple[str, ...]:
    lines = case.error.strip().splitlines() or [""]
    return (
        str(case.id), case.identifier, case.state.value, images, str(case.attempts),
        _age(time.time() - case.created), lines[-1].strip(),
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

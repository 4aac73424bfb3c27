"""Log lines: which association and case each is about, one line for each event, and no patient.

Solves that a line can be followed without reading it: what runs inside `about` puts its numbers on
each line that is logged there, also by user code with `self.logger`. What user code says of its
patient is taken out (see `dicomnode.lib.redaction`).
"""

import json
import logging
import os
import re
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass
from datetime import UTC, datetime
from datetime import time as time_of_day
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path
from stat import S_ISREG
from typing import Any

from dicomnode.errors import DicomnodeError, IncorrectlyConfigured
from dicomnode.lib.dicom import printable
from dicomnode.lib.redaction import redacted

#: The `log_format` with one JSON object in each line.
JSON = "json"

_DATE_FORMAT = "%Y/%m/%d %H:%M:%S"
_PACKAGE = str(Path(__file__).parents[1])
# Into so many files at least a log is cut, so that what goes first is not all of it.
_MOST_FILES = 16
_MOVED = re.compile(r"(\.\d{4}-\d{2}-\d{2})(?:\.(\d{1,9}))?", re.ASCII)


@dataclass(eq=False)
class Scope:
    """What runs now is about these."""

    association: int | None = None
    case: int | None = None
    #: Tells what may not be in a log, when it is asked the first time.
    patient: Callable[[], frozenset[str]] | None = None
    _words: frozenset[str] | None = None
    _token: "Token[Scope] | None" = None

    def __enter__(self) -> "Scope":
        self._token = _scope.set(self)
        if self.patient is not None:
            _active.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        _active.discard(self)
        if self._token is not None:
            _scope.reset(self._token)

    def hide(self, text: str) -> str:
        """A text without what is known of the patient that this is about."""
        if self.patient is None:
            return text
        if self._words is None:
            try:
                self._words = self.patient()
            except (DicomnodeError, sqlite3.Error, OSError, KeyError):
                return "*** (not shown: the patient cannot be read now)"
        return redacted(text, self._words)


_NOTHING = Scope()
# Those that have a patient. A thread that user code starts has none of its own.
_active: set[Scope] = set()
_scope: ContextVar[Scope] = ContextVar("dicomnode_scope", default=_NOTHING)


def about(
    *,
    association: int | None = None,
    case: int | None = None,
    patient: Callable[[], frozenset[str]] | None = None,
) -> Scope:
    """What is logged inside, in this thread, is about these; what is None stays as it is outside."""
    outer = _scope.get()
    return Scope(
        outer.association if association is None else association,
        outer.case if case is None else case,
        outer.patient if patient is None else patient,
    )


def current() -> Scope:
    """What runs in this thread is about."""
    return _scope.get()


def hide_patient(patient: Callable[[], frozenset[str]]) -> None:
    """From now on, until the innermost `about` ends, do not show this patient."""
    scope = current()
    if scope is not _NOTHING:
        scope.patient, scope._words = patient, None
        _active.add(scope)


class Annotating(logging.Filter):
    """Puts association and case on each record, and takes the patient out of what users say.

    Also for handlers that the program has given to its own loggers: they see the record after this.
    """

    def __init__(self, shows_patients: Callable[[], bool]) -> None:
        super().__init__()
        self._shows_patients = shows_patients

    def filter(self, record: logging.LogRecord) -> bool:
        scope = current()
        record.association, record.case = scope.association, _case_of(record, scope)
        is_ours = record.pathname.startswith(_PACKAGE)
        if is_ours and record.levelno < logging.WARNING and not record.exc_info:
            return True
        scopes = [scope]
        if scope.patient is None:
            scopes = [] if is_ours else list(_active)
        if scopes and not self._shows_patients():
            record.msg, record.args = _hide(record.getMessage(), scopes), None
            if record.exc_info and record.exc_info[1] is not None:
                lines = traceback.format_exception(record.exc_info[1])
                record.exc_text = indented(_hide("".join(lines), scopes))
                # A handler that formats it itself would show everything.
                record.exc_info = None
            elif record.exc_text:
                record.exc_text = _hide(record.exc_text, scopes)
        return True


def _hide(text: str, scopes: Iterable[Scope]) -> str:
    for scope in scopes:
        text = scope.hide(text)
    return text


def tell(logger: logging.Logger, level: int, text: str, trace: str = "") -> None:
    """Log what was said in another process, with the traceback from there."""
    if logger.isEnabledFor(level):
        # It is no line of ours, wherever it is logged.
        record = logger.makeRecord(logger.name, level, "", 0, printable(text), (), None)
        if trace:
            record.exc_text = indented(trace)
        logger.handle(record)


def _case_of(record: logging.LogRecord, scope: Scope) -> int | None:
    """A line of ours that begins with a case has its number as first argument."""
    args = record.args
    if str(record.msg).startswith("case %d") and isinstance(args, tuple) and args:
        return args[0] if isinstance(args[0], int) else scope.case
    return scope.case


class LogFile(TimedRotatingFileHandler):
    """A log that starts anew every Monday at midnight, and before that where it has grown large.

    The files of `weeks` older weeks are kept, 0 for all, but no more than `most_bytes` in all: the oldest
    go first. So nobody fills a disk by what he has the node write. A file that is moved aside is called
    `<name>.<Monday>`, and where one week has several, `<name>.<Monday>.1` and so on.

    Where it cannot be written, the node goes on: that is told once, not with every line.
    """

    def __init__(self, path: Path, weeks: int, most_bytes: int) -> None:
        """Raises OSError."""
        super().__init__(path, when="W0", atTime=time_of_day(), backupCount=weeks, encoding="utf-8")
        self._is_lost = False
        self._most_bytes = most_bytes
        self._file_bytes = most_bytes // _MOST_FILES
        self._delete_old()

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802
        """Whether a week is over or the file is large."""
        if super().shouldRollover(record):
            return True
        if self.stream is None:
            self.stream = self._open()
        state = os.fstat(self.stream.fileno())
        return S_ISREG(state.st_mode) and state.st_size >= self._file_bytes

    def doRollover(self) -> None:  # noqa: N802
        """Move the file aside, and delete what is too old or too much."""
        super().doRollover()
        self._delete_old()

    def rotation_filename(self, default_name: str) -> str:
        """A name that no file has, behind those of the same week."""
        numbers = [number for name, number, _ in self._moved() if name == Path(default_name).name]
        return f"{default_name}.{max(numbers) + 1}" if numbers else default_name

    def getFilesToDelete(self) -> list[str]:  # noqa: N802
        """None for the base class: `_delete_old` counts weeks and bytes, not files."""
        return []

    def _moved(self) -> list[tuple[str, int, Path]]:
        """The files that were moved aside, the newest first: name of the week, number in it, path."""
        base = Path(self.baseFilename)
        found = []
        for path in base.parent.iterdir():
            match = _MOVED.fullmatch(path.name.removeprefix(base.name))
            if match is not None and path.name.startswith(base.name):
                found.append((base.name + match[1], int(match[2] or 0), path))
        return sorted(found, reverse=True)

    def rotate(self, source: str, dest: str) -> None:
        """Move the file aside; where its folder does not allow that, it grows to the size of all."""
        try:
            super().rotate(source, dest)
        except OSError:
            if self._file_bytes == self._most_bytes:
                raise
            self._file_bytes = self._most_bytes

    def _delete_old(self) -> None:
        left = self._most_bytes - self._file_bytes
        weeks: set[str] = set()
        with suppress(OSError):
            for week, _, path in self._moved():
                weeks.add(week)
                left -= path.stat().st_size
                if left < 0 or (self.backupCount and len(weeks) > self.backupCount):
                    path.unlink(missing_ok=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, and tell on the screen where lines begin and end to be lost."""
        was_lost, self._is_lost = self._is_lost, False
        super().emit(record)
        if was_lost != self._is_lost:
            how = "cannot be written, lines are lost" if self._is_lost else "is written again"
            print(f"dicomnode: the log {self.baseFilename} {how}", file=sys.stderr)  # noqa: T201

    def close(self) -> None:
        """Write what is left, as far as that works."""
        with suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """The line is lost; what it says may not be on the screen."""
        del record
        self._is_lost = True


def formatter(log_format: str) -> logging.Formatter:
    """The formatter for a `log_format`. Raises IncorrectlyConfigured for one that is none."""
    if log_format == JSON:
        return _JsonFormatter()
    try:
        found = _TextFormatter(log_format, _DATE_FORMAT)
        record = logging.LogRecord("", 0, "", 0, "", None, None)
        record.association = record.case = None
        found.format(record)
    except (ValueError, TypeError, KeyError) as error:
        raise IncorrectlyConfigured(
            f"log_format {log_format!r} cannot be used: {error}; use {JSON!r}, or a format as in the "
            "module logging"
        ) from error
    return found


def indented(trace: str) -> str:
    """The lines of a traceback below a message, none of which can pass for a message."""
    return "\n".join(f"    {printable(line)}" for line in trace.splitlines())


class _TextFormatter(logging.Formatter):
    """One line for a message whatever it holds; a traceback is indented below it.

    The numbers that a record is about stand at its end, where its text does not tell them.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        said = printable(record.message)
        numbers = [
            f"{name} {number}"
            for name in ("association", "case")
            if (number := getattr(record, name, None)) is not None
            and f"{name} {number}" not in said
        ]
        record.message = f"{said} [{', '.join(numbers)}]" if numbers else said
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return indented(super().formatException(ei))


class _JsonFormatter(logging.Formatter):
    """One object in one line: time (UTC), level, logger, association, case, message, error."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "association": getattr(record, "association", None),
            "case": getattr(record, "case", None),
            "message": record.getMessage(),
        }
        error = record.exc_text
        if record.exc_info and not error:
            error = indented(self.formatException(record.exc_info))
        if error:
            fields["error"] = "\n".join(line.removeprefix("    ") for line in error.splitlines())
        return json.dumps({name: value for name, value in fields.items() if value is not None})

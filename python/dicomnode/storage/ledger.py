"""The ledger: which cases there are, and in which state, in one SQLite file.

Every change of state is one transaction, durable when the method returns (WAL, synchronous FULL), but
for `settle`, and for `expect`, which relies on the journal. The states and who moves a case between them:

    RECEIVING --validated--> READY --claimed--> PROCESSING --results kept--> EXPORTING --all
    acknowledged--> DONE

From READY a case goes back to RECEIVING where it no longer validates. From any state but DONE and
EXPIRED it can become FAILED, which is kept and listed. `retry` leads out of it, and, for a case that was not
claimed yet, the next image that makes it validate.
"""

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from dicomnode.errors import NoRoom, OutOfResources, UnknownCase
from dicomnode.storage.damage import check_values


class State(Enum):
    """How far a case has come."""

    RECEIVING = "RECEIVING"  # images arrive; not all inputs validate yet
    READY = "READY"  # all inputs validated; waits for a worker
    PROCESSING = "PROCESSING"  # a worker grinds and processes
    EXPORTING = "EXPORTING"  # the results are kept; endpoints have not acknowledged all
    DONE = "DONE"  # every endpoint acknowledged every result; files are deleted
    FAILED = "FAILED"  # an error was recorded; everything is kept until a retry
    EXPIRED = "EXPIRED"  # no image came for study_expiration_days; files are deleted


@dataclass(frozen=True)
class Case:
    """One row of the ledger."""

    id: int
    identifier: str
    folder: str
    state: State
    sealed: bool
    attempts: int
    error: str
    created: float
    changed: float


class InstanceRow(NamedTuple):
    """One instance in one input of a case."""

    input: str
    uid: str
    file: str
    size: int
    digest: bytes
    damaged: bool = False


@dataclass(frozen=True)
class ResultRow:
    """One dataset that process() returned."""

    number: int
    uid: str
    sop_class: str
    syntax: str
    file: str
    digest: bytes


#: In these states a case is over, and its files are deleted.
OVER = (State.DONE, State.EXPIRED)
_TABLES = files(__package__).joinpath("ledger.sql").read_text("utf-8")
# A case is in one of these until it is claimed.
_UNCLAIMED = (State.RECEIVING, State.READY, State.FAILED)
# Of the tables in ledger.sql; a ledger of another version is left alone.
_VERSION = 2
# So long somebody else who uses the ledger is waited for.
_BUSY_SECONDS = 30
# So many results are known when they come back.
MOST_MADE = 200_000
# SQLite counts no further.
_MOST = 1 << 63
# A sender tries again within hours; the same images after that are a wish to process them again.
_REPEAT_SECONDS = 24 * 3600.0
_INSERT = (
    "INSERT OR REPLACE INTO instances (case_id, input, uid, file, size, digest, damaged) VALUES "
)
_ROW = "(?, ?, ?, ?, ?, ?, ?)"
# So many rows are one statement.
_MOST_AT_ONCE = 32
# More are not left to wait.
_MOST_EXPECTED = 512
_CASE = "id, identifier, folder, state, sealed, attempts, error, created, changed"


class Ledger:
    """Cases and their states. `path` None keeps them in memory. Safe to use from any thread.

    Without `flush` changes survive a killed process, not a power cut.
    """

    def __init__(self, path: Path | None, flush: bool = True) -> None:
        self._path = path
        self._lock = threading.RLock()
        # Rows that the journal has, and the tables not yet.
        self._expected: list[tuple[object, ...]] = []
        self._expecting = threading.Lock()
        self._durable = "FULL" if flush else "OFF"
        self._synchronous = ""
        self._connection = sqlite3.connect(
            ":memory:" if path is None else path,
            isolation_level=None,
            check_same_thread=False,
            timeout=_BUSY_SECONDS,
        )
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version != _VERSION and tables:
                raise sqlite3.OperationalError(
                    f"it has version {version}, this dicomnode knows version {_VERSION}"
                )
            if version != _VERSION:
                # Not without need: there may be no room for it.
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")
            self._connection.executescript(_TABLES)
            found = self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            check_values(self._connection, _TABLES, {state.value for state in State})
        except UnicodeDecodeError:
            # What SQLite told of it cannot be told.
            self._connection.close()
            raise sqlite3.DatabaseError("bytes that are no text in its schema") from None
        except BaseException:
            self._connection.close()
            raise

    @property
    def _db(self) -> sqlite3.Connection:
        """The tables, with all rows that were expected; `_connection` is for what tells of none.

        With `_lock` held. Raises OutOfResources where they cannot be written.
        """
        if self._expected and not self._connection.in_transaction:
            self.write_expected()
        return self._connection

    def close(self) -> None:
        """Close the file; further calls fail."""
        with self._lock:
            # Where that fails, the journal has it yet.
            with suppress(OutOfResources, sqlite3.Error, MemoryError):
                self.write_expected()
            self._connection.close()

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Changes that become durable together, or not at all. For this package.

        Raises OutOfResources where the ledger cannot be written.
        """
        with self._lock:
            database = self._db
            try:
                self._flush_commits(durable)
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    # SQLite may have done so itself.
                    if database.in_transaction:
                        database.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                raise self._not_written(error) from error

    def _flush_commits(self, durable: bool) -> None:
        wanted = self._durable if durable or self._durable == "OFF" else "NORMAL"
        if wanted != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted

    def _not_written(self, error: sqlite3.OperationalError) -> NoRoom:
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            # Then the next change finds room in what the log of the ledger has already.
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        return NoRoom(f"the ledger cannot be written: {error}")

    def changes(self) -> int:
        """A number that differs after another process has changed the ledger."""
        with self._lock:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def rows(self, query: str, arguments: tuple[object, ...]) -> list[tuple[object, ...]]:
        """What a query finds; one that asks for instances also those that were expected. For this package."""
        with self._lock:
            database = self._db if "instances" in query else self._connection
            return database.execute(query, arguments).fetchall()

    # Cases

    def open_case(self, identifier: str, folder: str) -> Case:
        """The case that takes new images of an identifier; made, with that folder, where none is."""
        now = time.time()
        with self.transaction() as db:
            row = db.execute(
                f"SELECT {_CASE} FROM cases WHERE identifier = ? AND sealed = 0", (identifier,)
            ).fetchone()
            if row is None:
                db.execute(
                    "INSERT INTO cases (identifier, folder, state, created, changed) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (identifier, folder, State.RECEIVING.value, now, now),
                )
                row = db.execute(
                    f"SELECT {_CASE} FROM cases WHERE id = last_insert_rowid()"
                ).fetchone()
        return _case(row)

    def failed_case(self, identifier: str, folder: str, error: str) -> Case:
        """A new case that takes no images and waits for a retry."""
        now = time.time()
        with self.transaction() as db:
            db.execute(
                "INSERT INTO cases (identifier, folder, state, sealed, error, created, changed) "
                "VALUES (?, ?, ?, 1, ?, ?, ?)",
                (identifier, folder, State.FAILED.value, error, now, now),
            )
            row = db.execute(f"SELECT {_CASE} FROM cases WHERE id = last_insert_rowid()").fetchone()
        return _case(row)

    def park(self, case_id: int, error: str) -> bool:
        """RECEIVING, or FAILED before it was claimed, -> FAILED and sealed; whether it was.

        It takes no more images and waits for a retry.
        """
        with self.transaction() as db:
            cursor = db.execute(
                "UPDATE cases SET state = ?, sealed = 1, error = ?, changed = ? "
                "WHERE id = ? AND state IN (?, ?) AND NOT sealed",
                (
                    State.FAILED.value,
                    error,
                    time.time(),
                    case_id,
                    State.RECEIVING.value,
                    State.FAILED.value,
                ),
            )
            return cursor.rowcount == 1

    def interrupt(self, case_id: int) -> None:
        """Remember what a case holds, since its sender may send that again."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO interrupted (case_id, input, uid, digest) "
                "SELECT case_id, input, uid, digest FROM instances "
                "WHERE case_id = ? AND NOT damaged AND length(digest) > 0",
                (case_id,),
            )

    def release(self, case_id: int) -> None:
        """Forget what `interrupt` remembered of a case."""
        with self.transaction() as db:
            db.execute("DELETE FROM interrupted WHERE case_id = ?", (case_id,))

    def interrupt_all(self, *states: State) -> None:
        """Remember what the cases in these states hold, as `interrupt`, in one transaction."""
        wanted = [state.value for state in states]
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO interrupted (case_id, input, uid, digest) "
                "SELECT i.case_id, i.input, i.uid, i.digest FROM cases AS c "
                "JOIN instances AS i ON i.case_id = c.id LEFT JOIN interrupted AS o "
                "ON o.case_id = i.case_id AND o.input = i.input AND o.uid = i.uid "
                f"WHERE c.state IN ({', '.join('?' * len(wanted))}) "
                "AND NOT i.damaged AND length(i.digest) > 0 AND o.digest IS NOT i.digest",
                wanted,
            )

    def repeated(self, case_id: int) -> list[tuple[int, list[tuple[InstanceRow, bytes]]]]:
        """The earlier cases of the same identifier that held all that this one holds, newest first.

        Only those that were interrupted, and changed within the last `_REPEAT_SECONDS`. With each the
        instances whose digest of then, which comes with them, is of another kind than their own, so
        that their content has yet to be compared.
        """
        with self._lock:
            found = self._db.execute(
                "SELECT old.id FROM cases AS new JOIN cases AS old "
                "ON old.identifier = new.identifier AND old.id < new.id AND old.sealed "
                "AND new.created < old.changed + ? "
                "WHERE new.id = ? AND EXISTS (SELECT 1 FROM instances WHERE case_id = new.id) "
                "AND NOT EXISTS ("
                "SELECT 1 FROM instances AS i WHERE i.case_id = new.id AND NOT EXISTS ("
                "SELECT 1 FROM interrupted AS o WHERE o.case_id = old.id AND o.input = i.input "
                "AND o.uid = i.uid AND (o.digest = i.digest OR length(o.digest) != length(i.digest))"
                ")) ORDER BY old.id DESC",
                (_REPEAT_SECONDS, case_id),
            ).fetchall()
            return [(int(row[0]), self._unlike(case_id, int(row[0]))) for row in found]

    def _unlike(self, case_id: int, earlier: int) -> list[tuple[InstanceRow, bytes]]:
        rows = self._db.execute(
            "SELECT i.input, i.uid, i.file, i.size, i.digest, i.damaged, o.digest "
            "FROM instances AS i JOIN interrupted AS o ON o.input = i.input AND o.uid = i.uid "
            "WHERE i.case_id = ? AND o.case_id = ? AND length(o.digest) != length(i.digest)",
            (case_id, earlier),
        ).fetchall()
        return [(InstanceRow(*row[:6]), row[6]) for row in rows]

    def put_back(self, case_id: int, error: str) -> None:
        """PROCESSING -> READY, with the reason; the attempt does not count."""
        with self.transaction() as db:
            db.execute(
                "UPDATE cases SET state = ?, attempts = max(attempts - 1, 0), error = ?, "
                "changed = ? WHERE id = ? AND state = ?",
                (State.READY.value, error, time.time(), case_id, State.PROCESSING.value),
            )

    def excuse(self) -> None:
        """Take back the attempts that are under way: the node is stopped, it did not die."""
        with self.transaction() as db:
            db.execute(
                "UPDATE cases SET attempts = attempts - 1 WHERE state = ?",
                (State.PROCESSING.value,),
            )

    def case(self, case_id: int) -> Case:
        """One case. Raises UnknownCase."""
        if not 0 < case_id < _MOST:
            raise UnknownCase(f"there is no case {case_id}")
        with self._lock:
            row = self._connection.execute(
                f"SELECT {_CASE} FROM cases WHERE id = ?", (case_id,)
            ).fetchone()
        if row is None:
            raise UnknownCase(f"there is no case {case_id}")
        return _case(row)

    def cases(self, *states: State) -> list[Case]:
        """All cases, oldest first; with `states` only those in one of them."""
        wanted = [state.value for state in states or State]
        marks = ", ".join("?" * len(wanted))
        with self._lock:
            rows = self._connection.execute(
                f"SELECT {_CASE} FROM cases WHERE state IN ({marks}) ORDER BY id", wanted
            ).fetchall()
        return [_case(row) for row in rows]

    def over_with_files(self) -> list[Case]:
        """The cases that are over and whose files were not all deleted."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT {_CASE} FROM cases WHERE state IN (?, ?) AND (EXISTS "
                "(SELECT 1 FROM instances WHERE case_id = cases.id) OR EXISTS "
                "(SELECT 1 FROM results WHERE case_id = cases.id)) ORDER BY id",
                [state.value for state in OVER],
            ).fetchall()
        return [_case(row) for row in rows]

    def last_case(self) -> int:
        """The number of the newest case that there ever was."""
        found = self.rows("SELECT seq FROM sqlite_sequence WHERE name = 'cases'", ())
        return int(str(found[0][0])) if found else 0

    def cases_with_results(self) -> set[int]:
        """The numbers of the cases whose results are kept."""
        with self._lock:
            rows = self._connection.execute("SELECT DISTINCT case_id FROM results").fetchall()
        return {int(row[0]) for row in rows}

    def summary(self) -> dict[State, tuple[int, float]]:
        """{state: (how many cases are in it, when the first of them came into it)}."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT state, count(*), min(changed) FROM cases GROUP BY state"
            ).fetchall()
        return {State(state): (count, first) for state, count, first in rows}

    def undelivered(self, endpoint: str) -> int:
        """How many results an endpoint has yet to acknowledge, of cases that are not DONE."""
        with self._lock:
            row = self._connection.execute(
                "SELECT count(*) FROM results AS r JOIN cases AS c ON c.id = r.case_id "
                "WHERE c.state != ? AND NOT EXISTS (SELECT 1 FROM deliveries AS d "
                "WHERE d.case_id = r.case_id AND d.endpoint = ? AND d.uid = r.uid AND d.stored)",
                (State.DONE.value, endpoint),
            ).fetchone()
        return int(row[0])

    def case_in(self, folder: str) -> Case | None:
        """The newest case with this folder that is not over; None where there is none."""
        with self._lock:
            row = self._connection.execute(
                f"SELECT {_CASE} FROM cases WHERE folder = ? AND state NOT IN (?, ?) "
                "ORDER BY id DESC LIMIT 1",
                (folder, *(state.value for state in OVER)),
            ).fetchone()
        return None if row is None else _case(row)

    def folder_is_taken(self, folder: str) -> bool:
        """Whether a case that may still have files uses this folder."""
        with self._lock:
            row = self._db.execute(
                "SELECT 1 FROM cases WHERE folder = ? AND (state NOT IN (?, ?) OR EXISTS "
                "(SELECT 1 FROM instances WHERE case_id = cases.id)) LIMIT 1",
                (folder, *(state.value for state in OVER)),
            ).fetchone()
        return row is not None

    def move(
        self, case_id: int, expected: State, state: State, *, seal: bool = False, error: str = ""
    ) -> bool:
        """Change a state if it is the expected one, and tell whether it was.

        Entering PROCESSING counts an attempt.
        """
        with self.transaction() as db:
            cursor = db.execute(
                "UPDATE cases SET state = ?, sealed = max(sealed, ?), error = ?, changed = ?, "
                "attempts = attempts + ? WHERE id = ? AND state = ?",
                (
                    state.value,
                    int(seal),
                    error,
                    time.time(),
                    int(state is State.PROCESSING),
                    case_id,
                    expected.value,
                ),
            )
            return cursor.rowcount == 1

    def settle(self, case_id: int, state: State) -> None:
        """RECEIVING, READY or FAILED -> RECEIVING or READY, whichever it is not yet.

        Written, but not flushed to the disk before the next change: it is what validate() said, and
        each start asks that again of all cases that take images.
        """
        before = [one.value for one in _UNCLAIMED if one is not state]
        with self.transaction(durable=False) as db:
            db.execute(
                "UPDATE cases SET state = ?, error = '', changed = ? WHERE id = ? AND state IN (?, ?)",
                (state.value, time.time(), case_id, *before),
            )

    def fail(self, case_id: int, error: str) -> None:
        """Any state but DONE and EXPIRED -> FAILED, with the reason.

        A case that was not claimed yet still takes images, and can become READY by them.
        """
        with self.transaction() as db:
            db.execute(
                "UPDATE cases SET state = ?, error = ?, changed = ? "
                "WHERE id = ? AND state NOT IN (?, ?)",
                (State.FAILED.value, error, time.time(), case_id, *(one.value for one in OVER)),
            )

    def retry(self, case_id: int) -> State:
        """FAILED -> EXPORTING where results are kept, else READY.

        Raises UnknownCase for a case that does not exist or has not failed.
        """
        with self.transaction() as db:
            case = self.case(case_id)
            if case.state is not State.FAILED:
                raise UnknownCase(
                    f"case {case_id} is {case.state.value}; only a FAILED case can be retried"
                )
            has_results = db.execute(
                "SELECT 1 FROM results WHERE case_id = ? LIMIT 1", (case_id,)
            ).fetchone()
            state = State.EXPORTING if has_results else State.READY
            db.execute(
                "UPDATE cases SET state = ?, attempts = 0, error = '', changed = ?, "
                "remade = remade + ? WHERE id = ?",
                (state.value, time.time(), not has_results, case_id),
            )
            self.restart_exports(case_id)
        return state

    def restart_exports(self, case_id: int) -> None:
        """Within a transaction: count anew the attempts to deliver a case, the next of which is now."""
        self._db.execute(
            "DELETE FROM outages WHERE endpoint IN "
            "(SELECT endpoint FROM exports WHERE case_id = ? AND state != 'SENT')",
            (case_id,),
        )
        self._db.execute("DELETE FROM exports WHERE case_id = ? AND state != 'SENT'", (case_id,))
        self._db.execute("DELETE FROM commitments WHERE case_id = ?", (case_id,))
        self._db.execute(
            "UPDATE deliveries SET attempts = 0 WHERE case_id = ? AND NOT stored", (case_id,)
        )

    def forget(self, keep: int) -> None:
        """Drop the oldest cases that are over and whose files are gone, all but the newest `keep`."""
        with self.transaction() as db:
            old = db.execute(
                "SELECT id FROM cases WHERE state IN (?, ?) AND NOT EXISTS "
                "(SELECT 1 FROM instances WHERE case_id = cases.id) "
                "ORDER BY id DESC LIMIT -1 OFFSET ?",
                (*(state.value for state in OVER), keep),
            ).fetchall()
            for table, column in (
                ("deliveries", "case_id"),
                ("exports", "case_id"),
                ("commitments", "case_id"),
                ("interrupted", "case_id"),
                ("cases", "id"),
            ):
                db.executemany(f"DELETE FROM {table} WHERE {column} = ?", old)

    # Instances

    def expect(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Record instances as stored, which the journal has: many at once, before the ledger is used next.

        Each row begins with its case. Raises nothing: they may be answered already.
        """
        with self._expecting:
            self._expected += rows
            is_much = len(self._expected) >= _MOST_EXPECTED
        if is_much:
            # They stay expected, and whoever uses the ledger next is told.
            with suppress(OutOfResources, sqlite3.Error, MemoryError):
                self.write_expected()

    def write_expected(self) -> None:
        """Write what was expected. It need not be flushed, since the journal has it. Raises OutOfResources."""
        with self._lock:
            if self._connection.in_transaction:
                raise OutOfResources("the ledger is in use")
            # They are expected until they are written.
            rows = self._expected[:]
            if not rows:
                return
            try:
                self._flush_commits(durable=False)
                self._connection.execute("BEGIN IMMEDIATE")
                self._insert(rows)
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise self._not_written(error) from error
                raise
            with self._expecting:
                del self._expected[: len(rows)]

    def add_instances(self, case_id: int, rows: Iterable[InstanceRow]) -> None:
        """Record instances as stored, durably. Their files have to be durable before.

        Raises OutOfResources where that was not written.
        """
        with self.transaction():
            self._insert([(case_id, *row) for row in rows])

    def _insert(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Many in a statement: one for each would wait for the interpreter after each."""
        for start in range(0, len(rows), _MOST_AT_ONCE):
            some = rows[start : start + _MOST_AT_ONCE]
            self._connection.execute(
                _INSERT + ", ".join([_ROW] * len(some)), tuple(chain.from_iterable(some))
            )

    def instances(self, case_id: int) -> list[InstanceRow]:
        """The instances of a case, damaged ones too."""
        with self._lock:
            rows = self._db.execute(
                "SELECT input, uid, file, size, digest, damaged FROM instances WHERE case_id = ?",
                (case_id,),
            ).fetchall()
        return [InstanceRow(*row) for row in rows]

    def counts(self, case_id: int) -> dict[str, tuple[int, int]]:
        """For each input how many instances there are, and how many of them are damaged."""
        with self._lock:
            rows = self._db.execute(
                "SELECT input, count(*), sum(damaged) FROM instances WHERE case_id = ? "
                "GROUP BY input ORDER BY input",
                (case_id,),
            ).fetchall()
        return {name: (total, damaged) for name, total, damaged in rows}

    # Results

    def seed(self, case_id: int) -> bytes:
        """What the UIDs of results are made from: the same as long as nobody has them made anew."""
        ((identity, remade),) = self.rows(
            "SELECT seed, remade FROM identity, cases WHERE cases.id = ?", (case_id,)
        )
        text = f"{case_id} {remade}"
        return hashlib.sha256(bytes(identity) + text.encode()).digest()  # type: ignore[call-overload]

    def export(self, case_id: int, rows: Iterable[ResultRow]) -> None:
        """PROCESSING -> EXPORTING together with the rows of all results."""
        with self.transaction() as db:
            db.executemany(
                "INSERT INTO results (case_id, number, uid, sop_class, syntax, file, digest) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (case_id, row.number, row.uid, row.sop_class, row.syntax, row.file, row.digest)
                    for row in rows
                ],
            )
            db.execute(
                "INSERT OR IGNORE INTO made (uid, case_id) SELECT uid, case_id FROM results AS r "
                "WHERE case_id = ? AND NOT EXISTS "
                "(SELECT 1 FROM instances AS i WHERE i.case_id = r.case_id AND i.uid = r.uid)",
                (case_id,),
            )
            db.execute(
                "DELETE FROM made WHERE number <= (SELECT max(number) FROM made) - ?", (MOST_MADE,)
            )
            cursor = db.execute(
                "UPDATE cases SET state = ?, changed = ? WHERE id = ? AND state = ?",
                (State.EXPORTING.value, time.time(), case_id, State.PROCESSING.value),
            )
            if cursor.rowcount != 1:
                raise UnknownCase(f"case {case_id} is not being processed")

    def results(self, case_id: int) -> list[ResultRow]:
        """The results of a case in the order in which process() gave them."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT number, uid, sop_class, syntax, file, digest FROM results "
                "WHERE case_id = ? ORDER BY number",
                (case_id,),
            ).fetchall()
        return [ResultRow(*row) for row in rows]

    def queue(self, state: State) -> list[int]:
        """The numbers of the cases in a state, oldest first."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT id FROM cases WHERE state = ? ORDER BY id", (state.value,)
            ).fetchall()
        return [row[0] for row in rows]

    def drop_results(self, case_id: int, error: str) -> None:
        """EXPORTING -> FAILED without results, in one step: a retry makes them anew."""
        with self.transaction() as db:
            cursor = db.execute(
                "UPDATE cases SET state = ?, error = ?, changed = ? WHERE id = ? AND state = ?",
                (State.FAILED.value, error, time.time(), case_id, State.EXPORTING.value),
            )
            if cursor.rowcount == 1:
                for table in ("deliveries", "exports", "results", "commitments"):
                    db.execute(f"DELETE FROM {table} WHERE case_id = ?", (case_id,))

    def clear(self, case_id: int) -> None:
        """Forget instances and results of a case, whose files are gone."""
        with self.transaction() as db:
            db.execute("DELETE FROM instances WHERE case_id = ?", (case_id,))
            db.execute("DELETE FROM results WHERE case_id = ?", (case_id,))


def _case(row: tuple[object, ...]) -> Case:
    number, identifier, folder, state, sealed, attempts, error, created, changed = row
    return Case(
        id=int(str(number)),
        identifier=str(identifier),
        folder=str(folder),
        state=State(state),
        sealed=bool(sealed),
        attempts=int(str(attempts)),
        error=str(error),
        created=float(str(created)),
        changed=float(str(changed)),
    )

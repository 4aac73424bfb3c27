"""Waits: what the cases that are not complete wait for, and since when, in the ledger.

Solves that this is visible from outside, outlives a restart, and can be cut short by a command that
runs beside the node.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dicomnode.errors import UnknownCase
from dicomnode.storage.ledger import Case, Ledger, State

_COLUMNS = "seconds, reason, forced, revises, too_late_for, conflict"


@dataclass(frozen=True)
class Wait:
    """One row of the table `waits`."""

    seconds: float = 0.0
    reason: str = ""
    forced: bool = False
    revises: int = 0
    too_late_for: int = 0
    conflict: str = ""


class Waits:
    """The waiting of the cases in a ledger. Safe to use from any thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def of(self, case_id: int) -> Wait:
        """How a case waits, or has waited."""
        rows = self._ledger.rows(f"SELECT {_COLUMNS} FROM waits WHERE case_id = ?", (case_id,))
        if not rows:
            return Wait()
        seconds, reason, forced, revises, too_late_for, conflict = rows[0]
        return Wait(
            seconds=float(str(seconds)),
            reason=str(reason),
            forced=bool(forced),
            revises=int(str(revises)),
            too_late_for=int(str(too_late_for)),
            conflict=str(conflict),
        )

    def tell(self, case_id: int, reason: str) -> None:
        """What a case waits for. It is not flushed: each start finds it out again."""
        self._set("reason", {case_id: reason}, durable=False)

    def keep(self, seconds: Mapping[int, float]) -> None:
        """How many seconds have gone by since the last image of each of these cases."""
        self._set("seconds", seconds)

    def revise(self, case_id: int, earlier: int) -> None:
        """A case has the images of an earlier one, and more."""
        self._set("revises", {case_id: earlier})

    def come_too_late(self, case_id: int, earlier: int) -> None:
        """The images of a case belong to an earlier one that is over."""
        self._set("too_late_for", {case_id: earlier})

    def conflict(self, case_id: int, uid: str) -> None:
        """An image of a case came under another identifier before."""
        self._set("conflict", {case_id: uid})

    def unforce(self, case_id: int) -> None:
        """A case cannot be processed as it is."""
        self._set("forced", {case_id: 0})

    def force(self, case_id: int) -> None:
        """RECEIVING, READY, or FAILED without results -> READY, to be processed as it is.

        Raises UnknownCase for any other case.
        """
        with self._ledger.transaction() as db:
            case = self._ledger.case(case_id)
            if case.state not in (State.RECEIVING, State.READY, State.FAILED):
                raise UnknownCase(
                    f"case {case_id} is {case.state.value}; only one that waits for images, or has "
                    "FAILED, can be processed as it is"
                )
            if db.execute("SELECT 1 FROM results WHERE case_id = ? LIMIT 1", (case_id,)).fetchone():
                raise UnknownCase(
                    f"case {case_id} was processed, and its results wait to be sent: retry it"
                )
            if not db.execute(
                "SELECT 1 FROM instances WHERE case_id = ? AND NOT damaged LIMIT 1", (case_id,)
            ).fetchone():
                raise UnknownCase(f"case {case_id} holds no image")
            db.execute("INSERT OR IGNORE INTO waits (case_id) VALUES (?)", (case_id,))
            db.execute("UPDATE waits SET forced = 1 WHERE case_id = ?", (case_id,))
            db.execute(
                "UPDATE cases SET state = ?, attempts = 0, error = '', changed = ? WHERE id = ?",
                (State.READY.value, time.time(), case_id),
            )

    def expire(self, case_id: int) -> bool:
        """A case that takes images and waits for them, also one that FAILED so -> EXPIRED.

        Tells whether it was one. It takes no more images, and its files may be deleted.
        """
        with self._ledger.transaction() as db:
            cursor = db.execute(
                "UPDATE cases SET state = ?, sealed = 1, changed = ? "
                "WHERE id = ? AND state IN (?, ?) AND NOT sealed",
                (
                    State.EXPIRED.value,
                    time.time(),
                    case_id,
                    State.RECEIVING.value,
                    State.FAILED.value,
                ),
            )
            if cursor.rowcount != 1:
                return False
            # It was not processed: what is sent again is no repeat.
            db.execute("DELETE FROM interrupted WHERE case_id = ?", (case_id,))
            return True

    # Late images

    def sealed_cases(self, identifier: str, before: int) -> list[Case]:
        """The cases of an identifier, before this one, that take no images; the newest first."""
        rows = self._ledger.rows(
            "SELECT id FROM cases WHERE identifier = ? AND sealed AND id < ? ORDER BY id DESC",
            (identifier, before),
        )
        return [self._ledger.case(int(str(row[0]))) for row in rows]

    def remember_series(self, case_id: int, uids: Iterable[str]) -> None:
        """The series of a case, whose files are about to be deleted."""
        with self._ledger.transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO series (case_id, uid) VALUES (?, ?)",
                [(case_id, uid) for uid in uids],
            )

    def series(self, case_id: int) -> set[str]:
        """The series of a case whose files are deleted."""
        rows = self._ledger.rows("SELECT uid FROM series WHERE case_id = ?", (case_id,))
        return {str(row[0]) for row in rows}

    def identifiers_of_images(self) -> list[tuple[str, str]]:
        """(SOPInstanceUID, identifier) of all images that are kept."""
        rows = self._ledger.rows(
            "SELECT DISTINCT uid, identifier FROM instances JOIN cases ON id = case_id "
            "ORDER BY case_id",
            (),
        )
        return [(str(uid), str(identifier)) for uid, identifier in rows]

    def forget(self) -> None:
        """Drop what belongs to cases that the ledger has dropped."""
        with self._ledger.transaction(durable=False) as db:
            for table in ("waits", "series"):
                db.execute(f"DELETE FROM {table} WHERE case_id NOT IN (SELECT id FROM cases)")

    def _set(self, column: str, values: Mapping[int, object], durable: bool = True) -> None:
        with self._ledger.transaction(durable) as db:
            db.executemany(
                f"INSERT INTO waits (case_id, {column}) VALUES (?, ?) "
                f"ON CONFLICT (case_id) DO UPDATE SET {column} = excluded.{column}",
                list(values.items()),
            )

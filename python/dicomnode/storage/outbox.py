"""The outbox: what the ledger knows of results on their way to endpoints.

Solves that nothing is sent twice without need, and nothing is forgotten: what an endpoint said of each
result is kept, and for each case and endpoint whether all is delivered, is tried again, or was given
up.
"""

import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from dicomnode.errors import UnknownCase
from dicomnode.storage.ledger import MOST_MADE, Ledger, State

# Ten bits for each result that is known.
_BITS = 21


class Delivery(Enum):
    """How far the results of one case have come with one endpoint, or one result of them."""

    PENDING = "PENDING"  # not all is acknowledged; it is tried again
    SENT = "SENT"  # the endpoint acknowledged all
    DEAD = "DEAD"  # given up, and kept until `retry`


@dataclass(frozen=True)
class Export:
    """The results of one case for one endpoint."""

    case_id: int
    endpoint: str
    state: Delivery = Delivery.PENDING
    #: Failed attempts in a row, since the endpoint acknowledged a result.
    attempts: int = 0
    #: How often it was refused as a whole, in a way that does not pass by itself.
    refusals: int = 0
    #: Seconds that it has waited between attempts.
    waited: float = 0.0
    #: When it is tried again, in seconds since 1970.
    next: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Outage:
    """An endpoint that takes no associations."""

    endpoint: str
    attempts: int
    next: float
    problem: str


@dataclass(frozen=True)
class Answer:
    """What an endpoint said of one result the last time, and how often it was sent."""

    uid: str
    status: int
    stored: bool
    comment: str = ""
    attempts: int = 1


_EXPORT = "case_id, endpoint, state, attempts, refusals, waited, next, problem"


class Outbox:
    """Deliveries in a ledger. Safe to use from any thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        # Nearly every image is no result of ours, which this tells without asking the ledger:
        # the newest results, and those before them.
        self._made = _Seen(), _Seen()
        self._made[0].add([str(row[0]) for row in self._ledger.rows("SELECT uid FROM made", ())])
        self._remembering = threading.Lock()

    # What there is

    def pending(self, endpoint: str) -> list[Export]:
        """What has yet to go to an endpoint: of every case that is EXPORTING, oldest first."""
        rows = self._ledger.rows(
            "SELECT c.id, ?, e.state, e.attempts, e.refusals, e.waited, e.next, e.problem "
            "FROM cases AS c LEFT JOIN exports AS e ON e.case_id = c.id AND e.endpoint = ? "
            "WHERE c.state = ? AND coalesce(e.state, ?) = ? ORDER BY c.id",
            (endpoint, endpoint, State.EXPORTING.value, *[Delivery.PENDING.value] * 2),
        )
        return [
            _export(row) if row[2] is not None else Export(int(str(row[0])), endpoint)
            for row in rows
        ]

    def exports(self, case_id: int | None = None) -> list[Export]:
        """What is known of deliveries, of one case or of all."""
        where, arguments = ("WHERE case_id = ?", (case_id,)) if case_id is not None else ("", ())
        rows = self._ledger.rows(
            f"SELECT {_EXPORT} FROM exports {where} ORDER BY case_id, endpoint", arguments
        )
        return [_export(row) for row in rows]

    def settled(self, endpoints: Sequence[str]) -> list[int]:
        """The cases that are EXPORTING and wait for none of these endpoints, or have nothing to send."""
        over = "EXISTS (SELECT 1 FROM exports WHERE case_id = c.id AND endpoint = ? AND state != ?)"
        rows = self._ledger.rows(
            f"SELECT id FROM cases AS c WHERE state = ? AND (({' AND '.join([over] * len(endpoints)) or 1})"
            " OR NOT EXISTS (SELECT 1 FROM results WHERE case_id = c.id)) ORDER BY id",
            (
                State.EXPORTING.value,
                *(one for key in endpoints for one in (key, Delivery.PENDING.value)),
            ),
        )
        return [int(str(row[0])) for row in rows]

    def outages(self) -> dict[str, Outage]:
        """The endpoints that take no associations."""
        rows = self._ledger.rows("SELECT endpoint, attempts, next, problem FROM outages", ())
        return {
            str(row[0]): Outage(str(row[0]), int(str(row[1])), float(str(row[2])), str(row[3]))
            for row in rows
        }

    def dead_letters(self) -> dict[str, int]:
        """For each endpoint for how many cases it was given up; none where for no case."""
        rows = self._ledger.rows(
            "SELECT endpoint, count(*) FROM exports WHERE state = ? GROUP BY endpoint",
            (Delivery.DEAD.value,),
        )
        return {str(row[0]): int(str(row[1])) for row in rows}

    def answers(self, case_id: int, endpoint: str) -> dict[str, Answer]:
        """What an endpoint said of each result that it was asked to keep."""
        rows = self._ledger.rows(
            "SELECT uid, status, stored, comment, attempts FROM deliveries "
            "WHERE case_id = ? AND endpoint = ?",
            (case_id, endpoint),
        )
        return {
            str(row[0]): Answer(
                str(row[0]), int(str(row[1])), bool(row[2]), str(row[3]), int(str(row[4]))
            )
            for row in rows
        }

    def maker(self, uid: str) -> int | None:
        """The case of which this node made the instance; None for one from elsewhere."""
        newest, others = self._made
        if not ((newest.count and uid in newest) or (others.count and uid in others)):
            return None
        rows = self._ledger.rows("SELECT case_id FROM made WHERE uid = ?", (uid,))
        return int(str(rows[0][0])) if rows else None

    # What happens

    def remember(self, uids: Iterable[str]) -> None:
        """Know results that are to be kept."""
        with self._remembering:
            newest, _ = self._made
            # A case that is processed again has the same ones.
            results = [uid for uid in uids if uid not in newest]
            if newest.count + len(results) > MOST_MADE:
                self._made = _Seen(), newest
            self._made[0].add(results)

    def answer(self, case_id: int, endpoint: str, answers: Iterable[Answer]) -> None:
        """Record what an endpoint said. A result that was dropped meanwhile is left out."""
        with self._ledger.transaction() as db:
            db.executemany(
                "INSERT INTO deliveries (case_id, endpoint, uid, status, stored, comment, attempts) "
                "SELECT case_id, ?, uid, ?, ?, ?, 1 FROM results WHERE case_id = ? AND uid = ? "
                "ON CONFLICT DO UPDATE SET status = excluded.status, stored = excluded.stored, "
                "comment = excluded.comment, attempts = attempts + 1 WHERE NOT stored",
                [
                    (endpoint, one.status, one.stored, one.comment, case_id, one.uid)
                    for one in answers
                ],
            )

    def update(self, export: Export) -> None:
        """Record how far a delivery has come; as SENT only where every result was stored."""
        with self._ledger.transaction() as db:
            db.execute(
                f"INSERT OR REPLACE INTO exports ({_EXPORT}) SELECT ?, ?, ?, ?, ?, ?, ?, ? "
                "WHERE ? != ? OR NOT EXISTS (SELECT 1 FROM results AS r WHERE r.case_id = ? "
                "AND NOT EXISTS (SELECT 1 FROM deliveries AS d WHERE d.case_id = r.case_id "
                "AND d.endpoint = ? AND d.uid = r.uid AND d.stored))",
                (
                    export.case_id,
                    export.endpoint,
                    export.state.value,
                    export.attempts,
                    export.refusals,
                    export.waited,
                    export.next,
                    export.problem,
                    export.state.value,
                    Delivery.SENT.value,
                    export.case_id,
                    export.endpoint,
                ),
            )

    def miss(
        self, outage: Outage, waits: float, refused: bool, most_refusals: int, most_seconds: float
    ) -> None:
        """An endpoint takes no associations: all that is to go there waits, or is given up.

        That is what was refused more than `most_refusals` times or has waited `most_seconds`.
        """
        with self._ledger.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO outages (endpoint, attempts, next, problem) "
                "VALUES (?, ?, ?, ?)",
                (outage.endpoint, outage.attempts, outage.next, outage.problem),
            )
            db.execute(
                "INSERT OR IGNORE INTO exports (case_id, endpoint) "
                "SELECT id, ? FROM cases WHERE state = ?",
                (outage.endpoint, State.EXPORTING.value),
            )
            waiting = (
                "endpoint = ? AND state = ? AND EXISTS "
                "(SELECT 1 FROM cases WHERE id = exports.case_id AND cases.state = ?)"
            )
            which = (outage.endpoint, Delivery.PENDING.value, State.EXPORTING.value)
            db.execute(
                "UPDATE exports SET attempts = attempts + 1, refusals = refusals + ?, problem = ? "
                f"WHERE {waiting}",
                (int(refused), outage.problem, *which),
            )
            db.execute(
                f"UPDATE exports SET state = ? WHERE {waiting} AND (refusals > ? OR waited >= ?)",
                (Delivery.DEAD.value, *which, most_refusals, most_seconds),
            )
            db.execute(f"UPDATE exports SET waited = waited + ? WHERE {waiting}", (waits, *which))

    def mend(self, endpoint: str) -> None:
        """An endpoint takes associations again."""
        with self._ledger.transaction() as db:
            db.execute("DELETE FROM outages WHERE endpoint = ?", (endpoint,))

    def resend(self, case_id: int | None = None) -> list[int]:
        """Try again now what waits or was given up, of one case or of all; the cases concerned.

        Raises UnknownCase for a case that is not there or has nothing to send.
        """
        with self._ledger.transaction() as db:
            found = [
                int(row[0])
                for row in db.execute(
                    "SELECT id FROM cases WHERE state IN (?, ?) AND (? IS NULL OR id = ?) "
                    "AND EXISTS (SELECT 1 FROM results WHERE case_id = cases.id) ORDER BY id",
                    (State.FAILED.value, State.EXPORTING.value, case_id, case_id),
                )
            ]
            if not found and case_id is not None:
                state = self._ledger.case(case_id).state.value
                raise UnknownCase(f"case {case_id} is {state} and has no results that wait")
            for number in found:
                db.execute(
                    "UPDATE cases SET state = ?, attempts = 0, error = '', changed = ? "
                    "WHERE id = ? AND state = ?",
                    (State.EXPORTING.value, time.time(), number, State.FAILED.value),
                )
                self._ledger.restart_exports(number)
        return found


class _Seen:
    """Which texts were added; sometimes also says so of one that was not (a Bloom filter).

    Of `MOST_MADE` texts it tells 98 of 100 others apart, in memory that never grows.
    """

    def __init__(self) -> None:
        self._bits = bytearray(1 << _BITS >> 3)
        #: How many were added.
        self.count = 0

    def add(self, texts: Sequence[str]) -> None:
        for text in texts:
            for place in _places(text):
                self._bits[place >> 3] |= 1 << (place & 7)
        self.count += len(texts)

    def __contains__(self, text: str) -> bool:
        bits, (first, second, third) = self._bits, _places(text)
        # Asked for each image that comes.
        return bool(
            bits[first >> 3] >> (first & 7) & 1
            and bits[second >> 3] >> (second & 7) & 1
            and bits[third >> 3] >> (third & 7) & 1
        )


def _places(text: str) -> tuple[int, int, int]:
    number, mask = hash(text), (1 << _BITS) - 1
    return number & mask, number >> _BITS & mask, number >> 2 * _BITS & mask


def _export(row: tuple[object, ...]) -> Export:
    case_id, endpoint, state, attempts, refusals, waited, moment, problem = row
    return Export(
        case_id=int(str(case_id)),
        endpoint=str(endpoint),
        state=Delivery(state),
        attempts=int(str(attempts)),
        refusals=int(str(refusals)),
        waited=float(str(waited)),
        next=_moment(float(str(moment))),
        problem=str(problem),
    )


def _moment(seconds: float) -> float:
    return seconds if math.isfinite(seconds) else 0.0

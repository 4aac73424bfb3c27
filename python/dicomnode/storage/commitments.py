"""Commitments: what this node asked others to keep, and what others asked it to keep, in the ledger."""

import time
from collections.abc import Container

from dicomnode.lib.commitment import NOT_THERE, Commitment
from dicomnode.storage.ledger import Ledger
from dicomnode.storage.outbox import Delivery

# A request tells what belongs together for a week, unless there are too many.
_KEPT_SECONDS = 7 * 86400.0
_MOST_ASKED = 300_000


class Commitments:
    """Transactions of storage commitment. Safe to use from any thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    # As the one who asks

    def begin(self, transaction_uid: str, case_id: int, endpoint: str) -> None:
        """An endpoint is going to be asked to keep the results of a case."""
        with self._ledger.transaction() as db:
            db.execute(
                "INSERT INTO commitments (transaction_uid, case_id, endpoint) VALUES (?, ?, ?)",
                (transaction_uid, case_id, endpoint),
            )

    def cancel(self, transaction_uid: str) -> None:
        """An endpoint was not asked after all, or refused."""
        with self._ledger.transaction() as db:
            db.execute("DELETE FROM commitments WHERE transaction_uid = ?", (transaction_uid,))

    def is_open(self, case_id: int, endpoint: str) -> bool:
        """Whether an endpoint was asked, and has not reported."""
        return bool(
            self._ledger.rows(
                "SELECT 1 FROM commitments WHERE case_id = ? AND endpoint = ?", (case_id, endpoint)
            )
        )

    def settle(
        self, report: Commitment, reporters: Container[str], pause: float
    ) -> tuple[int, int] | None:
        """Record a report: the case, and how many of its results are not kept.

        What is not kept is sent again after a pause. None for a transaction that is not open, or of
        which none of these endpoints was asked.
        """
        with self._ledger.transaction() as db:
            row = db.execute(
                "SELECT case_id, endpoint FROM commitments WHERE transaction_uid = ?",
                (report.transaction_uid,),
            ).fetchone()
            if row is None or row[1] not in reporters:
                return None
            case_id, endpoint = int(row[0]), str(row[1])
            results = [
                str(one[0])
                for one in db.execute("SELECT uid FROM results WHERE case_id = ?", (case_id,))
            ]
            lost = [uid for uid in results if uid in report.failed or uid not in report.instances]
            db.executemany(
                "UPDATE deliveries SET stored = 0, status = ?, comment = 'not committed' "
                "WHERE case_id = ? AND endpoint = ? AND uid = ?",
                [(report.failed.get(uid, NOT_THERE), case_id, endpoint, uid) for uid in lost],
            )
            if lost:
                db.execute(
                    "UPDATE exports SET next = ?, refusals = 0, problem = ? "
                    "WHERE case_id = ? AND endpoint = ?",
                    (
                        time.time() + pause,
                        f"{endpoint} does not keep {len(lost)} of {len(results)} results, the first "
                        f"{lost[0]} (reason 0x{report.failed.get(lost[0], NOT_THERE):04X})",
                        case_id,
                        endpoint,
                    ),
                )
            else:
                db.execute(
                    "UPDATE exports SET state = ?, attempts = 0, next = 0, problem = '' "
                    "WHERE case_id = ? AND endpoint = ? AND state = ?",
                    (Delivery.SENT.value, case_id, endpoint, Delivery.PENDING.value),
                )
            db.execute(
                "DELETE FROM commitments WHERE case_id = ? AND endpoint = ?", (case_id, endpoint)
            )
        return case_id, len(lost)

    # As the one who is asked

    def ask(self, calling: str, asked: Commitment) -> None:
        """Remember that a sender asked to keep these instances: they are all that it sends."""
        with self._ledger.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO asked (uid, transaction_uid, calling, moment) "
                "VALUES (?, ?, ?, ?)",
                [(uid, asked.transaction_uid, calling, time.time()) for uid in asked.instances],
            )
            db.execute(
                "DELETE FROM asked WHERE moment < (SELECT max(moment) FROM asked) - ?",
                (_KEPT_SECONDS,),
            )
            ((count,),) = db.execute("SELECT count(*) FROM asked")
            if count > _MOST_ASKED:
                db.execute(
                    "DELETE FROM asked WHERE uid IN (SELECT uid FROM asked ORDER BY moment LIMIT ?)",
                    # Some more, so that not each request sorts all.
                    (count - _MOST_ASKED * 9 // 10,),
                )

    def lists_all_of(self, case_id: int) -> bool:
        """Whether the newest requests for the instances of a case list all of them, and none that is
        not here: then its sender has sent all.
        """
        rows = self._ledger.rows(
            "SELECT (SELECT count(*) FROM instances WHERE case_id = ? AND uid NOT IN "
            "(SELECT uid FROM asked)), "
            "(SELECT count(*) FROM asked WHERE transaction_uid IN (SELECT a.transaction_uid FROM "
            "instances AS i CROSS JOIN asked AS a ON a.uid = i.uid WHERE i.case_id = ?) "
            "AND uid NOT IN (SELECT uid FROM instances))",
            (case_id, case_id),
        )
        return rows[0] == (0, 0)

    def identifiers_in(self, transaction_uid: str) -> list[str]:
        """The identifiers whose cases take images and hold some that a request lists."""
        rows = self._ledger.rows(
            "SELECT DISTINCT identifier FROM cases JOIN instances ON case_id = id "
            "WHERE NOT sealed AND uid IN (SELECT uid FROM asked WHERE transaction_uid = ?)",
            (transaction_uid,),
        )
        return [str(row[0]) for row in rows]

    def copies(self, transaction_uid: str) -> list[tuple[str, str, str, str, bytes]]:
        """The instances that a request lists and that are here, once for each input that holds one.

        UID, folder of the case, input, file and digest; damaged ones are left out.
        """
        rows = self._ledger.rows(
            "SELECT i.uid, c.folder, i.input, i.file, i.digest FROM instances AS i "
            "CROSS JOIN asked AS a ON a.uid = i.uid CROSS JOIN cases AS c ON c.id = i.case_id "
            "WHERE a.transaction_uid = ? AND NOT i.damaged",
            (transaction_uid,),
        )
        return [
            (str(uid), str(folder), str(name), str(file), bytes(digest))  # type: ignore[call-overload]
            for uid, folder, name, file, digest in rows
        ]

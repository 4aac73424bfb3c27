"""The results of cases, whole and durable before the first is sent.

Solves that what `process` has made is neither sent in part nor made twice: the results of a case lie in its folder of the
outbox, with their digests in the ledger, until every endpoint has acknowledged them or they are given up.
"""

from collections.abc import Iterable
from pathlib import Path

from dicomnode.errors import InvalidDataset, NoRoom
from dicomnode.storage.instances import Buffer, Instances
from dicomnode.storage.layout import OWNER, digest_of, outbox_folder
from dicomnode.storage.ledger import Case, Ledger, ResultRow
from dicomnode.storage.outbox import Outbox


class DamagedResult(InvalidDataset):
    """A result in the outbox is missing or is not what was kept."""


class Results:
    """The bytes of results. Safe to use from any thread."""

    def __init__(
        self, ledger: Ledger, outbox: Outbox, instances: Instances, is_on_disk: bool
    ) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._instances = instances
        self._is_on_disk = is_on_disk

    def keep(self, case: Case, results: Iterable[tuple[str, str, str, Buffer]]) -> int:
        """PROCESSING -> EXPORTING with all results durable; how many there are.

        `results` are (SOPInstanceUID, SOPClassUID, transfer syntax UID, Part 10 bytes); they are
        consumed one by one. Raises OutOfResources; then none is kept. NoRoom tells how much they need.
        """
        folder = outbox_folder(case.id)
        rows: list[ResultRow] = []
        size, trouble = 0, None
        try:
            if self._is_on_disk:
                # Where the ledger is lost, this tells whose results these are.
                self._put(folder, OWNER, case.folder.encode())
            for number, (uid, sop_class, syntax, data) in enumerate(results, 1):
                size += len(data)
                if trouble is not None:
                    continue
                try:
                    file = self._put(folder, f"{number:06}.dcm", data)
                except NoRoom as error:
                    # The others only tell how much room all need; it is not taken meanwhile.
                    trouble = error
                    self._instances.remove(folder, [row.file for row in rows])
                    rows.clear()
                    continue
                rows.append(ResultRow(number, uid, sop_class, syntax, file, digest_of(data)))
            if trouble is not None:
                trouble.needed = size
                raise trouble
            # Before anybody can send them: one may come back at once.
            self._outbox.remember(row.uid for row in rows)
            self._ledger.export(case.id, rows)
        except BaseException:
            self._instances.remove(folder, [OWNER, *(row.file for row in rows)])
            raise
        return len(rows)

    def _put(self, folder: str, name: str, data: Buffer) -> str:
        with self._instances.staging([data]) as staged:
            if not self._instances.place(staged, folder, name):
                raise ValueError(f"{folder}/{name} is there already")
        return name

    def undelivered(self, case_id: int, endpoint: str) -> list[ResultRow]:
        """The results that an endpoint has not acknowledged yet."""
        answers = self._outbox.answers(case_id, endpoint)
        stored = {answer.uid for answer in answers.values() if answer.stored}
        return [row for row in self._ledger.results(case_id) if row.uid not in stored]

    def read(self, case_id: int, row: ResultRow) -> bytes:
        """A result as it was kept.

        Raises DamagedResult for one that is gone or is not what it was, and OSError for one that
        cannot be read now.
        """
        source = self._instances.source(outbox_folder(case_id), row.file)
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        except FileNotFoundError as error:
            raise DamagedResult(f"result {row.uid} is gone") from error
        if digest_of(data) != row.digest:
            raise DamagedResult(f"result {row.uid} is not what was kept")
        return data

    def drop(self, case_id: int, error: str) -> None:
        """Give up the results of a case, which is FAILED by that: a retry makes them anew."""
        rows = self._ledger.results(case_id)
        self._ledger.drop_results(case_id, error)
        self._instances.remove(outbox_folder(case_id), [OWNER, *(row.file for row in rows)])

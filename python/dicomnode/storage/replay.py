"""What the journal tells at a start, made up for: files and rows that a crash has left undone."""

import logging
import stat
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from dicomnode.errors import InvalidDataset, InvalidDicom, UnknownCase
from dicomnode.lib.dicom import scan
from dicomnode.storage.instances import Instances, Staged
from dicomnode.storage.journal_file import NAME_AHEAD, File, Head, Record
from dicomnode.storage.layout import INCOMING, OWN, input_folder, set_aside
from dicomnode.storage.ledger import OVER, InstanceRow, Ledger


class Replay:
    """One start: `read` each file of the journal, then `run`, then `set_aside` where something is in doubt."""

    def __init__(
        self,
        root: Path,
        ledger: Ledger,
        instances: Instances,
        logger: logging.Logger,
        seed: bytes,
    ) -> None:
        self._root = root
        self._ledger = ledger
        self._instances = instances
        self._logger = logger
        # Of the ledger: of records of another one the images are known, and not their cases.
        self._seed = seed
        self._found: list[tuple[Head, list[Record]]] = []
        #: Whether an image that was answered may be among the files of which nothing tells.
        self.is_in_doubt = False

    def read(self, file: File) -> None:
        """Raises OSError."""
        try:
            records = list(file.read())
        except InvalidDataset as error:
            # As if it had been lost: what is in the files and the ledger is there.
            self._logger.error("%s: what it alone tells of is lost", error)
            self.is_in_doubt = True
            return
        self.is_in_doubt |= file.is_damaged
        if file.head is not None:
            self._found.append((file.head, records))

    @property
    def has_found(self) -> bool:
        """Whether a file tells of something."""
        return bool(self._found)

    def run(self) -> tuple[int, int]:
        """Bring files and ledger up to what was read, not yet on the disk; how many images and rows.

        Raises OSError and OutOfResources.
        """
        found = sorted(self._found, key=lambda one: one[0].generation)
        over = {
            (head.seed, record.case_id)
            for head, records in found
            for record in records
            if not record.rows or (head.seed == self._seed and self._is_over(record.case_id))
        }
        written = added = 0
        sealed: dict[int, set[tuple[str, str]] | None] = {}
        rows: dict[int, dict[tuple[str, str], InstanceRow]] = {}
        for head, records in found:
            for record in records:
                if (head.seed, record.case_id) in over:
                    continue
                images = record.rows
                if head.seed == self._seed:
                    number = record.case_id
                    if number not in sealed:
                        sealed[number] = self._sealed_with(number)
                    held = sealed[number]
                    # Of one that takes no more, others were refused.
                    images = [row for row in images if held is None or (row.input, row.uid) in held]
                written += self._write(record, images, head.is_distrusted)
                if head.seed == self._seed:
                    if head.is_distrusted and not record.data:
                        # The record may be one that failed: then its file lost its name, and the image was refused.
                        images = [row for row in images if self._is_there(record.folder, row)]
                    mine = rows.setdefault(record.case_id, {})
                    mine.update({(row.input, row.uid): row for row in images})
        for case_id, mine in rows.items():
            added += self._add_missing(case_id, mine)
        return written, added

    def _is_over(self, case_id: int) -> bool:
        """Whether the files of a case were deleted because it is over; it may be forgotten since."""
        try:
            return self._ledger.case(case_id).state in OVER
        except UnknownCase:
            return case_id <= self._ledger.last_case()

    def _sealed_with(self, case_id: int) -> set[tuple[str, str]] | None:
        """The images of a case that takes no more; None for any other one."""
        try:
            if not self._ledger.case(case_id).sealed:
                return None
        except UnknownCase:
            return None
        return {(row.input, row.uid) for row in self._ledger.instances(case_id)}

    def _write(self, record: Record, images: list[InstanceRow], anew: bool) -> int:
        """Make the files of an image that are not there, or all of them `anew`, of what is left of it; how many."""
        count = 0
        for row in images if record.data or record.name_ahead else ():
            folder = input_folder(record.folder, row.input)
            place = f"{folder}/{row.file}"
            if record.data and not anew and self._has(place, record.data):
                continue
            if self._is_another(place, row.uid):
                # It has that name since a case that is over had it.
                self.is_in_doubt = True
                continue
            if not record.data and not anew and self._instances.size(folder, row.file) == row.size:
                continue
            with suppress(FileNotFoundError), self._left_of(record) as staged:
                if staged.size == row.size:
                    self._instances.remove(folder, [row.file])
                    self._instances.place(staged, folder, row.file)
                    count += 1
        return count

    def _left_of(self, record: Record) -> AbstractContextManager[Staged]:
        """An image, out of its record or by the name that it had ahead.

        Raises FileNotFoundError where that was not needed any more, or the image was refused.
        """
        if record.data:
            return self._instances.staging([record.data])
        if not stat.S_ISREG((self._root / INCOMING / record.name_ahead).lstat().st_mode):
            raise FileNotFoundError(record.name_ahead)
        return self._instances.placed(INCOMING, record.name_ahead)

    def _is_there(self, folder: str, row: InstanceRow) -> bool:
        return self._instances.size(input_folder(folder, row.input), row.file) is not None

    def _is_another(self, place: str, uid: str) -> bool:
        """Whether there is a whole image that is not this one."""
        try:
            return scan(str(self._root / place)).text(0x00080018) not in ("", uid)
        except (InvalidDicom, OSError):
            return False

    def _has(self, place: str, data: bytes) -> bool:
        try:
            return (self._root / place).read_bytes() == data
        except OSError:
            return False

    def set_aside(self) -> None:
        """Keep the files that have no name but the one ahead."""
        count = 0
        for path in (self._root / INCOMING).iterdir():
            found = path.lstat()
            is_file = stat.S_ISREG(found.st_mode) and NAME_AHEAD.fullmatch(path.name)
            if is_file and found.st_size and found.st_nlink == 1:
                set_aside(self._root, path.relative_to(self._root))
                count += 1
        if count:
            self._logger.error(
                "%d files may be images that were answered, and nothing tells where they belong: they are in %s, send them again",
                count,
                Path(OWN, "damaged", INCOMING),
            )

    def _add_missing(self, case_id: int, rows: dict[tuple[str, str], InstanceRow]) -> int:
        """Add the rows that a case has not, or has of a damaged image; how many."""
        try:
            self._ledger.case(case_id)
        except UnknownCase:
            # Its files are found without it.
            return 0
        for known in self._ledger.instances(case_id):
            if not known.damaged:
                rows.pop((known.input, known.uid), None)
        if rows:
            self._ledger.add_instances(case_id, rows.values())
        return len(rows)


__all__ = ["Replay"]

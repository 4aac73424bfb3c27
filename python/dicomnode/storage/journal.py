"""The journal: what images were answered for, until ledger and disk have it.

Solves that an image waits for its row in the ledger, and a small one, where it has to survive a power cut, for three
flushes of the disk: of its file, of its name and of its row. Instead a record goes to the end of a file that is there already,
with the row and, of a small image, all bytes; it is flushed once for all that arrive at the same time. The rows are
written to the ledger later, many at once, and the small files have their names but nobody waits until the disk has them.
Nor for the name of a large image, whose file may have had one in the folder of incoming files before it was written: the record
tells that, and it is deleted when the disk has the other one. A start after a crash makes up for what is missing. There are two
such files: while records go to one, ledger and disk are brought up to the other.
"""

import errno
import json
import logging
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dicomnode.errors import (
    InvalidRootDataDirectory,
    OutOfResources,
)
from dicomnode.lib.dicom import (
    JournalFile,
    Received,
    filesystem_type,
    link,
    sync_filesystem,
)
from dicomnode.storage.instances import Instance, Instances, Staged, out_of_resources
from dicomnode.storage.journal_file import FILE_BYTES, MAGIC, File, Head, text_of
from dicomnode.storage.layout import INCOMING, OWN
from dicomnode.storage.ledger import InstanceRow, Ledger
from dicomnode.storage.recovery import OpenCase
from dicomnode.storage.replay import Replay

#: The file of a larger image is flushed: to write it twice would take longer.
MOST_BYTES = 64 << 10
#: What the journal takes of the disk.
JOURNAL_BYTES = 2 * FILE_BYTES
# Descriptors and memory, which come back.
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# File systems that are flushed by syncfs(): ext2 to ext4, XFS, Btrfs, F2FS, tmpfs.
_SOUND = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994}


@dataclass
class Kept:
    """What was kept of an image."""

    rows: Sequence[InstanceRow] = ()


class Journal:
    """The journal of a root that is taken: `restore`, then `open`. Safe to use from any thread.

    With `is_flushed` what was added survives a power cut, without a killed process only.
    """

    def __init__(
        self,
        root: Path,
        ledger: Ledger,
        instances: Instances,
        logger: logging.Logger,
        is_flushed: bool,
        digest_size: int,
    ) -> None:
        self._root = root
        self._ledger = ledger
        self._instances = instances
        self._logger = logger
        self._is_flushed = is_flushed
        self._digest_size = digest_size
        self._paths = [root / OWN / f"journal-{number}" for number in (1, 2)]
        ((seed,),) = ledger.rows("SELECT seed FROM identity", ())
        self._seed = bytes(seed)  # type: ignore[call-overload]
        self._is_open = False
        # Records go to the first of them.
        self._files: list[File] = []
        # None where it takes none.
        self._records: JournalFile | None = None
        self._turning = threading.Lock()
        self._giving_up = threading.Lock()
        self._has_failed = False
        #: Called when the disk may not have kept what this run wrote, and what is read of it be something else.
        self.on_failure: Callable[[], None] = lambda: None
        self._cleaning: threading.Thread | None = None
        # Open as long as the journal is, so that an error of the disk is told here.
        self._folder = -1
        # The names that files had ahead and still have, each with its case. Each use of it is one that no other thread divides.
        self._names_ahead: dict[str, int] = {}

    # At a start

    def restore(self) -> None:
        """Make up for what a crash has left undone.

        Raises InvalidRootDataDirectory where what an earlier run has kept cannot be read, and OutOfResources.
        """
        try:
            self._folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            replay = Replay(self._root, self._ledger, self._instances, self._logger, self._seed)
            are_there = [path.exists() for path in self._paths]
            replay.is_in_doubt = not all(are_there)
            for path in self._paths if any(are_there) else ():
                try:
                    file = File(path, self._is_flushed)
                    self._files.append(file)
                    replay.read(file)
                except OSError as error:
                    raise InvalidRootDataDirectory(
                        f"{path} cannot be read: {error.strerror}; it may have images that were answered. Move it away "
                        f"to start without them; files that it alone knew of are set aside in {OWN}/damaged then"
                    ) from error
            if replay.has_found:
                made = replay.run()
                self._flush_all()
                if any(made):
                    self._logger.warning(
                        "the node had ended before all was in its place: %d images and %d rows are from the journal",
                        *made,
                    )
            if replay.is_in_doubt:
                replay.set_aside()
            if replay.has_found or replay.is_in_doubt:
                for file in self._files:
                    file.clear()
        except OSError as error:
            raise out_of_resources(error) from error

    def _flush_all(self) -> None:
        try:
            sync_filesystem(self._folder)
        except OSError:
            self._distrust()
            raise

    def open(self) -> None:
        """Take records from now on, where the system allows it."""
        # Before Linux 5.8 syncfs() does not tell of errors, and others do not even flush.
        if self._is_flushed and (
            _linux_version() < (5, 8) or filesystem_type(self._folder) not in _SOUND
        ):
            return
        try:
            if not self._files:
                self._files = [File(path, self._is_flushed) for path in self._paths]
            for file in self._files:
                file.widen()
            head = Head(MAGIC, secrets.token_bytes(16), self._seed, 1, False)
            self._records = self._files[0].start(head)
            self._is_open = True
        except OSError as error:
            self._logger.error("there is no journal: %s", error.strerror)

    # While images arrive

    @property
    def named_above(self) -> int | None:
        """Files of more bytes may have names ahead; None where none may."""
        return MOST_BYTES if self._is_open and self._is_flushed else None

    def prepare(self, staged: Staged, request: Received | None) -> None:
        """Find out whether `keep` keeps an image, so that its file, or only its names, need not be flushed."""
        is_small, is_here = staged.size <= MOST_BYTES, self._is_open and self._is_flushed
        if is_here and not is_small and request is not None:
            staged.name_ahead = request.name_ahead
        staged.is_kept = is_here and (is_small or staged.name_ahead is not None)

    def keep(
        self,
        case: OpenCase,
        others: Sequence[tuple[str, str]],
        input_name: str,
        instance: Instance,
        staged: Staged,
        kept: Kept,
        descriptor: int,
        size: int,
        folder: str,
        name: str,
        _: bool,
    ) -> bool:
        """Give the file of an image its last name, keep a record of it, answer its request, and have the ledger expect its rows.

        `others` are the inputs where it has a name, with that; `kept` has all rows then. False, and nothing is done, where
        the name is taken. Raises OutOfResources, and OSError; then it has no name.
        """
        files, request = [*others, (input_name, name)], instance.request
        text = text_of(case, files, instance, staged, self._digest_size)
        with_image = staged.is_kept and staged.name_ahead is None
        while (records := self._current()) is not None:
            try:
                outcome = records.keep(
                    text,
                    descriptor,
                    size,
                    with_image,
                    folder,
                    name,
                    request,
                    instance.is_awaited,
                    staged.name_ahead,
                )
            except OSError as error:
                if records.has_failed:
                    self._give_up(error)
                raise
            if outcome:
                try:
                    if staged.name_ahead is not None:
                        self._names_ahead[staged.name_ahead] = case.id
                    kept.rows = rows_of(files, instance, staged, self._digest_size)
                    self._ledger.expect([(case.id, *row) for row in kept.rows])
                finally:
                    records.settle()
            if outcome is not None:
                return outcome
            self._turn(records)
        if staged.is_kept and others:
            # Their names count on the journal.
            raise OutOfResources("the journal was given up")
        return self._keep_without(case, files, instance, staged, kept, folder)

    def _keep_without(
        self,
        case: OpenCase,
        files: Sequence[tuple[str, str]],
        instance: Instance,
        staged: Staged,
        kept: Kept,
        folder: str,
    ) -> bool:
        """The same where there is no journal, or none any more."""
        _, name = files[-1]
        if not link(staged.descriptor, staged.size, folder, name, self._is_flushed):
            return False
        rows = rows_of(files, instance, staged, self._digest_size)
        try:
            self._ledger.add_instances(case.id, rows)
        except OutOfResources:
            with suppress(OSError):
                Path(folder, name).unlink()
            raise
        kept.rows = rows
        return True

    def forget(self, case_id: int) -> None:
        """A case is over: before its files are deleted. Also without the ledger it does not come back then."""
        self._forget(case_id)
        names = self._names_ahead.copy()
        self._delete_names([name for name, number in names.items() if number == case_id])

    def _forget(self, case_id: int) -> None:
        text = json.dumps((case_id, "", ()))
        with suppress(OutOfResources):
            while (records := self._current()) is not None:
                try:
                    is_kept = records.append(text)
                except OSError as error:
                    self._give_up(error)
                    return
                if is_kept:
                    records.settle()
                    return
                self._turn(records)

    def _current(self) -> JournalFile | None:
        """Where records go; None where none are kept."""
        return self._records if self._is_open else None

    def _turn(self, records: JournalFile) -> None:
        """Go on with the other file, or without the journal, and bring ledger and disk up to this one.

        Raises OutOfResources.
        """
        try:
            self._begin_other(records)
        except OSError as error:
            if error.errno in _SCARCE:
                # Nothing was written, and the next image may find what this one lacked.
                raise out_of_resources(error) from error
            self._give_up(error)

    def _begin_other(self, records: JournalFile) -> None:
        with self._turning:
            if self._current() is not records:
                # Another thread has.
                return
            if self._cleaning is not None:
                self._cleaning.join()
            full, other = self._files
            if other.head is not None:
                # There was no room then.
                self._clean(other)
            assert full.head is not None
            generation = full.head.generation + 1
            head = full.head._replace(nonce=secrets.token_bytes(16), generation=generation)
            self._records = other.start(head)
            self._files = [other, full]
            cleaning = threading.Thread(
                target=self._clean_later, args=(full, records), name="journal", daemon=True
            )
            try:
                cleaning.start()
            except RuntimeError:
                # There are too many.
                self._clean_later(full, records)
            else:
                self._cleaning = cleaning

    def _clean_later(self, file: File, records: JournalFile) -> None:
        try:
            records.finish()
            _check(records)
            self._clean(file)
        except (OutOfResources, sqlite3.Error) as error:
            # It is tried again when the other one is full.
            self._logger.error("the ledger is behind the journal: %s", error)
        except OSError as error:
            self._give_up(error)

    def _clean(self, file: File) -> None:
        """Bring ledger and disk up to a file of records that have settled.

        Raises OSError, OutOfResources, and what SQLite raises of a ledger that is damaged.
        """
        self._ledger.write_expected()
        # Who has one of them has its other name, which is flushed here.
        names = list(self._names_ahead)
        if self._is_flushed:
            sync_filesystem(self._folder)
        file.clear()
        self._delete_names(names)

    def _delete_names(self, names: Iterable[str]) -> None:
        """Delete names that files had ahead."""
        for name in names:
            with suppress(OSError):
                (self._root / INCOMING / name).unlink()
            self._names_ahead.pop(name, None)

    def _give_up(self, error: OSError) -> None:
        """Take no more; what is here waits for the next start."""
        with self._giving_up:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._logger.error(
                "the journal cannot be used any more, images are kept without it: %s",
                error.strerror or error,
            )
            self._distrust()

    def _distrust(self) -> None:
        """What the disk has not kept is told once, and nobody knows what it was: have all written anew."""
        self._has_failed = True
        self.on_failure()
        for one in self._files:
            with suppress(OSError):
                one.distrust()

    def close(self) -> None:
        """Bring ledger and disk up to it."""
        with self._turning:
            was_open, self._is_open = self._is_open, False
        try:
            if self._cleaning is not None:
                self._cleaning.join()
            if was_open and not self._has_failed and self._records is not None:
                self._records.finish()
                _check(self._records)
                for file in self._files:
                    if file.head is not None:
                        self._clean(file)
        except (OutOfResources, OSError, sqlite3.Error) as error:
            self._logger.error("the journal is left for the next start: %s", error)
            if isinstance(error, OSError):
                self._distrust()
        finally:
            for file in self._files:
                file.close()
            self._files = []
            # It has its file open, and may have a thread.
            self._records = None
            if self._folder >= 0:
                os.close(self._folder)
                self._folder = -1


def _check(records: JournalFile) -> None:
    """Raises OSError where a record was not kept, which whoever brought it may not have dealt with yet."""
    if records.has_failed:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def rows_of(
    files: Iterable[tuple[str, str]], instance: Instance, staged: Staged, digest_size: int
) -> list[InstanceRow]:
    """What the ledger has of an instance, which has these files in these inputs."""
    uid, request = instance.sop_instance_uid, instance.request
    digest = instance.digest_of(digest_size) if request is None else request.digest
    return [InstanceRow(name, uid, file, staged.size, digest) for name, file in files]


def _linux_version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))

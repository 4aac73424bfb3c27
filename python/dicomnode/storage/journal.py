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
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import NamedTuple

from dicomnode.errors import (
    InvalidDataset,
    InvalidDicom,
    InvalidRootDataDirectory,
    OutOfResources,
    UnknownCase,
)
from dicomnode.lib.dicom import (
    JournalFile,
    Received,
    digest,
    filesystem_type,
    link,
    scan,
    sync_filesystem,
)
from dicomnode.storage.instances import Instance, Instances, Staged, out_of_resources
from dicomnode.storage.layout import BLAKE3, INCOMING, OURS, OWN, input_folder, set_aside
from dicomnode.storage.ledger import OVER, InstanceRow, Ledger
from dicomnode.storage.recovery import OpenCase

#: The file of a larger image is flushed: to write it twice would take longer.
MOST_BYTES = 64 << 10
_FILE_BYTES = 4 << 20
#: What the journal takes of the disk.
JOURNAL_BYTES = 2 * _FILE_BYTES
# Each record begins at a multiple of it, so that one behind a damaged one is found.
_BLOCK = 512
# How a file begins, twice: what it is, a number that nobody can guess, the ledger that it belongs to, which of the files
# is newer, and whether the disk has failed to keep what it tells of; then a digest.
_HEAD = struct.Struct("<16s16s16sQ?")
_MAGIC = b"dicomnode jrnl 1"
# Descriptors and memory, which come back.
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# What the core gives files ahead.
_NAME_AHEAD = re.compile(r"[0-9a-f]{32}\.ahead")
# File systems that are flushed by syncfs(): ext2 to ext4, XFS, Btrfs, F2FS, tmpfs.
_SOUND = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994}
# How a record begins, see `record` in the core: that number, a digest of all that follows, bytes of the text and of the image.
_RECORD = struct.Struct("<16s16sII")
_CHECKED = 32


@dataclass
class Kept:
    """What was kept of an image."""

    rows: Sequence[InstanceRow] = ()


class _Head(NamedTuple):
    """How a file of the journal begins."""

    magic: bytes
    nonce: bytes
    seed: bytes
    generation: int
    is_distrusted: bool


class _Record(NamedTuple):
    """What is kept of an image: case, folder, rows, the name that its file had ahead, and its bytes, or none of these."""

    case_id: int
    folder: str
    rows: list[InstanceRow]
    name_ahead: str
    data: bytes


class _File:
    """One file of the journal. All of it raises OSError."""

    def __init__(self, path: Path, is_flushed: bool) -> None:
        self._path = path
        self._is_flushed = is_flushed
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        #: None where it tells of nothing.
        self.head: _Head | None = None
        #: Whether a record was found that is damaged, or never was whole.
        self.is_damaged = False

    def widen(self) -> None:
        """Give it its size: to flush what makes a file longer takes twice the time."""
        if os.fstat(self._descriptor).st_size < _FILE_BYTES:
            self._write(bytes(_FILE_BYTES))

    def start(self, head: _Head) -> JournalFile:
        """Where records go to from now on."""
        # Opened anew: an error of the disk that is told to whoever writes a head is told to whoever appends as well.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            records = JournalFile(descriptor, head.nonce, _BLOCK, _FILE_BYTES, self._is_flushed)
        finally:
            os.close(descriptor)
        self._write(_sealed(head))
        self.head = head
        return records

    def clear(self) -> None:
        """It tells of nothing that the ledger and the disk have not."""
        self._write(bytes(_BLOCK))
        self.head = None

    def distrust(self) -> None:
        """Have the next start write all images anew that this has."""
        if self.head is not None:
            self._write(_sealed(self.head._replace(is_distrusted=True)))

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.pwrite(self._descriptor, left, len(data) - len(left)) :]
        if self._is_flushed:
            os.fsync(self._descriptor)

    def read(self) -> Iterator[_Record]:
        """What it tells of, oldest first. Raises InvalidDataset where it began as a journal, and is damaged there."""
        data = self._path.read_bytes()
        self.head = _head_of(data)
        if self.head is None:
            if _MAGIC in data[:_BLOCK]:
                raise InvalidDataset(f"{self._path.name} is damaged where it begins")
            return
        at = _BLOCK
        while (at := data.find(self.head.nonce, at)) >= 0:
            record, size = _record_at(data, at)
            if record is None or at % _BLOCK:
                self.is_damaged |= not at % _BLOCK
                at += 1
            else:
                yield record
                at += size

    def close(self) -> None:
        """It is not used any more."""
        with suppress(OSError):
            os.close(self._descriptor)


def _record_at(data: bytes, at: int) -> tuple[_Record | None, int]:
    """The record that begins there, and its bytes; None where it is damaged or was never whole."""
    if at + _RECORD.size > len(data):
        return None, 0
    _, check, texts, images = _RECORD.unpack_from(data, at)
    start = at + _RECORD.size
    end = start + texts + images
    if end > len(data) or digest(data[at + _CHECKED : end], BLAKE3) != check:
        return None, 0
    case_id, folder, rows, *ahead = json.loads(data[start : start + texts])
    # Nothing that leads out of the root, whoever wrote it.
    name_ahead = ahead[0] if ahead else ""
    if name_ahead and not (isinstance(name_ahead, str) and _NAME_AHEAD.fullmatch(name_ahead)):
        return None, 0
    if not all(OURS.fullmatch(part) for row in rows for part in (folder, row[2])):
        return None, 0
    found = [
        InstanceRow(name, uid, file, size, bytes.fromhex(known))
        for name, uid, file, size, known in rows
    ]
    return _Record(case_id, folder, found, name_ahead, data[start + texts : end]), end - at


def _sealed(head: _Head) -> bytes:
    """A first block."""
    packed = _HEAD.pack(*head)
    return (packed + digest(packed, BLAKE3)).ljust(_BLOCK // 2, b"\0") * 2


def _head_of(data: bytes) -> _Head | None:
    """How a file begins; None where it does not."""
    for start in (0, _BLOCK // 2):
        head = data[start : start + _HEAD.size]
        check = data[start + _HEAD.size : start + _HEAD.size + BLAKE3]
        if len(head) == _HEAD.size and digest(head, BLAKE3) == check:
            found = _Head(*_HEAD.unpack(head))
            return found if found.magic == _MAGIC else None
    return None


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
        self._files: list[_File] = []
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
        # Whether an image that was answered may be among the files of which nothing tells.
        self._is_in_doubt = False

    # At a start

    def restore(self) -> None:
        """Make up for what a crash has left undone.

        Raises InvalidRootDataDirectory where what an earlier run has kept cannot be read, and OutOfResources.
        """
        try:
            self._folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            found: list[tuple[_Head, list[_Record]]] = []
            are_there = [path.exists() for path in self._paths]
            self._is_in_doubt = not all(are_there)
            for path in self._paths if any(are_there) else ():
                try:
                    file = _File(path, self._is_flushed)
                    self._files.append(file)
                    records = list(file.read())
                except InvalidDataset as error:
                    # As if it had been lost: what is in the files and the ledger is there.
                    self._logger.error("%s: what it alone tells of is lost", error)
                    self._is_in_doubt = True
                except OSError as error:
                    raise InvalidRootDataDirectory(
                        f"{path} cannot be read: {error.strerror}; it may have images that were answered. Move it away "
                        f"to start without them; files that it alone knew of are set aside in {OWN}/damaged then"
                    ) from error
                else:
                    self._is_in_doubt |= file.is_damaged
                    if file.head is not None:
                        found.append((file.head, records))
            if found:
                self._restore(sorted(found, key=lambda one: one[0].generation))
            if self._is_in_doubt:
                self._set_aside()
            if found or self._is_in_doubt:
                for file in self._files:
                    file.clear()
        except OSError as error:
            raise out_of_resources(error) from error

    def _restore(self, found: list[tuple[_Head, list[_Record]]]) -> None:
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
        try:
            sync_filesystem(self._folder)
        except OSError:
            self._distrust()
            raise
        if written or added:
            self._logger.warning(
                "the node had ended before all was in its place: %d images and %d rows are from the journal",
                written,
                added,
            )

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

    def _write(self, record: _Record, images: list[InstanceRow], anew: bool) -> int:
        """Make the files of an image that are not there, or all of them `anew`, of what is left of it; how many."""
        count = 0
        for row in images if record.data or record.name_ahead else ():
            folder = input_folder(record.folder, row.input)
            place = f"{folder}/{row.file}"
            if record.data and not anew and self._has(place, record.data):
                continue
            if self._is_another(place, row.uid):
                # It has that name since a case that is over had it.
                self._is_in_doubt = True
                continue
            if not record.data and not anew and self._instances.size(folder, row.file) == row.size:
                continue
            with suppress(FileNotFoundError), self._left_of(record) as staged:
                if staged.size == row.size:
                    self._instances.remove(folder, [row.file])
                    self._instances.place(staged, folder, row.file)
                    count += 1
        return count

    def _left_of(self, record: _Record) -> AbstractContextManager[Staged]:
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

    def _set_aside(self) -> None:
        """Keep the files that have no name but the one ahead."""
        count = 0
        for path in (self._root / INCOMING).iterdir():
            found = path.lstat()
            is_file = stat.S_ISREG(found.st_mode) and _NAME_AHEAD.fullmatch(path.name)
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

    def open(self) -> None:
        """Take records from now on, where the system allows it."""
        # Before Linux 5.8 syncfs() does not tell of errors, and others do not even flush.
        if self._is_flushed and (
            _linux_version() < (5, 8) or filesystem_type(self._folder) not in _SOUND
        ):
            return
        try:
            if not self._files:
                self._files = [_File(path, self._is_flushed) for path in self._paths]
            for file in self._files:
                file.widen()
            head = _Head(_MAGIC, secrets.token_bytes(16), self._seed, 1, False)
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
        text = _text(case, files, instance, staged, self._digest_size)
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

    def _clean_later(self, file: _File, records: JournalFile) -> None:
        try:
            records.finish()
            _check(records)
            self._clean(file)
        except (OutOfResources, sqlite3.Error) as error:
            # It is tried again when the other one is full.
            self._logger.error("the ledger is behind the journal: %s", error)
        except OSError as error:
            self._give_up(error)

    def _clean(self, file: _File) -> None:
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


def _text(
    case: OpenCase,
    files: Iterable[tuple[str, str]],
    instance: Instance,
    staged: Staged,
    digest_size: int,
) -> str:
    """What `_record_at` reads as JSON; by hand, because it is done for each image before its answer."""
    # The request puts it in where that is NUL.
    known = "\0" if instance.request is not None else instance.digest_of(digest_size).hex()
    uid, size = quoted(instance.sop_instance_uid), staged.size
    images = ", ".join(
        [f'[{quoted(name)}, {uid}, {quoted(file)}, {size}, "{known}"]' for name, file in files]
    )
    ahead = "" if staged.name_ahead is None else f", {quoted(staged.name_ahead)}"
    return f"[{case.id}, {quoted(case.folder)}, [{images}]{ahead}]"


def _linux_version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))

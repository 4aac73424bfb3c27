"""One file of the journal, as it is on the disk: how it begins, and the records that follow."""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import NamedTuple

from dicomnode.errors import InvalidDataset
from dicomnode.lib.dicom import JournalFile, digest
from dicomnode.storage.instances import Instance, Staged
from dicomnode.storage.layout import BLAKE3, OURS
from dicomnode.storage.ledger import InstanceRow
from dicomnode.storage.recovery import OpenCase

#: Of one file.
FILE_BYTES = 4 << 20
# Each record begins at a multiple of it, so that one behind a damaged one is found.
_BLOCK = 512
# How a file begins, twice: what it is, a number that nobody can guess, the ledger that it belongs to, which of the files
# is newer, and whether the disk has failed to keep what it tells of; then a digest.
_HEAD = struct.Struct("<16s16s16sQ?")
#: What a file of the journal begins with.
MAGIC = b"dicomnode jrnl 1"
#: What the core gives files ahead.
NAME_AHEAD = re.compile(r"[0-9a-f]{32}\.ahead")
# How a record begins, see `record` in the core: that number, a digest of all that follows, bytes of the text and of the image.
_RECORD = struct.Struct("<16s16sII")
_CHECKED = 32


class Head(NamedTuple):
    """How a file of the journal begins."""

    magic: bytes
    nonce: bytes
    seed: bytes
    generation: int
    is_distrusted: bool


class Record(NamedTuple):
    """What is kept of an image: case, folder, rows, the name that its file had ahead, and its bytes, or none of these."""

    case_id: int
    folder: str
    rows: list[InstanceRow]
    name_ahead: str
    data: bytes


class File:
    """One file of the journal. All of it raises OSError."""

    def __init__(self, path: Path, is_flushed: bool) -> None:
        self._path = path
        self._is_flushed = is_flushed
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        #: None where it tells of nothing.
        self.head: Head | None = None
        #: Whether a record was found that is damaged, or never was whole.
        self.is_damaged = False

    def widen(self) -> None:
        """Give it its size: to flush what makes a file longer takes twice the time."""
        if os.fstat(self._descriptor).st_size < FILE_BYTES:
            self._write(bytes(FILE_BYTES))

    def start(self, head: Head) -> JournalFile:
        """Where records go to from now on."""
        # Opened anew: an error of the disk that is told to whoever writes a head is told to whoever appends as well.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            records = JournalFile(descriptor, head.nonce, _BLOCK, FILE_BYTES, self._is_flushed)
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

    def read(self) -> Iterator[Record]:
        """What it tells of, oldest first. Raises InvalidDataset where it began as a journal, and is damaged there."""
        data = self._path.read_bytes()
        self.head = head_of(data)
        if self.head is None:
            if MAGIC in data[:_BLOCK]:
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


def _record_at(data: bytes, at: int) -> tuple[Record | None, int]:
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
    if name_ahead and not (isinstance(name_ahead, str) and NAME_AHEAD.fullmatch(name_ahead)):
        return None, 0
    if not all(OURS.fullmatch(part) for row in rows for part in (folder, row[2])):
        return None, 0
    found = [
        InstanceRow(name, uid, file, size, bytes.fromhex(known))
        for name, uid, file, size, known in rows
    ]
    return Record(case_id, folder, found, name_ahead, data[start + texts : end]), end - at


def _sealed(head: Head) -> bytes:
    """A first block."""
    packed = _HEAD.pack(*head)
    return (packed + digest(packed, BLAKE3)).ljust(_BLOCK // 2, b"\0") * 2


def head_of(data: bytes) -> Head | None:
    """How a file begins; None where it does not."""
    for start in (0, _BLOCK // 2):
        head = data[start : start + _HEAD.size]
        check = data[start + _HEAD.size : start + _HEAD.size + BLAKE3]
        if len(head) == _HEAD.size and digest(head, BLAKE3) == check:
            found = Head(*_HEAD.unpack(head))
            return found if found.magic == MAGIC else None
    return None


def text_of(
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


__all__ = ["FILE_BYTES", "MAGIC", "NAME_AHEAD", "File", "Head", "Record", "head_of", "text_of"]

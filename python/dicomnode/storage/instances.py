"""The bytes of instances: on disk, durable before anyone is told so, or in memory.

Solves one thing: an object is either wholly there under its name, or not there. A file is written
under another name, flushed, linked to its place, and the folder is flushed; then, and only then,
`place` returns (as maildir and SQLite do).
"""

import errno
import os
import secrets
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dicomnode.errors import OutOfResources
from dicomnode.lib.dicom import Source

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Staged:
    """Bytes that are safe but not yet in any folder."""

    size: int
    path: Path | None = None
    data: bytes = b""


class Instances(Protocol):
    """Bytes by folder and name. `folder` is a relative path made of safe names."""

    def stage(self, chunks: Iterable[Buffer]) -> Staged:
        """Keep bytes. Raises OutOfResources; then nothing is kept."""

    def place(self, staged: Staged, folder: str, names: Iterable[str]) -> str:
        """Put staged bytes into a folder under the first of `names` that is free, and tell it.

        Raises OutOfResources; never overwrites.
        """

    def discard(self, staged: Staged) -> None:
        """Forget the staged bytes; where they were placed they stay."""

    def source(self, folder: str, name: str) -> Source:
        """What to read an instance from."""

    def size(self, folder: str, name: str) -> int | None:
        """How many bytes are there; None where nothing is."""

    def remove(self, folder: str, names: Iterable[str]) -> None:
        """Delete instances, and the folder where that leaves it empty."""


class FileInstances:
    """Instances as files below a root; `incoming` is a folder on the same file system."""

    def __init__(self, root: Path, incoming: Path) -> None:
        self._root = root
        self._incoming = incoming

    def stage(self, chunks: Iterable[Buffer]) -> Staged:
        path = self._incoming / f"{secrets.token_hex(16)}.part"
        parts = list(chunks)
        size = sum(len(part) for part in parts)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for part in parts:
                    _write_all(descriptor, part)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _out_of_resources(error) from error
        return Staged(size, path=path)

    def place(self, staged: Staged, folder: str, names: Iterable[str]) -> str:
        if staged.path is None:
            raise ValueError("these bytes were staged in memory")
        directory = self._root / folder
        try:
            make_folder(directory)
            for name in names:
                try:
                    os.link(staged.path, directory / name)
                except FileExistsError:
                    continue
                flush_folder(directory)
                return name
        except OSError as error:
            raise _out_of_resources(error) from error
        raise ValueError("no name is free")

    def discard(self, staged: Staged) -> None:
        if staged.path is not None:
            staged.path.unlink(missing_ok=True)

    def source(self, folder: str, name: str) -> Source:
        # Joined by hand, because it is asked for each image of a case whenever that is looked at.
        return f"{self._root}/{folder}/{name}"

    def size(self, folder: str, name: str) -> int | None:
        try:
            return (self._root / folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, folder: str, names: Iterable[str]) -> None:
        directory = self._root / folder
        for name in names:
            # A folder of that name is somebody else's.
            with suppress(IsADirectoryError):
                (directory / name).unlink(missing_ok=True)
        # The node's own folders stay, also when they are empty: another thread may need them now.
        while directory != self._root and directory.parent != self._incoming.parent:
            try:
                directory.rmdir()
            except OSError:
                return
            directory = directory.parent


class MemoryInstances:
    """Instances in memory, up to a limit in bytes; an instance in several folders counts once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._kept: dict[tuple[str, str], bytes] = {}
        self._places: dict[int, int] = {}
        self._lock = threading.Lock()

    def stage(self, chunks: Iterable[Buffer]) -> Staged:
        parts = list(chunks)
        size = sum(len(part) for part in parts)
        with self._lock:
            if self._used + size > self._limit:
                raise OutOfResources(
                    f"{self._used + size} bytes in memory would be more than memory_limit "
                    f"{self._limit}; set root_data_directory to keep images on disk"
                )
            self._used += size
        try:
            data = b"".join(parts)
        except MemoryError as error:
            with self._lock:
                self._used -= size
            raise OutOfResources(f"no memory for {size} bytes") from error
        with self._lock:
            self._places[id(data)] = self._places.get(id(data), 0) + 1
        return Staged(size, data=data)

    def place(self, staged: Staged, folder: str, names: Iterable[str]) -> str:
        with self._lock:
            for name in names:
                if (folder, name) not in self._kept:
                    self._kept[folder, name] = staged.data
                    self._places[id(staged.data)] += 1
                    return name
        raise ValueError("no name is free")

    def discard(self, staged: Staged) -> None:
        with self._lock:
            self._release(staged.data)

    def _release(self, data: bytes) -> None:
        self._places[id(data)] -= 1
        if not self._places[id(data)]:
            del self._places[id(data)]
            self._used -= len(data)

    def source(self, folder: str, name: str) -> Source:
        return self._kept[folder, name]

    def size(self, folder: str, name: str) -> int | None:
        data = self._kept.get((folder, name))
        return None if data is None else len(data)

    def remove(self, folder: str, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                data = self._kept.pop((folder, name), None)
                if data is not None:
                    self._release(data)


def make_folder(directory: Path) -> None:
    """Make a folder and those above it that are missing, durably."""
    if directory.is_dir():
        return
    make_folder(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    flush_folder(directory.parent)


def flush_folder(directory: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _out_of_resources(error: OSError) -> OutOfResources:
    reason = errno.errorcode.get(error.errno or 0, "unknown")
    return OutOfResources(f"cannot write: {reason} ({error.strerror})")

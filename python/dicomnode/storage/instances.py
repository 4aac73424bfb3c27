"""The bytes of instances: on disk, durable before anyone is told so, or in memory.

Solves one thing: an object is either wholly there under its name, or not there. A file is written
without a name, flushed, linked to its place, and the folder is flushed; then, and only then,
`place` returns (as maildir and SQLite do).
"""

import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from dicomnode.errors import NoRoom, OutOfResources
from dicomnode.lib.dicom import Received, Source, link

Buffer = bytes | memoryview
#: Gives an open file of so many bytes a name in a folder, flushed or not; False, and nothing is done, where it is taken.
#: Raises OSError.
Naming: TypeAlias = Callable[[int, int, str, str, bool], bool]

# What is kept of an instance in memory besides its bytes, at most: its names and its row in the ledger.
KEPT_BESIDES = 4096
# A folder that became empty may go at the moment at which something is put into it.
_MOST_TRIES = 10


@dataclass(eq=False, slots=True)
class Staged:
    """Bytes that are whole but not yet in any folder: those of an open file, or `data`."""

    size: int
    descriptor: int = -1
    data: bytes = b""
    #: Whether the journal stands for it: for all of it, or, where it has a name ahead, for its other names.
    is_kept: bool = False
    #: The name in the folder of incoming files that it has on the disk already.
    name_ahead: str | None = None

    @property
    def path(self) -> str:
        """By what a file can be read, as long as it is open."""
        return f"/proc/self/fd/{self.descriptor}"


class Instance(NamedTuple):
    """An image that arrived: who it is, what its file is called, and its bytes as a Part 10 object.

    `digest_of` gives the digest, of so many bytes, of the dataset without the file meta, so that a resend
    in another association counts as the same; it is asked for as late as possible. Where it is in a file
    already, that is `arrived`, which belongs to whoever wrote it, and there are no `chunks`. The `request` that
    brought it has the digest as well; if it `is_awaited`, it is answered as soon as the image is kept.
    """

    sop_instance_uid: str
    name: str
    chunks: Sequence[Buffer]
    digest_of: Callable[[int], bytes]
    arrived: Staged | None = None
    request: Received | None = None
    is_awaited: bool = False


class Instances(Protocol):
    """Bytes by folder and name. `folder` is a relative path made of safe names."""

    def staging(self, chunks: Iterable[Buffer]) -> AbstractContextManager[Staged]:
        """Keep bytes as long as this is open; where they are placed they stay.

        Raises OutOfResources; then nothing is kept.
        """

    def flush(self, staged: Staged) -> None:
        """As `place` does it before anything has a name. Raises OutOfResources."""

    def place(self, staged: Staged, folder: str, name: str, naming: Naming = link) -> bool:
        """Put staged bytes into a folder under a name; False, and nothing is done, where that is taken.

        Where they are in a file, `naming` does that. Raises OutOfResources.
        """

    def placed(self, folder: str, name: str) -> AbstractContextManager[Staged]:
        """An instance that has its place, to be placed once more.

        Raises FileNotFoundError, OutOfResources.
        """

    def source(self, folder: str, name: str) -> Source:
        """What to read an instance from."""

    def size(self, folder: str, name: str) -> int | None:
        """How many bytes are there; None where nothing is."""

    def remove(self, folder: str, names: Iterable[str]) -> None:
        """Delete instances, and the folder where that leaves it empty."""

    def flush_removed(self, folders: Iterable[str]) -> None:
        """What was removed from these folders does not come back, also after a power cut.

        Raises OSError.
        """


class FileInstances:
    """Instances as files below a root; `incoming` is a folder on the same file system.

    With `flush` they survive a power cut, without a killed process only.
    """

    def __init__(self, root: Path, incoming: Path, flush: bool = True) -> None:
        self._root = root
        # Paths of images are joined by hand, because that is done for each.
        self._base = str(root)
        self._incoming = incoming
        self._flush = flush
        # The folders that are there for sure, also after a power cut.
        self._made: set[str] = set()
        self._making = threading.Lock()

    @contextmanager
    def staging(self, chunks: Iterable[Buffer]) -> Iterator[Staged]:
        name, parts = None, list(chunks)
        size = sum(map(len, parts))
        try:
            descriptor, name = self._open()
        except OSError as error:
            raise out_of_resources(error) from error
        try:
            try:
                _write_parts(descriptor, parts, size)
            except OSError as error:
                raise out_of_resources(error) from error
            yield Staged(size, descriptor)
        finally:
            _close(descriptor)
            if name is not None:
                name.unlink(missing_ok=True)

    def flush(self, staged: Staged) -> None:
        if self._flush:
            try:
                os.fsync(staged.descriptor)
            except OSError as error:
                raise out_of_resources(error) from error

    def _open(self) -> tuple[int, Path | None]:
        """A file without a name, or with one that is to be deleted in the end. Raises OSError."""
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(self._incoming, flags | os.O_TMPFILE, 0o600), None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
        # A file system that has no such files.
        name = self._incoming / f"{secrets.token_hex(16)}.part"
        return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600), name

    def place(self, staged: Staged, folder: str, name: str, naming: Naming = link) -> bool:
        directory = f"{self._base}/{folder}"
        try:
            for _ in range(_MOST_TRIES):
                try:
                    if folder not in self._made:
                        self._make(folder)
                    is_flushed = self._flush and not staged.is_kept
                    return naming(staged.descriptor, staged.size, directory, name, is_flushed)
                except FileNotFoundError:
                    # It was removed, or one above it, since it was empty.
                    self._made.discard(folder)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
        except OSError as error:
            raise out_of_resources(error) from error

    def _make(self, folder: str) -> None:
        # Who finds a folder that another thread makes waits until it is durable.
        with self._making:
            directory = self._root / folder
            make_folder(directory, self._flush)
            if self._flush and folder not in self._made:
                # It may be there because a node made it that was killed before it had flushed it.
                while directory != self._root:
                    directory = directory.parent
                    flush_folder(directory)
            self._made.add(folder)

    @contextmanager
    def placed(self, folder: str, name: str) -> Iterator[Staged]:
        try:
            descriptor = os.open(self._root / folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise out_of_resources(error) from error
        try:
            yield Staged(os.fstat(descriptor).st_size, descriptor)
        finally:
            _close(descriptor)

    def source(self, folder: str, name: str) -> Source:
        return f"{self._base}/{folder}/{name}"

    def size(self, folder: str, name: str) -> int | None:
        try:
            return (self._root / folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, folder: str, names: Iterable[str]) -> None:
        # By hand, too: pathlib interns each part of a path, and the interpreter's table of such texts is moved,
        # megabytes at once, whenever it has been turned over.
        root = self._base
        own = f"{root}/{self._incoming.parent.relative_to(self._root)}"
        directory = f"{root}/{folder}"
        self._made.discard(folder)
        for name in names:
            # A folder of that name is somebody else's.
            with suppress(IsADirectoryError, FileNotFoundError):
                os.unlink(f"{directory}/{name}")  # noqa: PTH108
        # The node's own folders stay, also when they are empty: another thread may need them now.
        while directory != root and os.path.dirname(directory) != own:  # noqa: PTH120
            try:
                os.rmdir(directory)  # noqa: PTH106
            except OSError:
                return
            directory = os.path.dirname(directory)  # noqa: PTH120

    def flush_removed(self, folders: Iterable[str]) -> None:
        flushed: set[Path] = set()
        for folder in folders if self._flush else ():
            directory = self._root / folder
            while directory not in flushed:
                try:
                    flush_folder(directory)
                    flushed.add(directory)
                except FileNotFoundError:
                    directory = directory.parent


class MemoryInstances:
    """Instances in memory, up to a limit in bytes; an instance in several folders counts once.

    Each counts with what is kept of it besides its bytes, so that many tiny ones are bounded too.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._kept: dict[tuple[str, str], Staged] = {}
        # In how many folders each is, and one more while it is used.
        self._places: dict[Staged, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def staging(self, chunks: Iterable[Buffer]) -> Iterator[Staged]:
        staged = self._stage(list(chunks))
        try:
            yield staged
        finally:
            with self._lock:
                self._release(staged)

    def _stage(self, parts: list[Buffer]) -> Staged:
        size = sum(len(part) for part in parts)
        taken = self._taken(size)
        with self._lock:
            if self._used + taken > self._limit:
                raise OutOfResources(
                    f"{self._used + taken} bytes in memory would be more than memory_limit "
                    f"{self._limit}; set root_data_directory to keep images on disk"
                )
            self._used += taken
        try:
            staged = self._made(parts, size)
        except OutOfResources:
            with self._lock:
                self._used -= taken
            raise
        with self._lock:
            self._places[staged] = 1
        return staged

    def flush(self, staged: Staged) -> None:
        pass

    def place(self, staged: Staged, folder: str, name: str, naming: Naming = link) -> bool:
        del naming
        with self._lock:
            if (folder, name) in self._kept:
                return False
            self._kept[folder, name] = staged
            self._places[staged] += 1
            return True

    @contextmanager
    def placed(self, folder: str, name: str) -> Iterator[Staged]:
        with self._lock:
            staged = self._kept.get((folder, name))
            if staged is None:
                raise FileNotFoundError(name)
            self._places[staged] += 1
        try:
            yield staged
        finally:
            with self._lock:
                self._release(staged)

    def source(self, folder: str, name: str) -> Source:
        return self._kept[folder, name].data

    def size(self, folder: str, name: str) -> int | None:
        staged = self._kept.get((folder, name))
        return None if staged is None else staged.size

    def remove(self, folder: str, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                staged = self._kept.pop((folder, name), None)
                if staged is not None:
                    self._release(staged)

    def close(self) -> None:
        """Let all memory go."""
        with self._lock:
            self._kept.clear()
            for staged in self._places:
                self._let_go(staged)
            self._places.clear()

    def _release(self, staged: Staged) -> None:
        if staged not in self._places:
            # All was let go meanwhile.
            return
        self._places[staged] -= 1
        if not self._places[staged]:
            del self._places[staged]
            self._used -= self._taken(staged.size)
            self._let_go(staged)

    # What kind of memory it is

    def _made(self, parts: list[Buffer], size: int) -> Staged:
        """Raises OutOfResources."""
        try:
            return Staged(size, data=b"".join(parts))
        except MemoryError as error:
            raise OutOfResources(f"no memory for {size} bytes") from error

    def _let_go(self, staged: Staged) -> None:
        """The last that used it does not any more."""

    def _taken(self, size: int) -> int:
        """Bytes of memory that an instance of so many bytes takes."""
        return size + KEPT_BESIDES

    def flush_removed(self, folders: Iterable[str]) -> None:
        pass


def make_folder(directory: Path, flush: bool = True) -> None:
    """Make a folder and those above it that are missing, with `flush` durably."""
    if directory.is_dir():
        return
    make_folder(directory.parent, flush)
    directory.mkdir(mode=0o700, exist_ok=True)
    if flush:
        flush_folder(directory.parent)


def flush_folder(directory: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        _close(descriptor)


def flush_file(path: Path) -> None:
    """Make what is in a file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        _close(descriptor)


def _close(descriptor: int) -> None:
    """Close what was open for reading, or what a flush has told all about: an error tells nothing."""
    with suppress(OSError):
        os.close(descriptor)


def flush_below(directory: Path) -> None:
    """Make durable a folder with all files and folders in it, but for those that are somebody else's."""
    with suppress(PermissionError), os.scandir(directory) as entries:
        for one in entries:
            if one.is_dir(follow_symlinks=False):
                flush_below(Path(one.path))
            elif one.is_file(follow_symlinks=False):
                with suppress(PermissionError):
                    flush_file(Path(one.path))
        flush_folder(directory)


def _write_parts(descriptor: int, parts: list[Buffer], size: int) -> None:
    """Write all; at once where the system takes it."""
    written = os.writev(descriptor, parts)
    if written == size:
        return
    for part in parts:
        if written < len(part):
            _write_all(descriptor, memoryview(part)[written:])
        written = max(0, written - len(part))


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def out_of_resources(error: OSError) -> NoRoom:
    if error.errno is None:
        return NoRoom(f"cannot write: {error}")
    reason = errno.errorcode.get(error.errno, "unknown")
    return NoRoom(f"cannot write: {reason} ({error.strerror})")

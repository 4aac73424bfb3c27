"""Instances in memory that worker processes can read: each is a file without a name (memfd).

Solves that what rests in memory is not copied to be processed elsewhere. The source of such an
instance is the path under which this process's descriptor shows it, which any process of the same
user can open as long as this one holds it.
"""

import fcntl
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from dicomnode.errors import OutOfResources
from dicomnode.lib.dicom import Source
from dicomnode.lib.shared import write_shared
from dicomnode.storage.instances import Buffer, Staged, out_of_resources

# Below are the descriptors of sockets, some of which have to be small for `select`.
_FIRST_DESCRIPTOR = 4096
_PAGE = os.sysconf("SC_PAGE_SIZE")


class SharedInstances:
    """Instances in shared memory, up to a limit in bytes; one in several folders counts once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        # By descriptor.
        self._kept: dict[tuple[str, str], int] = {}
        self._sizes: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._lock = threading.Lock()
        _allow_descriptors()

    @contextmanager
    def staging(self, chunks: Iterable[Buffer]) -> Iterator[Staged]:
        staged = self._stage(list(chunks))
        try:
            yield staged
        finally:
            with self._lock:
                self._release(staged.descriptor)

    def _stage(self, parts: list[Buffer]) -> Staged:
        size = sum(len(part) for part in parts)
        with self._lock:
            if self._used + _taken(size) > self._limit:
                raise OutOfResources(
                    f"{self._used + _taken(size)} bytes in memory would be more than memory_limit "
                    f"{self._limit}; set root_data_directory to keep images on disk"
                )
            self._used += _taken(size)
        try:
            descriptor = _high(write_shared(parts))
        except OSError as error:
            with self._lock:
                self._used -= _taken(size)
            raise out_of_resources(error) from error
        with self._lock:
            self._places[descriptor], self._sizes[descriptor] = 1, size
        return Staged(size, descriptor)

    def place(self, staged: Staged, folder: str, names: Iterable[str]) -> str:
        with self._lock:
            for name in names:
                if (folder, name) not in self._kept:
                    self._kept[folder, name] = staged.descriptor
                    self._places[staged.descriptor] += 1
                    return name
        raise ValueError("no name is free")

    @contextmanager
    def placed(self, folder: str, name: str) -> Iterator[Staged]:
        with self._lock:
            descriptor = self._kept.get((folder, name))
            if descriptor is None:
                raise FileNotFoundError(name)
            self._places[descriptor] += 1
            size = self._sizes[descriptor]
        try:
            yield Staged(size, descriptor)
        finally:
            with self._lock:
                self._release(descriptor)

    def _release(self, descriptor: int) -> None:
        if descriptor not in self._places:
            # All was let go meanwhile.
            return
        self._places[descriptor] -= 1
        if not self._places[descriptor]:
            del self._places[descriptor]
            self._used -= _taken(self._sizes.pop(descriptor))
            os.close(descriptor)

    def source(self, folder: str, name: str) -> Source:
        return f"/proc/{os.getpid()}/fd/{self._kept[folder, name]}"

    def size(self, folder: str, name: str) -> int | None:
        descriptor = self._kept.get((folder, name))
        return None if descriptor is None else self._sizes.get(descriptor)

    def remove(self, folder: str, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                descriptor = self._kept.pop((folder, name), None)
                if descriptor is not None:
                    self._release(descriptor)

    def close(self) -> None:
        """Let all memory go."""
        with self._lock:
            for descriptor in self._places:
                os.close(descriptor)
            self._places.clear()
            self._kept.clear()


def _taken(size: int) -> int:
    """Memory comes in whole pages."""
    return -(-size // _PAGE) * _PAGE


def _allow_descriptors() -> None:
    """Each instance takes one, so as many as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _high(descriptor: int) -> int:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
    finally:
        os.close(descriptor)

"""Instances in memory that worker processes can read: each is a file without a name (memfd).

Solves that what rests in memory is not copied to be processed elsewhere. The source of such an
instance is the path under which this process's descriptor shows it, which any process of the same
user can open as long as this one holds it.
"""

import fcntl
import os
import resource

from dicomnode.lib.dicom import Source
from dicomnode.lib.shared import write_shared
from dicomnode.storage.instances import Buffer, MemoryInstances, Staged, out_of_resources

# Below are the descriptors of sockets, some of which have to be small for `select`; of few, half.
_MOST_BELOW = 4096
_PAGE = os.sysconf("SC_PAGE_SIZE")


class SharedInstances(MemoryInstances):
    """Instances in shared memory, up to a limit in bytes; one in several folders counts once."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._first_descriptor = min(_MOST_BELOW, _allowed_descriptors() // 2)

    def source(self, folder: str, name: str) -> Source:
        return f"/proc/{os.getpid()}/fd/{self._kept[folder, name].descriptor}"

    def _made(self, parts: list[Buffer], size: int) -> Staged:
        try:
            return Staged(size, _moved(write_shared(parts), self._first_descriptor))
        except OSError as error:
            raise out_of_resources(error) from error

    def _let_go(self, staged: Staged) -> None:
        os.close(staged.descriptor)

    def _taken(self, size: int) -> int:
        """It comes in whole pages."""
        return super()._taken(-(-size // _PAGE) * _PAGE)


def _allowed_descriptors() -> int:
    """Each instance takes one, so as many as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _moved(descriptor: int, first: int) -> int:
    """The same file under the lowest number that is free from `first` on."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, first)
    finally:
        os.close(descriptor)

"""Memory that several processes see: the same pages, not a copy in each.

Solves that pixels reach another process without passing through a pipe. Such memory is a file without
a name (memfd): a descriptor stands for it, and it is gone with its last user, however that one ends.
"""

import fcntl
import math
import mmap
import os
from collections.abc import Iterable
from typing import Any

import numpy
from numpy.typing import NDArray

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def write_shared(parts: Iterable[bytes | memoryview]) -> int:
    """Memory that holds these bytes and never changes again; the descriptor is the caller's.

    Raises OSError.
    """
    descriptor = os.memfd_create("dicomnode", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(descriptor, view) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_sealed(descriptor: int) -> bool:
    """Whether what `write_shared` made is behind a descriptor: nobody can change or shorten it."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def view_shared(descriptor: int) -> memoryview:
    """The bytes of sealed memory, to read. The descriptor may be closed after that."""
    size = os.fstat(descriptor).st_size
    if not size:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ))


def new_shared(size: int) -> int:
    """Memory for so many bytes, of which only what is written to is taken. Raises OSError."""
    descriptor = os.memfd_create("dicomnode", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def shared_array(
    descriptor: int, shape: tuple[int, ...], dtype: numpy.dtype[Any], first: int = 0
) -> NDArray[Any]:
    """An array that lies in shared memory: of the rows there, `shape[0]` from the first on.

    The descriptor may be closed after that. Raises OSError, ValueError.
    """
    start = first * math.prod(shape[1:]) * dtype.itemsize
    skipped = start % mmap.ALLOCATIONGRANULARITY
    size = math.prod(shape) * dtype.itemsize
    if start + size > os.fstat(descriptor).st_size:
        raise ValueError(f"shared memory has no {size} bytes from {start} on")
    memory = mmap.mmap(descriptor, size + skipped, offset=start - skipped)
    return numpy.frombuffer(memory, dtype, math.prod(shape), skipped).reshape(shape)

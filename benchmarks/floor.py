"""The practical floor: a minimal reader in C that is told where everything is.

Compiled when it is first needed, where the machine has a C compiler.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pydicom
from numpy.typing import NDArray


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "floor.so")
        source = Path(__file__).with_suffix(".c")
        command = [compiler, "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(target), str(source)], check=True)
        return ctypes.CDLL(str(target))


def stacker(
    paths: Sequence[Path], threads: int, out: NDArray[numpy.float32] | None = None
) -> Callable[[], NDArray[numpy.float32]] | None:
    """A function that reads one series, in the order given; None where that cannot be.

    Into fresh memory, or again and again into `out`. Knows only unsigned 16 bit little endian
    pixels without foreign bits.
    """
    found = library()
    if found is None:
        return None
    heads = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    first = heads[0]
    for head in heads:
        kind = (head.BitsAllocated, head.PixelRepresentation, head.file_meta.TransferSyntaxUID)
        if kind != (16, 0, "1.2.840.10008.1.2.1"):
            return None
    slopes = _floats([head.RescaleSlope for head in heads])
    intercepts = _floats([head.RescaleIntercept for head in heads])
    shape = (len(paths), first.Rows, first.Columns)
    values = first.Rows * first.Columns
    names = _strings(paths)
    offsets = (ctypes.c_int64 * len(paths))(*map(_pixel_offset, paths))

    def run() -> NDArray[numpy.float32]:
        target = numpy.empty(shape, numpy.float32) if out is None else out
        if found.floor_stack(
            names,
            offsets,
            ctypes.c_int64(len(paths)),
            ctypes.c_int64(values),
            slopes,
            intercepts,
            ctypes.c_void_p(target.ctypes.data),
            threads,
        ):
            raise OSError("the floor could not read")
        return target

    return run


def heads(paths: Sequence[Path]) -> Callable[[], None] | None:
    """A function that opens each file, reads its first 16 KiB and closes it."""
    found = library()
    if found is None:
        return None
    names = _strings(paths)

    def run() -> None:
        if found.floor_heads(names, ctypes.c_int64(len(paths))):
            raise OSError("the floor could not read")

    return run


def memcpy(megabytes: int) -> Callable[[], None] | None:
    """A function that copies that much warm memory."""
    found = library()
    if found is None:
        return None
    source = numpy.ones(megabytes << 20, numpy.uint8)
    target = numpy.ones_like(source)

    def run() -> None:
        found.floor_copy(
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_int64(source.nbytes),
        )

    return run


def _strings(paths: Sequence[Path]) -> Any:
    return (ctypes.c_char_p * len(paths))(*(str(path).encode() for path in paths))


def _floats(values: Sequence[float]) -> Any:
    return (ctypes.c_float * len(values))(*map(float, values))


def _pixel_offset(path: Path) -> int:
    with path.open("rb") as file:
        head = pydicom.dcmread(file, specific_tags=["SOPInstanceUID"], stop_before_pixels=True)
        del head
        return file.tell() + 12

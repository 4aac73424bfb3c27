"""The disk where images rest: how much of it is free, and how much has to stay so.

Solves that a node stops to take images while it still has room for what it has answered: the ledger,
the results that it makes, and its next start.
"""

import os
from contextlib import suppress
from pathlib import Path

from dicomnode.errors import NoRoom

_MOST_FREE = 1 << 30
# What the ledger needs to recover, to send results and to delete what is done.
_RESERVE_BYTES = 1 << 20


class Disk:
    """The disk of a folder; None has no end. `wanted` bytes stay free, None is 5 %, at most 1 GiB.

    `reserve` is a file that takes the room for a start, and is deleted where nothing else is left.
    """

    def __init__(
        self, folder: Path | None, wanted: int | None = None, reserve: Path | None = None
    ) -> None:
        self._folder = folder
        self._reserve = reserve
        self._has_reserve = reserve is None
        # Known once the disk is there.
        self._least = wanted

    def free_bytes(self) -> int:
        """How many bytes may be written to it; it counts as full where it is gone."""
        return self._sizes()[0]

    def whole_bytes(self) -> int:
        """How many bytes it has in all; 0 where it is gone."""
        return self._sizes()[1]

    def _sizes(self) -> tuple[int, int]:
        try:
            found = os.statvfs(self._folder or "/")
        except OSError:
            return 0, 0
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def least_free(self) -> int:
        """How many bytes have to stay free."""
        if self._least is None and (whole := self.whole_bytes()):
            self._least = min(_MOST_FREE, whole // 20)
        return _MOST_FREE if self._least is None else self._least

    def has_room(self, size: int) -> bool:
        """Whether so many bytes leave as much free as has to stay so."""
        if self._folder is None:
            return True
        floor = self.floor()
        return self.free_bytes() - size >= floor

    def floor(self) -> int:
        """Images are taken as long as so many bytes are free, which includes what a start needs."""
        if not self._has_reserve:
            self.keep_reserve()
        return self.least_free() + (0 if self._has_reserve else _RESERVE_BYTES)

    def check_room(self, size: int) -> None:
        """Raises NoRoom where so many bytes leave too little free."""
        if not self.has_room(size):
            raise NoRoom(
                f"{self.free_bytes()} bytes are free on the disk of root_data_directory, and "
                f"{self.least_free()} have to stay free (limits.free_bytes)"
            )

    def keep_reserve(self) -> None:
        """Take room for a start on a full disk, once there is enough of it."""
        if self._reserve is None:
            return
        with suppress(OSError):
            if not self._reserve.exists() or self._reserve.stat().st_size < _RESERVE_BYTES:
                if self.free_bytes() - _RESERVE_BYTES < self.least_free():
                    return
                with self._reserve.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
            self._has_reserve = True

    def use_reserve(self) -> bool:
        """For a start: whether nothing else is left, so that the reserve is given up."""
        if self._reserve is None or self.free_bytes() >= _RESERVE_BYTES:
            return False
        self._reserve.unlink(missing_ok=True)
        self._has_reserve = False
        return True

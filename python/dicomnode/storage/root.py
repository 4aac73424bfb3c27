"""The root: the folder of one node, that no other process uses meanwhile, and the ledger found in it."""

import fcntl
import logging
import os
import sqlite3
import time
import weakref
from functools import partial
from pathlib import Path

from dicomnode.errors import InvalidRootDataDirectory
from dicomnode.storage.instances import flush_below, flush_folder, make_folder, out_of_resources
from dicomnode.storage.layout import OWN
from dicomnode.storage.ledger import Ledger
from dicomnode.storage.rebuild import Rebuild


class Root:
    """A root directory: `take` it, and `let_go` of it in the end."""

    def __init__(self, path: Path, is_flushed: bool, logger: logging.Logger) -> None:
        self.path = path
        self._own = path / OWN
        self._is_flushed = is_flushed
        self._logger = logger
        self._lock = -1
        #: Of a ledger that was lost; known when the ledger is open.
        self.rebuild: Rebuild

    def take(self) -> None:
        """Make what is missing of it, and keep other nodes from it.

        Raises InvalidRootDataDirectory where it cannot be used.
        """
        own = self._own
        try:
            for folder in (self.path, own, own / "incoming", own / "outbox"):
                make_folder(folder.absolute())
            self._lock = os.open(own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidRootDataDirectory(
                f"root_data_directory {self.path} cannot be used: {error.strerror}"
            ) from error
        if not _lock(self._lock):
            self.let_go()
            raise InvalidRootDataDirectory(
                f"root_data_directory {self.path} is in use by another running node; "
                "give every node its own"
            )
        # A program that process() forks has the lock too, and would keep it when the node is gone.
        os.register_at_fork(after_in_child=partial(_let_go, weakref.ref(self)))

    def let_go(self) -> None:
        """Others may use it from now on."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def flush_earlier(self) -> None:
        """Flush what runs with `durability = "process"` have left to the system; they leave a mark.

        After a power cut the mark may be gone, but then so is what was not flushed. Raises OutOfResources.
        """
        mark = self._own / "unflushed"
        try:
            if not self._is_flushed:
                mark.touch()
            elif mark.exists():
                flush_below(self.path)
                mark.unlink()
        except OSError as error:
            raise out_of_resources(error) from error

    def open_ledger(self) -> Ledger:
        """The ledger; a new one where it is damaged or lost, and what is left of that is set aside.

        Raises InvalidRootDataDirectory where it is sound and cannot be opened, and OutOfResources.
        """
        path = self._own / "ledger.sqlite"
        self.rebuild = Rebuild(self._own, self._is_flushed)
        is_lost = not path.exists() or not path.stat().st_size
        try:
            if is_lost and any((self._own / "outbox").iterdir()):
                self._set_ledger_aside(path, "is gone, but there are results")
            elif is_lost:
                self.rebuild.begin()
            return Ledger(path, self._is_flushed)
        except sqlite3.OperationalError as error:
            raise InvalidRootDataDirectory(
                f"the ledger {path} cannot be opened: {error}"
            ) from error
        except sqlite3.DatabaseError as error:
            self._set_ledger_aside(path, f"is damaged ({error})")
            return Ledger(path, self._is_flushed)

    def _set_ledger_aside(self, path: Path, trouble: str) -> None:
        """Keep what is left of a ledger, and the results that only it could tell the way of."""
        aside = self._own / f"ledger-lost-{time.time_ns()}"
        make_folder(aside)
        self.rebuild.begin(aside.name)
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm", "outbox"):
            if (self._own / name).exists():
                (self._own / name).rename(aside / name)
        make_folder(self._own / "outbox")
        flush_folder(aside)
        self._logger.error(
            "the ledger %s; what is left was set aside in %s, and it is rebuilt from the files; a "
            "case whose results were on their way becomes FAILED, for you to decide",
            trouble,
            aside.name,
        )


def _let_go(root: "weakref.ref[Root]") -> None:
    """In a forked child: close the lock of the root, which stays the parent's."""
    owner = root()
    if owner is not None:
        owner.let_go()


def _lock(descriptor: int) -> bool:
    """Take a lock, waiting a moment for a command that only looks whether a node runs."""
    for _ in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return True
    return False

"""What is known of a ledger that was lost, until the new one has all files.

Solves that a start which rebuilds a ledger may break off, at any moment and several times: what it found out
about files that it has moved away is in a file, written before they are moved.
"""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from dicomnode.storage.instances import flush_folder, out_of_resources
from dicomnode.storage.layout import OWNER


class Rebuild:
    """A rebuild that goes on, or none. Whatever cannot be written raises OutOfResources."""

    def __init__(self, own: Path, is_flushed: bool) -> None:
        self._own = own
        self._path = own / "rebuilding"
        self._is_flushed = is_flushed
        #: The folders where what was left of the ledger is.
        self._asides: list[str] = []
        #: For each folder of a case its files that cannot be used, each of which may be an acknowledged image.
        self.lacking: dict[str, set[str]] = {}
        self.is_going_on = self._path.is_file()
        if self.is_going_on:
            for line in self._path.read_text("utf-8", "replace").split("\n"):
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            match json.loads(line):
                case [str(folder), list(names)] if all(isinstance(one, str) for one in names):
                    if folder:
                        self.lacking.setdefault(folder, set()).update(names)
                    else:
                        self._asides += names
        except (ValueError, RecursionError):
            # Of a start that was killed, or found no room, while it wrote this; it had moved nothing yet.
            pass

    def begin(self, aside: str | None = None) -> None:
        """Before there is a new ledger, and before what is left of the old one goes to the folder `aside`."""
        self.is_going_on = True
        self._add("", [] if aside is None else [aside])

    def lacks(self, folder: str, names: Iterable[str]) -> None:
        """Before these files are moved away. Nothing where no ledger was lost: then nobody was told of them."""
        new = set(names) - self.lacking.get(folder, set())
        if self.is_going_on and new:
            self._add(folder, sorted(new))

    def end(self, unread: Collection[str] = ()) -> None:
        """All files that can be used have their rows.

        It goes on at the next start where folders of cases were `unread`; the empty name is the root.
        """
        kept = {one: names for one, names in self.lacking.items() if {one, ""} & set(unread)}
        new = self._path.with_suffix(".new")
        try:
            if unread:
                self._write("", self._asides, new, "w")
                for folder, names in kept.items():
                    self._write(folder, sorted(names), new, "a")
                new.replace(self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            raise out_of_resources(error) from error
        self.is_going_on, self.lacking = bool(unread), kept

    @property
    def unfinished(self) -> set[str]:
        """The folders of cases whose results were on their way when the ledger was lost."""
        return {
            owner.read_text("utf-8", "replace")
            for aside in self._asides
            for owner in (self._own / aside).glob(f"outbox/*/{OWNER}")
        }

    def _add(self, folder: str, names: list[str]) -> None:
        self._write(folder, names, self._path, "a")
        self._read(json.dumps([folder, names]))

    def _write(self, folder: str, names: list[str], path: Path, mode: str) -> None:
        try:
            with path.open(mode) as file:
                # What is there may end in a part of a line.
                file.write(f"\n{json.dumps([folder, names])}\n")
                file.flush()
                if self._is_flushed:
                    os.fsync(file.fileno())
            if self._is_flushed:
                flush_folder(self._own)
        except OSError as error:
            raise out_of_resources(error) from error


__all__ = ["Rebuild"]

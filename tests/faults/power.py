"""What a power cut may leave of a folder: from the system calls of a program, as strace wrote them.

A disk keeps what was flushed. What was written and not flushed it may keep, lose, or keep in part, and
so it is with the names in a folder: a file whose folder was not flushed may be gone, or be back after it
was deleted. `Disk` replays the calls up to any moment and writes down a state that a power cut at
that moment can leave. It is stricter than ext4 and XFS, where to flush a file flushes what happened to
names before, too. What is in `NOT_KEPT` does not count: SQLite makes it anew.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What strace has to be asked for.
OPTIONS = (
    *("-f", "--seccomp-bpf", "-y", "-qqq", "-s", "4000000", "-e"),
    "trace=openat,write,writev,pwrite64,ftruncate,fallocate,linkat,rename,renameat,renameat2,unlink,"
    "unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,syncfs,dup,fcntl,sendto,"
    "sendmsg",
)
NOT_KEPT = ("ledger.sqlite-shm",)
_SECTOR = 512
_FLUSHES = ("fsync", "fdatasync", "syncfs")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Call:
    """A system call that ended well: between which lines of the trace, and what it said."""

    name: str
    text: str
    begin: int
    end: int

    @property
    def strings(self) -> list[bytes]:
        """Its texts and buffers."""
        return [_bytes(match[1]) for match in _STRING.finditer(self.text)]

    @property
    def descriptor(self) -> int:
        """Its first argument."""
        return int(self.text.split("(", 1)[1].split("<", 1)[0])

    @property
    def result(self) -> int:
        """What it returned."""
        return int(self.text.rsplit(" = ", 1)[1].split("<", 1)[0].split()[0])


def calls_of(trace: Path, first: int = 0) -> list[Call]:
    """The calls that ended well, in the order in which they ended; lines are counted from `first`."""
    found: list[Call] = []
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(trace.read_text("latin-1").splitlines(), first):
        thread, _, text = line.partition(" ")
        text, begin = text.lstrip(), number
        if text.endswith("<unfinished ...>"):
            begun[thread] = (number, text.removesuffix("<unfinished ...>"))
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            begin, first = begun.pop(thread, (number, ""))
            text = first + resumed[1]
        if re.search(r"\) += \d", text):
            found.append(Call(text.split("(", 1)[0], text, begin, number))
    return found


def _bytes(text: str) -> bytes:
    """Out of C's escapes."""
    return bytes(ast.literal_eval(f'b"{text}"'))


@dataclass(eq=False)
class _File:
    """Its writes, of which the first `flushed` are safe: (where, what), or (size, None) for a cut."""

    changes: list[tuple[int, bytes | None]] = field(default_factory=list)
    flushed: int = 0
    position: int = 0

    def content(self, changes: Sequence[tuple[int, bytes | None]]) -> bytes:
        data = bytearray()
        for place, what in changes:
            end = place + len(what or b"")
            data.extend(bytes(max(0, end - len(data))))
            if what is None:
                del data[place:]
            else:
                data[place:end] = what
        return bytes(data)


@dataclass(eq=False)
class _Folder:
    """What happened to its names, of which the first `flushed` are safe; None where one is deleted."""

    changes: list[tuple[str, "_File | _Folder | None"]] = field(default_factory=list)
    flushed: int = 0

    def names(
        self, changes: Sequence[tuple[str, "_File | _Folder | None"]]
    ) -> dict[str, "_File | _Folder"]:
        found: dict[str, _File | _Folder] = {}
        for name, node in changes:
            found.pop(name, None)
            if node is not None:
                found[name] = node
        return found

    def now(self) -> dict[str, "_File | _Folder"]:
        return self.names(self.changes)


#: Of changes that were not flushed, those that are on the disk all the same.
Keeps = Callable[[list[Any]], list[Any]]


def keeps_nothing(changes: list[Any]) -> list[Any]:
    """As a disk that writes nothing before it has to."""
    return []


def keeps_all(changes: list[Any]) -> list[Any]:
    """As if only the process had been killed."""
    return changes


def keeps_some(seed: int) -> Keeps:
    """By chance, a write also in part."""
    chance = random.Random(seed)

    def keep(changes: list[Any]) -> list[Any]:
        kept = []
        for place, what in changes:
            if chance.random() < 0.5:
                if isinstance(what, bytes) and chance.random() < 0.3:
                    sectors = chance.randint(0, len(what) // _SECTOR)
                    kept.append((place, what[: _SECTOR * sectors]))
                else:
                    kept.append((place, what))
        return kept

    return keep


class Disk:
    """The disk below one folder, which is empty when the program starts."""

    def __init__(self, root: Path) -> None:
        self._place = root
        self._root = _Folder()
        self._open: dict[int, _File | _Folder | None] = {}

    def moments(self, calls: Sequence[Call]) -> Iterator[int]:
        """Replay; after each change of what is or may be on the disk, the line of the trace."""
        events = [(call.end, 1, call) for call in calls]
        events += [(call.begin, 0, call) for call in calls if call.name in _FLUSHES]
        flushing: dict[int, list[tuple[_File | _Folder, int]]] = {}
        for line, is_end, call in sorted(events, key=lambda one: one[:2]):
            if call.name not in _FLUSHES:
                if self._change(call):
                    yield line
                continue
            if not is_end:
                # What is written from here on it need not flush.
                nodes = self._all() if call.name == "syncfs" else [self._open.get(call.descriptor)]
                flushing[call.begin] = [(one, len(one.changes)) for one in nodes if one is not None]
            elif flushed := flushing.pop(call.begin, None):
                for node, count in flushed:
                    node.flushed = max(node.flushed, count)
                yield line

    def _all(self) -> list["_File | _Folder | None"]:
        """All that has a name or is open."""
        found: list[_File | _Folder | None] = [self._root, *self._open.values()]
        for node in found:
            if isinstance(node, _Folder):
                found += node.now().values()
        return found

    def write(self, place: Path, keep: Keeps) -> None:
        """Write down what is left of the folder by a power cut now."""
        self._write(self._root, place, keep)

    def _write(self, node: _File | _Folder, place: Path, keep: Keeps) -> None:
        kept = [*node.changes[: node.flushed], *keep([*node.changes[node.flushed :]])]
        if isinstance(node, _File):
            place.write_bytes(node.content(kept))
            return
        place.mkdir(mode=0o700)
        for name, inner in node.names(kept).items():
            if name not in NOT_KEPT:
                self._write(inner, place / name, keep)

    # The calls

    def _change(self, call: Call) -> bool:
        """Whether it may change what is on the disk."""
        match call.name:
            case "openat":
                return self._opened(call)
            case "dup" | "fcntl":
                if call.name == "dup" or "F_DUPFD" in call.text:
                    self._open[call.result] = self._open.get(call.descriptor)
                return False
            case "write" | "writev" | "pwrite64" | "ftruncate" | "fallocate":
                return self._written(call)
            case "mkdir":
                return self._named(self._path(call), _Folder())
            case "unlink" | "rmdir" | "unlinkat":
                return self._named(self._path(call), None)
            case "linkat":
                source, _ = call.strings
                assert "AT_EMPTY_PATH" in call.text or source.startswith(b"/proc/self/fd/"), (
                    call.text
                )
                opened = int(source.rsplit(b"/", 1)[1]) if source else call.descriptor
                node = self._open.get(opened)
                return node is not None and self._named(self._path(call), node)
            case "rename" | "renameat" | "renameat2" | "mkdirat":
                inside = any(str(self._place).encode() in one for one in call.strings)
                assert not inside and f"<{self._place}" not in call.text, (
                    f"not modelled: {call.text}"
                )
        return False

    def _path(self, call: Call) -> Path:
        """Of the name that it makes or deletes: its last text, in the last folder before it."""
        before = call.text.split('"')[0] if call.name == "unlinkat" else call.text
        folders = re.findall(r"<([^<>]*)>", before)
        return Path(folders[-1] if folders else "/", call.strings[-1].decode())

    def _find(self, path: Path) -> _File | _Folder | None:
        node: _File | _Folder | None = self._root
        for part in path.relative_to(self._place).parts:
            node = node.now().get(part) if isinstance(node, _Folder) else None
        return node

    def _named(self, path: Path, node: _File | _Folder | None) -> bool:
        # The folder itself is there when the power is cut.
        if not path.is_relative_to(self._place) or path == self._place:
            return False
        folder = self._find(path.parent)
        assert isinstance(folder, _Folder), path
        folder.changes.append((path.name, node))
        return True

    def _opened(self, call: Call) -> bool:
        path = self._path(call)
        self._open[call.result] = None
        if not path.is_relative_to(self._place):
            return False
        flags = call.text.rsplit('"', 1)[1]
        if "O_TMPFILE" in flags:
            self._open[call.result] = _File()
            return False
        node = self._find(path)
        is_new = node is None
        if node is None:
            assert "O_CREAT" in flags, call.text
            node = _File()
            self._named(path, node)
        elif "O_TRUNC" in flags and isinstance(node, _File):
            node.changes.append((0, None))
        if isinstance(node, _File):
            node.position = 0
        self._open[call.result] = node
        return is_new or "O_TRUNC" in flags

    def _written(self, call: Call) -> bool:
        node = self._open.get(call.descriptor)
        if not isinstance(node, _File):
            return False
        numbers = [
            int(one) for one in re.findall(r", (\d+)(?= *[,)])", call.text.rsplit('"', 1)[-1])
        ]
        if call.name == "ftruncate":
            node.changes.append((numbers[0], None))
        elif call.name == "fallocate":
            node.changes.append((sum(numbers[1:]), None))
        else:
            data = b"".join(call.strings)[: call.result]
            assert len(data) == call.result, call.text[:200]
            place = numbers[-1] if call.name == "pwrite64" else node.position
            node.position = place + len(data)
            node.changes.append((place, data))
        return True

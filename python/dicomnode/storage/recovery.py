"""Recovery: what a crash, a disk or a person left below the root, brought back to order at a start.

Every step may be interrupted and run again. Nothing that was acknowledged is dropped: a file that
the ledger does not know is adopted, one that is not what it was is set aside and waited for.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dicomnode.errors import InvalidDicom, OutOfResources
from dicomnode.lib.dicom import identifier_of, safe_name, scan
from dicomnode.storage.instances import Instances, flush_file, flush_folder
from dicomnode.storage.layout import (
    INCOMING,
    OURS,
    OWN,
    OWNER,
    SHA256,
    digest_of_file,
    input_folder,
    outbox_folder,
    set_aside,
)
from dicomnode.storage.ledger import OVER, Case, InstanceRow, Ledger, State
from dicomnode.storage.rebuild import Rebuild

_ATTEMPTS = 3
# In these states a case may have senders that never got their last answers.
_INTERRUPTED = (State.RECEIVING, State.READY, State.PROCESSING, State.EXPORTING)


@dataclass
class OpenCase:
    """What is known in memory of a case that takes images: to answer without asking the ledger."""

    id: int
    folder: str
    rows: dict[str, dict[str, InstanceRow]] = field(default_factory=dict)
    suffixes: dict[tuple[str, str], int] = field(default_factory=dict)
    #: Counts the images that came.
    generation: int = 0

    def put(self, row: InstanceRow) -> None:
        """Add or change one row."""
        self.rows.setdefault(row.input, {})[row.uid] = row
        self.generation += 1


class Recovery:
    """One start of a node: `run` it, then take `open_cases` and `unverified`."""

    def __init__(
        self,
        root: Path,
        ledger: Ledger,
        instances: Instances,
        input_names: Iterable[str],
        identifier_tag: int,
        logger: logging.Logger,
        rebuild: Rebuild,
        flush: bool = True,
        digest_size: int = SHA256,
    ) -> None:
        self._root = root
        # While one goes on, files without a row may have been acknowledged.
        self._rebuild = rebuild
        self._unfinished = rebuild.unfinished
        # The identifiers of which a person has a case to decide about.
        self._held_back: set[str] = set()
        self._ledger = ledger
        self._instances = instances
        self._input_names = tuple(input_names)
        self._identifier_tag = identifier_tag
        self._logger = logger
        self._flush = flush
        self._digest_size = digest_size
        self._found: dict[str, tuple[str, OpenCase]] = {}
        self._adopted: dict[int, tuple[OpenCase, list[InstanceRow]]] = {}
        #: What could not be read in the folders of cases now; under an empty name, in the root.
        self.unread: dict[str, set[str]] = {}
        #: The cases that take images, by identifier.
        self.open_cases: dict[str, OpenCase] = {}
        #: Cases whose files were not compared with their digests yet.
        self.unverified: set[int] = set()

    def run(self) -> None:
        """Bring ledger and files to agree."""
        # The journal has made up for what it needed of these.
        for leftover in (self._root / INCOMING).iterdir():
            if leftover.is_file():
                leftover.unlink()
        for case in self._ledger.over_with_files():
            try:
                delete_files(self._ledger, self._instances, case)
            except OSError as error:
                self._logger.error(
                    "files of case %d, %s, stay: %s", case.id, case.state.value, error
                )
        known: dict[str, set[str]] = {}
        for case in self._ledger.cases(*(state for state in State if state not in OVER)):
            if case.state is State.PROCESSING:
                self._recover_processing(case)
            self._check_files(case, known)
        self._drop_stale_outbox()
        if self._rebuild.is_going_on:
            sealed = (case for case in self._ledger.cases(State.FAILED) if case.sealed)
            self._held_back.update(case.identifier for case in sealed)
        self._adopt_orphans(known)
        try:
            self._ledger.interrupt_all(*_INTERRUPTED)
        except OutOfResources as error:
            self._logger.error("what may be sent again is not remembered: %s", error)

    def _recover_processing(self, case: Case) -> None:
        if case.attempts >= _ATTEMPTS:
            self._ledger.fail(
                case.id,
                f"the node ended {case.attempts} times while it processed this case; see the log, "
                "then retry it",
            )
            self._logger.error("case %d ended the node %d times: FAILED", case.id, case.attempts)
        else:
            self._ledger.move(case.id, State.PROCESSING, State.READY)
            self._logger.info("case %d was interrupted while processing, it runs again", case.id)

    def _check_files(self, case: Case, known: dict[str, set[str]]) -> None:
        """Look whether the files of a case are there, in the size that they had.

        What is in them is compared with its digest before it is processed, since reading all of it now
        would take long. `known` gets the names of the files in each folder.
        """
        rows: dict[str, dict[str, InstanceRow]] = {}
        damaged: list[InstanceRow] = []
        for row in self._ledger.instances(case.id):
            rows.setdefault(row.input, {})[row.uid] = row
        for name, by_uid in rows.items():
            folder = input_folder(case.folder, name)
            sizes = self._sizes(folder)
            known.setdefault(folder, set()).update(row.file for row in by_uid.values())
            damaged += [
                mark_damaged(self._root, case, row, self._logger)
                for row in by_uid.values()
                if not row.damaged and not self._is_sound(folder, row, sizes)
            ]
        changed = damaged + self._in_our_kind(case, rows, {(row.input, row.uid) for row in damaged})
        if changed:
            self._ledger.add_instances(case.id, changed)
            for row in changed:
                rows[row.input][row.uid] = row
        for name in set(rows) - set(self._input_names):
            if case.state is State.EXPORTING:
                continue
            self._logger.warning(
                "case %d holds images of an input %r, which this pipeline lacks: it waits",
                case.id,
                name,
            )
        self.unverified.add(case.id)
        if case.sealed:
            return
        if damaged and case.state is State.READY:
            self._ledger.move(case.id, State.READY, State.RECEIVING)
        self.open_cases[case.identifier] = OpenCase(case.id, case.folder, rows)

    def _in_our_kind(
        self, case: Case, rows: dict[str, dict[str, InstanceRow]], damaged: set[tuple[str, str]]
    ) -> list[InstanceRow]:
        """Rows with digests of another kind, made by a run with another durability, with ours.

        They are compared with those of images that come. A file that is not what it was keeps its
        own, by which it is found damaged later.
        """
        found = []
        for row in (one for by_uid in rows.values() for one in by_uid.values()):
            size = len(row.digest)
            if size in (0, self._digest_size) or row.damaged or (row.input, row.uid) in damaged:
                continue
            path = self._root / input_folder(case.folder, row.input) / row.file
            with suppress(OSError):
                if digest_of_file(path, size) == row.digest:
                    digest = digest_of_file(path, self._digest_size)
                    found.append(row._replace(digest=digest))
        return found

    def _sizes(self, folder: str) -> dict[str, int] | None:
        """The size of each file in a folder; None where it cannot be looked into now."""
        try:
            with os.scandir(self._root / folder) as entries:
                return {one.name: one.stat().st_size for one in entries if one.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            self._logger.error("the folder %r cannot be read: %s", folder, error.strerror)
            return None

    def _is_sound(self, folder: str, row: InstanceRow, sizes: dict[str, int] | None) -> bool:
        if sizes is None:
            return True
        if sizes.get(row.file) != row.size:
            return False
        if row.digest:
            return True
        # One that was found without a row, and is not in the form of ours.
        try:
            header = scan(self._instances.source(folder, row.file))
        except (InvalidDicom, OSError):
            return False
        return header.text(0x00080018) == row.uid

    def _drop_stale_outbox(self) -> None:
        """Results of a case that had not reached EXPORTING: process() makes them again."""
        exporting = {str(number) for number in self._ledger.cases_with_results()}
        for folder in (self._root / OWN / "outbox").iterdir():
            if folder.name not in exporting and folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)

    def _adopt_orphans(self, known: dict[str, set[str]]) -> None:
        by_folder = {safe_name(name): name for name in self._input_names}
        for folder in sorted(self._names(self._root, _folders)):
            if folder == OWN:
                continue
            # They may belong to a case, or to somebody who has files in the root.
            others: set[str] = set()
            for inner in sorted(self._names(self._root / folder, _folders)):
                place = f"{folder}/{inner}"
                names = self._names(self._root / place, _files) - known.get(place, set())
                if names and inner not in by_folder:
                    others |= names
                    self._logger.warning(
                        "%d files in %r belong to no input of this pipeline, left alone",
                        len(names),
                        place,
                    )
                    continue
                for file in sorted(names):
                    try:
                        self._adopt(Path(place, file), by_folder[inner])
                    except (OSError, MemoryError) as error:
                        self._rebuild.lacks(folder, [file])
                        # It is looked at again at the next start.
                        self._logger.error(
                            "file %r can be neither read nor set aside: %s",
                            file,
                            type(error).__name__,
                        )
                self._record_adopted(self._root / place)
            if self._rebuild.is_going_on:
                self._hold_back(folder, others)

    def _names(self, place: Path, kind: Callable[[Path], set[str]]) -> set[str]:
        """What is in a folder; where it cannot be read, a rebuild goes on at the next start."""
        try:
            return kind(place)
        except OSError as error:
            folder, *_ = (*place.relative_to(self._root).parts, "")
            if folder and OURS.fullmatch(folder) is None:
                # Such as `lost+found`.
                return set()
            self._logger.error("the folder %r cannot be read: %s", place.name, error.strerror)
            self.unread.setdefault(folder, set()).add(place.name)
            return set()

    def _adopt(self, relative: Path, input_name: str) -> None:
        """Take a file that the ledger does not know: complete, but the node ended before its row."""
        path = self._root / relative
        folder, _, file = relative.parts
        trouble = ""
        try:
            str(relative).encode()
            header = scan(str(path))
            identifier = identifier_of(header, self._identifier_tag)
            uid = header.text(0x00080018)
            if not identifier or not uid:
                trouble = "it has no identifier or no SOPInstanceUID"
        except UnicodeEncodeError:
            trouble = "its name is no UTF-8"
        except (InvalidDicom, OSError) as error:
            trouble = f"it cannot be read: {error}"
        if trouble:
            self._rebuild.lacks(folder, [file])
            self._set_aside(relative, trouble)
            return
        case = self._case_of_folder(identifier, folder)
        if case is None:
            self._rebuild.lacks(folder, [file])
            self._set_aside(relative, "it is in the folder of another identifier")
            return
        known = case.rows.get(input_name, {}).get(uid)
        if known is not None and not known.damaged:
            self._set_aside(relative, f"it repeats an instance of case {case.id}")
            return
        adopted = InstanceRow(
            input_name, uid, file, path.stat().st_size, digest_of_file(path, self._digest_size)
        )
        if self._flush:
            # Its sender was not told that it is safe, and is told so when it sends it again.
            flush_file(path)
        self._adopted.setdefault(case.id, (case, []))[1].append(adopted)
        case.put(adopted)
        self._logger.debug("case %d: instance %s was found without its row, adopted", case.id, uid)

    def _record_adopted(self, folder: Path) -> None:
        """The files of one folder together, because the ledger of many may have been lost."""
        adopted, self._adopted = self._adopted, {}
        for case, rows in adopted.values():
            try:
                if self._flush:
                    for one in (folder, folder.parent, folder.parent.parent):
                        flush_folder(one)
                self._ledger.add_instances(case.id, rows)
            except (OSError, OutOfResources) as error:
                if self._rebuild.is_going_on:
                    # Else the case may be processed without them before the next start finds them.
                    raise OutOfResources(
                        f"the ledger was lost, and {len(rows)} files cannot be written to the new one: "
                        f"{error}"
                    ) from error
                # They are found again at the next start.
                self._logger.error("%d files cannot be adopted now: %s", len(rows), error)
                for row in rows:
                    del case.rows[row.input][row.uid]
            else:
                self._logger.info(
                    "case %d: %d instances were found without their rows, adopted",
                    case.id,
                    len(rows),
                )

    def _hold_back(self, folder: str, others: set[str]) -> None:
        """Have a person decide about the case of a folder, images of which may be lost with the ledger.

        Where there is no case, nothing is processed without them.
        """
        files = others | self._rebuild.lacking.get(folder, set()) | self.unread.get(folder, set())
        if not files:
            return
        why = (
            f"the ledger was lost, and {len(files)} of its files cannot be used, such as {min(files)!r}: "
            "send its images again, or retry it to have it processed without these"
        )
        for identifier, case in list(self.open_cases.items()):
            if case.folder == folder and self._ledger.park(case.id, why):
                self._held_back.add(identifier)
                del self.open_cases[identifier]
                self._logger.error("case %d: %s", case.id, why)
        if folder in self._found:
            # FAILED for another reason: whoever decides about it has to know this, too.
            decided = self._ledger.case(self._found[folder][1].id)
            if decided.state is State.FAILED and why not in decided.error:
                self._ledger.fail(decided.id, f"{decided.error}; {why}")

    def _set_aside(self, relative: Path, trouble: str) -> None:
        self._logger.error("file %r set aside: %s", relative.name, trouble)
        set_aside(self._root, relative)

    def _case_of_folder(self, identifier: str, folder: str) -> OpenCase | None:
        """The case that an orphan belongs to; made where the ledger has none.

        None where the folder is that of another identifier. Where another folder is the open case
        of this identifier already, these images wait as a FAILED case for the operator to decide.
        """
        case = self.open_cases.get(identifier)
        if case is not None and case.folder == folder:
            return case
        if folder not in self._found:
            row = self._ledger.case_in(folder)
            if row is None and folder in self._unfinished:
                row = self._ledger.failed_case(
                    identifier,
                    folder,
                    "the ledger was lost while results of this case were on their way, and some may "
                    "have been delivered; a retry makes all of them again, under new UIDs",
                )
                self._logger.error("case %d may have been delivered in part: FAILED", row.id)
            if row is None and case is None and identifier not in self._held_back:
                row = self._ledger.open_case(identifier, folder)
                self.open_cases[identifier] = OpenCase(row.id, row.folder)
                return self.open_cases[identifier]
            if row is None:
                row = self._ledger.failed_case(
                    identifier,
                    folder,
                    "found at the start without an entry in the ledger, beside another case of the "
                    "same identifier; retry it to have it processed",
                )
                self._logger.error("case %d was found without an entry: FAILED", row.id)
            self._found[folder] = (row.identifier, OpenCase(row.id, row.folder))
            for known in self._ledger.instances(row.id):
                self._found[folder][1].rows.setdefault(known.input, {})[known.uid] = known
        owner, found = self._found[folder]
        return found if owner == identifier else None


def _folders(place: Path) -> set[str]:
    """The names of the folders in a folder."""
    with os.scandir(place) as entries:
        return {one.name for one in entries if _leads(one.is_dir)}


def _files(place: Path) -> set[str]:
    """The names of the files in a folder."""
    with os.scandir(place) as entries:
        return {one.name for one in entries if _leads(one.is_file)}


def _leads(is_one: Callable[[], bool]) -> bool:
    """Whether an entry is a folder, or a file; a link in a circle, which is none of ours, is neither."""
    try:
        return is_one()
    except OSError:
        return False


def mark_damaged(root: Path, case: Case, row: InstanceRow, logger: logging.Logger) -> InstanceRow:
    """Set the file of an instance aside; the row that says so."""
    try:
        set_aside(root, Path(input_folder(case.folder, row.input), row.file))
        fate = "it was set aside"
    except OSError as error:
        fate = f"it cannot be set aside: {error.strerror}"
    logger.error(
        "case %d: instance %s of input %r is damaged; %s", case.id, row.uid, row.input, fate
    )
    return row._replace(damaged=True)


def delete_files(ledger: Ledger, instances: Instances, case: Case) -> None:
    """Delete images and results of a case that is over, then forget them."""
    by_input: dict[str, list[str]] = {}
    for row in ledger.instances(case.id):
        by_input.setdefault(row.input, []).append(row.file)
    removed = {input_folder(case.folder, name): names for name, names in by_input.items()}
    removed[outbox_folder(case.id)] = [OWNER, *(row.file for row in ledger.results(case.id))]
    for folder, names in removed.items():
        instances.remove(folder, names)
    # A file that comes back, and that the ledger has forgotten, would be adopted.
    instances.flush_removed(removed)
    ledger.clear(case.id)

"""Storage: the bytes and the ledger as one object, so that a node cannot use one without the other.

The promise: when `add` returns, the instance survives a crash (with a root directory) and is listed
in its case. Files are durable before their ledger row; a file without a row was never acknowledged
and is adopted at the next start, a row without a sound file is reported and waits for a resend.

On disk, below the root:

    <identifier>/<input>/Image_<modality>_<instance number>.dcm    what arrived
    .dicomnode/ledger.sqlite                                       cases and states
    .dicomnode/outbox/<case>/                                      results on their way
    .dicomnode/journal-1, -2                                       what is not in the ledger yet, or not flushed
    .dicomnode/incoming/                                           not yet complete files, and names not yet flushed
    .dicomnode/work/                                               working directories of cases
    .dicomnode/reserve                                             room for a start on a full disk
    .dicomnode/damaged/                                            set aside at a start
    .dicomnode/unflushed                                           files may have to be flushed
"""

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from dicomnode.errors import (
    InvalidDicom,
    InvalidRootDataDirectory,
    OutOfResources,
    UnknownCase,
)
from dicomnode.lib.dicom import LazyDataset, Source, link, safe_name, scan
from dicomnode.lib.expected import series_of
from dicomnode.storage.commitments import Commitments
from dicomnode.storage.disk import Disk
from dicomnode.storage.instances import (
    FileInstances,
    Instance,
    Instances,
    MemoryInstances,
    Naming,
    Staged,
    flush_folder,
)
from dicomnode.storage.journal import JOURNAL_BYTES, Journal, Kept, rows_of
from dicomnode.storage.layout import (
    BLAKE3,
    INCOMING,
    OWN,
    SHA256,
    digest_of_file,
    input_folder,
)
from dicomnode.storage.ledger import OVER, Case, InstanceRow, Ledger, State
from dicomnode.storage.outbox import Outbox
from dicomnode.storage.recovery import OpenCase, Recovery, delete_files, mark_damaged
from dicomnode.storage.results import Results
from dicomnode.storage.root import Root
from dicomnode.storage.shared import SharedInstances
from dicomnode.storage.turns import Turn, Turns
from dicomnode.storage.waits import Waits

_DONE_KEPT = 1000
# There is a journal where the disk has so many times what it takes.
_MANY = 100

#: What an answer 0x0000 promises: the image survives a power cut, or a killed process only.
Durability: TypeAlias = Literal["power", "process"]


class DuplicateInstance(Exception):
    """The same SOPInstanceUID arrived before with other content."""


@dataclass(frozen=True)
class Contents:
    """What a case holds: for each input {SOPInstanceUID: source}, and what forbids to process it.

    `generation` differs after every image that came for an open case, also one that it had.
    """

    case_id: int
    sources: dict[str, dict[str, Source]]
    obstacle: str
    generation: int


class Storage:
    """Cases with their instances and results. Safe to use from any thread.

    `root` None keeps all in memory, at most `memory_limit` bytes. `input_names` are the inputs of
    the pipeline; `identifier_tag` is the attribute that groups images into cases, which recovery
    needs for files that the ledger does not know. With `is_shared` other processes can read what is in
    memory.
    """

    def __init__(
        self,
        root: Path | None,
        input_names: Iterable[str],
        identifier_tag: int,
        memory_limit: int,
        logger: logging.Logger,
        *,
        durability: Durability = "power",
        least_free: int | None = None,
        is_shared: bool = False,
    ) -> None:
        self.root = root
        self._is_flushed = durability == "power"
        #: Of what kind the digests of images are.
        self.digest_size = SHA256 if root is not None and self._is_flushed else BLAKE3
        #: Where the root is.
        self.disk = Disk(root, least_free, None if root is None else root / OWN / "reserve")
        self._input_names = tuple(input_names)
        self._identifier_tag = identifier_tag
        self._logger = logger
        self._open_cases: dict[str, OpenCase] = {}
        self._turns = Turns()
        # The instances that are on their way into the open case of an identifier, and whether one waits for that.
        self._arriving: dict[str, dict[str, bool]] = {}
        self._taken: Root | None = None
        #: Whether an association that brought images to a case is open; the node tells.
        self.is_open_for: Callable[[int], bool] = lambda _: False
        # Cases that were done while one was, and who looks at that and changes it.
        self._unreleased: set[int] = set()
        self._releasing = threading.Lock()
        self._unverified: set[int] = set()
        self._instances: Instances
        if root is None and is_shared:
            self._instances = SharedInstances(memory_limit)
        elif root is None:
            self._instances = MemoryInstances(memory_limit)
        else:
            self._instances = FileInstances(root, root / INCOMING, self._is_flushed)
        self._journal: Journal | None = None
        self.ledger: Ledger
        self.outbox: Outbox
        self.results: Results
        self.commitments: Commitments
        self.waits: Waits

    # Opening and closing

    def open(self) -> None:
        """Take the root, recover what a crash left, and know every case.

        Raises InvalidRootDataDirectory where the root cannot be used. A damaged file or a damaged
        ledger does not keep it from opening.
        """
        if self.root is None:
            self.ledger = Ledger(None)
            self.outbox = Outbox(self.ledger)
            self.results = Results(self.ledger, self.outbox, self._instances, self.root is not None)
            self.commitments = Commitments(self.ledger)
            self.waits = Waits(self.ledger)
            return
        root = self._taken = Root(self.root, self._is_flushed, self._logger)
        root.take()
        try:
            self._begin(root, self.root)
        except OutOfResources as error:
            root.let_go()
            raise InvalidRootDataDirectory(
                f"root_data_directory {self.root} has no room for a start: {error}"
            ) from error
        except BaseException:
            root.let_go()
            raise

    def _begin(self, root: Root, path: Path) -> None:
        """Open the ledger of a root that is taken, and bring what is there to order."""
        if self.disk.use_reserve():
            self._logger.error(
                "the disk of root_data_directory is full: no image is taken until it has room"
            )
        root.flush_earlier()
        self.ledger = root.open_ledger()
        try:
            self.outbox = Outbox(self.ledger)
            self.results = Results(self.ledger, self.outbox, self._instances, self.root is not None)
            self.commitments = Commitments(self.ledger)
            self.waits = Waits(self.ledger)
            self._journal = Journal(
                path, self.ledger, self._instances, self._logger, self._is_flushed, self.digest_size
            )
            self._journal.restore()
            self._journal.on_failure = self._doubt
            recovery = Recovery(
                path,
                self.ledger,
                self._instances,
                self._input_names,
                self._identifier_tag,
                self._logger,
                root.rebuild,
                self._is_flushed,
                self.digest_size,
            )
            recovery.run()
            root.rebuild.end(recovery.unread if root.rebuild.is_going_on else ())
            self._open_cases = recovery.open_cases
            self._unverified = recovery.unverified
            self.disk.keep_reserve()
            if self.disk.has_room(_MANY * JOURNAL_BYTES):
                self._journal.open()
            if self._is_flushed:
                flush_folder(path / OWN)
        except BaseException:
            self._close()
            raise

    def close(self) -> None:
        """Let the root go."""
        self._close()
        self._open_cases.clear()
        if isinstance(self._instances, MemoryInstances):
            self._instances.close()
        if self._taken is not None:
            self._taken.let_go()

    def _close(self) -> None:
        try:
            if self._journal is not None:
                self._journal.close()
        finally:
            self.ledger.close()

    # Receiving

    def holding(self, identifier: str) -> AbstractContextManager[threading.Condition]:
        """Nothing is added to, or sealed of, the cases of this identifier meanwhile.

        No code of a user runs while this is held: it could wait for ever.
        """
        return self._turns.of(identifier)

    def add(
        self,
        identifier: str,
        input_names: Iterable[str],
        instance: Instance,
        on_added: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Keep an instance in the named inputs of the identifier's open case; the case's number.

        An instance that is there already with the same content is not stored again. `on_added` is called with
        that number before anybody can see the instance in the case.

        Raises OutOfResources (nothing was stored) and DuplicateInstance (other content under the
        same SOPInstanceUID; the first is kept).
        """
        turn = self._turns.take(identifier)
        try:
            return self._add(turn, identifier, tuple(input_names), instance, on_added)
        finally:
            self._turns.give(identifier, turn)

    def _add(
        self,
        turn: Turn,
        identifier: str,
        names: tuple[str, ...],
        instance: Instance,
        on_added: Callable[[int], None],
    ) -> int:
        uid = instance.sop_instance_uid
        # What was kept, also where something fails after that.
        kept = Kept()
        with turn.lock:
            # The same image may be arriving over another association.
            while uid in (arriving := self._arriving.get(identifier, {})):
                arriving[uid] = True
                turn.condition.wait()
            known = self._open_cases.get(identifier)
            lacking = names if known is None else self._lacking(known, names, instance)
            if known is not None and not lacking:
                # Who looked at the case before must not delete it: its sender is told that it is here.
                known.generation += 1
                on_added(known.id)
                return known.id
            if instance.arrived is None:
                # Whoever wrote that has looked.
                self.disk.check_room(sum(map(len, instance.chunks)))
            case = known or self._open_case(identifier)
            self._arriving.setdefault(identifier, {})[uid] = False
        try:
            # While it is on its way, the case is neither claimed nor set aside.
            self._put_instance(case, lacking, instance, instance.arrived, kept)
        finally:
            with turn.lock:
                arriving = self._arriving[identifier]
                if arriving.pop(uid):
                    turn.condition.notify_all()
                if not arriving:
                    del self._arriving[identifier]
                if kept.rows:
                    on_added(case.id)
                for row in kept.rows:
                    case.put(row)
        return case.id

    def _put_instance(
        self,
        case: OpenCase,
        names: Sequence[str],
        instance: Instance,
        staged: Staged | None,
        kept: Kept,
    ) -> None:
        """Make an instance durable in these inputs: its files, their folders, then the rows, which `kept` has in the end.

        The journal stands for the rows, and for all of a small one or the names of a large one.
        """
        if staged is None:
            with self._instances.staging(instance.chunks) as made:
                self._put_instance(case, names, instance, made, kept)
            return
        files: list[tuple[str, str]] = []
        journal = self._journal
        if journal is not None:
            journal.prepare(staged, instance.request)
        try:
            for name in names if journal is None else names[:-1]:
                file = self._place(case, name, staged, instance.name)
                files.append((name, file))
            if journal is None:
                kept.rows = rows_of(files, instance, staged, self.digest_size)
                self.ledger.expect([(case.id, *row) for row in kept.rows])
            else:
                naming = partial(journal.keep, case, files, names[-1], instance, staged, kept)
                self._place(case, names[-1], staged, instance.name, naming)
        except OutOfResources:
            for name, file in files:
                self._instances.remove(input_folder(case.folder, name), [file])
            raise

    @property
    def incoming(self) -> Path | None:
        """Where files of images begin; None where they are kept in memory."""
        return None if self.root is None else self.root / INCOMING

    @property
    def named_above(self) -> int | None:
        """Files of more bytes may have names ahead; None where none may."""
        return None if self._journal is None else self._journal.named_above

    def _lacking(self, case: OpenCase, names: tuple[str, ...], instance: Instance) -> list[str]:
        """The inputs that do not hold this instance yet, or hold it damaged.

        Raises DuplicateInstance where one holds it with other content.
        """
        lacking = []
        for name in names:
            known = case.rows.get(name, {}).get(instance.sop_instance_uid)
            if known is not None and case.id in self._unverified and not known.damaged:
                # What an earlier run wrote may have changed since; the sender offers it again.
                known = self._checked(self.ledger.case(case.id), known, case)
            if known is None or known.damaged:
                lacking.append(name)
            elif known.digest and known.digest != instance.digest_of(len(known.digest)):
                raise DuplicateInstance(
                    f"{instance.sop_instance_uid} is in case {case.id} with other content"
                )
        return lacking

    def _place(
        self,
        case: OpenCase,
        input_name: str,
        staged: Staged,
        stem: str,
        naming: Naming = link,
    ) -> str:
        """Put staged bytes into an input as `stem.dcm`, `stem~2.dcm`, ..., the first that is free; which it is."""
        key, folder = (input_name, stem), input_folder(case.folder, input_name)
        while True:
            # It starts where the last instance of that name ended.
            number = case.suffixes[key] = case.suffixes.get(key, 0) + 1
            file = f"{stem}.dcm" if number == 1 else f"{stem}~{number}.dcm"
            if self._instances.place(staged, folder, file, naming):
                return file

    def _open_case(self, identifier: str) -> OpenCase:
        case = self._open_cases.get(identifier)
        if case is None:
            row = self.ledger.open_case(identifier, self._free_folder(identifier))
            case = OpenCase(row.id, row.folder)
            self._open_cases[identifier] = case
        return case

    def _free_folder(self, identifier: str) -> str:
        base = safe_name(identifier)
        for number in itertools.count(1):
            folder = base if number == 1 else f"{base}~{number}"
            if self.ledger.folder_is_taken(folder):
                continue
            if self.root is not None and (self.root / folder).exists():
                continue
            return folder
        raise AssertionError("unreachable: a count never ends")

    def probe(self) -> None:
        """Keep and let go a few bytes as those of an image. Raises OutOfResources."""
        self.disk.check_room(0)
        with self._instances.staging([b"probe"]) as staged:
            self._instances.flush(staged)
        with self.ledger.transaction(durable=False):
            pass

    # From RECEIVING to PROCESSING

    def open_identifiers(self) -> list[str]:
        """The identifiers of all cases that take images."""
        return list(self._open_cases)

    def open_case(self, identifier: str) -> int:
        """The number of the case of an identifier that takes images; 0 where there is none."""
        case = self._open_cases.get(identifier)
        return 0 if case is None else case.id

    def current(self, identifier: str) -> Contents | None:
        """What the open case of an identifier holds; None where there is no such case."""
        with self.holding(identifier):
            case = self._open_cases.get(identifier)
            if case is None:
                return None
            rows = [row for by_uid in case.rows.values() for row in by_uid.values()]
            return self._contents(case.id, case.folder, rows, generation=case.generation)

    def sources(self, identifier: str, uid: str) -> tuple[int, dict[str, Source]]:
        """The number of the open case of an identifier, and {input: source} of one instance in it."""
        with self.holding(identifier):
            case = self._open_cases.get(identifier)
            if case is None:
                return 0, {}
            rows = [by_uid[uid] for by_uid in case.rows.values() if uid in by_uid]
            return case.id, {
                row.input: self._instances.source(input_folder(case.folder, row.input), row.file)
                for row in rows
                if not row.damaged
            }

    def sources_of(self, case_id: int) -> list[Source]:
        """All images of a case, open or sealed, that are not damaged."""
        folder = self.ledger.case(case_id).folder
        return [
            self._instances.source(input_folder(folder, row.input), row.file)
            for row in self.ledger.instances(case_id)
            if not row.damaged
        ]

    def contents(self, case: Case) -> Contents:
        """What a sealed case holds."""
        rows = self.ledger.instances(case.id)
        return self._contents(case.id, case.folder, rows, sealed=True)

    def _contents(
        self,
        case_id: int,
        folder: str,
        rows: Iterable[InstanceRow],
        *,
        sealed: bool = False,
        generation: int = 0,
    ) -> Contents:
        sources: dict[str, dict[str, Source]] = {name: {} for name in self._input_names}
        places = {name: input_folder(folder, name) for name in sources}
        source, obstacle = self._instances.source, ""
        for row in rows:
            if row.damaged:
                remedy = "the series again, it forms a new case" if sealed else "it again"
                obstacle = f"instance {row.uid} is damaged and was set aside; send {remedy}"
            elif row.input not in sources:
                obstacle = f"it holds images of an input {row.input!r}, which this pipeline lacks"
            else:
                sources[row.input][row.uid] = source(places[row.input], row.file)
        return Contents(case_id, sources, obstacle, generation)

    def is_verified(self, case_id: int) -> bool:
        """Whether this run received all images of a case, or has compared them with their digests."""
        return self.root is None or case_id not in self._unverified

    def _doubt(self) -> None:
        """The disk may have failed to keep what this run received."""
        self._unverified.update(case.id for case in list(self._open_cases.values()))

    def verify(self, case: Case) -> None:
        """Compare with their digests the images of a case that this run did not receive itself."""
        if self.root is None or not (case.sealed or case.id in self._unverified):
            return
        with self.holding(case.identifier):
            known = self._open_cases.get(case.identifier)
            if known is not None and known.id != case.id:
                known = None
            for row in self.ledger.instances(case.id):
                self._checked(case, row, known)
            self._unverified.discard(case.id)

    def _checked(self, case: Case, row: InstanceRow, known: OpenCase | None) -> InstanceRow:
        """A row whose file was compared with its digest; set aside and marked where it differs."""
        source = self._instances.source(input_folder(case.folder, row.input), row.file)
        if self.root is None or row.damaged or not row.digest or not isinstance(source, str):
            return row
        try:
            if digest_of_file(source, len(row.digest)) == row.digest:
                return row
        except OSError:
            pass
        damaged = mark_damaged(self.root, case, row, self._logger)
        self.ledger.add_instances(case.id, [damaged])
        if known is not None:
            known.put(damaged)
        return damaged

    def settle(self, identifier: str, contents: Contents, complete: bool, why: str = "") -> bool:
        """An open case is READY where it is complete, else RECEIVING, also if it had FAILED.

        `why` is what it waits for. False, and nothing is done, where the case holds something else
        than `contents` by now, or is to be processed as it is.
        """
        with self._as_it_was(identifier, contents) as known:
            if known is None:
                return False
            if not complete and self._is_forced(contents):
                return False
            if why != self.waits.of(known.id).reason:
                self.waits.tell(known.id, why)
            self.ledger.settle(known.id, State.READY if complete else State.RECEIVING)
            return True

    def give_up(self, identifier: str, contents: Contents, why: str) -> bool:
        """An open case FAILED, since it is not complete; it still takes images.

        False, and nothing is done, where the case holds something else than `contents` by now, or is to be
        processed as it is.
        """
        with self._as_it_was(identifier, contents) as known:
            if known is None or self._is_forced(contents):
                return False
            self.ledger.fail(known.id, why)
            return True

    def force(self, identifier: str, contents: Contents, why: str) -> bool:
        """An open case is READY, to be processed as it is, though it waits for something.

        False, and nothing is done, where the case holds something else than `contents` by now.
        """
        with self._as_it_was(identifier, contents) as known:
            if known is None:
                return False
            self.waits.tell(known.id, why)
            self.waits.force(known.id)
            return True

    def _is_forced(self, contents: Contents) -> bool:
        """Whether a case can and is to be processed as it is; that may be wanted while it is looked at."""
        return not contents.obstacle and self.waits.of(contents.case_id).forced

    @contextmanager
    def _as_it_was(self, identifier: str, contents: Contents) -> Iterator[OpenCase | None]:
        """The open case of an identifier, held; None where it is not what `contents` are of."""
        with self.holding(identifier):
            known = self._open_cases.get(identifier)
            if known is None or (known.id, known.generation) != (
                contents.case_id,
                contents.generation,
            ):
                yield None
            else:
                yield known

    def revise(self, identifier: str, contents: Contents, earlier: Case) -> int | None:
        """Give an open case the images of an earlier one that it lacks; how many these are.

        They are linked, not copied, and stay in the earlier case. None, and nothing is done, where the open case
        holds something else than `contents` by now, or the earlier one is over. Raises OutOfResources.
        """
        with self._as_it_was(identifier, contents) as known:
            if known is None or identifier in self._arriving:
                return None
            if self.ledger.case(earlier.id).state in OVER:
                return None
            rows: list[InstanceRow] = []
            try:
                for row in self.ledger.instances(earlier.id):
                    mine = known.rows.get(row.input, {}).get(row.uid)
                    if mine is not None:
                        continue
                    if not row.damaged:
                        source = input_folder(earlier.folder, row.input)
                        stem = row.file.removesuffix(".dcm").partition("~")[0]
                        with self._instances.placed(source, row.file) as placed:
                            file = self._place(known, row.input, placed, stem)
                        row = row._replace(file=file)  # noqa: PLW2901
                    rows.append(row)
                self.ledger.add_instances(known.id, rows)
            except (OutOfResources, FileNotFoundError) as error:
                for row in rows:
                    if not row.damaged:
                        self._instances.remove(input_folder(known.folder, row.input), [row.file])
                if isinstance(error, FileNotFoundError):
                    return None
                raise
            for row in rows:
                known.put(row)
            # An earlier run may have written them.
            self._unverified.add(known.id)
            self.waits.revise(known.id, earlier.id)
            return len(rows)

    def expire(self, identifier: str, contents: Contents) -> bool:
        """Delete a case that takes images and waits for them; whether it was one.

        Nothing is done where it holds something else than `contents` by now.
        """
        with self._as_it_was(identifier, contents) as known:
            if known is None or identifier in self._arriving or not self.waits.expire(known.id):
                return False
            del self._open_cases[identifier]
            self._delete(self.ledger.case(known.id))
            return True

    def interrupt(self, case_ids: Iterable[int]) -> None:
        """Remember what these cases hold: their sender has not got all answers, or may not have."""
        for case_id in case_ids:
            self.ledger.interrupt(case_id)
            self._unreleased.discard(case_id)

    def released(self, case_ids: Iterable[int]) -> None:
        """The sender of images of these cases has got all answers.

        Of one that was done before that, nothing needs to be remembered any more.
        """
        # Others may want to see them.
        with suppress(OutOfResources):
            self.ledger.write_expected()
        with self._releasing:
            for case_id in self._unreleased.intersection(case_ids):
                if not self.is_open_for(case_id):
                    self._unreleased.discard(case_id)
                    with suppress(OutOfResources):
                        self.ledger.release(case_id)

    def park(self, identifier: str, contents: Contents) -> int | None:
        """Set aside a case whose images an interrupted one held before; that one's number.

        The sender may not have got the last answers, and sent everything again: processing it would
        deliver the same results twice. Also a part of it is set aside, before it joins what comes
        next. None, and nothing is done, for any other case.
        """
        with self._as_it_was(identifier, contents) as known:
            if identifier in self._arriving or known is None:
                return None
            repeated = next(
                (
                    number
                    for number, unlike in self.ledger.repeated(known.id)
                    if all(self._has_digest(known, row, digest) for row, digest in unlike)
                ),
                None,
            )
            if repeated is None or not self.ledger.park(
                known.id,
                f"it holds what case {repeated} held before, whose sender had not got all answers, "
                "and nothing else: it was sent again; retry it to have it processed a second time",
            ):
                return None
            del self._open_cases[identifier]
            return repeated

    def _has_digest(self, case: OpenCase, row: InstanceRow, digest: bytes) -> bool:
        """Whether the file of an instance has a digest, of whatever kind."""
        source = self._instances.source(input_folder(case.folder, row.input), row.file)
        try:
            return isinstance(source, str) and digest_of_file(source, len(digest)) == digest
        except OSError:
            return False

    def seal(self, case: Case, contents: Contents) -> bool:
        """READY -> PROCESSING: the case is claimed, and takes no further images.

        False where it is not READY, holds something else than `contents` by now, or will in a moment.
        """
        with self.holding(case.identifier):
            known = self._open_cases.get(case.identifier)
            if not case.sealed and (
                case.identifier in self._arriving
                or known is None
                or (known.id, known.generation) != (contents.case_id, contents.generation)
            ):
                return False
            claimed = self.ledger.move(case.id, State.READY, State.PROCESSING, seal=True)
            if claimed and known is not None and known.id == case.id:
                del self._open_cases[case.identifier]
            return claimed

    def fail(self, case_id: int, error: str) -> None:
        """Any state -> FAILED with the reason; nothing is deleted."""
        self.ledger.fail(case_id, error)

    # After that

    def kept(self, transaction_uid: str, uids: Iterable[str]) -> dict[str, str]:
        """Of the instances that a sender asked to keep, which are `uids`, those that are here and sound, with their class.

        None of them without a root directory: what is in memory is not kept.
        """
        found: dict[str, str] = {}
        self._await(set(uids))
        for uid, folder, name, file, digest in self.commitments.copies(transaction_uid):
            source = self._instances.source(input_folder(folder, name), file)
            if self.root is None or uid in found or not isinstance(source, str):
                continue
            try:
                if not digest or digest_of_file(source, len(digest)) == digest:
                    found[uid] = scan(source).text(0x00080016)
            except (InvalidDicom, OSError) as error:
                self._logger.error("%s cannot be read: %s", uid, type(error).__name__)
        return found

    def _await(self, uids: set[str]) -> None:
        """Until none of these is on its way: it may be answered, and the ledger not know of it yet."""
        for identifier in list(self._arriving):
            with self.holding(identifier) as condition:
                while coming := uids.intersection(self._arriving.get(identifier, {})):
                    self._arriving[identifier].update(dict.fromkeys(coming, True))
                    condition.wait()

    def finish(self, case: Case) -> None:
        """EXPORTING -> DONE, and only then delete the files of the case."""
        # An image that comes later is to be known as one that came too late.
        with suppress(InvalidDicom, OSError, KeyError):
            uids = series_of(LazyDataset(source) for source in self.sources_of(case.id))
            self.waits.remember_series(case.id, filter(None, uids))
        revised = self._contained(case)
        with self.holding(case.identifier):
            with self._releasing:
                if self.is_open_for(case.id):
                    # Should its sender break off, it sends again what is deleted here.
                    self.ledger.interrupt(case.id)
                    self._unreleased.add(case.id)
            if self.ledger.move(case.id, State.EXPORTING, State.DONE):
                self._delete(case)
        for earlier in revised:
            if self.ledger.move(earlier.id, State.FAILED, State.DONE):
                self._logger.info(
                    "case %d is done, too: case %d had all its images", earlier.id, case.id
                )
                self._delete(earlier)
        self.ledger.forget(_DONE_KEPT)
        self.waits.forget()

    def _delete(self, case: Case) -> None:
        """Delete the files of a case that is over."""
        if self._journal is not None:
            self._journal.forget(case.id)
        delete_files(self.ledger, self._instances, case)

    def _contained(self, case: Case) -> list[Case]:
        """The FAILED cases without results that a case is a revision of, and has all images of."""
        found: list[Case] = []
        mine = {(row.input, row.uid, row.digest) for row in self.ledger.instances(case.id)}
        number = self.waits.of(case.id).revises
        while number:
            try:
                earlier = self.ledger.case(number)
            except UnknownCase:
                break
            held = {(row.input, row.uid, row.digest) for row in self.ledger.instances(number)}
            if earlier.state is State.FAILED and held <= mine and not self.ledger.results(number):
                found.append(earlier)
            number = self.waits.of(number).revises
        return found

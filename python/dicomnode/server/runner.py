"""The runner: claims ready cases, grinds, processes.

Solves that a failure stays where it happens: one case, one step. Work is done off the association
threads, by workers that take READY cases one at a time; what they made is left to the exporter.
Whatever fails, the case is kept and FAILED.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset

from dicomnode.errors import InvalidDataset, OutOfResources
from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import Address
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.exporter import Exporter, Retries
from dicomnode.server.input import AbstractInput, Datasets
from dicomnode.server.loop import Failures, Loop
from dicomnode.server.meters import Meters
from dicomnode.storage.ledger import Case, State
from dicomnode.storage.store import Contents, Storage


@dataclass(frozen=True)
class Work:
    """What a runner needs to know about its node."""

    ae_title: str
    inputs: Mapping[str, type[AbstractInput]]
    endpoints: Sequence[Address]
    retries: Retries
    process: Callable[[dict[str, Any]], Iterable[Dataset] | None]


class Runner:
    """Workers and exporters over one storage."""

    def __init__(
        self,
        work: Work,
        storage: Storage,
        eager: EagerDecoding,
        logger: logging.Logger,
        workers: int,
        meters: Meters,
    ) -> None:
        self._meters = meters
        self._work = work
        self._storage = storage
        self._eager = eager
        self._logger = logger
        self._lock = threading.Lock()
        self._unchecked: set[str] = set()
        # How many cases are being processed, and whether one of them has to be alone.
        self._processing = 0
        self._alone = False
        self._is_awaited = False
        self._failures = Failures(storage, logger, meters)
        self._loop = Loop(storage, logger, lambda: bool(self._failures or self._unchecked))
        self._loop.add("worker", self._process_next, workers)
        Exporter(
            work.ae_title,
            work.endpoints,
            work.retries,
            storage,
            logger,
            self._loop,
            self._failures,
            meters,
        )

    def start(self) -> None:
        """Start the threads."""
        self._loop.start()

    def stop(self, drain: bool, seconds: float | None) -> bool:
        """Stop after the step that runs, or with `drain` after all that is ready.

        Tells whether all threads ended within `seconds`; None waits without end.
        """
        return self._loop.stop(drain, seconds)

    def is_worker(self, thread: threading.Thread) -> bool:
        """Whether a thread is one of these, in which user code runs."""
        return self._loop.owns(thread)

    def check(self, identifiers: Iterable[str]) -> None:
        """Make READY each of these cases whose inputs all validate."""
        for identifier in identifiers:
            try:
                self._check(identifier)
            except OutOfResources as error:
                self._logger.error("a case cannot be made ready now: %s", error)
                with self._lock:
                    self._unchecked.add(identifier)
        self.wake()

    def wake(self) -> None:
        """Look for work now."""
        self._loop.wake()

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition on the storage holds; looked at after every step. For tests."""
        return self._loop.wait(condition, seconds)

    # RECEIVING -> READY

    def _check(self, identifier: str) -> None:
        """Look whether a case is complete; again, where images came in meanwhile."""
        while (contents := self._storage.current(identifier)) is not None:
            looked = self._look(contents)
            if looked is None:
                return
            _, waiting = looked
            repeated = self._storage.park(identifier, contents)
            if repeated is not None:
                self._eager.drop(contents.case_id)
                self._logger.error(
                    "case %d repeats case %d, whose sender had not got all answers, and is not "
                    "processed; retry it if it should be",
                    contents.case_id,
                    repeated,
                )
                return
            if self._storage.settle(identifier, contents, complete=not waiting):
                if waiting:
                    self._logger.info("case %d waits: %s", contents.case_id, waiting)
                else:
                    self._logger.info("case %d is ready", contents.case_id)
                return

    def _look(self, contents: Contents) -> tuple[dict[str, AbstractInput], str] | None:
        """The inputs of a case and what they wait for; None where looking failed."""
        with self._failures.blaming(contents.case_id):
            inputs = self._inputs(contents)
            return inputs, _waiting_for(contents, inputs)
        return None

    def _inputs(self, contents: Contents) -> dict[str, AbstractInput]:
        return {
            name: kind(
                Datasets(contents.sources[name], self._eager.decoded(contents.case_id, name))
            )
            for name, kind in self._work.inputs.items()
        }

    # READY -> PROCESSING -> EXPORTING

    def _process_next(self) -> bool:
        self._failures.record()
        self._check_again()
        for case_id in self._storage.ledger.queue(State.READY):
            if case_id in self._failures:
                continue
            case = self._storage.ledger.case(case_id)
            if case.state is not State.READY:
                continue
            if not self._begin(case):
                return False
            worked = False
            try:
                inputs = self._claim(case)
                if inputs is not None:
                    self._process(case, inputs)
                    worked = True
                    return True
            finally:
                self._end(worked)
        return False

    def _check_again(self) -> None:
        with self._lock:
            identifiers, self._unchecked = self._unchecked, set()
        if identifiers:
            self.check(identifiers)

    def _begin(self, case: Case) -> bool:
        """Whether a case may be processed now.

        One that was being processed when the node died runs alone, so that if it is what ends the
        node, no other case gets the blame.
        """
        with self._lock:
            if self._alone or (case.attempts and self._processing):
                self._is_awaited = True
                return False
            self._processing += 1
            self._meters.workers_busy.add(1)
            self._alone = case.attempts > 0
            return True

    def _end(self, worked: bool) -> None:
        with self._lock:
            self._processing -= 1
            self._meters.workers_busy.add(-1)
            self._alone = False
            # What could not be claimed now wakes nobody, or workers would wake each other for ever.
            wakes, self._is_awaited = worked or self._is_awaited, False
        if wakes:
            self.wake()

    def _claim(self, case: Case) -> dict[str, AbstractInput] | None:
        """The inputs of a case that is now ours; None where it is not to be processed now.

        The inputs validate again: what is claimed is what was validated, whatever came in between.
        """
        self._storage.verify(case)
        contents = (
            self._storage.contents(case) if case.sealed else self._storage.current(case.identifier)
        )
        if contents is None or contents.case_id != case.id:
            return None
        looked = self._look(contents)
        if looked is None:
            return None
        inputs, waiting = looked
        if not waiting:
            return inputs if self._storage.seal(case, contents) else None
        if not case.sealed:
            self._storage.settle(case.identifier, contents, complete=False)
            return None
        with self._failures.blaming(case.id):
            raise InvalidDataset(f"this case is not complete, and takes no images: {waiting}")
        return None

    def _process(self, case: Case, inputs: Mapping[str, AbstractInput]) -> None:
        with self._failures.blaming(case.id):
            start = time.perf_counter()
            try:
                data = {name: one.get_data() for name, one in inputs.items()}
            finally:
                self._eager.drop(case.id)
            ground = time.perf_counter()
            self._meters.grind_seconds.observe(ground - start)
            self._logger.info("case %d ground in %.3f s", case.id, ground - start)
            results = self._work.process(data)
            count = self._storage.keep_results(case, _encoded(results))
            self._meters.process_seconds.observe(time.perf_counter() - ground)
            self._logger.info(
                "case %d processed in %.3f s: %d results",
                case.id,
                time.perf_counter() - ground,
                count,
            )


def _waiting_for(contents: Contents, inputs: Mapping[str, AbstractInput]) -> str:
    """What keeps a case from being processed; empty where nothing does."""
    if contents.obstacle:
        return contents.obstacle
    missing = [name for name, one in inputs.items() if not one.validate()]
    return f"input {', '.join(missing)} does not validate" if missing else ""


def _encoded(results: object) -> Iterator[tuple[str, str, str, bytes]]:
    """What process() returned, one by one as (SOPInstanceUID, SOPClassUID, syntax, Part 10)."""
    if results is None:
        return
    if isinstance(results, Dataset):
        results = [results]
    if not isinstance(results, Iterable):
        raise InvalidDataset(
            f"process() returned {type(results).__name__}; it has to return an iterable of Datasets"
        )
    seen: set[str] = set()
    for dataset in results:
        if not isinstance(dataset, Dataset):
            raise InvalidDataset(
                f"process() gave a {type(dataset).__name__} among its results; it has to give Datasets"
            )
        data, syntax = encode(dataset)
        uid = str(dataset.SOPInstanceUID)
        if uid in seen:
            raise InvalidDataset(
                f"two results have the SOPInstanceUID {uid}; give each a new one "
                "(pydicom.uid.generate_uid)"
            )
        seen.add(uid)
        yield uid, str(dataset.SOPClassUID), syntax, data

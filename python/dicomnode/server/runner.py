"""The runner: claims ready cases, grinds, processes.

Solves that a failure stays where it happens: one case, one step. Work is done off the association
threads, by workers that take READY cases one at a time; what they made is left to the exporter.
Whatever fails, the case is kept and FAILED.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from dicomnode.errors import NoRoom, OutOfResources
from dicomnode.lib.dimse import Address
from dicomnode.server.commitment import Committing
from dicomnode.server.completeness import Completeness, Patience, Senders
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.exporter import Exporter, Retries
from dicomnode.server.input import AbstractInput
from dicomnode.server.job import CaseLimits, Claimed, Place, Stopped, WorkerLost, checked
from dicomnode.server.loop import Failures, Loop
from dicomnode.server.meters import Meters
from dicomnode.storage.ledger import Case, State
from dicomnode.storage.store import Storage

# A case whose worker was ended by somebody else is processed once more.
_ATTEMPTS = 2
# A case whose results found no room is processed again when there is some, and where that was not enough
# after at most so many seconds.
_LONGEST_PAUSE = 15 * 60.0
# So many READY cases for each worker are looked at before it is their turn.
_AHEAD = 2
# How long it takes to interrupt one that outlasts the end of the node.
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Work:
    """What a runner needs to know about its node."""

    ae_title: str
    inputs: Mapping[str, type[AbstractInput]]
    endpoints: Sequence[Address]
    retries: Retries
    patience: Patience
    clock: Callable[[], float]
    place: Place
    limits: CaseLimits


@dataclass(frozen=True)
class _PutOff:
    """A case whose results found no room."""

    #: How often.
    tries: int
    #: When it is tried again, by a monotonic clock, if there is room for so many bytes.
    until: float
    needed: int


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
        self._place = work.place
        self._lock = threading.Lock()
        # How many cases are being processed, and whether one of them has to be alone.
        self._processing = 0
        self._alone = False
        self._is_awaited = False
        # Cases whose results found no room; and those of them that the ledger still has as PROCESSING.
        self._put_offs: dict[int, _PutOff] = {}
        self._claimed: dict[int, str] = {}
        self._putting_back = threading.Lock()
        self._failures = Failures(storage, logger, meters)
        self._loop = Loop(storage, logger, self._is_postponed)
        self._completeness = Completeness(
            work.inputs,
            work.patience,
            storage,
            eager,
            logger,
            self._failures,
            work.clock,
            self._loop,
            _AHEAD * workers,
        )
        self._loop.add("worker", self._process_next, workers)
        self._exporter = Exporter(
            work.ae_title,
            work.endpoints,
            work.retries,
            storage,
            logger,
            self._loop,
            self._failures,
            meters,
        )
        #: Called with identifier and SOPInstanceUID of an image that was stored.
        self.arrived = self._completeness.arrived
        #: Storage commitment, for the association server.
        self.committing = Committing(
            work.ae_title,
            work.endpoints,
            storage,
            logger,
            self._exporter.reported,
            self._completeness.check_soon,
            self._loop,
        )

    def watch(self, senders: Senders) -> None:
        """Whose associations to look at; before images come."""
        self._completeness.senders = senders

    def recall(self) -> None:
        """Have all cases looked at that take images, as an earlier run left them."""
        self._completeness.recall()
        self._completeness.check_soon(self._storage.open_identifiers())

    def _is_postponed(self) -> bool:
        return bool(self._failures or self._put_offs or self._place.is_waiting())

    def open(self) -> None:
        """Make ready where cases are processed. Raises IncorrectlyConfigured where it cannot work."""
        self._place.open()

    def start(self) -> None:
        """Start the threads."""
        self._loop.start()

    def stop(self, drain: bool, seconds: float | None) -> bool:
        """Stop after the step that runs, or with `drain` after all that is ready.

        Tells whether all threads ended within `seconds`; None waits without end. A case that is
        processed in another process is interrupted then.
        """
        self._completeness.keep()
        has_ended = self._loop.stop(drain, seconds)
        if not has_ended and self._place.stop():
            has_ended = self._loop.stop(False, _END_SECONDS)
        if has_ended:
            self._place.close()
        return has_ended

    def is_worker(self, thread: threading.Thread) -> bool:
        """Whether a thread is one of these, in which user code runs."""
        return self._loop.owns(thread)

    def left(self, identifiers: Iterable[str]) -> None:
        """An association has ended: have the cases that it brought made READY where they are complete."""
        self._completeness.left(identifiers)

    def trouble(self) -> list[str]:
        """What keeps cases from being processed, whatever comes."""
        return self._completeness.trouble()

    def wake(self) -> None:
        """Look for work now."""
        self._loop.wake()

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition on the storage holds; looked at after every step. For tests."""
        return self._loop.wait(condition, seconds)

    # READY -> PROCESSING -> EXPORTING

    def _process_next(self) -> bool:
        self._failures.record()
        self._put_back()
        with self._lock:
            put_back = self._put_offs.keys() - self._claimed.keys()
        queue = self._storage.ledger.queue(State.READY)
        for case_id in put_back.difference(queue):
            # It was dealt with in another way.
            self._forget_put_off(case_id)
        ready = [
            case_id
            for case_id in queue
            if case_id not in self._failures and not self._is_put_off(case_id)
        ]
        for case_id in self._completeness.claimable(ready):
            case = self._storage.ledger.case(case_id)
            if case.state is not State.READY:
                continue
            if not self._place.reserve():
                return False
            try:
                if not self._begin(case):
                    return False
                worked = False
                try:
                    claimed = self._claim(case)
                    if claimed is not None:
                        self._process(case, claimed)
                        worked = True
                        return True
                finally:
                    self._end(worked)
            finally:
                self._place.release()
        return False

    # Results for which the disk has no room

    def _put_off(self, case_id: int, tries: int, error: NoRoom) -> None:
        """Process a case once more, when there may be room for its results."""
        disk = self._storage.disk.whole_bytes()
        if 0 < disk < error.needed:
            raise OutOfResources(
                f"the results take {error.needed} bytes, and the whole disk of root_data_directory has "
                f"{disk}"
            ) from error
        pause = min(_LONGEST_PAUSE, 2.0**tries)
        told = f"its results are not kept: {error}; it is processed again when there is room"
        if error.needed:
            told += f" for {error.needed} bytes"
        self._logger.error("case %d: %s", case_id, told)
        with self._lock:
            self._put_offs[case_id] = _PutOff(tries + 1, time.monotonic() + pause, error.needed)
            self._meters.without_room.add(1)
            self._claimed[case_id] = told
        self._put_back()

    def _forget_put_off(self, case_id: int) -> int:
        """How often the results of a case found no room, which is no longer so."""
        with self._lock:
            put_off = self._put_offs.pop(case_id, None)
            if put_off is None:
                return 0
            self._meters.without_room.add(-1)
            return put_off.tries

    def _put_back(self) -> None:
        """PROCESSING -> READY for what was put off; later, where the ledger has no room either."""
        # One after the other: what was put back may be claimed again a moment later.
        with self._putting_back:
            with self._lock:
                claimed = list(self._claimed.items())
            for case_id, told in claimed:
                try:
                    self._storage.ledger.put_back(case_id, told)
                except NoRoom:
                    return
                with self._lock:
                    self._claimed.pop(case_id, None)

    def _is_put_off(self, case_id: int) -> bool:
        put_off = self._put_offs.get(case_id)
        return put_off is not None and (
            time.monotonic() < put_off.until or self._storage.disk.free_bytes() < put_off.needed
        )

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

    def _claim(self, case: Case) -> Claimed | None:
        """What a case holds that is now ours; None where it is not to be processed now.

        What is claimed is what was validated, whatever came in between.
        """
        looked = self._completeness.take(case.id)
        if looked is None:
            return None
        claimed = Claimed(
            looked.contents.sources, looked.inputs, seed=self._storage.ledger.seed(case.id)
        )
        if not case.sealed and not self._can_be_ground(case, claimed):
            return None
        return claimed if self._storage.seal(case, looked.contents) else None

    def _can_be_ground(self, case: Case, claimed: Claimed) -> bool:
        """Whether an incomplete case that is to be processed as it is can be.

        Tried while it still takes images, since images may be all that it lacks.
        """
        if not self._storage.waits.of(case.id).forced:
            return True
        with self._failures.blaming(case.id):
            try:
                trial = replace(claimed, grinds_only=True)
                for _ in self._place.process(case.id, trial, lambda _: None):
                    pass
            except Stopped:
                return False
            except NoRoom:
                # It passes, and says nothing about the case.
                raise
            except BaseException:
                self._storage.waits.unforce(case.id)
                raise
            return True
        return False

    def _process(self, case: Case, claimed: Claimed) -> None:
        with self._failures.blaming(case.id):
            tries = self._forget_put_off(case.id)
            start = time.perf_counter()

            def on_ground(seconds: float) -> None:
                nonlocal start
                start = time.perf_counter()
                self._eager.drop(case.id)
                self._meters.grind_seconds.observe(seconds)
                self._logger.info("case %d ground in %.3f s", case.id, seconds)

            results = self._place.process(case.id, claimed, on_ground)
            try:
                # What is not taken any more is not made.
                with closing(results):
                    count = self._storage.results.keep(case, checked(results, self._work.limits))
            except Stopped:
                self._logger.warning("case %d is interrupted: the node closes", case.id)
                return
            except NoRoom as error:
                self._put_off(case.id, tries, error)
                return
            except WorkerLost as error:
                if case.attempts + 1 >= _ATTEMPTS:
                    raise
                self._logger.error("case %d is processed once more: %s", case.id, error)
                self._storage.ledger.move(case.id, State.PROCESSING, State.READY)
                return
            finally:
                self._eager.drop(case.id)
            took = time.perf_counter() - start
            self._meters.process_seconds.observe(took)
            self._logger.info("case %d processed in %.3f s: %d results", case.id, took, count)

"""The runner: claims ready cases, grinds, processes, exports.

Solves that a failure stays where it happens: one case, one step. Work is done off the association
threads, by workers that take READY cases one at a time, and by exporters that take EXPORTING cases,
so that a slow endpoint does not keep a worker. Whatever fails, the case is kept and FAILED.
"""

import logging
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydicom.dataset import Dataset

from dicomnode.errors import (
    CouldNotCompleteDIMSEMessage,
    DicomnodeError,
    IncorrectlyConfigured,
    InvalidDataset,
    OutOfResources,
    PeerUnreachable,
)
from dicomnode.lib.dicom import encode, printable, read
from dicomnode.lib.dimse import Address, Response, send
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.input import AbstractInput, Datasets
from dicomnode.storage.ledger import Case, ResultRow, State
from dicomnode.storage.store import Contents, DamagedResult, Storage

# How often to look whether another process (`dicomnode retry`) has changed the ledger.
_LOOK_SECONDS = 1.0
# How many cases are exported at once, so that an endpoint that hangs does not hold up the others.
_EXPORTERS = 16


class _Stopping(Exception):
    """The node stops between two results of an export."""


@dataclass(frozen=True)
class Work:
    """What a runner needs to know about its node."""

    ae_title: str
    inputs: Mapping[str, type[AbstractInput]]
    endpoints: Sequence[Address]
    process: Callable[[dict[str, Any]], Iterable[Dataset] | None]


class Runner:
    """Workers and an exporter over one storage."""

    def __init__(
        self,
        work: Work,
        storage: Storage,
        eager: EagerDecoding,
        logger: logging.Logger,
        workers: int,
    ) -> None:
        self._work = work
        self._storage = storage
        self._eager = eager
        self._logger = logger
        self._wake = threading.Condition()
        self._generation = 0
        self._stopping = False
        self._draining = False
        self._unrecorded: dict[int, str] = {}
        self._recording = threading.Lock()
        self._unchecked: set[str] = set()
        self._exporting: set[int] = set()
        # How many cases are being processed, and whether one of them has to be alone.
        self._processing = 0
        self._alone = False
        self._is_awaited = False
        # One association for each endpoint at a time: many peers take no more.
        self._locks = {endpoint: threading.Lock() for endpoint in work.endpoints}
        self._outages: dict[Address, tuple[float, str]] = {}
        self._threads = [
            threading.Thread(
                target=self._loop, args=(self._process_next,), name=f"worker-{k}", daemon=True
            )
            for k in range(workers)
        ]
        self._threads += [
            threading.Thread(
                target=self._loop, args=(self._export_next,), name=f"exporter-{k}", daemon=True
            )
            for k in range(_EXPORTERS)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, drain: bool, seconds: float | None) -> bool:
        """Stop after the step that runs, or with `drain` after all that is ready.

        Tells whether all threads ended within `seconds`; None waits without end.
        """
        with self._wake:
            self._draining = drain
            self._stopping = True
            self._notify()
        end = None if seconds is None else time.monotonic() + seconds
        started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in started)

    def is_worker(self, thread: threading.Thread) -> bool:
        """Whether a thread is one of these, in which user code runs."""
        return thread in self._threads

    def check(self, identifiers: Iterable[str]) -> None:
        """Make READY each of these cases whose inputs all validate."""
        for identifier in identifiers:
            try:
                self._check(identifier)
            except OutOfResources as error:
                self._logger.error("a case cannot be made ready now: %s", error)
                with self._wake:
                    self._unchecked.add(identifier)
        self.wake()

    def wake(self) -> None:
        """Look for work now."""
        with self._wake:
            self._notify()

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition on the storage holds; looked at after every step. For tests."""
        end = time.monotonic() + seconds
        with self._wake:
            while not condition():
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._wake.wait(min(left, _LOOK_SECONDS))
        return True

    def _is_drained(self) -> bool:
        busy = (State.READY, State.PROCESSING, State.EXPORTING)
        return not self._storage.ledger.cases(*busy)

    def _notify(self) -> None:
        self._generation += 1
        self._wake.notify_all()

    # The loop of each thread

    def _loop(self, step: Callable[[], bool]) -> None:
        seen = changes = -1
        while True:
            with self._wake:
                while seen == self._generation and not self._stopping and not self._postponed():
                    now = self._changes()
                    if now != changes:
                        changes = now
                        break
                    self._wake.wait(_LOOK_SECONDS)
                seen = self._generation
                if self._stopping and not self._draining:
                    return
            try:
                worked = step()
                if self._stopping and not worked and self._is_drained():
                    return
            except (DicomnodeError, sqlite3.Error):
                self._logger.exception("a step of the runner failed, it is tried again")
                worked, seen = False, -1
            with self._wake:
                if worked:
                    self._notify()
                elif self._stopping:
                    # Another thread still works and may bring more.
                    self._wake.wait(0.05)
                elif self._postponed() or seen < 0:
                    self._wake.wait(_LOOK_SECONDS)

    def _postponed(self) -> bool:
        """Whether something waits for the disk to have room again."""
        return bool(self._unrecorded or self._unchecked)

    def _changes(self) -> int:
        try:
            return self._storage.ledger.changes()
        except sqlite3.Error:
            return -1

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
        with self._blaming(contents.case_id):
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
        self._record_failures()
        self._check_again()
        for case_id in self._storage.ledger.queue(State.READY):
            if case_id in self._unrecorded:
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
        with self._wake:
            identifiers, self._unchecked = self._unchecked, set()
        if identifiers:
            self.check(identifiers)

    def _begin(self, case: Case) -> bool:
        """Whether a case may be processed now.

        One that was being processed when the node died runs alone, so that if it is what ends the
        node, no other case gets the blame.
        """
        with self._wake:
            if self._alone or (case.attempts and self._processing):
                self._is_awaited = True
                return False
            self._processing += 1
            self._alone = case.attempts > 0
            return True

    def _end(self, worked: bool) -> None:
        with self._wake:
            self._processing -= 1
            self._alone = False
            # What could not be claimed now wakes nobody, or workers would wake each other for ever.
            if worked or self._is_awaited:
                self._is_awaited = False
                self._notify()

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
        with self._blaming(case.id):
            raise InvalidDataset(f"this case is not complete, and takes no images: {waiting}")
        return None

    def _process(self, case: Case, inputs: Mapping[str, AbstractInput]) -> None:
        with self._blaming(case.id):
            start = time.perf_counter()
            try:
                data = {name: one.get_data() for name, one in inputs.items()}
            finally:
                self._eager.drop(case.id)
            ground = time.perf_counter()
            self._logger.info("case %d ground in %.3f s", case.id, ground - start)
            results = self._work.process(data)
            count = self._storage.keep_results(case, _encoded(results))
            self._logger.info(
                "case %d processed in %.3f s: %d results",
                case.id,
                time.perf_counter() - ground,
                count,
            )

    # EXPORTING -> DONE

    def _export_next(self) -> bool:
        self._record_failures()
        for case_id in self._storage.ledger.queue(State.EXPORTING):
            if not self._take(case_id):
                continue
            try:
                case = self._storage.ledger.case(case_id)
                if case.state is not State.EXPORTING:
                    continue
                with self._blaming(case_id):
                    self._export(case)
            finally:
                self._exporting.discard(case_id)
            return True
        return False

    def _take(self, case_id: int) -> bool:
        """Make an EXPORTING case this thread's own, unless it is another's."""
        with self._wake:
            if case_id in self._exporting or case_id in self._unrecorded:
                return False
            self._exporting.add(case_id)
            return True

    def _export(self, case: Case) -> None:
        endpoints = self._work.endpoints
        if not endpoints and self._storage.ledger.results(case.id):
            raise IncorrectlyConfigured(
                "process() returned results but the pipeline has no endpoints: set `endpoints`, "
                "start the node again and retry this case; or return nothing"
            )
        try:
            problems = list(filter(None, _at_once(partial(self._deliver, case), endpoints)))
        except _Stopping:
            # What is not acknowledged goes out after the next start.
            return
        except DamagedResult as error:
            reason = f"{error}; a retry makes all results again from the images, under new UIDs"
            self._logger.error("case %d FAILED and is kept: %s", case.id, reason)
            self._storage.drop_results(case.id, reason)
            return
        if problems:
            raise CouldNotCompleteDIMSEMessage("; ".join(problems))
        self._storage.finish(case)
        self._logger.info("case %d is done", case.id)

    def _deliver(self, case: Case, endpoint: Address) -> str:
        """Send what one endpoint has not acknowledged yet; the problem, empty where there is none."""
        key = str(endpoint)
        asked = time.monotonic()
        with self._locks[endpoint]:
            failed, problem = self._outages.get(endpoint, (0.0, ""))
            if failed > asked:
                # It failed for another case while this one waited for its turn.
                return problem
            try:
                return self._send(case, endpoint, key)
            except PeerUnreachable as error:
                self._outages[endpoint] = (time.monotonic(), str(error))
                return str(error)
            except CouldNotCompleteDIMSEMessage as error:
                return str(error)

    def _send(self, case: Case, endpoint: Address, key: str) -> str:
        pending = self._storage.undelivered(case.id, key)
        if not pending:
            return ""
        acknowledged: list[tuple[str, int]] = []

        def record(response: Response) -> None:
            if response.is_stored:
                acknowledged.append((response.sop_instance_uid, response.status))
                if response.status:
                    self._logger.warning(
                        "case %d: %s stored %s with status 0x%04X",
                        case.id,
                        key,
                        response.sop_instance_uid,
                        response.status,
                    )
            if len(acknowledged) >= 32:
                self._storage.ledger.deliver(case.id, key, acknowledged)
                acknowledged.clear()
            if self._stopping and not self._draining:
                raise _Stopping

        try:
            responses = send(
                endpoint,
                [partial(self._result, case.id, row) for row in pending],
                self._work.ae_title,
                contexts={(row.sop_class, row.syntax) for row in pending},
                on_response=record,
            )
        finally:
            self._storage.ledger.deliver(case.id, key, acknowledged)
        refused = [response for response in responses if not response.is_stored]
        self._logger.info(
            "case %d: %s acknowledged %d of %d results",
            case.id,
            key,
            len(responses) - len(refused),
            len(responses),
        )
        if not refused:
            return ""
        first = refused[0]
        return (
            f"{key} refused {len(refused)} of {len(responses)} results, the first "
            f"{first.sop_instance_uid} with status 0x{first.status:04X} {first.comment}".rstrip()
        )

    def _result(self, case_id: int, row: ResultRow) -> Dataset:
        return read(self._storage.result(case_id, row))

    # Failures

    @contextmanager
    def _blaming(self, case_id: int) -> Iterator[None]:
        """What fails inside belongs to this case: it becomes FAILED and is kept, others go on."""
        try:
            yield
        except BaseException as error:
            in_main_thread = threading.current_thread() is threading.main_thread()
            if in_main_thread and isinstance(error, KeyboardInterrupt | SystemExit):
                # Ctrl-C or SIGTERM while the node opens: not the case's fault.
                raise
            if isinstance(error, RuntimeError) and not threading.main_thread().is_alive():
                # At its end an interpreter starts no more threads, which sending needs.
                self._logger.warning("case %d: the program ends, it goes on after a start", case_id)
                return
            self._logger.error(
                "case %d FAILED and is kept: %s: %s",
                case_id,
                type(error).__name__,
                error,
                exc_info=True,
            )
            trace = traceback.format_exc().splitlines()
            self._unrecorded[case_id] = "\n".join(printable(line) for line in trace)
            self._record_failures()

    def _record_failures(self) -> None:
        """Write failures to the ledger; those that cannot be written now are tried again later."""
        with self._recording:
            for case_id, trace in list(self._unrecorded.items()):
                try:
                    self._storage.fail(case_id, trace)
                except (DicomnodeError, sqlite3.Error) as error:
                    self._logger.critical("case %d cannot be marked FAILED: %s", case_id, error)
                    return
                self._unrecorded.pop(case_id, None)


def _at_once(job: Callable[[Address], str], endpoints: Sequence[Address]) -> list[str]:
    """What `job` gives for each endpoint, all at the same time; raises what one of them raised.

    In daemon threads, which do not keep a program from ending, as those of a pool would.
    """
    results: dict[Address, str] = {}
    errors: list[BaseException] = []

    def run(endpoint: Address) -> None:
        try:
            results[endpoint] = job(endpoint)
        except BaseException as error:  # noqa: BLE001  (raised again below, in the exporter)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in endpoints[1:]]
    for thread in threads:
        thread.start()
    for endpoint in endpoints[:1]:
        run(endpoint)
    for thread in threads:
        thread.join()
    if errors:
        # What is wrong with the case counts more than that the node stops.
        raise min(errors, key=lambda error: isinstance(error, _Stopping))
    return [results[endpoint] for endpoint in endpoints]


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

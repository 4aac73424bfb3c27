"""What workers and exporters share: threads that repeat a step, and the failures of cases.

Solves that no thread misses work, none spins while there is none, all end when the node stops, and
a failure that cannot be written to the ledger now is written later.
"""

import logging
import math
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from dicomnode.errors import DicomnodeError, NoRoom, ProcessingFailed
from dicomnode.lib.dicom import printable
from dicomnode.lib.redaction import patient_words_of
from dicomnode.server.crew import Crew
from dicomnode.server.logs import about, current, tell
from dicomnode.server.meters import Meters
from dicomnode.storage.ledger import State
from dicomnode.storage.store import Storage

# How often to look whether another process (`dicomnode retry`) has changed the ledger.
_LOOK_SECONDS = 1.0


class Loop:
    """Threads that repeat their step while it finds work, and then wait to be woken.

    `is_postponed` tells whether something waits for the disk to have room again.
    """

    def __init__(
        self, storage: Storage, logger: logging.Logger, is_postponed: Callable[[], bool]
    ) -> None:
        self._storage = storage
        self._logger = logger
        self._is_postponed = is_postponed
        self._wake = threading.Condition()
        self._generation = 0
        self._stopping = False
        self._draining = False
        self._threads: list[threading.Thread] = []
        self._crews: list[Crew] = []
        self._pending: list[Callable[[], bool]] = []

    def add(
        self,
        name: str,
        step: Callable[[], bool],
        count: int = 1,
        due: Callable[[], float] = lambda: math.inf,
        is_pending: Callable[[], bool] = lambda: False,
    ) -> None:
        """Have `count` threads repeat a step, which tells whether it found work.

        `due` tells in how many seconds it has work of itself, without being woken; `is_pending` whether
        it has some that the ledger does not tell of.
        """
        self._pending.append(is_pending)
        self._threads += [
            threading.Thread(target=self._run, args=(step, due), name=f"{name}-{k}", daemon=True)
            for k in range(count)
        ]

    def crew(self, name: str, most: int) -> Crew:
        """Threads for work that a step begins and does not wait for."""
        crew = Crew(name, most, self._logger, self.wake)
        self._crews.append(crew)
        return crew

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
        _join(started, end)
        # Those that begin such work have ended, or go on for ever.
        begun = [thread for crew in self._crews for thread in crew.threads()]
        _join(begun, end)
        return not any(thread.is_alive() for thread in (*started, *begun))

    @property
    def is_stopping(self) -> bool:
        """Whether to stop as soon as possible."""
        return self._stopping and not self._draining

    @property
    def is_draining(self) -> bool:
        """Whether to stop as soon as there is nothing left to do."""
        return self._stopping and self._draining

    def owns(self, thread: threading.Thread) -> bool:
        """Whether a thread is one of these."""
        return thread in self._threads or any(thread in crew.threads() for crew in self._crews)

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

    def _notify(self) -> None:
        self._generation += 1
        self._wake.notify_all()

    def _run(self, step: Callable[[], bool], due: Callable[[], float]) -> None:
        seen = changes = -1
        while True:
            with self._wake:
                while seen == self._generation and not self._stopping and not self._is_postponed():
                    now = self._changes()
                    if now != changes:
                        changes = now
                        break
                    left = due()
                    if left <= 0:
                        break
                    self._wake.wait(min(left, _LOOK_SECONDS))
                seen = self._generation
                if self.is_stopping:
                    return
            try:
                worked = step()
                if self._stopping and not worked and self._is_drained():
                    return
            except NoRoom as error:
                self._logger.error("%s; it is tried again", error)
                worked, seen = False, -1
            except Exception:
                # One iteration of the runner: without its thread nothing of its kind would ever be done.
                self._logger.exception("a step of the runner failed, it is tried again")
                worked, seen = False, -1
            with self._wake:
                if worked:
                    self._notify()
                elif self._stopping:
                    # Another thread still works and may bring more.
                    self._wake.wait(0.05)
                elif seen < 0:
                    # Whoever has worked meanwhile has not mended it.
                    self._wake.wait_for(lambda: self._stopping, _LOOK_SECONDS)
                elif self._is_postponed():
                    self._wake.wait(_LOOK_SECONDS)

    def _is_drained(self) -> bool:
        if any(is_pending() for is_pending in self._pending):
            return False
        busy = (State.READY, State.PROCESSING, State.EXPORTING)
        return not self._storage.ledger.cases(*busy)

    def _changes(self) -> int:
        try:
            return self._storage.ledger.changes()
        except sqlite3.Error:
            return -1


def _join(threads: Iterable[threading.Thread], end: float | None) -> None:
    for thread in threads:
        thread.join(None if end is None else max(0.0, end - time.monotonic()))


class Failures:
    """What went wrong with cases, on its way to the ledger."""

    def __init__(self, storage: Storage, logger: logging.Logger, meters: Meters) -> None:
        self._meters = meters
        self._storage = storage
        self._logger = logger
        self._unrecorded: dict[int, str] = {}
        self._recording = threading.Lock()

    def __contains__(self, case_id: int) -> bool:
        return case_id in self._unrecorded

    def __bool__(self) -> bool:
        return bool(self._unrecorded)

    @contextmanager
    def blaming(
        self, case_id: int, has_gone_on: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """What fails inside belongs to this case: it becomes FAILED and is kept, others go on.

        But for NoRoom, which is nobody's fault: it is raised, and the step is tried again. And where the
        case has gone on without what fails: that is told only.
        """
        patient = partial(self._patient_words, case_id)
        with about(case=case_id, patient=patient), self._recorded(case_id, has_gone_on):
            yield

    @contextmanager
    def _recorded(self, case_id: int, has_gone_on: Callable[[], bool]) -> Iterator[None]:
        try:
            yield
        except NoRoom:
            # Not the case's fault, and it passes.
            raise
        except BaseException as error:
            in_main_thread = threading.current_thread() is threading.main_thread()
            if in_main_thread and isinstance(error, KeyboardInterrupt | SystemExit):
                # Ctrl-C or SIGTERM while the node opens: not the case's fault.
                raise
            if isinstance(error, RuntimeError) and not threading.main_thread().is_alive():
                # At its end an interpreter starts no more threads, which sending needs.
                self._logger.warning("case %d: the program ends, it goes on after a start", case_id)
                return
            if has_gone_on():
                self._logger.warning(
                    "case %d has gone on, and what failed does not count", case_id, exc_info=True
                )
                return
            self._meters.failures.add()
            if isinstance(error, ProcessingFailed):
                # Where it was processed counts, not where this was told.
                told = str(error)
                text = error.trace if told in error.trace else f"{error.trace}\n{told}".lstrip()
                tell(
                    self._logger, logging.ERROR, f"case {case_id} FAILED and is kept: {told}", text
                )
            else:
                text = traceback.format_exc()
                self._logger.error(
                    "case %d FAILED and is kept: %s: %s",
                    case_id,
                    type(error).__name__,
                    error,
                    exc_info=True,
                )
            trace = current().hide(text).splitlines()
            self._unrecorded[case_id] = "\n".join(printable(line) for line in trace)
            self.record()

    def _patient_words(self, case_id: int) -> frozenset[str]:
        return patient_words_of(self._storage.sources_of(case_id))

    def record(self) -> None:
        """Write failures to the ledger; those that cannot be written now are tried again later."""
        with self._recording:
            for case_id, trace in list(self._unrecorded.items()):
                try:
                    self._storage.fail(case_id, trace)
                except (DicomnodeError, sqlite3.Error) as error:
                    self._logger.critical("case %d cannot be marked FAILED: %s", case_id, error)
                    return
                self._unrecorded.pop(case_id, None)

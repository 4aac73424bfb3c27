"""Cases are processed by the threads of the node: nothing is between them and user code."""

import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from dicomnode.server.job import CaseLimits, Claimed, Process, Result, run


class Threads:
    """The place of `isolation = "thread"`."""

    def __init__(self, process: Process, limits: CaseLimits, logger: logging.Logger) -> None:
        self._process = process
        self._seconds = limits.seconds
        self._logger = logger

    def open(self) -> None:
        """Nothing to do: the threads are the runner's."""

    def reserve(self) -> bool:
        """There is always room for one more."""
        return True

    def release(self) -> None:
        """Nothing to do."""

    def is_waiting(self) -> bool:
        """Never."""
        return False

    def process(
        self, case_id: int, claimed: Claimed, on_ground: Callable[[float], None]
    ) -> Generator[Result]:
        """The results of a case."""
        with self._watched(case_id):
            process = None if claimed.grinds_only else self._process
            yield from run(process, claimed.inputs, on_ground)

    @contextmanager
    def _watched(self, case_id: int) -> Iterator[None]:
        """A thread cannot be ended from outside; that it takes long is told."""
        if self._seconds is None:
            yield
            return
        timer = threading.Timer(self._seconds, self._tell_of_time, (case_id,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _tell_of_time(self, case_id: int) -> None:
        self._logger.error(
            "case %d is not processed within process_seconds %g; a thread cannot be ended, a worker "
            'process can: set isolation = "process"',
            case_id,
            self._seconds,
        )

    def stop(self) -> bool:
        """A thread cannot be interrupted."""
        return False

    def close(self) -> None:
        """Nothing to do."""

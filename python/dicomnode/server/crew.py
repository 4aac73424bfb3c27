"""A crew: threads for work that may never end, such as a user's `validate`.

Solves that such work holds up nothing else: each piece has a thread of its own, and there are at most so
many of them.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable


class Crew:
    """Work that may never end: each piece has a thread of its own, one at a time for each key."""

    def __init__(
        self, name: str, most: int, logger: logging.Logger, wake: Callable[[], None]
    ) -> None:
        self._name = name
        self._most = most
        self._logger = logger
        self._wake = wake
        self._lock = threading.Lock()
        # Since when each runs, by a monotonic clock.
        self._running: dict[Hashable, tuple[threading.Thread, float]] = {}

    def begin(self, key: Hashable, work: Callable[[], None]) -> bool:
        """Do this work, and wake the loop after it; False where it cannot be begun now.

        That is while work for the same key runs, or as much work as there may be, or where the
        system has no thread.
        """
        thread = threading.Thread(target=self._run, args=(key, work), name=self._name, daemon=True)
        with self._lock:
            if key in self._running or len(self._running) >= self._most:
                return False
            self._running[key] = thread, time.monotonic()
        try:
            thread.start()
        except RuntimeError as error:
            self._logger.error("a thread cannot be started: %s", error)
            with self._lock:
                del self._running[key]
            return False
        return True

    def __contains__(self, key: Hashable) -> bool:
        return key in self._running

    @property
    def is_busy(self) -> bool:
        """Whether something runs."""
        return bool(self._running)

    @property
    def is_full(self) -> bool:
        """Whether nothing can be begun before something ends."""
        return len(self._running) >= self._most

    def seconds(self) -> dict[Hashable, float]:
        """For how long the work for each key has run."""
        now = time.monotonic()
        with self._lock:
            return {key: now - since for key, (_, since) in self._running.items()}

    def threads(self) -> list[threading.Thread]:
        """Those that run now."""
        with self._lock:
            return [thread for thread, _ in self._running.values()]

    def _run(self, key: Hashable, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            # One iteration of the runner, too: what fails here is looked for in its log.
            self._logger.exception("a step of the runner failed")
        finally:
            with self._lock:
                del self._running[key]
            self._wake()

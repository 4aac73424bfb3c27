"""What the threads of a connection wait with: until something happens, and by a clock that nobody sets.

pynetdicom's threads look every millisecond whether there is something to do.
"""

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pynetdicom.timer import Timer


class MonotonicTimer(Timer):
    """pynetdicom's timer by a clock that nobody sets."""

    @property
    def remaining(self) -> float:
        if self.timeout is None:
            return 1.0
        if self._start_time is None:
            return self.timeout
        end = time.monotonic() if self._end_time is None else self._end_time
        return self.timeout - (end - self._start_time)

    def start(self) -> None:
        self._start_time, self._end_time = time.monotonic(), None

    restart = start

    def stop(self) -> None:
        self._end_time = time.monotonic()


class Wake:
    """Ends the waiting of another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.number = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self.number >= 0:
                os.eventfd_write(self.number, 1)

    def wait(self, seconds: float) -> None:
        poll = select.poll()
        if self.number >= 0:
            poll.register(self.number, select.POLLIN)
        poll.poll(seconds * 1000)
        self.clear()

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_read(self.number)

    def close(self) -> None:
        with self._lock:
            if self.number >= 0:
                os.close(self.number)
            self.number = -1


class Line(deque[Any]):
    """A queue of pynetdicom's at which nobody waits: whoever puts something into it tells so."""

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._tell = tell

    @property
    def queue(self) -> "Line":
        """What is in it."""
        return self

    def put(self, item: Any) -> None:
        self.append(item)
        self._tell()

    def get(self, block: bool = False, timeout: float | None = None) -> Any:
        """The first; raises queue.Empty where there is none, at once."""
        del block, timeout
        try:
            return self.popleft()
        except IndexError:
            raise queue.Empty from None

    def empty(self) -> bool:
        return not self


def wait_readable(client: socket.socket, wake: Wake, seconds: float) -> bool:
    """Whether a socket can be read within so many seconds; sooner false where somebody wakes us."""
    poll = select.poll()
    poll.register(client, select.POLLIN)
    if wake.number >= 0:
        poll.register(wake.number, select.POLLIN)
    found = {number for number, _ in poll.poll(seconds * 1000)}
    if wake.number in found:
        wake.clear()
    return client.fileno() in found


__all__ = ["Line", "MonotonicTimer", "Wake", "wait_readable"]

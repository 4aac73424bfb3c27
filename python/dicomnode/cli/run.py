"""`dicomnode run`: from a file that a user wrote to a node that is open, until it is stopped."""

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from dicomnode.cli.notify import notifier
from dicomnode.cli.pipeline import blaming, pipeline_in

# How much longer than `stop_seconds` closing may take: worker processes are interrupted then.
_CLOSE_SECONDS = 12.0
# A thread that serves a peer ends within this time after the node is closed, or is left behind.
_PATIENCE_SECONDS = 2.0
# M_ARENA_MAX of glibc's mallopt(3).
_ARENA_MAX = -8


def run_pipeline(where: str, settings: Mapping[str, Any]) -> None:
    """Open the pipeline of `FILE.py[:Class]` and block until it is stopped.

    `settings` replace attributes of the class; None leaves one as it is.
    """
    _share_heaps()
    with _stopping_on_sigterm(), pipeline_in(where) as kind, blaming(where):
        node = kind(start=False)
        for attribute, value in settings.items():
            if value is not None:
                setattr(node, attribute, value)
        # What was imported stays, and need not be looked at whenever garbage is collected.
        gc.freeze()
        supervisor = notifier(os.environ)

        def notify(word: str) -> None:
            if word == "STOPPING=1":
                _end_within(node.stop_seconds + _CLOSE_SECONDS, node.logger)
            if supervisor is not None:
                supervisor(word)

        try:
            node.open(blocking=True, notify=notify)
        finally:
            node.close()
    _leave_stalled_threads()


def _share_heaps() -> None:
    """Two heaps for all threads, where the C library is glibc.

    It gives threads up to 16, and what one has freed of its own is seldom used again: a node that has
    many short threads would hold more memory from day to day, none of which is in use.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """A SIGTERM ends this process in good order also before the node blocks, and after."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _end_within(seconds: float, logger: logging.Logger) -> None:
    """End this process after so many seconds, whatever it still does.

    What was answered is stored, and what is under way goes on after the next start: it is as safe as
    a node that is killed.
    """

    def end() -> None:
        logger.error("the node is not closed after %.0f s: it ends now", seconds)
        _end()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _leave_stalled_threads() -> None:
    """Python waits for threads that are no daemons without end, and a peer may hold one."""
    end = time.monotonic() + _PATIENCE_SECONDS
    own = threading.current_thread()
    left = [one for one in threading.enumerate() if one is not own and not one.daemon]
    for thread in left:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in left):
        _end()


def _end() -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

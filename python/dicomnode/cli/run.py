"""`dicomnode run`: from a file that a user wrote to a node that is open."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dicomnode.cli.pipeline import blaming, pipeline_in


def run_pipeline(where: str, settings: Mapping[str, Any]) -> None:
    """Open the pipeline of `FILE.py[:Class]` and block until it is stopped.

    `settings` replace attributes of the class; None leaves one as it is.
    """
    with _stopping_on_sigterm(), pipeline_in(where) as kind, blaming(where):
        node = kind(start=False)
        for attribute, value in settings.items():
            if value is not None:
                setattr(node, attribute, value)
        try:
            node.open(blocking=True)
        finally:
            node.close()


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

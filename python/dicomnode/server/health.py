"""How a node is: `/healthz` for a supervisor, `/metrics` for Prometheus.

A node is well while it listens, its storage takes an image, its disk has room, and cases are looked at. What is told has
no identifier of a patient in it.
"""

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence

from dicomnode.errors import DicomnodeError, OutOfResources
from dicomnode.server.meters import Meters, sample_lines
from dicomnode.server.web import Page, WebServer
from dicomnode.storage.ledger import State
from dicomnode.storage.store import Storage

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# However often somebody asks, the disk is tried only so often.
_TRY_SECONDS = 1.0
# What a case in one of these waits for is the node's to do.
_QUEUED = (State.READY, State.PROCESSING, State.EXPORTING)


class Health:
    """Looks at a node, and serves what it sees on a port of its own."""

    def __init__(
        self,
        storage: Storage,
        meters: Meters,
        is_listening: Callable[[], bool],
        endpoints: Sequence[str],
        trouble: Callable[[], Sequence[str]],
        logger: logging.Logger,
    ) -> None:
        self._storage = storage
        self._meters = meters
        self._is_listening = is_listening
        self._endpoints = endpoints
        # Of those who process cases.
        self._other_trouble = trouble
        self._server = WebServer(self._page, logger)
        self._tried = 0.0
        self._trouble: list[str] = []

    def open(self, ip: str, port: int) -> int:
        """Start to serve, and tell the port. Raises CannotListen."""
        return self._server.open(ip, port)

    def close(self) -> None:
        """Stop to serve."""
        self._server.close()

    def reasons(self) -> list[str]:
        """Why the node is not well; empty where it is."""
        listening = [] if self._is_listening() else ["the node does not listen"]
        now = time.monotonic()
        if not self._tried or now - self._tried > _TRY_SECONDS:
            self._trouble = list(self._storage_trouble())
            self._tried = time.monotonic()
        return [*listening, *self._trouble, *self._other_trouble()]

    def _storage_trouble(self) -> Iterator[str]:
        try:
            self._storage.probe()
        except OutOfResources as error:
            yield f"the storage takes no image: {error}"
        except (DicomnodeError, sqlite3.Error, OSError) as error:
            yield f"the storage takes no image: {type(error).__name__}"

    def _page(self, path: str) -> Page | None:
        if path == "/healthz":
            reasons = self.reasons()
            told = {"status": "failing" if reasons else "ok", "reasons": reasons}
            return Page(503 if reasons else 200, json.dumps(told) + "\n", "application/json")
        if path == "/metrics":
            return Page(200, "".join(f"{line}\n" for line in self._metrics()), _METRICS_TYPE)
        return None

    def _metrics(self) -> Iterator[str]:
        yield from self._meters.lines()
        is_well = {"": float(not self.reasons())}
        yield from sample_lines("dicomnode_healthy", "What /healthz says", "gauge", "", is_well)
        try:
            yield from self._ledger_lines()
        except (OutOfResources, sqlite3.Error, OSError):
            # The node closes, or its disk does not answer; the other numbers are still right.
            return

    def _ledger_lines(self) -> Iterator[str]:
        if self._storage.root is not None:
            free = {"": float(self._storage.disk.free_bytes())}
            name, told = "dicomnode_disk_free_bytes", "Free bytes where images rest"
            yield from sample_lines(name, told, "gauge", "", free)
        summary = self._storage.ledger.summary()
        counts = {state.value: float(summary.get(state, (0, 0.0))[0]) for state in State}
        yield from sample_lines(
            "dicomnode_cases", "Cases in the ledger by state", "gauge", "state", counts
        )
        now = time.time()
        ages = {
            state.value: max(0.0, now - summary[state][1]) if state in summary else 0.0
            for state in _QUEUED
        }
        name, told = "dicomnode_oldest_case_seconds", "How long the oldest case is in a state"
        yield from sample_lines(name, told, "gauge", "state", ages)
        waiting = {
            endpoint: float(self._storage.ledger.undelivered(endpoint))
            for endpoint in self._endpoints
        }
        name, told = "dicomnode_outbox_results", "Results that an endpoint has yet to acknowledge"
        yield from sample_lines(name, told, "gauge", "endpoint", waiting)
        dead = {**dict.fromkeys(self._endpoints, 0), **self._storage.outbox.dead_letters()}
        name, told = "dicomnode_dead_letters", "Cases whose results were given up for an endpoint"
        yield from sample_lines(name, told, "gauge", "endpoint", dead)
        outages = self._storage.outbox.outages()
        down = {endpoint: float(endpoint in outages) for endpoint in self._endpoints}
        name, told = "dicomnode_endpoint_down", "Whether an endpoint takes no associations"
        yield from sample_lines(name, told, "gauge", "endpoint", down)

"""The exporter: sends the results of cases to the endpoints.

Solves that a slow endpoint keeps neither a worker nor another endpoint: cases that are EXPORTING are
taken by threads of their own, each endpoint is served at the same time, and what one acknowledged is
recorded instance by instance.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from pydicom.dataset import Dataset

from dicomnode.errors import (
    CouldNotCompleteDIMSEMessage,
    IncorrectlyConfigured,
    PeerUnreachable,
)
from dicomnode.lib.dicom import read
from dicomnode.lib.dimse import Address, Response, send
from dicomnode.server.loop import Failures, Loop
from dicomnode.server.meters import Meters
from dicomnode.storage.ledger import Case, ResultRow, State
from dicomnode.storage.store import DamagedResult, Storage

# How many cases are exported at once, so that an endpoint that hangs does not hold up the others.
EXPORTERS = 16


class _Stopping(Exception):
    """The node stops between two results of an export."""


class Exporter:
    """Sends the results of one case after the other; safe to use from any thread."""

    def __init__(
        self,
        ae_title: str,
        endpoints: Sequence[Address],
        storage: Storage,
        logger: logging.Logger,
        loop: Loop,
        failures: Failures,
        meters: Meters,
    ) -> None:
        self._meters = meters
        self._ae_title = ae_title
        self._endpoints = endpoints
        self._storage = storage
        self._logger = logger
        self._loop = loop
        self._failures = failures
        self._exporting: set[int] = set()
        self._lock = threading.Lock()
        # One association for each endpoint at a time: many peers take no more.
        self._locks = {endpoint: threading.Lock() for endpoint in endpoints}
        self._outages: dict[Address, tuple[float, str]] = {}

    def export_next(self) -> bool:
        """Export one case, and tell whether there was one. The step of an exporter."""
        self._failures.record()
        for case_id in self._storage.ledger.queue(State.EXPORTING):
            if not self._take(case_id):
                continue
            try:
                case = self._storage.ledger.case(case_id)
                if case.state is not State.EXPORTING:
                    continue
                with self._failures.blaming(case_id):
                    self._export(case)
            finally:
                self._exporting.discard(case_id)
            return True
        return False

    def _take(self, case_id: int) -> bool:
        """Make an EXPORTING case this thread's own, unless it is another's."""
        with self._lock:
            if case_id in self._exporting or case_id in self._failures:
                return False
            self._exporting.add(case_id)
            return True

    def _export(self, case: Case) -> None:
        endpoints = self._endpoints
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
                with self._meters.export_seconds.timing():
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
            meter = self._meters.results_sent if response.is_stored else self._meters.results_failed
            meter.add(label=key)
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
            if self._loop.is_stopping:
                raise _Stopping

        try:
            responses = send(
                endpoint,
                [partial(self._result, case.id, row) for row in pending],
                self._ae_title,
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

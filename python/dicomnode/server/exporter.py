"""The exporter: sends the results of cases to the endpoints, again and again where that is needed.

Solves that an endpoint that is slow, down or broken keeps neither a worker nor another endpoint: each
endpoint has a thread of its own, and one sender at a time. What it acknowledged is recorded instance
by instance, what it did not is sent again later, and what it will not take is given up and kept.
"""

import logging
import math
import random
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from pydicom.uid import generate_uid

from dicomnode.errors import (
    CouldNotCompleteDIMSEMessage,
    IncorrectlyConfigured,
    OutOfResources,
    PeerUnreachable,
)
from dicomnode.lib.commitment import Commitment
from dicomnode.lib.dimse import Address, Outgoing, Response, ask_commitment, send
from dicomnode.server.loop import Failures, Loop
from dicomnode.server.meters import Meters
from dicomnode.storage.ledger import ResultRow
from dicomnode.storage.outbox import Answer, Delivery, Export, Outage
from dicomnode.storage.results import DamagedResult
from dicomnode.storage.store import Storage

# No wait is longer.
_LONGEST_SECONDS = 15 * 60.0
# Where an operator has to change something, asking often does not help: with the usual settings five
# minutes pass between these attempts.
_SLOWLY = 60
_MOST_REFUSALS = 3
# How long a report of storage commitment is waited for over the association of the request.
_REPORT_SECONDS = 10.0
# So many answers are recorded at once.
_RECORDED_TOGETHER = 32
# Answers of a peer that has no room or no time now (PS3.4 B.2.3, PS3.7 annex C): out of resources,
# processing failure, resource limitation; and 0xFE00, cancelled.
_PASSING = frozenset({0x0110, 0x0213, 0xFE00, *range(0xA700, 0xA800)})


class _Stopping(Exception):
    """The node stops between two results of an export."""


@dataclass(frozen=True)
class Retries:
    """When to send again, when to give up, and whether endpoints are asked to keep what they got."""

    retry_seconds: float
    give_up_seconds: float
    commit: bool = False

    def pause(self, attempts: int, slowly: bool) -> float:
        """How long to wait after so many attempts that failed in a row."""
        if slowly:
            return min(_LONGEST_SECONDS, _SLOWLY * self.retry_seconds)
        longest = min(_LONGEST_SECONDS, self.retry_seconds * 2.0 ** min(attempts - 1, 60))
        # A random part of it, so that what failed together does not come back together.
        return random.uniform(0, longest)  # noqa: S311  (no secret)


class Exporter:
    """A thread for each endpoint, and one that tells when a case is over."""

    def __init__(
        self,
        ae_title: str,
        endpoints: Sequence[Address],
        retries: Retries,
        storage: Storage,
        logger: logging.Logger,
        loop: Loop,
        failures: Failures,
        meters: Meters,
    ) -> None:
        self._meters = meters
        self._ae_title = ae_title
        self._endpoints = tuple(dict.fromkeys(endpoints))
        self._retries = retries
        self._storage = storage
        self._logger = logger
        self._loop = loop
        self._failures = failures
        # Of what waits for an endpoint, by case, and 0 for itself: its time by the ledger's clock, and
        # by one that nobody sets. Only the thread of the endpoint uses it.
        self._times: dict[str, dict[int, tuple[float, float]]] = {
            str(endpoint): {} for endpoint in self._endpoints
        }
        self._due = dict.fromkeys(self._endpoints, math.inf)
        self._unrecorded = dict.fromkeys(self._endpoints, 0)
        loop.add("settler", self._settle_next)
        for endpoint in self._endpoints:
            loop.add(
                "exporter",
                partial(self._export_next, endpoint),
                due=partial(self._seconds_left, endpoint),
            )

    # One endpoint

    def _seconds_left(self, endpoint: Address) -> float:
        return self._due[endpoint] - time.monotonic()

    def _export_next(self, endpoint: Address) -> bool:
        """Send the results of one case to an endpoint, and tell whether there were some."""
        self._failures.record()
        if self._unrecorded[endpoint] and self._seconds_left(endpoint) > 0:
            return False
        key = str(endpoint)
        soonest = math.inf
        outage = self._storage.outbox.outages().get(key)
        if outage is not None and (left := self._left(0, key, outage.next)) > 0:
            # Of what waits there may be much, which is not looked at until then.
            self._due[endpoint] = time.monotonic() + left
            return False
        pending = self._storage.outbox.pending(key)
        waiting = {0, *(export.case_id for export in pending)}
        for case_id in self._times[key].keys() - waiting:
            del self._times[key][case_id]
        for export in pending:
            if export.case_id in self._failures:
                continue
            left = self._left(export.case_id, key, export.next)
            if left > 0:
                soonest = min(soonest, left)
                continue
            with self._failures.blaming(export.case_id):
                self._deliver(endpoint, export, outage)
            return True
        self._due[endpoint] = time.monotonic() + soonest
        return False

    def _left(self, case_id: int, key: str, moment: float) -> float:
        """Seconds until a moment of the ledger.

        Its clock may be set meanwhile, or before a start: nothing waits longer than the longest
        pause for that.
        """
        if self._loop.is_draining:
            return 0.0
        known = self._times[key].get(case_id)
        if known is None or known[0] != moment:
            left = min(max(moment - time.time(), 0.0), _LONGEST_SECONDS)
            known = self._times[key][case_id] = moment, time.monotonic() + left
        return known[1] - time.monotonic()

    def _next(self, case_id: int, key: str, pause: float) -> float:
        """The moment after a pause, for the ledger."""
        moment = time.time() + pause
        self._times[key][case_id] = moment, time.monotonic() + pause
        return moment

    def _deliver(self, endpoint: Address, export: Export, outage: Outage | None) -> None:
        try:
            try:
                self._attempt(endpoint, export, outage)
            except PeerUnreachable as error:
                self._miss(endpoint, outage, error)
            except IncorrectlyConfigured as error:
                # Its certificate cannot be read now. The case goes to the other endpoints all the same.
                self._miss(endpoint, outage, PeerUnreachable(f"{endpoint}: {error}"))
            self._unrecorded[endpoint] = 0
        except _Stopping:
            # What is not acknowledged goes out after the next start.
            return
        except DamagedResult as error:
            reason = f"{error}; a retry makes all results again from the images, under new UIDs"
            self._logger.error("case %d FAILED and is kept: %s", export.case_id, reason)
            self._storage.results.drop(export.case_id, reason)
        except (OutOfResources, sqlite3.Error) as error:
            # It was sent, and cannot be recorded: not again and again, as long as that lasts.
            self._unrecorded[endpoint] += 1
            pause = self._retries.pause(self._unrecorded[endpoint] + 1, slowly=False) / 2
            pause += self._retries.retry_seconds / 2
            self._due[endpoint] = time.monotonic() + pause
            self._logger.error(
                "case %d: what %s answered cannot be recorded: %s", export.case_id, endpoint, error
            )

    def _attempt(self, endpoint: Address, export: Export, outage: Outage | None) -> None:
        """Send what this endpoint has not acknowledged, and record what comes of it."""
        key, number, outbox = export.endpoint, export.case_id, self._storage.outbox
        answers = outbox.answers(number, key)
        rows = [
            row
            for row in self._storage.results.undelivered(number, key)
            if row.uid not in answers or not _is_exhausted(answers[row.uid])
        ]
        problem, is_permanent = "", False
        try:
            if rows:
                with self._meters.export_seconds.timing():
                    self._send(endpoint, number, rows)
        except PeerUnreachable:
            raise
        except CouldNotCompleteDIMSEMessage as error:
            problem, is_permanent = str(error), error.is_permanent
        if outage is not None:
            outbox.mend(key)
            self._logger.info("%s takes associations again", key)
        answers = outbox.answers(number, key)
        left = self._storage.results.undelivered(number, key)
        if not left and self._retries.commit:
            self._ask(endpoint, export)
            return
        if not left:
            outbox.update(replace(export, state=Delivery.SENT, attempts=0, next=0.0, problem=""))
            return
        refused = [answers[row.uid] for row in left if row.uid in answers]
        problem = problem or _told(key, refused, len(self._storage.ledger.results(number)))
        final = [one for one in refused if one.status not in _PASSING]
        is_over = len(left) == sum(map(_is_exhausted, refused))
        self._postpone(
            replace(
                export,
                attempts=1
                if any(answers[row.uid].stored for row in rows if row.uid in answers)
                else export.attempts + 1,
                refusals=export.refusals + is_permanent,
                problem=problem,
            ),
            slowly=is_permanent or bool(final),
            is_over=is_over,
        )

    def _ask(self, endpoint: Address, export: Export) -> None:
        """Ask an endpoint to keep what it stored, before anything of the case is deleted."""
        key, number, commitments = export.endpoint, export.case_id, self._storage.commitments
        asked = Commitment(
            generate_uid(),
            {row.uid: row.sop_class for row in self._storage.ledger.results(number)},
        )
        if not asked.instances:
            self._storage.outbox.update(replace(export, state=Delivery.SENT))
            return
        if commitments.is_open(number, key):
            export = replace(
                export,
                attempts=export.attempts + 1,
                refusals=export.refusals + 1,
                problem=f"{key} has not reported whether it keeps the results (storage commitment)",
            )
            is_over = export.waited >= self._retries.give_up_seconds
            if is_over or export.refusals > _MOST_REFUSALS:
                self._postpone(export, slowly=True, is_over=True)
                return
            self._logger.warning("case %d: %s; it is asked again", number, export.problem)
        # Before it is asked, since the report may be here before the answer.
        commitments.begin(asked.transaction_uid, number, key)
        pause = self._retries.pause(export.attempts, slowly=True)
        waiting = replace(
            export,
            waited=export.waited + pause,
            next=self._next(number, key, pause),
            problem=f"{key} was asked whether it keeps the results (storage commitment)",
        )
        self._storage.outbox.update(waiting)
        try:
            report = ask_commitment(
                endpoint,
                asked,
                self._ae_title,
                is_reported=lambda: not commitments.is_open(number, key) or self._loop.is_stopping,
                seconds=_REPORT_SECONDS,
            )
        except CouldNotCompleteDIMSEMessage as error:
            commitments.cancel(asked.transaction_uid)
            if isinstance(error, PeerUnreachable):
                raise
            failed = replace(
                export,
                attempts=export.attempts + 1,
                refusals=export.refusals + error.is_permanent,
                problem=str(error),
            )
            self._postpone(failed, slowly=error.is_permanent, is_over=False)
            return
        if report is not None and report.transaction_uid == asked.transaction_uid:
            self.reported(report, endpoint.ae_title)
        elif commitments.is_open(number, key) and self._loop.is_draining:
            # Nobody listens any more for what it reports later.
            self._postpone(
                replace(
                    waiting,
                    problem=f"{key} has stored all results, and has not reported before the node "
                    "closed whether it keeps them (storage commitment)",
                ),
                slowly=True,
                is_over=True,
            )
        elif commitments.is_open(number, key):
            self._logger.info("case %d: %s, and reports later", number, waiting.problem)

    def reported(self, report: Commitment, calling: str) -> bool:
        """Record what an AE title reports of a commitment; whether it was asked for that."""
        asked = {str(one) for one in self._endpoints if one.ae_title.strip() == calling.strip()}
        settled = self._storage.commitments.settle(
            report, asked, self._retries.pause(1, slowly=False)
        )
        if settled is None:
            return False
        number, lost = settled
        if lost:
            self._logger.error(
                "case %d: %d results are not kept, they are sent again", number, lost
            )
        else:
            self._logger.info("case %d: an endpoint keeps all results", number)
        self._loop.wake()
        return True

    def _postpone(self, export: Export, slowly: bool, is_over: bool) -> None:
        """Try it again later, or give it up."""
        if (
            is_over
            or export.refusals > _MOST_REFUSALS
            or export.waited >= self._retries.give_up_seconds
            or self._loop.is_draining
        ):
            self._storage.outbox.update(replace(export, state=Delivery.DEAD))
            return
        pause = self._retries.pause(export.attempts, slowly)
        self._logger.warning(
            "case %d: %s; attempt %d, the next in %.0f s",
            export.case_id,
            export.problem,
            export.attempts,
            pause,
        )
        self._storage.outbox.update(
            replace(
                export,
                waited=export.waited + pause,
                next=self._next(export.case_id, export.endpoint, pause),
            )
        )

    def _miss(self, endpoint: Address, outage: Outage | None, error: PeerUnreachable) -> None:
        """Nothing goes to this endpoint now: one attempt tells for all cases."""
        attempts = 1 if outage is None else outage.attempts + 1
        pause = self._retries.pause(attempts, slowly=error.is_permanent)
        self._logger.warning("%s; attempt %d, the next in %.0f s", error, attempts, pause)
        self._storage.outbox.miss(
            Outage(str(endpoint), attempts, self._next(0, str(endpoint), pause), str(error)),
            waits=pause,
            refused=error.is_permanent,
            most_refusals=_MOST_REFUSALS,
            most_seconds=-1.0 if self._loop.is_draining else self._retries.give_up_seconds,
        )

    def _send(self, endpoint: Address, case_id: int, rows: Sequence[ResultRow]) -> None:
        """Send results, and record each answer."""
        key = str(endpoint)
        answers: list[Answer] = []
        stored = 0

        def record(response: Response) -> None:
            nonlocal stored
            meter = self._meters.results_sent if response.is_stored else self._meters.results_failed
            meter.add(label=key)
            stored += response.is_stored
            answers.append(
                Answer(
                    response.sop_instance_uid,
                    response.status,
                    response.is_stored,
                    response.comment,
                )
            )
            if response.is_stored and response.status:
                self._logger.warning(
                    "case %d: %s stored %s with status 0x%04X",
                    case_id,
                    key,
                    response.sop_instance_uid,
                    response.status,
                )
            if len(answers) >= _RECORDED_TOGETHER:
                self._storage.outbox.answer(case_id, key, answers)
                answers.clear()
            if self._loop.is_stopping:
                raise _Stopping

        try:
            send(
                endpoint,
                [
                    Outgoing(
                        row.sop_class,
                        row.uid,
                        row.syntax,
                        partial(self._storage.results.read, case_id, row),
                    )
                    for row in rows
                ],
                self._ae_title,
                on_response=record,
            )
        finally:
            self._storage.outbox.answer(case_id, key, answers)
        self._logger.info(
            "case %d: %s acknowledged %d of %d results", case_id, key, stored, len(rows)
        )

    # EXPORTING -> DONE | FAILED

    def _settle_next(self) -> bool:
        """Look for cases that are over with every endpoint, and tell whether there were some."""
        self._failures.record()
        keys = [str(endpoint) for endpoint in self._endpoints]
        worked = False
        for case_id in self._storage.outbox.settled(keys):
            if case_id in self._failures:
                continue
            known = [one for one in self._storage.outbox.exports(case_id) if one.endpoint in keys]
            worked = True
            with self._failures.blaming(case_id):
                self._settle(case_id, known)
        return worked

    def _settle(self, case_id: int, exports: Sequence[Export]) -> None:
        if not self._endpoints and self._storage.ledger.results(case_id):
            raise IncorrectlyConfigured(
                "process() returned results but the pipeline has no endpoints: set `endpoints`, "
                "start the node again and retry this case; or return nothing"
            )
        dead = [export.problem for export in exports if export.state is Delivery.DEAD]
        if dead:
            raise CouldNotCompleteDIMSEMessage("; ".join(dead))
        self._storage.finish(self._storage.ledger.case(case_id))
        self._logger.info("case %d is done", case_id)


def _is_exhausted(answer: Answer) -> bool:
    """Whether a result was refused for good often enough."""
    is_final = not answer.stored and answer.status not in _PASSING
    return is_final and answer.attempts > _MOST_REFUSALS


def _told(key: str, refused: Sequence[Answer], count: int) -> str:
    """What an endpoint refused, in one line."""
    if not refused:
        return f"{key} did not answer for all results"
    first = refused[0]
    return (
        f"{key} refused {len(refused)} of {count} results, the first {first.uid} with status "
        f"0x{first.status:04X} {first.comment}"
    ).rstrip()

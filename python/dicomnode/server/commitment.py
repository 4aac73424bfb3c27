"""Storage commitment, as the one who is asked and as the one who gets reports (PS3.4 annex J).

Solves that a sender can know what this node has before it deletes its own. A report is made after the
request was answered, in threads of their own, since every file is read again for it.
"""

import logging
import queue
from collections.abc import Callable, Iterable, Sequence

from pydicom.dataset import Dataset

from dicomnode.errors import DicomnodeError, InvalidDataset, OutOfResources
from dicomnode.lib.commitment import NOT_THERE, OTHER_CLASS, Commitment
from dicomnode.lib.dimse import Address, report_commitment
from dicomnode.server.loop import Loop
from dicomnode.storage.store import Storage

_SUCCESS = 0x0000
_PROCESSING_FAILURE = 0x0110
_INVALID_ARGUMENT = 0x0115
_RESOURCE_LIMITATION = 0x0213
# A sender that asks for more at once is answered with a resource limitation.
_MOST_REQUESTS = 100
# How many reports are made at once, so that a sender that does not take its own keeps no other from one.
_REPORTERS = 4

#: Reports over the association of the request; whether the sender took it.
Reply = Callable[[Commitment], bool]


class Committing:
    """Answers those who ask, and passes on the reports of those who were asked."""

    def __init__(
        self,
        ae_title: str,
        endpoints: Sequence[Address],
        storage: Storage,
        logger: logging.Logger,
        on_report: Callable[[Commitment, str], bool],
        on_asked: Callable[[Iterable[str]], None],
        loop: Loop,
    ) -> None:
        self._ae_title = ae_title
        self._endpoints = {endpoint.ae_title: endpoint for endpoint in reversed(endpoints)}
        self._storage = storage
        self._logger = logger
        self._on_report = on_report
        # Who asks has sent all: the cases of these identifiers may be complete.
        self._on_asked = on_asked
        self._loop = loop
        self._requests: queue.Queue[tuple[Commitment, str, Reply]] = queue.Queue()
        loop.add("commitment", self._report_next, _REPORTERS)

    def asked(self, information: Dataset, calling: str, reply: Reply) -> int:
        """A sender asks to keep instances (N-ACTION): the status."""
        if self._requests.qsize() >= _MOST_REQUESTS:
            return _RESOURCE_LIMITATION
        try:
            asked = Commitment.of(information)
            self._storage.commitments.ask(calling, asked)
        except InvalidDataset as error:
            self._logger.warning("%r asks for what cannot be understood: %s", calling, error)
            return _INVALID_ARGUMENT
        except OutOfResources as error:
            self._logger.error("a request for storage commitment is not taken: %s", error)
            return _PROCESSING_FAILURE
        self._requests.put((asked, calling, reply))
        self._loop.wake()
        return _SUCCESS

    def reported(self, information: Dataset, calling: str) -> int:
        """A peer reports what it keeps (N-EVENT-REPORT): the status."""
        try:
            if not self._on_report(Commitment.of(information), calling):
                self._logger.warning(
                    "%r reports on a commitment that nobody waits for, or that another AE title was "
                    "asked for: that of an endpoint has to be the one it reports with",
                    calling,
                )
        except InvalidDataset as error:
            self._logger.warning("%r reports what cannot be understood: %s", calling, error)
            return _INVALID_ARGUMENT
        except OutOfResources as error:
            self._logger.error("a report of storage commitment is not recorded: %s", error)
            return _PROCESSING_FAILURE
        return _SUCCESS

    def _report_next(self) -> bool:
        """Make one report, and tell whether one was wanted."""
        try:
            asked, calling, reply = self._requests.get_nowait()
        except queue.Empty:
            return False
        try:
            self._report(asked, calling, reply)
        except (DicomnodeError, OSError) as error:
            # Whoever gets none asks again.
            self._logger.error("%r gets no report: %s", calling, error)
        # Not before the report: what is done with is deleted, and would count as not kept.
        self._on_asked(self._storage.commitments.identifiers_in(asked.transaction_uid))
        return True

    def _report(self, asked: Commitment, calling: str, reply: Reply) -> None:
        kept = self._storage.kept(asked.transaction_uid)
        failed = {
            uid: NOT_THERE if uid not in kept else OTHER_CLASS
            for uid, kind in asked.instances.items()
            if kept.get(uid) != kind
        }
        report = Commitment(asked.transaction_uid, asked.instances, failed)
        endpoint = self._endpoints.get(calling)
        if endpoint is not None:
            report_commitment(endpoint, report, self._ae_title)
        elif not reply(report):
            self._logger.error(
                "%r is no endpoint and did not wait: it gets no report on %d instances",
                calling,
                len(asked.instances),
            )
            return
        self._logger.info(
            "%r was told that %d of %d instances are kept",
            calling,
            len(asked.instances) - len(failed),
            len(asked.instances),
        )

"""Storage commitment, as the one who is asked and as the one who gets reports (PS3.4 annex J).

Solves that a sender can know what this node has before it deletes its own. A report is made after the
request was answered, in a thread for each sender, since every file is read again for it, and since a
sender may not take it. What waits for that is bounded.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from pydicom.dataset import Dataset

from dicomnode.errors import DicomnodeError, InvalidDataset, OutOfResources
from dicomnode.lib.commitment import NOT_THERE, OTHER_CLASS, Commitment
from dicomnode.lib.dimse import Address, report_commitment
from dicomnode.server.loop import Loop
from dicomnode.storage.store import Storage

_SUCCESS = 0x0000
_PROCESSING_FAILURE = 0x0110
_INVALID_ARGUMENT = 0x0115
# PS3.7 annex C: the sender may ask again later.
_RESOURCE_LIMITATION = 0x0213
# What may wait to be reported on, of one sender and of all: instances, and for each request as many as
# take its room. A request has at most 60,000, which is what its 4 MiB hold.
_MOST_OF_ONE, _MOST_OF_ALL = 100_000, 300_000
_REQUEST_SIZE = 20
# So many senders get reports at once; of each a connection is open, or it is an endpoint.
_MOST_REPORTS = 128
# For so many of them files are read at once.
_READERS = 4

#: Reports over the association of the request; whether the sender took it.
Reply = Callable[[Commitment], bool]


@dataclass(frozen=True)
class Asking:
    """Who asks, by AE title and address, and over which association."""

    title: str
    address: str
    reply: Reply
    #: Whether the association is still there.
    is_there: Callable[[], bool]

    @property
    def peer(self) -> tuple[str, str]:
        """Those of one peer wait for each other."""
        return self.title, self.address


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
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str], deque[tuple[Commitment, Asking]]] = {}
        # The room of those that are being written down.
        self._coming: Counter[tuple[str, str]] = Counter()
        self._reading = threading.Semaphore(_READERS)
        self._reports = loop.crew("report", _MOST_REPORTS)
        loop.add("commitment", self._step, is_pending=lambda: bool(self._requests))

    def asked(self, read: Callable[[], Dataset], asking: Asking) -> int:
        """A sender asks to keep instances (N-ACTION): the status."""
        if not self._takes_room(asking, _REQUEST_SIZE):
            # Before it is read and written down.
            return _RESOURCE_LIMITATION
        size = _REQUEST_SIZE
        try:
            asked = Commitment.of(read())
            if not self._takes_room(asking, len(asked.instances)):
                return _RESOURCE_LIMITATION
            size += len(asked.instances)
            self._storage.commitments.ask(asking.title, asked)
            with self._lock:
                self._requests.setdefault(asking.peer, deque()).append((asked, asking))
        except InvalidDataset as error:
            self._logger.warning("%r asks for what cannot be understood: %s", asking.title, error)
            return _INVALID_ARGUMENT
        except OutOfResources as error:
            self._logger.error("a request for storage commitment is not taken: %s", error)
            return _PROCESSING_FAILURE
        finally:
            with self._lock:
                self._coming[asking.peer] -= size
                self._coming += Counter()
        self._loop.wake()
        return _SUCCESS

    def _takes_room(self, asking: Asking, size: int) -> bool:
        """Count a request that is coming, where there is room for it; many may come at once."""
        with self._lock:
            sizes = self._coming + Counter(
                {
                    peer: sum(_REQUEST_SIZE + len(asked.instances) for asked, _ in waiting)
                    for peer, waiting in self._requests.items()
                }
            )
            mine, all_of_them = sizes[asking.peer], sizes.total()
            if mine + size <= _MOST_OF_ONE and all_of_them + size <= _MOST_OF_ALL:
                self._coming[asking.peer] += size
                return True
        self._logger.warning(
            "%r is refused: %d requests for storage commitment wait, %d of them its own",
            asking.title,
            sum(map(len, list(self._requests.values()))),
            len(self._requests.get(asking.peer, ())),
        )
        return False

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

    def _step(self) -> bool:
        """Begin to report to each sender that waits. False: that is no work of this thread."""
        with self._lock:
            waiting = list(self._requests)
        for peer in waiting:
            self._reports.begin(peer, partial(self._report_all, peer))
        return False

    def _report_all(self, peer: tuple[str, str]) -> None:
        """Make the reports that one sender waits for, in their order."""
        while True:
            with self._lock:
                waiting = self._requests.get(peer)
                if not waiting:
                    # Another thread may have made the last of them just before this one began.
                    self._requests.pop(peer, None)
                    return
                asked, asking = waiting[0]
            try:
                self._report(asked, asking)
            except (DicomnodeError, OSError) as error:
                # Whoever gets none asks again.
                self._logger.error("%r gets no report: %s", asking.title, error)
            finally:
                with self._lock:
                    waiting.popleft()
            # Not before the report: what is done with is deleted, and would count as not kept.
            self._on_asked(self._storage.commitments.identifiers_in(asked.transaction_uid))

    def _report(self, asked: Commitment, asking: Asking) -> None:
        endpoint = self._endpoints.get(asking.title)
        if endpoint is None and not asking.is_there():
            self._tell_of_none(asked, asking)
            return
        with self._reading:
            kept = self._storage.kept(asked.transaction_uid, asked.instances)
        failed = {
            uid: NOT_THERE if uid not in kept else OTHER_CLASS
            for uid, kind in asked.instances.items()
            if kept.get(uid) != kind
        }
        report = Commitment(asked.transaction_uid, asked.instances, failed)
        if endpoint is not None:
            report_commitment(endpoint, report, self._ae_title)
        elif not asking.reply(report):
            self._tell_of_none(asked, asking)
            return
        self._logger.info(
            "%r was told that %d of %d instances are kept",
            asking.title,
            len(asked.instances) - len(failed),
            len(asked.instances),
        )

    def _tell_of_none(self, asked: Commitment, asking: Asking) -> None:
        self._logger.error(
            "%r is no endpoint and did not wait: it gets no report on %d instances",
            asking.title,
            len(asked.instances),
        )

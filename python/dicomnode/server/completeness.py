"""Completeness: when a case has all that it needs, and what happens where it never does.

Solves that DICOM has no sign that a series is complete. A case is looked at when an association ends
that brought images to it, and, where the pipeline asks for it, when no image came for some time. It is
ready where each input has enough and no more images are on their way.

A look calls the user's `validate`, which may take long or never end. So each look has a thread of its
own, one at a time for each case: one that hangs holds up its own case only, until `_MOST_LOOKS` hang.
Those who receive and those who process never call it.

There is one clock: the seconds since the last image of a case, counted by a monotonic clock while the
node runs. So neither a change of the time of day nor the time for which a node was down makes a case
ready, late or too old.
"""

import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Literal, Protocol, TypeAlias

from dicomnode.errors import InvalidDataset, OutOfResources
from dicomnode.lib.dicom import LazyDataset
from dicomnode.lib.expected import series_of
from dicomnode.lib.uids import Uids
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.input import AbstractInput, Datasets, waits_for
from dicomnode.server.logs import about, current
from dicomnode.server.loop import Failures, Loop
from dicomnode.server.owners import Owners
from dicomnode.storage.ledger import OVER, Case, State
from dicomnode.storage.store import Contents, Storage

#: What happens to a case that is not complete at its deadline.
AtDeadline: TypeAlias = Literal["fail", "process"]

# So many cases are looked at at once. Where so many hang, no other case is looked at.
_MOST_LOOKS = 32
# A look that takes longer is told of.
_LONG_SECONDS = 30.0
# How soon it is looked again where the disk, or the system, had no room for it.
_AGAIN_SECONDS = 1.0
# A READY case is looked at before it is its turn, unless those before it take longer than this.
_SHORT_SECONDS = 0.5
# How often the clocks of the cases are written down; so much of them is lost with a killed node.
_KEEP_SECONDS = 60.0
# How soon a case is looked at again where the half of an image is here.
_ARRIVING_SECONDS = 1.0
# Before a case is deleted the log tells so, at least this part of its time before, or a day.
_NOTICE_PART, _NOTICE_SECONDS = 0.1, 24 * 3600.0


@dataclass(frozen=True)
class Patience:
    """How long the cases of a pipeline wait; None is without end."""

    quiet_seconds: float | None = None
    deadline_seconds: float | None = None
    at_deadline: AtDeadline = "fail"
    expiration_seconds: float | None = None

    @property
    def notice_seconds(self) -> float:
        """How long before its end a case is told to be deleted."""
        return min(_NOTICE_PART * (self.expiration_seconds or 0), _NOTICE_SECONDS)

    def next(self, idle: float) -> float:
        """The next time since its last image at which a case is to be looked at."""
        expiration = self.expiration_seconds
        moments = [self.quiet_seconds, self.deadline_seconds, expiration]
        if expiration is not None:
            moments.append(expiration - self.notice_seconds)
        return min((one for one in moments if one is not None and one > idle), default=math.inf)


class Senders(Protocol):
    """The open associations, as far as the completeness of a case depends on them."""

    def is_open_for(self, case_id: int) -> bool:
        """Whether an association that brought images to a case is open."""

    def is_arriving_for(self, case_id: int) -> bool:
        """Whether the half of a further object is here on such an association."""


@dataclass
class _Clock:
    """Of the open case of one identifier."""

    #: When its last image came.
    since: float
    #: When it is to be looked at.
    next: float = math.inf
    #: What the ledger has of its age.
    kept: float = 0.0
    #: When the log told that it is going to be deleted, and which generation of it.
    warned: float = math.inf
    generation: int = -1
    #: The case, where the last look found that an association is open that brings it.
    coming: int = 0


@dataclass(frozen=True)
class Looked:
    """A case that was found complete: what it holds, and the inputs that said so."""

    contents: Contents
    inputs: Mapping[str, AbstractInput]


class Completeness:
    """Makes cases READY, or FAILED or EXPIRED where they never get complete.

    `ahead` is how many READY cases are kept as they were looked at, for those who process them.
    """

    def __init__(
        self,
        inputs: Mapping[str, type[AbstractInput]],
        patience: Patience,
        storage: Storage,
        eager: EagerDecoding,
        logger: logging.Logger,
        failures: Failures,
        clock: Callable[[], float],
        loop: Loop,
        ahead: int,
    ) -> None:
        self._inputs = inputs
        self._patience = patience
        self._storage = storage
        self._eager = eager
        #: Set before images come.
        self.senders: Senders
        self._logger = logger
        self._failures = failures
        self._now = clock
        self._loop = loop
        self._ahead = ahead
        self._lock = threading.Lock()
        self._clocks: dict[str, _Clock] = {}
        # The times at which clocks are due, the next first; those that a clock does not have any more
        # are passed by. And those whose time has come while no look at them can be begun.
        self._first_look = patience.next(0.0)
        self._plan: list[tuple[float, str]] = []
        self._held_up: set[str] = set()
        self._keep_at = clock() + _KEEP_SECONDS
        # The identifiers whose cases are to be looked at, and the association that it is about; and those
        # of them that have to wait for that.
        self._unchecked: dict[str, int | None] = {}
        self._postponed: set[str] = set()
        # Until then nothing is looked at again that could not be.
        self._again_at = 0.0
        # READY cases that are to be claimed: to be looked at, the keys of these looks, and looked at.
        self._wanted: list[int] = []
        self._claiming: set[Hashable] = set()
        self._looked: dict[int, Looked] = {}
        self._owners = Owners()
        # The key of a look is the identifier of an open case, or the number of one that takes no images.
        self._looks = loop.crew("look", _MOST_LOOKS)
        self._told: set[Hashable] = set()
        self._is_stuck = False
        loop.add("looker", self.step, due=self.due, is_pending=self.is_pending)

    # Time

    def recall(self) -> None:
        """Take up the clocks of the cases that an earlier run left."""
        now = self._now()
        expiration = self._patience.expiration_seconds
        for identifier in self._storage.open_identifiers():
            kept = max(0.0, self._storage.waits.of(self._storage.open_case(identifier)).seconds)
            clock = self._clocks[identifier] = _Clock(now - kept, kept=kept)
            if expiration is not None and kept >= expiration - self._patience.notice_seconds:
                self._plan_look(identifier, clock, now)
            else:
                self._plan_look(identifier, clock, now - kept + self._patience.next(kept))
        for uid, identifier in self._storage.waits.identifiers_of_images():
            self._owners.is_other(uid, identifier)

    def arrived(self, identifier: str, uid: str) -> None:
        """An image was stored: the clock of its case starts anew. Raises nothing."""
        with self._lock:
            now = self._now()
            clock = self._clocks.get(identifier)
            if clock is None:
                clock = self._clocks[identifier] = _Clock(now)
            clock.since, clock.warned = now, math.inf
            if now + self._first_look < clock.next:
                self._plan_look(identifier, clock, now + self._first_look)
            was_kept, clock.kept = clock.kept, 0.0
            is_other = self._owners.is_other(uid, identifier)
        if was_kept or is_other:
            self._note(identifier, uid, is_other)

    def _plan_look(self, identifier: str, clock: _Clock, moment: float) -> None:
        """Look at a case at a moment, or before it."""
        if moment < clock.next:
            clock.next = moment
            heappush(self._plan, (moment, identifier))

    def _is_planned(self, moment: float, identifier: str) -> bool:
        clock = self._clocks.get(identifier)
        return clock is not None and clock.next == moment

    def _note(self, identifier: str, uid: str, is_conflict: bool) -> None:
        """Write down what an image changes, which is seldom."""
        case_id = self._storage.open_case(identifier)
        try:
            self._storage.waits.keep({case_id: 0.0})
            if is_conflict and not self._storage.waits.of(case_id).conflict:
                self._logger.error(
                    "case %d: %s came under another identifier before: one of the two is of another "
                    "patient than it says. This case waits for you",
                    case_id,
                    uid,
                )
                self._storage.waits.conflict(case_id, uid)
        except OutOfResources as error:
            self._logger.error("case %d: what its image changes is lost: %s", case_id, error)

    def due(self) -> float:
        """In how many seconds there is something to do."""
        looks = self._looks.seconds()
        moments = [_LONG_SECONDS - took for key, took in looks.items() if key not in self._told]
        with self._lock:
            short = [looks[key] for key in self._claiming & looks.keys()]
            moments += [_SHORT_SECONDS - took for took in short if took < _SHORT_SECONDS]
            if self._again_at:
                moments.append(self._again_at - time.monotonic())
            while self._plan and not self._is_planned(*self._plan[0]):
                heappop(self._plan)
            if self._plan and not self._looks.is_full:
                moments.append(self._plan[0][0] - self._now())
            if self._clocks:
                moments.append(self._keep_at - self._now())
        return min(moments, default=math.inf)

    def is_pending(self) -> bool:
        """Whether a case is looked at, or is to be now."""
        with self._lock:
            return bool(self._unchecked or self._postponed or self._looks.is_busy)

    def step(self) -> bool:
        """Begin to look at what is to be looked at now. False: that is no work of this thread."""
        if self._now() >= self._keep_at:
            self.keep()
        self._tell_of_long_looks()
        with self._lock:
            if self._again_at and time.monotonic() >= self._again_at:
                self._again_at = 0.0
                self._unchecked.update(dict.fromkeys(self._postponed))
                self._postponed.clear()
            unchecked = list(self._unchecked)
        for identifier in unchecked:
            if self._looks.is_full:
                # Of those that wait there may be many, and this is called after each look.
                break
            self._begin(identifier, partial(self._check, identifier))
        self._begin_late()
        self._begin_to_claim()
        return False

    def _begin_late(self) -> None:
        """Look at the cases whose time has come, as far as looks can be begun."""
        with self._lock:
            held_up, self._held_up = self._held_up, set()
        try:
            while not self._looks.is_full and (late := self._late(held_up)) is not None:
                identifier, clock = late
                if not self._begin(identifier, partial(self._look_by_clock, identifier, clock)):
                    with self._lock:
                        self._held_up.add(identifier)
        finally:
            with self._lock:
                self._held_up |= held_up

    def _late(self, held_up: set[str]) -> tuple[str, _Clock] | None:
        """The next case whose time has come; those that were held up first."""
        with self._lock:
            while held_up:
                identifier = held_up.pop()
                clock = self._clocks.get(identifier)
                if clock is not None:
                    return identifier, clock
            now = self._now()
            while self._plan and self._plan[0][0] <= now:
                moment, identifier = heappop(self._plan)
                if self._is_planned(moment, identifier):
                    return identifier, self._clocks[identifier]
        return None

    def _begin(self, key: Hashable, look: Callable[[], None]) -> bool:
        """Begin a look where none at this case has been begun; whether it was."""
        if key in self._looks or self._looks.is_full:
            return False
        if self._looks.begin(key, look):
            return True
        self._pause()
        return False

    def _pause(self) -> None:
        """Look again in a while."""
        with self._lock:
            self._again_at = time.monotonic() + _AGAIN_SECONDS

    def _tell_of_long_looks(self) -> None:
        seconds = self._looks.seconds()
        self._told &= seconds.keys()
        for key, took in seconds.items():
            if took < _LONG_SECONDS or key in self._told:
                continue
            self._told.add(key)
            number = key if isinstance(key, int) else self._storage.open_case(str(key))
            reason = f"validate() has not ended after {_LONG_SECONDS:.0f} s"
            if number:
                self._logger.warning("case %d: %s; other cases go on", number, reason)
                with suppress(OutOfResources):
                    self._storage.waits.tell(number, reason)
        is_stuck = self._looks.is_full and self._told == seconds.keys()
        if is_stuck and not self._is_stuck:
            self._logger.error("NO CASE IS LOOKED AT ANY MORE: %s", self._stuck())
        elif self._is_stuck and not is_stuck:
            self._logger.warning("cases are looked at again")
        self._is_stuck = is_stuck

    def _stuck(self) -> str:
        return f"validate() of {_MOST_LOOKS} cases does not end; find out why, and start the node again"

    def trouble(self) -> list[str]:
        """What keeps all cases from being looked at."""
        return [f"no case is looked at: {self._stuck()}"] if self._is_stuck else []

    def _look_by_clock(self, identifier: str, clock: _Clock) -> None:
        """Look at a case whose time it is, and plan the next time."""
        with self._lock:
            clock.next, since = math.inf, clock.since
        again = math.inf
        try:
            idle = self._now() - since
            # Its image may have come after this look was planned.
            if self._patience.next(-math.inf) <= idle:
                again = self._look_at_time(identifier, clock, idle)
        finally:
            with self._lock:
                idle = self._now() - clock.since
                planned = self._now() + min(self._patience.next(idle) - idle, again)
                self._plan_look(identifier, clock, planned)

    def _look_at_time(self, identifier: str, clock: _Clock, idle: float) -> float:
        """Look at a case for which no image came; in how many seconds that is to be done again."""
        case_id = self._storage.open_case(identifier)
        if not case_id:
            return math.inf
        if self.senders.is_arriving_for(case_id):
            return _ARRIVING_SECONDS
        self._check(identifier)
        expiration = self._patience.expiration_seconds
        if expiration is None or idle < expiration - self._patience.notice_seconds:
            return math.inf
        try:
            return self._expire(identifier, clock, idle, expiration)
        except (OutOfResources, sqlite3.Error) as error:
            self._logger.error("case %d cannot be deleted now: %s", case_id, error)
            return _AGAIN_SECONDS

    def _expire(self, identifier: str, clock: _Clock, idle: float, expiration: float) -> float:
        """Tell that a case is going to be deleted, or delete it; in how many seconds to look again.

        What is deleted is what was told of, so that no image that came since goes with it. It is
        told once in each run, so nothing is deleted at the first look after a start.
        """
        contents = self._storage.current(identifier)
        if contents is None:
            return math.inf
        number, notice = contents.case_id, self._patience.notice_seconds
        if self._storage.ledger.case(number).state not in (State.RECEIVING, State.FAILED):
            return math.inf
        if clock.warned == math.inf or clock.generation != contents.generation:
            clock.warned, clock.generation = self._now(), contents.generation
            self._logger.warning(
                "case %d is deleted in %s unless an image comes: it is not complete, and its last "
                "image came %s ago (study_expiration_days)",
                number,
                _days(max(notice, expiration - idle)),
                _days(idle),
            )
        left = max(expiration - idle, clock.warned + notice - self._now())
        if left <= 0 and self._storage.expire(identifier, contents):
            self._eager.drop(number)
            self._logger.warning(
                "case %d is deleted, with its images: it was not complete, and its last image came "
                "%s ago (study_expiration_days)",
                number,
                _days(idle),
            )
        return left if left > 0 else math.inf

    def keep(self) -> None:
        """Write down how long the open cases have waited, and forget the clocks of the others."""
        now = self._now()
        self._keep_at = now + _KEEP_SECONDS
        seconds: dict[int, float] = {}
        with self._lock:
            for identifier, clock in list(self._clocks.items()):
                case_id = self._storage.open_case(identifier)
                if case_id:
                    seconds[case_id] = clock.kept = now - clock.since
                else:
                    del self._clocks[identifier]
            self._plan = [
                (one.next, name) for name, one in self._clocks.items() if one.next < math.inf
            ]
            heapify(self._plan)
        # Without patience nothing depends on it.
        if self._patience == Patience() or not seconds:
            return
        try:
            self._storage.waits.keep(seconds)
        except OutOfResources as error:
            self._logger.error("how long cases have waited is not written down: %s", error)

    def _idle(self, identifier: str) -> float:
        """How many seconds ago the last image of a case came."""
        clock = self._clocks.get(identifier)
        return 0.0 if clock is None else self._now() - clock.since

    # RECEIVING -> READY

    def left(self, identifiers: Iterable[str]) -> None:
        """An association has ended: have its cases looked at, but where another one brings them, too."""
        if left := [one for one in identifiers if not self._is_coming(one)]:
            self.check_soon(left)

    def _is_coming(self, identifier: str) -> bool:
        """Whether a look would find nothing but what the last one did."""
        number = self._storage.open_case(identifier)
        with self._lock:
            clock = self._clocks.get(identifier)
            if not number or clock is None or clock.coming != number:
                return False
        # That one has it looked at when it ends.
        return self.senders.is_open_for(number)

    def check_soon(self, identifiers: Iterable[str]) -> None:
        """Have these cases looked at, and made READY where they are complete."""
        with self._lock:
            self._unchecked.update(dict.fromkeys(identifiers, current().association))
        self._loop.wake()

    def _check(self, identifier: str) -> None:
        """Look whether a case is complete; later, where that cannot be recorded now."""
        with self._lock:
            # Images that come from now on have it looked at once more.
            association = self._unchecked.pop(identifier, None)
        try:
            with about(association=association):
                self._settle(identifier)
        except (OutOfResources, sqlite3.Error) as error:
            self._logger.error("a case cannot be made ready now: %s", error)
            with self._lock:
                self._postponed.add(identifier)
            self._pause()

    def _settle(self, identifier: str) -> None:
        """Look whether a case is complete; again, where images came in meanwhile."""
        while (contents := self._storage.current(identifier)) is not None:
            looked = self.look(identifier, contents)
            if looked is None:
                return
            inputs, waiting = looked
            with self._lock:
                if identifier in self._clocks:
                    coming = contents.case_id if waiting.is_coming else 0
                    self._clocks[identifier].coming = coming
            # With more on its way it may turn out to be more than a repeat.
            repeated = None if waiting.is_coming else self._storage.park(identifier, contents)
            if repeated is not None:
                self._eager.drop(contents.case_id)
                self._logger.error(
                    "case %d repeats case %d, whose sender had not got all answers, and is not "
                    "processed; retry it if it should be",
                    contents.case_id,
                    repeated,
                )
                return
            if waiting.is_for_images and self._is_put_together(identifier, contents):
                continue
            if waiting and self._is_overdue(identifier):
                is_settled = self._end(identifier, contents, waiting)
            else:
                is_settled = self._settle_as(identifier, contents, inputs, waiting)
            if is_settled:
                return

    def _settle_as(
        self,
        identifier: str,
        contents: Contents,
        inputs: Mapping[str, AbstractInput],
        waiting: "Waiting",
    ) -> bool:
        """Record what a look found; False where that changed meanwhile."""
        number = contents.case_id
        was_ready = self._storage.ledger.case(number).state is State.READY
        if waiting:
            self._forget(number)
        elif self._storage.is_verified(number):
            self._remember(Looked(contents, inputs))
        if not self._storage.settle(identifier, contents, complete=not waiting, why=waiting.reason):
            return False
        if waiting:
            self._logger.info("case %d waits: %s", number, waiting.reason)
        elif not was_ready:
            self._logger.info("case %d is ready", number)
        return True

    # READY -> PROCESSING

    def claimable(self, ready: Sequence[int]) -> list[int]:
        """Those of the READY cases that can be taken; the others are looked at first."""
        with self._lock:
            self._looked = {one: self._looked[one] for one in ready if one in self._looked}
            found = list(self._looked)
            wanted = [one for one in ready if one not in self._looked]
            is_new, self._wanted = wanted != self._wanted, wanted
        if is_new and wanted:
            self._loop.wake()
        return found

    def take(self, case_id: int) -> Looked | None:
        """What was found of a case that is to be claimed; None where it has to be looked at again."""
        with self._lock:
            return self._looked.pop(case_id, None)

    def _begin_to_claim(self) -> None:
        """Look at the READY cases whose turn comes next."""
        looks = self._looks.seconds()
        with self._lock:
            self._claiming &= looks.keys()
            # Where those before it take long, another one is looked at.
            room = self._ahead - len(self._looked)
            room -= sum(looks[key] < _SHORT_SECONDS for key in self._claiming)
            wanted = (
                []
                if self._again_at
                else [
                    one
                    for one in self._wanted
                    # The ledger may not know yet that it has failed.
                    if one not in self._looked and one not in self._failures
                ]
            )
        for number in wanted:
            if room <= 0 or self._looks.is_full:
                return
            case = self._storage.ledger.case(number)
            if case.state is not State.READY:
                continue
            is_asked = not case.sealed and not self._storage.waits.of(number).forced
            key = case.identifier if is_asked else number
            if self._begin(key, partial(self._look_to_claim, case, is_asked)):
                room -= 1
                with self._lock:
                    self._claiming.add(key)

    def _look_to_claim(self, case: Case, is_asked: bool) -> None:
        """Look at a READY case, so that it can be claimed as it was found."""
        try:
            self._storage.verify(case)
            if is_asked:
                self._settle(case.identifier)
            else:
                self._look_at_given(case)
        except (OutOfResources, sqlite3.Error) as error:
            self._logger.error("case %d cannot be processed now: %s", case.id, error)
            self._pause()

    def _look_at_given(self, case: Case) -> None:
        """Look at a case that takes no images, or is to be processed as it is."""
        contents = (
            self._storage.contents(case) if case.sealed else self._storage.current(case.identifier)
        )
        if contents is None or contents.case_id != case.id:
            return
        looked = self.look(case.identifier, contents, case.sealed)
        if looked is None:
            return
        inputs, waiting = looked
        if not waiting:
            self._remember(Looked(contents, inputs))
        elif not case.sealed:
            self._settle_as(case.identifier, contents, inputs, waiting)
        else:
            with self._failures.blaming(case.id):
                raise InvalidDataset(
                    f"this case is not complete, and takes no images: {waiting.reason}"
                )

    def _remember(self, looked: Looked) -> None:
        with self._lock:
            number = looked.contents.case_id
            if number in self._looked or len(self._looked) < self._ahead:
                self._looked[number] = looked

    def _forget(self, number: int) -> None:
        with self._lock:
            self._looked.pop(number, None)

    def look(
        self, identifier: str, contents: Contents, is_sealed: bool = False
    ) -> tuple[dict[str, AbstractInput], "Waiting"] | None:
        """The inputs of a case and what it waits for; None where looking failed."""

        def has_gone_on() -> bool:
            # It was processed as it is while this look hung.
            return not is_sealed and self._storage.open_case(identifier) != contents.case_id

        with self._failures.blaming(contents.case_id, has_gone_on):
            number, is_quiet_in = contents.case_id, 0.0
            if contents.obstacle:
                return {}, Waiting(contents.obstacle)
            wait = self._storage.waits.of(number)
            if not (wait.forced or is_sealed):
                if wait.conflict:
                    return {}, Waiting(
                        f"{wait.conflict} came under another identifier before: find out whose it is; "
                        "dicomnode cases --complete processes this case"
                    )
                is_open, is_quiet_in = self._coming(identifier, number)
                if is_open:
                    # Nobody asks its inputs yet: many associations may bring it, one image each.
                    reason = "an association that brought images of it is open"
                    return {}, Waiting(reason, is_coming=True)
            uids = Uids(self._storage.ledger.seed(number))
            inputs = {
                name: kind(
                    Datasets(contents.sources[name], self._eager.decoded(number, name), uids)
                )
                for name, kind in self._inputs.items()
            }
            if wait.forced:
                return inputs, Waiting()
            return inputs, self._lacks(contents, inputs, is_quiet_in)
        return None

    def _lacks(
        self, contents: Contents, inputs: Mapping[str, AbstractInput], is_quiet_in: float
    ) -> "Waiting":
        """What these inputs wait for, or the silence that has to be where nothing tells that this is all."""
        counts = bool(inputs) and all(
            kind.expected_images is not None for kind in self._inputs.values()
        )
        is_listed = is_quiet_in > 0 and self._storage.commitments.lists_all_of(contents.case_id)
        quiet = Waiting(f"no image for {is_quiet_in:.0f} s more")
        if is_quiet_in > 0 and not (counts or is_listed):
            return quiet
        lacking = _lacking(inputs)
        if is_quiet_in > 0 and (lacking or not (lacking.is_counted or is_listed)):
            # Silence is needed only where neither headers nor sender tell that this is all.
            return quiet
        return lacking

    def _coming(self, identifier: str, case_id: int) -> tuple[bool, float]:
        """Whether more images are on their way, and for how long there have to be none."""
        quiet = self._patience.quiet_seconds
        left = 0.0 if quiet is None else max(0.0, quiet - self._idle(identifier))
        if self.senders.is_arriving_for(case_id):
            return True, left
        # A sender may keep its association open. That tells nothing where silence counts.
        is_over = self._is_overdue(identifier) or (quiet is not None and not left)
        return not is_over and self.senders.is_open_for(case_id), left

    def _is_overdue(self, identifier: str) -> bool:
        deadline = self._patience.deadline_seconds
        return deadline is not None and self._idle(identifier) >= deadline

    def _end(self, identifier: str, contents: Contents, waiting: "Waiting") -> bool:
        """What becomes of a case that is not complete at its deadline; False where that changed."""
        told = (
            f"not complete {self._patience.deadline_seconds:g} s after its last image "
            f"(deadline_seconds): {waiting.reason}"
        )
        number = contents.case_id
        if self._patience.at_deadline == "process" and waiting.is_for_images:
            if not self._storage.force(identifier, contents, told):
                return False
            self._logger.warning("case %d is processed as it is, though %s", number, told)
            return True
        case = self._storage.ledger.case(number)
        if case.state is State.FAILED and case.error == told:
            return True
        if not self._storage.give_up(identifier, contents, told):
            return False
        self._logger.error("case %d FAILED, is kept, and still takes images: %s", number, told)
        return True

    # Late images

    def _is_put_together(self, identifier: str, contents: Contents) -> bool:
        """Whether a case that holds late images of an earlier one has got that one's images, too."""
        storage, number = self._storage, contents.case_id
        # validate() may have closed the node.
        if storage.open_case(identifier) != number:
            return False
        wait = storage.waits.of(number)
        if wait.revises or wait.too_late_for:
            return False
        earlier_cases = storage.waits.sealed_cases(identifier, number)
        if not earlier_cases:
            return False
        series = self._series(number)
        for earlier in earlier_cases:
            is_over = earlier.state in OVER
            theirs = storage.waits.series(earlier.id) if is_over else self._series(earlier.id)
            if not series or not series <= theirs:
                continue
            if is_over:
                storage.waits.come_too_late(number, earlier.id)
                count = len({row.uid for row in storage.ledger.instances(number)})
                self._logger.warning(
                    "case %d: %s came after case %d was done, and waits",
                    number,
                    "1 image" if count == 1 else f"{count} images",
                    earlier.id,
                )
                return False
            return self._put_together(identifier, contents, earlier)
        return False

    def _put_together(self, identifier: str, contents: Contents, earlier: Case) -> bool:
        ledger = self._storage.ledger
        held = {
            (row.input, row.uid, row.digest)
            for row in ledger.instances(earlier.id)
            if not row.damaged
        }
        mine = {(row.input, row.uid, row.digest) for row in ledger.instances(contents.case_id)}
        if mine <= held:
            # They came twice, and are not late.
            return False
        count = self._storage.revise(identifier, contents, earlier)
        if count is None:
            # It changes just now, and is looked at again after that.
            return False
        self._logger.info(
            "case %d is a revision of case %d: %d late images and the %d of that one",
            contents.case_id,
            earlier.id,
            len(mine - held),
            count,
        )
        return True

    def _series(self, case_id: int) -> set[str]:
        sources = self._storage.sources_of(case_id)
        return set(series_of(LazyDataset(source) for source in sources)) - {""}


@dataclass(frozen=True)
class Waiting:
    """What a case waits for; false where for nothing."""

    reason: str = ""
    #: Its inputs lack images.
    is_for_images: bool = False
    #: Somebody who brought images of it is still there.
    is_coming: bool = False
    #: The headers of all images tell how many there are.
    is_counted: bool = field(default=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.reason)


def _lacking(inputs: Mapping[str, AbstractInput]) -> Waiting:
    looked = {name: waits_for(one) for name, one in inputs.items()}
    reasons: dict[str, list[str]] = {}
    for name, (reason, _) in looked.items():
        if reason:
            reasons.setdefault(reason, []).append(name)
    text = "; ".join(f"input {', '.join(names)} {reason}" for reason, names in reasons.items())
    is_counted = all(counted for _, counted in looked.values())
    return Waiting(text, bool(text), is_counted=is_counted)


def _days(seconds: float) -> str:
    if seconds >= 24 * 3600:
        return f"{seconds / (24 * 3600):.1f} days"
    return f"{seconds / 3600:.1f} hours"

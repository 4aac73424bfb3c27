"""Turns: whose identifier it is, one thread after the other, however many identifiers there are.

Solves that the lock of an identifier is there as long as somebody wants it, and costs little for each image.
"""

import threading
from contextlib import AbstractContextManager

# So many locks are kept for others, since making one costs as much as all the rest.
_MOST_SPARE = 64


class Turns:
    """Locks by name."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.held: dict[str, Turn] = {}
        self.spare: list[Turn] = []

    def of(self, name: str) -> AbstractContextManager[threading.Condition]:
        """Inside it is the turn of this thread; the condition can be waited for."""
        return _Holding(self, name)

    def take(self, name: str) -> "Turn":
        """The lock of a name, there until `give`; for whoever wants it several times in a row."""
        with self.guard:
            turn = self.held.get(name)
            if turn is None:
                turn = self.held[name] = self.spare.pop() if self.spare else Turn()
            turn.users += 1
        return turn

    def give(self, name: str, turn: "Turn", is_free: bool = True) -> None:
        """Whoever took a lock does not want it any more; `is_free` tells whether it does not have it."""
        with self.guard:
            turn.users -= 1
            if not turn.users:
                del self.held[name]
                if is_free and len(self.spare) < _MOST_SPARE:
                    self.spare.append(turn)


class Turn:
    """A lock, its condition, and how many want it."""

    __slots__ = ("condition", "lock", "users")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.condition = threading.Condition(self.lock)
        self.users = 0


class _Holding:
    """Has the lock of one name, or wants it."""

    __slots__ = ("_name", "_turn", "_turns")

    def __init__(self, turns: Turns, name: str) -> None:
        self._turns, self._name = turns, name

    def __enter__(self) -> threading.Condition:
        self._turn = turn = self._turns.take(self._name)
        try:
            turn.condition.acquire()
        except BaseException:
            # It may have been taken already, and is for nobody else then.
            self._turns.give(self._name, turn, is_free=False)
            raise
        return turn.condition

    def __exit__(self, *error: object) -> None:
        self._turn.condition.release()
        self._turns.give(self._name, self._turn)

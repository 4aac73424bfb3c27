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
        self.held: dict[str, _Turn] = {}
        self.spare: list[_Turn] = []

    def of(self, name: str) -> AbstractContextManager[threading.Condition]:
        """Inside it is the turn of this thread; the condition can be waited for."""
        return _Holding(self, name)


class _Turn:
    """A lock, and how many want it."""

    __slots__ = ("condition", "users")

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.users = 0


class _Holding:
    """Has the lock of one name, or wants it."""

    __slots__ = ("_name", "_turn", "_turns")

    def __init__(self, turns: Turns, name: str) -> None:
        self._turns, self._name = turns, name

    def __enter__(self) -> threading.Condition:
        turns, name = self._turns, self._name
        with turns.guard:
            turn = turns.held.get(name)
            if turn is None:
                turn = turns.held[name] = turns.spare.pop() if turns.spare else _Turn()
            turn.users += 1
        self._turn = turn
        try:
            turn.condition.acquire()
        except BaseException:
            # It may have been taken already, and is for nobody else then.
            self._leave(is_free=False)
            raise
        return turn.condition

    def __exit__(self, *error: object) -> None:
        self._turn.condition.release()
        self._leave(is_free=True)

    def _leave(self, is_free: bool) -> None:
        turns, turn = self._turns, self._turn
        with turns.guard:
            turn.users -= 1
            if not turn.users:
                del turns.held[self._name]
                if is_free and len(turns.spare) < _MOST_SPARE:
                    turns.spare.append(turn)

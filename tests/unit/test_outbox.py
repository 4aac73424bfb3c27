"""Which results a node knows, in memory that does not grow."""

from dicomnode.storage.ledger import MOST_MADE, Ledger
from dicomnode.storage.outbox import Outbox, _Seen


def test_all_that_was_added_is_known_and_hardly_anything_else() -> None:
    seen = _Seen()
    seen.add([f"2.25.{k}" for k in range(MOST_MADE)])
    assert seen.count == MOST_MADE
    assert all(f"2.25.{k}" in seen for k in range(0, MOST_MADE, 7))
    others = sum(f"1.2.{k}" in seen for k in range(20_000))
    assert others < 800
    assert not any(f"1.2.{k}" in _Seen() for k in range(1000))


def test_a_case_that_is_made_again_and_again_pushes_nothing_out() -> None:
    outbox = Outbox(Ledger(None))
    outbox.remember([f"1.2.{k}" for k in range(1000)])
    again = [f"2.25.{k}" for k in range(MOST_MADE // 10)]
    for _ in range(30):
        outbox.remember(again)
    assert outbox._made[0].count <= 1000 + len(again)
    assert all(f"1.2.{k}" in outbox._made[0] for k in range(1000))

"""Nobody waits while garbage is collected."""

import gc
from typing import Any

import pytest

from dicomnode.lib.dimse import echo
from dicomnode.server import listener
from dicomnode.testing import StoringNode, address_of, running_node


def test_p10_nobody_waits_for_a_collection_of_all_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """pynetdicom collects all garbage in its accept loop, again and again, while everybody waits."""
    asked: list[Any] = []
    monkeypatch.setattr(gc, "collect", lambda *given: asked.append(given) or 0)
    actions = []
    real = listener.Server.service_actions

    def counted(server: Any) -> None:
        actions.append(server)
        # As after half a minute.
        for _ in range(100):
            real(server)

    monkeypatch.setattr(listener.Server, "service_actions", counted)
    with running_node(StoringNode) as node:
        for _ in range(3):
            echo(address_of(node))
        assert node.wait(lambda: len(actions) >= 3, 30)
    assert not asked

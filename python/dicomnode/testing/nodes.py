"""Nodes that run in a test: on a free port of this machine, closed at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydicom.dataset import Dataset

from dicomnode.lib.dimse import Address
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import State

P = TypeVar("P", bound=AbstractPipeline)


@contextmanager
def running_node(kind: type[P], **attributes: Any) -> Iterator[P]:
    """A node of that class, open on a free port of 127.0.0.1; `attributes` are set before."""
    node = kind(start=False)
    for name, value in {"ip": "127.0.0.1", "port": 0, **attributes}.items():
        if not hasattr(node, name):
            raise AttributeError(f"{kind.__name__} has no attribute {name!r} to set")
        setattr(node, name, value)
    with node:
        yield node


def address_of(node: AbstractPipeline) -> Address:
    """Where an open node listens."""
    return Address(node.ip, node.port, node.ae_title)


def wait_for_cases(
    node: AbstractPipeline, state: State, count: int = 1, seconds: float = 30.0
) -> None:
    """Wait until `count` cases of a node are in a state.

    Raises TimeoutError, which tells where the cases are instead.
    """

    def reached() -> bool:
        return sum(case.state is state for case in node.cases()) >= count

    if not node.wait(reached, seconds):
        found = [f"{case.id} {case.state.value} {case.error[-500:]}" for case in node.cases()]
        raise TimeoutError(f"after {seconds} s not {count} cases are {state.value}: {found}")


class _Everything(AbstractInput):
    """Takes every object and is never complete."""

    required_tags = [0x00080018]

    def validate(self) -> bool:
        return False


class StoringNode(AbstractPipeline):
    """A node that keeps what it gets: the endpoint of a test or a demonstration.

    `received` are the datasets in the order of their arrival. With `root_data_directory` they are
    in files below it.
    """

    ae_title = "STORE"
    input = {"stored": _Everything}

    def __init__(self, start: bool = True) -> None:
        self.received: list[Dataset] = []
        super().__init__(start)

    def filter(self, dataset: Dataset) -> bool:
        self.received.append(dataset)
        return True

    def wait_for_images(self, count: int, seconds: float = 30.0) -> list[Dataset]:
        """Wait until `count` objects are stored, and give them. Raises TimeoutError."""
        if not self.wait(lambda: self._stored() >= count, seconds):
            raise TimeoutError(f"{self._stored()} of {count} objects after {seconds} s")
        return list(self.received)

    def _stored(self) -> int:
        storage = self._storage
        if storage is None:
            return len(self.received)
        counts = [storage.ledger.counts(case.id) for case in self.cases()]
        return sum(total for count in counts for total, _ in count.values())

"""What tests of a pipeline need: series that are made, a node that runs, a node that stores.

Users test the way this project tests itself:

    with running_node(MyPipeline) as node:
        send(address_of(node), make_series())
        wait_for_cases(node, State.DONE)
"""

from dicomnode.storage.ledger import State
from dicomnode.testing.nodes import (
    StoringNode,
    address_of,
    running_node,
    wait_for_cases,
)
from dicomnode.testing.series import make_series, write_series

__all__ = [
    "State",
    "StoringNode",
    "address_of",
    "make_series",
    "running_node",
    "wait_for_cases",
    "write_series",
]

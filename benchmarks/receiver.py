"""A receiver in a process of its own: `python -m benchmarks.receiver KIND FOLDER`.

Prints its port. Then answers each line on its standard input with how many images it has.
"""

import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import running_node


class Everything(AbstractInput):
    """Takes every image, and is never complete."""

    def validate(self) -> bool:
        """Called after each association."""
        return False


class Receiver(AbstractPipeline):
    """Our node with its defaults and one input."""

    ae_title = "ANY-SCP"
    log_level = logging.ERROR
    input = {"images": Everything}

    def process(self, input_data: dict[str, Any]) -> None:
        """Never called: the input is never complete."""


def serve_node(kind: str, root: Path | None) -> None:
    """Our node with a durability, or in memory."""
    settings = {"root_data_directory": root, "durability": kind} if kind != "memory" else {}
    with running_node(Receiver, **settings) as node:
        answer(node.port, lambda: _kept(node))


def _kept(node: AbstractPipeline) -> int:
    """How many images the node has by its ledger."""
    assert node._storage is not None
    ledger = node._storage.ledger
    return sum(total for case in node.cases() for total, _ in ledger.counts(case.id).values())


def serve_bare(tuned: bool) -> None:
    """pynetdicom alone: takes the bytes and answers success. `tuned` as our node's sockets are."""
    from pynetdicom import AE, AllStoragePresentationContexts, evt

    received = [0]

    def on_store(event: Any) -> int:
        event.request.DataSet.getvalue()
        received[0] += 1
        return 0

    def on_data(event: Any) -> None:
        event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    ae = AE(ae_title="ANY-SCP")
    ae.maximum_associations = 100
    ae.supported_contexts = AllStoragePresentationContexts
    handlers: list[Any] = [(evt.EVT_C_STORE, on_store)]
    if tuned:
        ae.maximum_pdu_size = 131072
        handlers.append((evt.EVT_DATA_RECV, on_data))
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    answer(server.server_address[1], lambda: received[0])
    server.shutdown()


def answer(port: int, count: Callable[[], int]) -> None:
    """The conversation with the benchmark."""
    print(port, flush=True)
    for _ in sys.stdin:
        print(count(), flush=True)


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    if kind in ("power", "process", "memory"):
        serve_node(kind, Path(folder) if folder else None)
    else:
        serve_bare(kind == "tuned")

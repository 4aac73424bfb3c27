"""dcmtk's storescp as an endpoint that is down, rejects, breaks off, dies, and is slow."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicomnode.lib.dimse import Address, send
from dicomnode.lib.grinders import identity_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import State
from dicomnode.storage.outbox import Outbox
from dicomnode.testing import address_of, make_series, running_node, wait_for_cases

_STORESCP = "/usr/bin/storescp"
pytestmark = pytest.mark.skipif(
    not Path(_STORESCP).exists(),
    reason="dcmtk is missing",
)
_IMAGES = 24


class All(AbstractInput):
    image_grinder = many_meta_grinder(identity_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images == _IMAGES


class Echoing(AbstractPipeline):
    """Sends back what it got, as a new series."""

    ae_title = "NODE"
    input = {"ct": All}
    export_retry_seconds = 0.1

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array, images)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "received").mkdir()
    return tmp_path / "received"


@contextmanager
def storescp(folder: Path, port: int, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [_STORESCP, "+B", *options, "-od", str(folder), str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait(30)


@contextmanager
def exporting(tmp_path: Path, port: int, **settings: Any) -> Iterator[Echoing]:
    address = Address("127.0.0.1", port, "STORESCP")
    options = {"endpoints": [address], "root_data_directory": tmp_path / "root", **settings}
    with running_node(Echoing, **options) as node:
        yield node


def give(node: AbstractPipeline) -> None:
    answers = send(address_of(node), make_series(_IMAGES, 64, 64))
    assert all(one.is_stored for one in answers)


def outbox_of(node: AbstractPipeline) -> Outbox:
    assert node._storage is not None
    return node._storage.outbox


def check(folder: Path) -> None:
    """All arrived, each once and whole."""
    received = [dcmread(path) for path in folder.iterdir()]
    assert len({one.SOPInstanceUID for one in received}) == len(received) == _IMAGES
    assert len({one.SeriesInstanceUID for one in received}) == 1
    numpy_grinder(received)


def test_x1_storescp_that_is_started_later_gets_everything(
    tmp_path: Path, folder: Path, port: int
) -> None:
    with exporting(tmp_path, port) as node:
        give(node)
        assert node.wait(lambda: len(outbox_of(node).outages()) == 1, 30)
        with storescp(folder, port):
            wait_for_cases(node, State.DONE, seconds=60)
    check(folder)


def test_x5_storescp_that_is_killed_in_the_middle_gets_what_is_left(
    tmp_path: Path, folder: Path, port: int
) -> None:
    with exporting(tmp_path, port) as node:
        with storescp(folder, port, "--sleep-after", "0", "--sleep-during", "0") as process:
            give(node)
            end = time.monotonic() + 60
            while len(list(folder.iterdir())) < 3 and time.monotonic() < end:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        with storescp(folder, port):
            wait_for_cases(node, State.DONE, seconds=60)
    check(folder)


@pytest.mark.parametrize("option", ["--abort-after", "--abort-during"])
def test_x4_storescp_that_aborts_is_tried_again(
    option: str, tmp_path: Path, folder: Path, port: int
) -> None:
    with exporting(tmp_path, port) as node:
        with storescp(folder, port, option):
            give(node)

            def has_failed() -> bool:
                exports = outbox_of(node).exports(1)
                return (
                    bool(exports)
                    and "PENDING" in str(exports[0].state)
                    and (exports[0].attempts > 0)
                )

            assert node.wait(has_failed, 60)
        with storescp(folder, port):
            wait_for_cases(node, State.DONE, seconds=60)
    check(folder)


def test_x4_storescp_that_refuses_associations_is_given_up_and_sent_to_on_demand(
    tmp_path: Path, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    with exporting(tmp_path, port, export_give_up_seconds=1.0) as node:
        with storescp(folder, port, "--refuse"):
            give(node)
            wait_for_cases(node, State.FAILED, seconds=60)
            assert "rejected the association" in node.cases()[0].error
        with storescp(folder, port):
            node.retry(1)
            wait_for_cases(node, State.DONE, seconds=60)
    check(folder)


def test_x3_storescp_that_takes_its_time_is_waited_for(
    tmp_path: Path, folder: Path, port: int
) -> None:
    with (
        storescp(folder, port, "--sleep-during", "1"),
        exporting(tmp_path, port, input={"ct": One}) as node,
    ):
        send(address_of(node), make_series(1, 64, 64))
        wait_for_cases(node, State.DONE, seconds=90)
    assert len(list(folder.iterdir())) == 1


class One(All):
    def validate(self) -> bool:
        return self.images == 1

"""Everything fails at once, and comes back by itself: disk, endpoints and senders."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, evt
from tests.e2e.programs import Command
from tests.e2e.test_full_disk import Disk, small_disk  # noqa: F401 - a fixture

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dimse import Address, Response, send
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

MIB = 1 << 20


class Three(AbstractInput):
    required_values = {"Modality": "CT"}
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= 3


class Adding(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": Three}
    export_retry_seconds = 0.1

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array + 1, images)


class Moody:
    """An endpoint that behaves as it is told, and remembers what it acknowledged."""

    def __init__(self, port: int) -> None:
        self.address = Address("127.0.0.1", port, "MOODY")
        self.mood = "well"
        self.kept: list[Dataset] = []
        self.asked: set[str] = set()
        self._server: Any = None

    def __call__(self, event: Any) -> int:
        self.asked.add(self.mood)
        if self.mood == "slow":
            threading.Event().wait(0.3)
        if self.mood == "dies":
            # In the middle of a transfer: what it got is not acknowledged.
            event.assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)
            return 0xA700
        if self.mood == "rejects":
            return 0xA700
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        self.kept.append(dataset)
        return 0x0000

    def start(self) -> None:
        ae = AE(ae_title="MOODY")
        ae.supported_contexts = AllStoragePresentationContexts
        where = (self.address.ip, self.address.port)
        handlers = [(evt.EVT_C_STORE, self)]
        self._server = ae.start_server(where, block=False, evt_handlers=handlers)

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
        self._server = None


@pytest.fixture
def moody(free_port: int) -> Iterator[Moody]:
    endpoint = Moody(free_port)
    yield endpoint
    endpoint.stop()


def until(node: AbstractPipeline, condition: Callable[[], bool], what: str) -> None:
    cases = [(case.identifier, case.state.value, case.error[-300:]) for case in node.cases()]
    assert node.wait(condition, 40), f"{what}: {cases}"


def abort(address: Address, series: list[Dataset], after: int) -> None:
    """A sender that goes away after some answers, without a release."""

    def stop(response: Response) -> None:
        seen.append(response)
        if len(seen) == after:
            raise KeyError

    seen: list[Response] = []
    with contextlib.suppress(KeyError, CouldNotCompleteDIMSEMessage):
        send(address, series, on_response=stop)
    assert [one.status for one in seen] == [0x0000] * after


def lie(address: Address, series: list[Dataset]) -> list[int]:
    """A sender whose request tells another SOPInstanceUID than the dataset has."""
    ae = AE(ae_title="LIAR")
    ae.requested_contexts = [
        cx for cx in AllStoragePresentationContexts if cx.abstract_syntax == series[0].SOPClassUID
    ]
    association = ae.associate(address.ip, address.port, ae_title=address.ae_title)
    assert association.is_established
    answers = []

    def other(event: Any) -> None:
        message = event.message
        if hasattr(message.command_set, "AffectedSOPInstanceUID"):
            message.command_set.AffectedSOPInstanceUID = "1.2.3"

    association.bind(evt.EVT_DIMSE_SENT, other)
    for image in series:
        image.SOPInstanceUID, kept = "1.2.3.4.5", image.SOPInstanceUID
        answers.append(int(association.send_c_store(image).Status))
        image.SOPInstanceUID = kept
    association.release()
    return answers


@contextlib.contextmanager
def stalling(address: Address) -> Iterator[None]:
    """A sender that stops in the middle of its request for an association, and stays."""
    with socket.create_connection((address.ip, address.port)) as one:
        one.sendall(b"\x01\x00\x00\x00\x01\x00\x00\x01")
        yield


@pytest.mark.timeout(240)
def test_disk_endpoint_and_senders_fail_at_once_and_all_comes_back(
    small_disk: Callable[..., Disk],  # noqa: F811
    moody: Moody,
    tmp_path: Path,
) -> None:
    disk = small_disk(16)
    root, log = disk.path / "root", tmp_path / "log"
    sent: dict[str, list[Dataset]] = {}
    with (
        running_node(
            Adding,
            root_data_directory=root,
            log_path=log,
            endpoints=[moody.address],
            limits=Limits(free_bytes=3 * MIB, stall_seconds=2.0, idle_seconds=5.0),
        ) as node,
        stalling(address_of(node)),
        stalling(address_of(node)),
    ):
        address = address_of(node)

        def bring(name: str) -> list[Dataset]:
            sent[name] = make_series(3, 64, 64, patient_id=name, seed=len(sent))
            assert [one.status for one in send(address, sent[name])] == [0x0000] * 3
            return sent[name]

        # The endpoint is down, and nobody is blamed.
        bring("DOWN")
        until(node, lambda: "cannot be reached" in log.read_text(), "told that it is down")
        # A sender goes away half way; another comes with what is no image of the request.
        sent["ABORTED"] = make_series(3, 64, 64, patient_id="ABORTED", seed=77)
        abort(address, sent["ABORTED"], 2)
        liar = make_series(2, 64, 64, patient_id="LIAR")
        assert set(lie(address, liar)) <= {0xA900, 0xC000, 0x0117}
        # The endpoint is up, and takes nothing; then it dies in each transfer; then it is slow.
        moody.mood = "rejects"
        moody.start()
        until(node, lambda: "rejects" in moody.asked, "asked while it rejects")
        moody.mood = "dies"
        until(node, lambda: "dies" in moody.asked, "asked while it dies")
        bring("DYING")
        assert not moody.kept
        # The disk is filled by others meanwhile.
        disk.fill(leave=3 * MIB)
        late = make_series(3, 64, 64, patient_id="LATE", seed=99)
        assert [one.status for one in send(address, late)] == [0xA700] * 3
        moody.mood = "slow"
        # What was taken goes out although the disk is full, and makes room.
        wait_for_cases(node, State.DONE, 2)
        disk.fill()
        assert [one.status for one in send(address, late)] == [0xA700] * 3
        # Everything was told of while it lasted.
        with _cases(root) as table:
            assert "ABORTED" in table and "RECEIVING" in table
        told = log.read_text()
        for word in ("cannot be reached", "0xA700", "aborted", "not stored", "have to stay free"):
            assert word in told, word
        assert "Phantom" not in told
        # And nothing has to be done but to let it be.
        disk.empty()
        moody.mood = "well"
        assert [one.status for one in send(address, late)] == [0x0000] * 3
        sent["LATE"] = late
        assert [one.status for one in send(address, sent["ABORTED"])] == [0x0000] * 3
        bring("AFTER")
        wait_for_cases(node, State.DONE, 5)
        assert {case.state for case in node.cases()} == {State.DONE}
        assert len(node.cases()) == 5
        assert "LIAR" not in {case.identifier for case in node.cases()}
    _is_once_and_right(moody.kept, sent)
    left = list(root.rglob("*.dcm"))
    assert left == [] and list((root / ".dicomnode" / "incoming").iterdir()) == []


@contextlib.contextmanager
def _cases(root: Path) -> Iterator[str]:
    with Command("cases", "--root", root, environment=dict(os.environ)) as command:
        yield command.ended()


def _is_once_and_right(kept: list[Dataset], sent: dict[str, list[Dataset]]) -> None:
    by_name: dict[str, dict[str, Dataset]] = {}
    for one in kept:
        by_name.setdefault(str(one.PatientID), {})[str(one.SOPInstanceUID)] = one
    assert set(by_name) == set(sent)
    for name, series in sent.items():
        assert len(by_name[name]) == 3
        made = numpy_grinder(by_name[name].values())
        assert numpy.array_equal(made, numpy_grinder(series) + 1)

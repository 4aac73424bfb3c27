"""The way of results to endpoints: sent again where that helps, given up where not, never lost."""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage
from typer.testing import CliRunner

from dicomnode.cli.main import app
from dicomnode.errors import IncorrectlyConfigured, UnknownCase
from dicomnode.lib.dimse import Address, send
from dicomnode.lib.grinders import identity_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.exporter import Retries
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import Ledger, State
from dicomnode.storage.outbox import Delivery, Outbox
from dicomnode.testing import address_of, make_series, running_node, wait_for_cases

from .programs import Command

NOBODY = Address("127.0.0.1", 1, "NOBODY")


class Four(AbstractInput):
    image_grinder = many_meta_grinder(identity_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images == 4


class Echoing(AbstractPipeline):
    """Sends back what it got, as a new series."""

    ae_title = "NODE"
    input = {"ct": Four}
    export_retry_seconds = 0.02

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array, images)


class Peer:
    """A receiver that answers what `says` returns for the n-th image, from 1."""

    def __init__(self, says: Callable[[int], int]) -> None:
        self.says = says
        self.uids: list[str] = []
        self.associations = 0
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()

    def on_store(self, event: Any) -> int:
        with self._lock:
            self.uids.append(str(event.request.AffectedSOPInstanceUID))
            count = len(self.uids)
        return self.says(count)

    def on_accepted(self, event: Any) -> None:
        with self._lock:
            self.associations += 1
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)

    def on_closed(self, event: Any) -> None:
        with self._lock:
            self._open -= 1


@contextmanager
def listening(peer: Peer, port: int = 0, **settings: Any) -> Iterator[Address]:
    ae = AE(ae_title="PEER")
    ae.add_supported_context(CTImageStorage)
    for name, value in settings.items():
        setattr(ae, name, value)
    handlers: list[Any] = [
        (evt.EVT_C_STORE, peer.on_store),
        (evt.EVT_ACCEPTED, peer.on_accepted),
        (evt.EVT_RELEASED, peer.on_closed),
        (evt.EVT_ABORTED, peer.on_closed),
    ]
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    try:
        yield Address("127.0.0.1", server.server_address[1], "PEER")
    finally:
        server.shutdown()


def send_case(node: AbstractPipeline, patient: str = "A") -> None:
    answers = send(address_of(node), make_series(4, 8, 8, patient_id=patient))
    assert [one.status for one in answers] == [0] * 4


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def opened_ledger(root: Path) -> Iterator[Ledger]:
    """As another process opens it."""
    ledger = Ledger(root / ".dicomnode" / "ledger.sqlite")
    try:
        yield ledger
    finally:
        ledger.close()


def outbox_of(node: AbstractPipeline) -> Outbox:
    assert node._storage is not None
    return node._storage.outbox


def test_x1_an_endpoint_that_comes_back_gets_everything_without_help(tmp_path: Path) -> None:
    peer, port = Peer(lambda n: 0), free_port()
    address = Address("127.0.0.1", port, "PEER")
    with running_node(Echoing, endpoints=[address], root_data_directory=tmp_path) as node:
        for patient in "ABC":
            send_case(node, patient)

        def is_down() -> bool:
            outage = outbox_of(node).outages().get(str(address))
            return outage is not None and outage.attempts >= 3

        wait_for_cases(node, State.EXPORTING, 3)
        assert node.wait(is_down, 30)
        with listening(peer, port):
            wait_for_cases(node, State.DONE, 3)
        assert outbox_of(node).outages() == {}
    assert len(peer.uids) == len(set(peer.uids)) == 12


def test_x1_a_name_that_nobody_knows_is_an_endpoint_that_is_down(tmp_path: Path) -> None:
    lost = Address("no-such-host.invalid", 104, "LOST")
    with running_node(Echoing, endpoints=[lost], export_give_up_seconds=0) as node:
        send_case(node)
        wait_for_cases(node, State.FAILED)
        assert "LOST@no-such-host.invalid:104 cannot be reached" in node.cases()[0].error


def test_x1_many_cases_ask_an_endpoint_that_is_down_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connects: list[Any] = []
    port = free_port()
    with running_node(
        Echoing,
        endpoints=[Address("127.0.0.1", port, "DOWN")],
        export_retry_seconds=60.0,
        root_data_directory=tmp_path,
    ) as node:
        monkeypatch.setattr(
            "dicomnode.server.exporter.send",
            lambda *args, **kwargs: connects.append(args) or send(*args, **kwargs),
        )
        monkeypatch.setattr(Retries, "pause", lambda *_, **__: 60.0)
        for patient in "ABCDEFGH":
            send_case(node, patient)
        assert node.wait(lambda: sum(one.state is State.EXPORTING for one in node.cases()) == 8, 30)
        assert node.wait(lambda: len(outbox_of(node).outages()) == 1, 30)
        assert not node.wait(lambda: len(connects) > 1, 1.5)


def test_x1_an_endpoint_that_is_down_does_not_delay_another() -> None:
    peer = Peer(lambda n: 0)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        listening(peer) as address,
        running_node(
            Echoing, endpoints=[Address("127.0.0.1", silent.getsockname()[1], "SILENT"), address]
        ) as node,
    ):
        for patient in "ABC":
            send_case(node, patient)
        assert node.wait(lambda: len(peer.uids) == 12, 20)
        silent.close()


@pytest.mark.parametrize("status", [0xA700, 0xA7FF, 0x0110, 0x0213])
def test_x4_a_passing_refusal_is_sent_again_until_it_is_stored(status: int) -> None:
    peer = Peer(lambda n: status if n <= 6 else 0)
    with listening(peer) as address, running_node(Echoing, endpoints=[address]) as node:
        send_case(node)
        wait_for_cases(node, State.DONE)
    assert len(set(peer.uids)) == 4


@pytest.mark.parametrize("status", [0xA900, 0xC000, 0x0117, 0x0122, 0x0124])
def test_x4_a_lasting_refusal_is_tried_four_times_and_then_given_up(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    peer = Peer(lambda n: status)
    with listening(peer) as address, running_node(Echoing, endpoints=[address]) as node:
        send_case(node)
        wait_for_cases(node, State.FAILED)
        assert len(peer.uids) == 16
        assert f"refused 4 of 4 results, the first {peer.uids[0]} with status 0x{status:04X}" in (
            node.cases()[0].error
        )
        (export,) = outbox_of(node).exports(1)
        assert export.state is Delivery.DEAD
        # Somebody mends the peer, and sends again.
        peer.says = lambda n: 0
        node.retry(1)
        wait_for_cases(node, State.DONE)
        assert len(peer.uids) == 20


@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007, 0x0111])
def test_x4_a_warning_counts_as_stored_and_is_told(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    peer = Peer(lambda n: status if n == 2 else 0)
    with listening(peer) as address, running_node(Echoing, endpoints=[address]) as node:
        send_case(node)
        wait_for_cases(node, State.DONE)
        assert outbox_of(node).answers(1, str(address))[peer.uids[1]].status == status
    assert len(peer.uids) == 4
    assert f"stored {peer.uids[1]} with status 0x{status:04X}" in caplog.text


def test_x4_a_peer_that_rejects_for_good_is_asked_four_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    peer = Peer(lambda n: 0)
    with (
        listening(peer, require_calling_aet=["OTHER"]) as address,
        running_node(Echoing, endpoints=[address]) as node,
    ):
        send_case(node)
        wait_for_cases(node, State.FAILED)
        assert "rejected the association of 'NODE'" in node.cases()[0].error
        assert outbox_of(node).outages()[str(address)].attempts == 4


def test_x4_a_peer_that_accepts_no_context_is_asked_four_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    peer = Peer(lambda n: 0)
    with listening(peer) as address, running_node(Echoing, endpoints=[address]) as node:
        series = make_series(4)
        for image in series:
            image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        send(address_of(node), series)
        wait_for_cases(node, State.FAILED)
        assert "accepted none of the presentation contexts" in node.cases()[0].error
        assert outbox_of(node).exports(1)[0].refusals == 4


def test_x4_what_waits_longer_than_the_limit_is_given_up(tmp_path: Path) -> None:
    with running_node(
        Echoing, endpoints=[NOBODY], export_give_up_seconds=0.05, root_data_directory=tmp_path
    ) as node:
        send_case(node)
        wait_for_cases(node, State.FAILED)
        (export,) = outbox_of(node).exports(1)
        assert export.state is Delivery.DEAD and export.waited >= 0.05
    assert len(list((tmp_path / ".dicomnode" / "outbox").glob("*/*.dcm"))) == 4


def test_x5_results_keep_their_uids_over_restarts(tmp_path: Path) -> None:
    peer, port = Peer(lambda n: 0), free_port()
    address = Address("127.0.0.1", port, "PEER")
    options: dict[str, Any] = {"endpoints": [address], "root_data_directory": tmp_path}
    with running_node(Echoing, **options) as node:
        send_case(node)
        assert node.wait(lambda: len(outbox_of(node).outages()) == 1, 30)
        kept = {row.uid for row in node._storage.ledger.results(1)}  # type: ignore[union-attr]
    with listening(peer, port), running_node(Echoing, **options) as node:
        wait_for_cases(node, State.DONE)
    assert set(peer.uids) == kept and len(peer.uids) == 4


def test_x5_attempts_and_their_time_survive_a_restart(tmp_path: Path) -> None:
    peer, port = Peer(lambda n: 0), free_port()
    options: dict[str, Any] = {
        "endpoints": [Address("127.0.0.1", port, "PEER")],
        "root_data_directory": tmp_path,
    }
    with running_node(Echoing, export_retry_seconds=0.01, **options) as node:
        send_case(node)
        assert node.wait(lambda: any(one.attempts > 2 for one in outbox_of(node).exports(1)), 30)
    with opened_ledger(tmp_path) as ledger, ledger.transaction() as db:
        db.execute("UPDATE outages SET next = ?", (time.time() + 600,))
    with listening(peer, port), running_node(Echoing, **options) as node:
        assert outbox_of(node).exports(1)[0].attempts > 2
        assert not node.wait(lambda: bool(peer.uids), 1.5)
        # `dicomnode resend` does not wait.
        with opened_ledger(tmp_path) as ledger:
            assert Outbox(ledger).resend() == [1]
        wait_for_cases(node, State.DONE)


def test_s6_no_pause_is_longer_than_the_longest_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._LONGEST_SECONDS", 1.0)
    peer, port = Peer(lambda n: 0), free_port()
    options: dict[str, Any] = {
        "endpoints": [Address("127.0.0.1", port, "PEER")],
        "root_data_directory": tmp_path,
    }
    with running_node(Echoing, **options) as node:
        send_case(node)
        assert node.wait(lambda: len(outbox_of(node).outages()) == 1, 30)
    with opened_ledger(tmp_path) as ledger, ledger.transaction() as db:
        db.execute("UPDATE outages SET next = ?", (time.time() + 10 * 365 * 86400,))
    with listening(peer, port), running_node(Echoing, **options) as node:
        wait_for_cases(node, State.DONE)


def test_x6_one_association_at_a_time_goes_to_one_endpoint() -> None:
    peer = Peer(lambda n: 0)
    with listening(peer) as address, running_node(Echoing, endpoints=[address], workers=4) as node:
        for patient in "ABCDEFGH":
            send_case(node, patient)
        wait_for_cases(node, State.DONE, 8)
    assert peer.associations == 8 and peer.most_at_once == 1


def test_x7_only_what_was_not_stored_is_sent_again() -> None:
    peer = Peer(lambda n: 0xA700 if n in (2, 5) else 0)
    with listening(peer) as address, running_node(Echoing, endpoints=[address]) as node:
        send_case(node)
        wait_for_cases(node, State.DONE)
        answers = outbox_of(node).answers(1, str(address))
    assert peer.uids[4:] == [peer.uids[1]] * 2
    assert answers[peer.uids[1]].attempts == 3 and answers[peer.uids[0]].attempts == 1


def test_x7_one_endpoint_of_two_that_gives_up_leaves_only_its_own_results_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicomnode.server.exporter._SLOWLY", 1)
    good, bad = Peer(lambda n: 0), Peer(lambda n: 0xC000)
    with (
        listening(good) as first,
        listening(bad) as second,
        running_node(Echoing, endpoints=[first, second]) as node,
    ):
        send_case(node)
        wait_for_cases(node, State.FAILED)
        states = {one.endpoint: one.state for one in outbox_of(node).exports(1)}
        assert states == {str(first): Delivery.SENT, str(second): Delivery.DEAD}
        bad.says = lambda n: 0
        node.retry(1)
        wait_for_cases(node, State.DONE)
    assert len(good.uids) == 4 and len(bad.uids) == 20


def test_a_node_without_a_root_does_not_wait_for_an_endpoint_that_is_down_when_it_closes() -> None:
    start = time.monotonic()
    with running_node(Echoing, endpoints=[NOBODY], export_retry_seconds=600.0) as node:
        send_case(node)
        assert node.wait(lambda: len(outbox_of(node).outages()) == 1, 30)
    assert time.monotonic() - start < 20


def test_the_outbox_is_listed_and_sent_again_by_command(tmp_path: Path) -> None:
    peer, port = Peer(lambda n: 0xA700 if n == 1 else 0), free_port()
    address = Address("127.0.0.1", port, "PEER")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    with running_node(
        Echoing, endpoints=[address], root_data_directory=tmp_path, export_retry_seconds=600.0
    ) as node:
        send_case(node)
        assert node.wait(lambda: len(outbox_of(node).outages()) == 1, 30)
        listed = run("outbox", "--root", tmp_path)
        assert f"1     {address}" in listed and "PENDING  0 of 4" in listed
        assert "cannot be reached" in listed and "in " in listed
        with listening(peer, port):
            assert "case 1 is sent now" in run("resend", 1, "--root", tmp_path)
            assert node.wait(lambda: len(peer.uids) == 4, 30)
            assert node.wait(
                lambda: [one.attempts for one in outbox_of(node).exports(1)] == [1], 30
            )
            shown = run("outbox", "--root", tmp_path, "--case", 1)
            assert shown.count("0x0000") == 3 and shown.count("0xA700") == 1
            assert shown.count("SENT") == 3 and shown.count("PENDING") == 1
            run("resend", "--root", tmp_path)
            wait_for_cases(node, State.DONE)
    assert "nothing waits" in run("outbox", "--root", tmp_path)
    assert "no case has results" in run("resend", "--root", tmp_path)
    with opened_ledger(tmp_path) as ledger, pytest.raises(UnknownCase, match="DONE"):
        Outbox(ledger).resend(1)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "5", None, True])
@pytest.mark.parametrize("name", ["export_retry_seconds", "export_give_up_seconds"])
def test_pauses_that_are_none_are_told(name: str, value: object) -> None:
    node = Echoing(start=False)
    setattr(node, name, value)
    with pytest.raises(IncorrectlyConfigured, match=name):
        node.open(blocking=False)


def test_a_pause_grows_to_a_quarter_of_an_hour_and_is_random() -> None:
    retries = Retries(5.0, 0.0)
    for attempts in (1, 2, 5, 50, 5000):
        pauses = [retries.pause(attempts, slowly=False) for _ in range(200)]
        longest = min(900.0, 5.0 * 2.0 ** min(attempts - 1, 60))
        assert min(pauses) >= 0 and longest / 2 < max(pauses) <= longest
    assert retries.pause(1, slowly=True) == 300.0


_NODE = """
from dicomnode.lib.dimse import Address
from dicomnode.lib.grinders import identity_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline

class Four(AbstractInput):
    image_grinder = many_meta_grinder(identity_grinder, numpy_grinder)

    def validate(self):
        return self.images == 4

class Node(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": Four}
    endpoints = [Address("127.0.0.1", PORT, "PEER")]
    export_retry_seconds = 0.1

    def process(self, input_data):
        images, array = input_data["ct"]
        return derive_series(array, images)
"""


@pytest.mark.parametrize("image", [1, 3, 4])
def test_x5_a_node_that_is_killed_after_the_peer_stored_sends_the_same_again(
    image: int, tmp_path: Path
) -> None:
    killed = threading.Event()

    def kill(count: int) -> int:
        if count == image:
            # The peer has it; the node dies before it knows.
            first.process.kill()
            first.process.wait(30)
            killed.set()
        return 0

    peer, root = Peer(kill), tmp_path / "root"
    with listening(peer) as address:
        file = tmp_path / "node.py"
        file.write_text(_NODE.replace("PORT", str(address.port)))
        with Command("run", file, "--root", root) as first:
            answers = send(first.address("NODE"), make_series(4, 8, 8))
            assert [one.status for one in answers] == [0] * 4
            assert killed.wait(60)
        with Command("run", file, "--root", root) as second:
            second.until("case 1 is done")
    # What the node knew to be stored is at most not recorded yet; nothing has another UID.
    assert len(set(peer.uids)) == 4 and len(peer.uids) <= 4 + image

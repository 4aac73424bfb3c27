"""`dicomnode run` under a supervisor: it says how it is, and ends in time, whatever its peers do."""

import re
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.programs import Command, Program, pipeline_file

from dicomnode.cli.notify import notifier
from dicomnode.errors import CouldNotCompleteDIMSEMessage, IncorrectlyConfigured
from dicomnode.lib.dimse import Address, Response, echo, send
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import Ledger
from dicomnode.testing import StoringNode, make_series, running_node

QUIET = """
class Node(Base):
    stop_seconds = 3
    def process(self, input_data):
        return None
"""


class Supervisor:
    """What a service says to its NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(60)

    def word(self) -> str:
        return self._socket.recv(4096).decode()

    def close(self) -> None:
        self._socket.close()


def test_a_supervisor_is_told_of_start_work_and_stop(tmp_path: Path) -> None:
    place = tmp_path / "notify"
    environment = {"NOTIFY_SOCKET": str(place), "WATCHDOG_USEC": "300000"}
    with (
        closing(Supervisor(place)) as supervisor,
        Command("run", pipeline_file(tmp_path, QUIET), environment=environment) as node,
    ):
        assert supervisor.word() == "READY=1"
        echo(node.address("NODE"))
        assert supervisor.word() == supervisor.word() == "WATCHDOG=1"
        node.process.terminate()
        while (word := supervisor.word()) == "WATCHDOG=1":
            pass
        assert word == "STOPPING=1"
        node.ended()
        assert node.process.returncode == 0


def test_a_supervisor_that_does_not_watch_gets_no_watchdog(tmp_path: Path) -> None:
    place = tmp_path / "notify"
    with closing(Supervisor(place)) as supervisor:
        for watching in (
            {},
            {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
            {"WATCHDOG_USEC": "x"},
        ):
            notify = notifier({"NOTIFY_SOCKET": str(place), **watching})
            assert notify is not None
            notify("WATCHDOG=1")
            notify("READY=1")
            assert supervisor.word() == "READY=1"
    # Nobody is there any more.
    notify("STOPPING=1")


def test_an_abstract_socket_and_none_at_all() -> None:
    assert notifier({}) is None
    assert notifier({"NOTIFY_SOCKET": "relative"}) is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind("\0dicomnode-test-notify")
        notify = notifier({"NOTIFY_SOCKET": "@dicomnode-test-notify"})
        assert notify is not None
        notify("READY=1")
        one.settimeout(10)
        assert one.recv(100) == b"READY=1"


# Stopping


# A PDU whose value is on its way, one whose value is longer than the PDU, and half of a header.
BEGUN = ("04000000100000000ffc010161", "040000001000", "04000000100068616c66206f66", "0400")


def stalled(address: Address, begun: str) -> socket.socket:
    """A peer that has an association, begins a PDU, and says nothing more."""
    items = item(0x10, b"1.2.840.10008.3.1.1.1")
    context = b"\x01\0\0\0" + item(0x30, b"1.2.840.10008.1.1") + item(0x40, b"1.2.840.10008.1.2")
    items += item(0x20, context)
    items += item(0x50, item(0x51, (16384).to_bytes(4, "big")) + item(0x52, b"1.2.3"))
    body = b"\0\x01\0\0" + b"NODE".ljust(16) + b"STALLED".ljust(16) + b"\0" * 32 + items
    connection = socket.create_connection((address.ip, address.port), 30)
    connection.sendall(b"\x01\0" + len(body).to_bytes(4, "big") + body)
    assert connection.recv(1) == b"\x02"
    connection.sendall(bytes.fromhex(begun))
    return connection


def item(kind: int, value: bytes) -> bytes:
    return bytes([kind, 0]) + len(value).to_bytes(2, "big") + value


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_p9_stalled_peers_do_not_keep_a_node_from_ending(
    number: signal.Signals, tmp_path: Path
) -> None:
    with Command("run", pipeline_file(tmp_path, QUIET)) as node:
        address = node.address("NODE")
        silent = [socket.create_connection((address.ip, address.port), 30) for _ in range(3)]
        peers = [stalled(address, begun) for begun in BEGUN]
        begun = time.monotonic()
        node.process.send_signal(number)
        said = node.ended(60)
        assert time.monotonic() - begun < 15
        assert node.process.returncode == 0
        assert "NODE closed" in said
        assert "Traceback" not in said, said[said.index("Traceback") - 300 :]
        for one in silent + peers:
            one.close()


def test_p9_stalled_peers_do_not_keep_a_python_program_from_ending(tmp_path: Path) -> None:
    file = Path(pipeline_file(tmp_path, QUIET + "\nNode()\n").removesuffix(":Node"))
    with Program([sys.executable, "-u", file]) as program:
        address = program.address("NODE")
        peers = [stalled(address, begun) for begun in BEGUN]
        program.process.terminate()
        assert "Traceback" not in program.ended(30)
        assert program.process.returncode == 0
        for one in peers:
            one.close()


def test_p9_what_was_answered_before_a_stop_is_there_and_nothing_is_half_written(
    tmp_path: Path,
) -> None:
    code = """
class Never(Two):
    def validate(self):
        return False
class Node(Base):
    stop_seconds = 10
    input = {"ct": Never}
"""
    answers: list[Response] = []
    enough = threading.Event()

    def answered(response: Response) -> None:
        answers.append(response)
        if len(answers) >= 20:
            enough.set()

    series = make_series(400, 128, 128, patient_id="P1")
    with Command("run", pipeline_file(tmp_path, code)) as node:
        address = node.address("NODE")

        def sending() -> None:
            with pytest.raises(CouldNotCompleteDIMSEMessage):
                send(address, series, on_response=answered)

        sender = threading.Thread(target=sending)
        sender.start()
        assert enough.wait(60)
        node.process.terminate()
        assert "Traceback" not in node.ended()
        sender.join(60)
        assert node.process.returncode == 0
    root = tmp_path / "root"
    assert not list((root / ".dicomnode" / "incoming").iterdir())
    ledger = Ledger(root / ".dicomnode" / "ledger.sqlite")
    kept = {row.uid: row for row in ledger.instances(1)}
    ledger.close()
    stored = [answer for answer in answers if answer.status == 0]
    assert 20 <= len(stored) < 400
    for answer in stored:
        row = kept[answer.sop_instance_uid]
        assert (root / "P1" / "ct" / row.file).stat().st_size == row.size


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_p9_a_case_that_outlasts_the_stop_runs_again(isolation: str, tmp_path: Path) -> None:
    code = """
class Node(Base):
    stop_seconds = 1
    isolation = "ISOLATION"
    def process(self, input_data):
        begun = Path(__file__).with_name("begun")
        print("PROCESSING")
        if not begun.exists():
            begun.touch()
            time.sleep(600)
"""
    file = pipeline_file(tmp_path, code.replace("ISOLATION", isolation))
    with Command("run", file) as node:
        send(node.address("NODE"), make_series(2, 8, 8))
        node.until("PROCESSING")
        begun = time.monotonic()
        node.process.terminate()
        assert re.search("runs again after the next start|is interrupted", node.ended(60))
        assert time.monotonic() - begun < 15
        assert node.process.returncode == 0
    ledger = Ledger(tmp_path / "root" / ".dicomnode" / "ledger.sqlite")
    assert ledger.case(1).attempts == 0
    ledger.close()
    with Command("run", file) as node:
        node.until("case 1 is done")


@pytest.mark.parametrize("milliseconds", [10, 30, 60, 120, 250, 500, 900])
def test_ctrl_c_is_quiet_also_while_python_imports(milliseconds: int, tmp_path: Path) -> None:
    arguments = ["run", pipeline_file(tmp_path, QUIET)]
    # Before our first line there is nothing that we could do.
    code = "from dicomnode.cli.start import main; print('BEGUN', flush=True); main()"
    with Program([sys.executable, "-c", code, *arguments]) as program:
        program.until("^BEGUN$")
        threading.Event().wait(milliseconds / 1000)
        program.process.send_signal(signal.SIGINT)
        said = program.ended()
    # It is ended by the signal, tells that it was stopped, or was open already.
    assert program.process.returncode in (-signal.SIGINT, 130, 0)
    assert "Traceback" not in said


def test_ctrl_c_twice_is_quiet(tmp_path: Path) -> None:
    code = """
class Node(Base):
    stop_seconds = 20
    def process(self, input_data):
        print("PROCESSING")
        time.sleep(600)
"""
    with Command("run", pipeline_file(tmp_path, code)) as node:
        send(node.address("NODE"), make_series(2, 8, 8))
        node.until("PROCESSING")
        node.process.send_signal(signal.SIGINT)
        for _ in range(100):
            threading.Event().wait(0.1)
            if node.process.poll() is not None:
                break
            node.process.send_signal(signal.SIGINT)
        said = node.ended(60)
        assert "Traceback" not in said, said


def test_stop_seconds_is_checked() -> None:
    class Node(AbstractPipeline):
        pass

    for value in (-1, "30", None, float("nan"), float("inf")):
        node = Node(start=False)
        node.stop_seconds = value  # type: ignore[assignment]
        with pytest.raises(IncorrectlyConfigured, match="stop_seconds"):
            node.open(blocking=False)


# A warning at the start


def test_a_node_that_everybody_may_send_to_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with running_node(StoringNode, ip="0.0.0.0"):
        pass
    assert "ANYBODY WHO REACHES THIS MACHINE CAN SEND TO STORE" in caplog.text
    caplog.clear()
    with running_node(StoringNode, ip="0.0.0.0", require_calling_aet=["SCANNER"]):
        pass
    with running_node(StoringNode, ip="0.0.0.0", allowed_networks=["10.0.0.0/8", "127.0.0.1"]):
        pass
    with running_node(StoringNode, ip="127.0.0.1"):
        pass
    assert "ANYBODY" not in caplog.text

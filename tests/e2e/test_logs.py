"""Log lines: numbers of association and case, one line for each event, and nobody's name."""

import json
import logging
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from tests.e2e.programs import Command, pipeline_file

from dicomnode.errors import CouldNotCompleteDIMSEMessage, IncorrectlyConfigured
from dicomnode.lib.dimse import Address, echo, send
from dicomnode.server.logs import LogFile
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import StoringNode, address_of, make_series, running_node

# One for each attribute that tells who the patient is.
MARKERS = {
    "PatientName": "Zyxname^Zyxgiven",
    "PatientBirthDate": "19330417",
    "OtherPatientNames": "Zyxother^Zyxalias",
    "PatientBirthName": "Zyxmaiden^",
    "PatientMotherBirthName": "Zyxmother^",
    "PatientAddress": "Zyxstreet 9",
    "PatientTelephoneNumbers": "Zyxphone",
    "OtherPatientIDs": "Zyxnumber",
    "AccessionNumber": "Zyxaccession",
    "ReferringPhysicianName": "Zyxdoctor^",
    "OperatorsName": "Zyxoperator^",
}
MARKED = re.compile("zyx|1933.?04.?17|17.?04.?1933", re.IGNORECASE)

NODE = """
class Node(Base):
    log_format = os.environ["LOG_FORMAT"]
    log_level = logging.DEBUG
    log_patient_data = bool(os.environ.get("LOG_PATIENT_DATA"))
    isolation = os.environ.get("ISOLATION", "thread")
    endpoints = [Address("127.0.0.1", 9, "NOBODY")]
    export_give_up_seconds = 0

    def filter(self, dataset):
        if dataset.PatientID == "ZYXID-FILTER":
            raise ValueError(f"filter of {dataset.PatientName}")
        return dataset.PatientID != "ZYXID-REFUSED"

    def process(self, input_data):
        first = list(input_data["ct"])[0]
        thread = threading.Thread(target=self.logger.info, args=("a thread for %s", first.PatientName))
        thread.start()
        thread.join()
        self.logger.info("begins with %s, %s", first.PatientName, first.PatientBirthDate)
        told = " ".join(str(first[name].value) for name in os.environ["NAMES"].split())
        if first.PatientID == "ZYXID-PROCESS":
            try:
                raise KeyError(told)
            except KeyError as error:
                raise ValueError(f"process of {told}") from error
        return None if first.PatientID == "ZYXID-FINE" else [first]

class Failing(Two):
    required_values = {"PatientID": lambda value: value.endswith("VALIDATE")}
    def validate(self):
        for dataset in self.data.values():
            raise ValueError(f"validate of {dataset.PatientName}")
        return True

Node.input = {"ct": Two, "failing": Failing}
"""


def marked(patient_id: str) -> list[Dataset]:
    series = make_series(2, 8, 8, patient_id=patient_id)
    for dataset in series:
        for name, value in MARKERS.items():
            setattr(dataset, name, value)
    return series


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("log_format", ["json", "%(asctime)s %(name)s %(levelname)s %(message)s"])
def test_d3_no_patient_is_in_a_log(log_format: str, isolation: str, tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, NODE)
    environment = {
        "LOG_FORMAT": log_format,
        "NAMES": " ".join(MARKERS),
        "ISOLATION": isolation,
    }
    with Command("run", file, environment=environment) as node:
        address = node.address("NODE")
        for patient_id in (
            "ZYXID-FINE",
            "ZYXID-REFUSED",
            "ZYXID-FILTER",
            "ZYXID-VALIDATE",
            "ZYXID-PROCESS",
            "ZYXID-EXPORT",
        ):
            send(address, marked(patient_id))
        for number, end in ((1, "is done"), (2, "FAILED"), (3, "FAILED"), (4, "FAILED")):
            node.until(f"case {number} {end}")
        # As `ps` shows them, those of worker processes too.
        lines = command_lines()
        node.process.terminate()
        log = node.ended()
    for told in (
        "validate of",
        "process of",
        "a thread for",
        "filter of",
        "begins with",
        "cannot be reached",
    ):
        assert told in log, log
    for text in (log, *lines):
        assert not MARKED.search(text), MARKED.search(text)
    for path in tmp_path.rglob("*"):
        # The folder of a case is called by its identifier.
        assert not MARKED.search(str(path).replace("ZYXID", "")), path
    with Command("cases", "--root", tmp_path / "root", "--case", 3) as cases:
        told = cases.ended()
        assert "process of ***" in told
        assert not MARKED.search(told.replace("ZYXID", ""))


def command_lines() -> list[str]:
    """Of all processes."""
    found = []
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(one.read_text("latin-1"))
    return found


def test_patients_are_in_the_log_where_that_is_asked_for(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, NODE)
    environment = {"LOG_FORMAT": "json", "NAMES": "PatientName", "LOG_PATIENT_DATA": "1"}
    with Command("run", file, environment=environment) as node:
        send(node.address("NODE"), marked("ZYXID-PROCESS"))
        node.until(r"process of Zyxname\^Zyxgiven")


def test_json_lines_tell_the_time_the_association_and_the_case(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, NODE)
    environment = {"LOG_FORMAT": "json", "NAMES": "PatientName"}
    with Command("run", file, environment=environment) as node:
        address = node.address("NODE")
        send(address, marked("ZYXID-FINE"))
        send(address, marked("ZYXID-PROCESS"))
        node.until("case 2 FAILED")
        node.process.terminate()
        lines = [json.loads(line) for line in node.ended().splitlines()]
    by_message = {line["message"]: line for line in lines}
    opened = [line for line in lines if line["message"].endswith("opened")]
    assert [line["association"] for line in opened] == [1, 2]
    assert by_message["case 2 is ready"]["association"] == 2
    assert by_message["case 2 is ready"]["case"] == 2
    (begins,) = (
        line for line in lines if "begins with" in line["message"] and line.get("case") == 1
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", begins["time"])
    assert begins["level"] == "INFO" and begins["logger"].startswith("dicomnode.Node-")
    (failed,) = (line for line in lines if line["message"].startswith("case 2 FAILED"))
    assert "Traceback" in failed["error"] and "pipeline.py" in failed["error"]
    for line in lines:
        if re.search("stored in case|association with|answered 0x", line["message"]):
            assert line["association"] in (1, 2)


def test_d2_a_line_for_each_event_whatever_the_network_says(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, NODE)
    for log_format in ("json", "%(levelname)s %(message)s"):
        environment = {"LOG_FORMAT": log_format, "NAMES": "PatientName"}
        with Command("run", file, environment=environment) as node:
            address = node.address("NODE")
            hostile = requested(address, calling="A\n\x1b[31m\r2026 X Y", called="N\nODE")
            # Whatever the answer is, there is one, or the connection ends.
            hostile.settimeout(60)
            hostile.recv(1)
            hostile.close()
            odd = make_series(1, 8, 8, patient_id="EVIL\n\x1b[2J")
            odd[0].Modality = "C\n\x1b[31mT"
            send(address, odd)
            node.until("closed: 1 stored")
            node.process.terminate()
            log = node.ended()
        assert "\x1b" not in log and "\r" not in log
        for line in log.splitlines():
            assert line.startswith(("{", "INFO ", "WARNING ", "ERROR ", "DEBUG ", "    ")), log


def requested(address: Address, calling: str, called: str) -> socket.socket:
    """A connection that asked for an association with AE titles that no library would send."""
    items = item(0x10, b"1.2.840.10008.3.1.1.1")
    abstract, syntax = b"1.2.840.10008.1.1", b"1.2.840.10008.1.2"
    context = b"\x01\0\0\0" + item(0x30, abstract) + item(0x40, syntax)
    items += item(0x20, context)
    items += item(0x50, item(0x51, (16384).to_bytes(4, "big")) + item(0x52, b"1.2.3"))
    titles = called.encode().ljust(16) + calling.encode().ljust(16)
    body = b"\0\x01\0\0" + titles + b"\0" * 32 + items
    connection = socket.create_connection((address.ip, address.port), 10)
    connection.sendall(b"\x01\0" + len(body).to_bytes(4, "big") + body)
    return connection


def item(kind: int, value: bytes) -> bytes:
    return bytes([kind, 0]) + len(value).to_bytes(2, "big") + value


def test_a_program_with_its_own_log_sees_no_patient_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Node(StoringNode):
        def filter(self, dataset: Dataset) -> bool:
            raise ValueError(f"filter of {dataset.PatientName}")

    with caplog.at_level(logging.DEBUG), running_node(Node) as node:
        send(address_of(node), marked("P1"))
    assert "filter of ***" in caplog.text
    assert not MARKED.search(caplog.text)
    (record, _) = (one for one in caplog.records if one.exc_text)
    assert vars(record)["association"] == 1


WARNED_OF = """
import logging, sys
logging.getLogger("pydicom").addHandler(logging.StreamHandler(sys.stderr))

from dicomnode.lib.commitment import Commitment
from dicomnode.lib.dimse import ask_commitment, send
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

class One(AbstractInput):
    def validate(self):
        return self.images > 0

class Node(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": One}

    def filter(self, dataset):
        return bool(dataset.PatientBirthDate and dataset.SeriesInstanceUID)

    def process(self, input_data):
        for one in input_data["ct"]:
            self.logger.info("read %d", len(one.PatientBirthDate + one.SeriesInstanceUID))

def remembered():
    return sum(
        len(vars(module).get("__warningregistry__", {}).keys() - {"version"})
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("pydicom", "pynetdicom")
    )

if __name__ == "__main__":
    settings = {"log_path": sys.argv[1], "isolation": sys.argv[2]}
    with running_node(Node, **settings) as node:
        before = remembered()
        for k in range(5):
            (image,) = make_series(1, patient_id=f"P{k}")
            image.PatientBirthDate = f"ZYX1933{k}"
            image.SeriesInstanceUID = f"1.2.09.{k}"
            assert [one.status for one in send(address_of(node), [image])] == [0]
        wait_for_cases(node, State.DONE, 5)
        wrong = {f"01.000.{k}": "1.2.840.10008.5.1.4.1.1.2" for k in range(100)}
        ask_commitment(address_of(node), Commitment("1.2.3", wrong), "MODALITY")
        assert remembered() == before, (before, remembered())
"""


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_d3_what_pydicom_warns_of_is_neither_told_nor_kept(isolation: str, tmp_path: Path) -> None:
    program, log = tmp_path / "warned_of.py", tmp_path / "log"
    program.write_text(WARNED_OF)
    run = subprocess.run(
        [sys.executable, "-W", "default", program, log, isolation],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    told = log.read_text()
    assert told.count("read ") == 5
    assert not MARKED.search(told) and "Invalid value" not in told, told


def test_s3_a_log_that_cannot_be_written_stops_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with running_node(StoringNode, log_path="/dev/full") as node:
        answers = send(address_of(node), make_series(3, 8, 8))
        assert [answer.status for answer in answers] == [0, 0, 0]
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "the log /dev/full cannot be written, lines are lost" in told


def test_a_log_that_is_written_again_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LogFile(tmp_path / "node.log", 1, 1 << 30)
    record = logging.LogRecord("", logging.INFO, "", 0, "said", None, None)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "flush", full)
    log.emit(record)
    log.emit(record)
    monkeypatch.undo()
    log.emit(record)
    log.close()
    lost, again = capsys.readouterr().err.splitlines()
    assert lost.endswith("lines are lost") and again.endswith("is written again")
    assert (tmp_path / "node.log").read_text().endswith("said\n")


def test_s3_a_stranger_who_has_lines_written_fills_no_disk(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    with running_node(
        StoringNode, log_path=folder / "log", log_bytes=1 << 16, require_called_aet=True
    ) as node:
        wrong = Address("127.0.0.1", node.port, "NOT-" + "X" * 12)
        for _ in range(500):
            with suppress(CouldNotCompleteDIMSEMessage):
                echo(wrong)
    # Not before: files are moved aside while lines are written.
    assert sum(one.stat().st_size for one in folder.iterdir()) <= 1 << 16
    # The newest are there, in the order of their names.
    assert "closed" in (folder / "log").read_text().splitlines()[-1]
    assert len(list(folder.iterdir())) > 10


def _written(log: LogFile, count: int) -> None:
    for k in range(count):
        log.emit(logging.LogRecord("", logging.INFO, "", 0, f"{k:9}" * 100, None, None))


def test_logs_of_older_weeks_go_first_and_only_those_of_this_log(tmp_path: Path) -> None:
    old = [f"log.2026-01-{day:02}" for day in (5, 12, 19)]
    for name in [*old, "log.2026-01-19.1", "log.2026-01-19.2", "log.2026-01-19.gz", "other"]:
        (tmp_path / name).write_bytes(bytes(1000))
    log = LogFile(tmp_path / "log", 2, 1 << 16)
    assert not (tmp_path / old[0]).exists() and (tmp_path / old[1]).exists()
    _written(log, 40)
    # A week with several files counts as one.
    assert not (tmp_path / old[1]).exists() and (tmp_path / old[2]).exists()
    _written(log, 200)
    log.close()
    left = {one.name for one in tmp_path.iterdir()}
    assert left >= {"log", "log.2026-01-19.gz", "other"} and not left & {*old, "log.2026-01-19.1"}
    assert sum(one.stat().st_size for one in tmp_path.glob("log*")) <= (1 << 16) + 1000


def test_a_log_that_cannot_be_moved_aside_goes_on_up_to_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: str, dest: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.rename", refused)
    log = LogFile(tmp_path / "log", 8, 1 << 16)
    _written(log, 50)
    assert (tmp_path / "log").stat().st_size > 40_000 and not capsys.readouterr().err
    _written(log, 50)
    log.close()
    assert (tmp_path / "log").stat().st_size < (1 << 16) + 1000
    assert "lines are lost" in capsys.readouterr().err


def test_log_settings_that_cannot_work_are_refused() -> None:
    class Node(AbstractPipeline):
        ip, port = "127.0.0.1", 0

    wrong = (("log_format", "%(nope)s"), ("log_patient_data", "yes"), ("log_bytes", 10))
    for name, value in wrong:
        node = Node(start=False)
        setattr(node, name, value)
        with pytest.raises(IncorrectlyConfigured, match=name):
            node.open(blocking=False)

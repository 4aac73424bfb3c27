"""A node that is killed at any moment finishes its job after a restart: nothing lost, no second UID."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from tests.e2e.programs import Program
from tests.faults.power import calls_of

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import Address, Response, send
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.storage.ledger import Ledger
from dicomnode.testing import State, StoringNode, address_of, make_series, running_node

NODE = """
import sys
from dicomnode.lib.dimse import Address
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline

root, expected, endpoint_port, endpoint_title = sys.argv[1:]

class All(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    eager = False
    def validate(self):
        return self.images >= int(expected)

class Node(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": All}
    endpoints = [Address("127.0.0.1", int(endpoint_port), endpoint_title)]
    root_data_directory = root
    log_format = "%(message)s"

    def process(self, input_data):
        images, array = input_data["ct"]
        return derive_series(array + 1, images)

node = Node(start=False)
node.open()
"""


class Killable(Program):
    """The node in a process of its own."""

    def __init__(self, script: Path, root: Path, expected: int, endpoint: Address) -> None:
        super().__init__(
            [sys.executable, "-u", script, root, expected, endpoint.port, endpoint.ae_title]
        )
        self.here = self.address("NODE")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "node.py"
    path.write_text(textwrap.dedent(NODE))
    return path


@pytest.fixture
def eager_script(script: Path) -> Path:
    """The same node, whose input is decoded on arrival."""
    text = script.read_text().replace("eager = False", "eager = True")
    assert "eager = True" in text
    script.write_text(text)
    return script


def send_until_killed(node: Killable, series: list[Dataset], kill_after: int) -> list[str]:
    """The UIDs that were acknowledged before the node was killed."""
    acknowledged: list[str] = []

    def count(response: Response) -> None:
        assert response.status == 0
        acknowledged.append(response.sop_instance_uid)
        if len(acknowledged) == kill_after:
            node.kill()

    with suppress(CouldNotCompleteDIMSEMessage):
        send(node.here, series, on_response=count)
    return acknowledged


@pytest.mark.parametrize("kill_after", [1, 7, 19])
def test_killed_while_receiving(kill_after: int, script: Path, tmp_path: Path) -> None:
    series = make_series(20, 64, 64)
    root = tmp_path / "root"
    with running_node(StoringNode) as store:
        node = Killable(script, root, 20, address_of(store))
        acknowledged = send_until_killed(node, series, kill_after)
        assert len(acknowledged) >= kill_after
        kept = {dcmread(path).SOPInstanceUID for path in root.glob("*/*/*.dcm")}
        assert set(acknowledged) <= kept
        node = Killable(script, root, 20, address_of(store))
        # A sender repeats only what was not acknowledged.
        send(node.here, [one for one in series if one.SOPInstanceUID not in acknowledged])
        node.until("case 1 is done")
        node.kill()
        arrived = store.wait_for_images(20)
        assert numpy.array_equal(numpy_grinder(arrived), numpy_grinder(series) + 1)


def test_killed_while_receiving_and_decoding(eager_script: Path, tmp_path: Path) -> None:
    test_killed_while_receiving(11, eager_script, tmp_path)


def state_of_case(root: Path) -> State:
    """Where case 1 is, read after the node was killed."""
    ledger = Ledger(root / ".dicomnode" / "ledger.sqlite")
    try:
        return ledger.case(1).state
    finally:
        ledger.close()


@pytest.mark.parametrize(
    "moment",
    [
        "association with .* closed",
        "case 1 is ready",
        "case 1 ground",
        "case 1 processed",
        "acknowledged",
        "case 1 is done",
    ],
)
def test_killed_at_every_step_of_a_case(moment: str, script: Path, tmp_path: Path) -> None:
    series = make_series(20, 64, 64)
    root = tmp_path / "root"
    with running_node(StoringNode) as store:
        node = Killable(script, root, 20, address_of(store))
        assert all(one.status == 0 for one in send(node.here, series))
        node.until(moment)
        node.kill()
        if state_of_case(root) is not State.DONE:
            node = Killable(script, root, 20, address_of(store))
            node.until("case 1 is done")
            node.kill()
        uids = {one.SOPInstanceUID for one in store.received}
        assert len(uids) == 20
        by_uid = {one.SOPInstanceUID: one for one in store.received}
        assert numpy.array_equal(numpy_grinder(by_uid.values()), numpy_grinder(series) + 1)


@pytest.mark.parametrize("moment", ["case 1 is ready", "case 1 ground"])
def test_killed_at_a_step_of_a_case_that_is_decoded(
    moment: str, eager_script: Path, tmp_path: Path
) -> None:
    test_killed_at_every_step_of_a_case(moment, eager_script, tmp_path)


def test_killed_while_sending(script: Path, tmp_path: Path) -> None:
    series = make_series(20, 64, 64)
    root = tmp_path / "root"
    nodes: list[Killable] = []

    class Killing(StoringNode):
        """Kills the node in the middle of its export, before it gets the answer."""

        def filter(self, dataset: Dataset) -> bool:
            accepted = super().filter(dataset)
            if len(self.received) == 9:
                nodes[0].kill()
            return accepted

    with running_node(Killing) as store:
        nodes.append(Killable(script, root, 20, address_of(store)))
        send(nodes[0].here, series)
        nodes[0].process.wait(30)
        again = Killable(script, root, 20, address_of(store))
        again.until("case 1 is done")
        again.kill()
        assert len({one.SOPInstanceUID for one in store.received}) == 20


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.0, 1.6, 2.4])
def test_real_ct_killed_at_some_time_arrives_whole_and_once(
    seconds: float,
    ct_folder: Path,
    storescp: tuple[Address, Path],
    peer: Callable[[str], str],
    script: Path,
    tmp_path: Path,
) -> None:
    endpoint, folder = storescp
    root = tmp_path / "root"
    files = sorted(path for path in ct_folder.iterdir() if path.name != "DIRFILE")
    environment = {**os.environ, "TCP_NODELAY": "1"}

    def sender(node: Killable) -> subprocess.Popen[bytes]:
        command = [peer("storescu"), "-aec", "NODE", "127.0.0.1", str(node.here.port)]
        return subprocess.Popen([*command, *map(str, files)], env=environment)

    node = Killable(script, root, 140, endpoint)
    with sender(node) as sending:
        try:
            node.process.wait(seconds)
        except subprocess.TimeoutExpired:
            node.kill()
        # As a sender does: send all again where not everything was acknowledged.
        complete = sending.wait() == 0
    node = Killable(script, root, 140, endpoint)
    if not complete:
        with sender(node) as sending:
            assert sending.wait() == 0
    if state_of_case(root) is not State.DONE:
        node.until("case 1 is done")
    node.kill()
    arrived = [dcmread(path) for path in folder.iterdir()]
    assert len({one.SOPInstanceUID for one in arrived}) == len(arrived) == 140
    assert numpy.array_equal(numpy_grinder(arrived), numpy_grinder(load(files)) + 1)


def test_L21_everything_is_flushed_before_it_is_acknowledged(
    script: Path, tmp_path: Path, peer: Callable[[str], str]
) -> None:
    """The order of system calls: file and folder flushed, the journal flushed, then the answer."""
    strace = peer("strace")
    trace = tmp_path / "trace"
    root = tmp_path / "root"
    with running_node(StoringNode) as store:
        node = Killable(script, root, 99, address_of(store))
        with subprocess.Popen(
            [
                strace,
                "-f",
                "-y",
                "-qq",
                "-o",
                str(trace),
                "-p",
                str(node.process.pid),
                "-e",
                "trace=fsync,fdatasync,link,linkat,sendto,write",
            ],
            stderr=subprocess.PIPE,
        ) as tracer:
            while not trace.exists() or not trace.stat().st_size:
                send(node.here, make_series(1, 256, 256, patient_id="WARM-UP"))
            trace.write_text("")
            # A small one goes to the journal: see test_s2 in test_crash.py.
            send(node.here, make_series(1, 256, 256, patient_id="TRACED"))
            node.kill()
            tracer.wait(10)
    calls, end = calls_of(trace), -1
    # Each has ended before the next one begins, whatever other threads do.
    for wanted in (
        r"fsync\(.*incoming/(#|.*\.part)",
        r"linkat\(.*Image_",
        r"fsync\(.*TRACED/ct>",
        r"fdatasync\(.*/journal-1>",
        r"sendto\(",
    ):
        found = next((one for one in calls if one.begin > end and re.match(wanted, one.text)), None)
        assert found is not None, (wanted, end, calls)
        end = found.end


def test_L21_nothing_is_acknowledged_earlier_where_it_is_decoded(
    eager_script: Path, tmp_path: Path, peer: Callable[[str], str]
) -> None:
    test_L21_everything_is_flushed_before_it_is_acknowledged(eager_script, tmp_path, peer)

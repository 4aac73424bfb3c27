"""Nodes in a process of their own that are stopped, end, fork and die: no case is blamed or lost."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from tests.e2e.programs import Program

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dimse import Response, send
from dicomnode.storage.ledger import Case, Ledger
from dicomnode.testing import State, StoringNode, address_of, make_series, running_node

NODE = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from dicomnode.lib.dimse import Address, send
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import make_series

root, store_port = Path(sys.argv[1]), int(sys.argv[2])

class Two(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    def validate(self):
        return self.images >= 2

class Base(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": Two}
    root_data_directory = root
    endpoints = [Address("127.0.0.1", store_port, "STORE")] if store_port else []
    log_format = "%(message)s"
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(code: str, port: int = 0) -> Program:
        file = NODE + textwrap.dedent(code)
        programs.append(Program([sys.executable, "-u", "-c", file, tmp_path / "root", port]))
        return programs[-1]

    yield begin
    for program in programs:
        program.kill()


def cases(tmp_path: Path) -> dict[str, Case]:
    ledger = Ledger(tmp_path / "root" / ".dicomnode" / "ledger.sqlite")
    try:
        return {case.identifier: case for case in ledger.cases()}
    finally:
        ledger.close()


def states(tmp_path: Path) -> dict[str, State]:
    return {name: case.state for name, case in cases(tmp_path).items()}


def test_the_neighbour_of_a_case_that_kills_the_node_is_not_blamed(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    code = """
    class Node(Base):
        workers = 2
        def process(self, input_data):
            name = input_data["ct"][0][0].PatientID
            print("PROCESSING", name)
            if name == "EVIL":
                if not (root / "both").exists():
                    while not (root / "good").exists():
                        time.sleep(0.01)
                    (root / "both").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            (root / "good").touch()
            if not (root / "both").exists():
                time.sleep(60)
    Node()
    """
    program = start(code)
    send(
        program.address("NODE"),
        make_series(2, patient_id="EVIL") + make_series(2, patient_id="GOOD"),
    )
    for _ in range(3):
        program.process.wait(30)
        program = start(code)
    expected = {"EVIL": State.FAILED, "GOOD": State.DONE}
    end = time.monotonic() + 30
    while (found := states(tmp_path)) != expected and time.monotonic() < end:
        # Either may come first; the other may have been done before one of the ends.
        time.sleep(0.1)
    assert found == expected


def test_stops_that_end_in_a_kill_do_not_count_against_a_case(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    code = """
    class Node(Base):
        def process(self, input_data):
            print("PROCESSING")
            time.sleep(60)
    Node()
    """
    for k in range(4):
        program = start(code)
        if k == 0:
            send(program.address("NODE"), make_series(2, patient_id="A"))
        program.until("PROCESSING")
        program.process.terminate()
        # It waits for the step that runs; its supervisor does not.
        with pytest.raises(subprocess.TimeoutExpired):
            program.process.wait(1)
        program.kill()
    assert cases(tmp_path)["A"].state is State.PROCESSING
    assert cases(tmp_path)["A"].attempts == 0


def test_a_program_that_ends_without_close_loses_and_fails_nothing(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    begun = threading.Event()

    class Slow(StoringNode):
        def filter(self, dataset: Dataset) -> bool:
            begun.set()
            threading.Event().wait(0.2)
            return super().filter(dataset)

    code = """
    class Node(Base):
        def process(self, input_data):
            images, array = input_data["ct"]
            return derive_series(array + 1, images)
    node = Node(start=False)
    node.open(blocking=False)
    send(Address("127.0.0.1", node.port, "NODE"), make_series(4, patient_id="A") + make_series(4, patient_id="B"))
    sys.stdin.read()
    """
    with running_node(Slow) as store:
        program = start(code.replace("sys.stdin.read()", ""), store.port)
        program.process.wait(60)
        assert not any("FAILED" in line for line in program.said), program.said
        left = cases(tmp_path)
        assert all(case.state is not State.FAILED for case in left.values())
        again = start(
            "class Node(Base): process = lambda self, data: derive_series(data['ct'][1] + 1, data['ct'][0])\nNode()",
            store.port,
        )
        ids = {case.id for case in left.values() if case.state is not State.DONE}
        for number in ids:
            again.until(f"case {number} is done")
        assert len({one.SOPInstanceUID for one in store.received}) == 8


def test_a_stop_does_not_wait_for_a_slow_endpoint(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    begun = threading.Event()

    class Slow(StoringNode):
        def filter(self, dataset: Dataset) -> bool:
            begun.set()
            threading.Event().wait(1.0)
            return super().filter(dataset)

    code = """
    class Node(Base):
        def process(self, input_data):
            images, array = input_data["ct"]
            return derive_series(array + 1, images)
    Node()
    """
    with running_node(Slow) as store:
        program = start(code, store.port)
        send(program.address("NODE"), make_series(30, 8, 8, patient_id="A"))
        assert begun.wait(30)
        program.process.terminate()
        assert program.process.wait(15) == 0
        assert cases(tmp_path)["A"].state is State.EXPORTING
        assert len(store.received) < 15


def test_many_signals_at_once_stop_a_node(start: Callable[..., Program]) -> None:
    for _ in range(3):
        program = start("class Node(Base): process = lambda self, data: None\nNode()")
        program.until("listens")
        for _ in range(2000):
            with suppress(ProcessLookupError):
                program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(15) == 0


def test_a_child_of_process_does_not_keep_the_root_of_a_node_that_died(
    start: Callable[..., Program],
) -> None:
    code = """
    class Node(Base):
        def process(self, input_data):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
            child.start()
            print("CHILD", child.pid)
            child.join()
    Node()
    """
    program = start(code)
    send(program.address("NODE"), make_series(2, patient_id="A"))
    child = int(program.until(r"CHILD (\d+)"))
    program.kill()
    try:
        start(code).until("listens", 10)
    finally:
        with suppress(ProcessLookupError):
            subprocess.run(["kill", "-9", str(child)], check=False)


def test_what_is_sent_again_because_the_last_answer_was_lost_is_not_delivered_twice(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    code = """
    from dicomnode.server.association import AssociationServer
    store, count = AssociationServer.store, []
    def dying(server, association, received):
        count.append(received)
        is_last = len(count) == 5 and not (root / "died").exists()
        if is_last:
            association.cut_off()
        store(server, association, received)
        if is_last:
            (root / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    AssociationServer.store = dying

    class Five(Two):
        def validate(self):
            return self.images >= 5

    class Node(Base):
        input = {"ct": Five}
        def process(self, input_data):
            images, array = input_data["ct"]
            return derive_series(array + 1, images)
    Node()
    """
    series = make_series(5, patient_id="A")
    answers: list[Response] = []
    with running_node(StoringNode) as store:
        program = start(code, store.port)
        with pytest.raises(CouldNotCompleteDIMSEMessage):
            send(program.address("NODE"), series, on_response=answers.append)
        assert len(answers) == 4
        again = start(code, store.port)
        # The sender knows of four, and sends all again.
        again.until("case 1 is done")
        assert [one.status for one in send(again.address("NODE"), series)] == [0] * 5
        again.until("case 2 repeats case 1")
        assert len({one.SOPInstanceUID for one in store.received}) == 5
        again.kill()
        # Nothing is lost: it can be processed a second time on demand.
        ledger = Ledger(tmp_path / "root" / ".dicomnode" / "ledger.sqlite")
        ledger.retry(2)
        ledger.close()
        last = start(code, store.port)
        last.until("case 2 is done")
        assert len({one.SOPInstanceUID for one in store.received}) == 10
        assert address_of(store).port == store.port


def test_a_fork_of_the_program_ends_and_leaves_the_node_alone(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    code = """
    class Node(Base):
        def process(self, input_data):
            return None
    node = Node(start=False)
    node.open(blocking=False)
    child = os.fork()
    if not child:
        sys.exit(0)
    print("CHILD", os.waitpid(child, 0)[1])
    send(Address("127.0.0.1", node.port, "NODE"), make_series(2, patient_id="A"))
    node.wait(lambda: node.cases()[0].state.value == "DONE", 20)
    print("STATE", node.cases()[0].state.value)
    node.close()
    """
    program = start(code)
    assert program.until(r"CHILD (\d+)") == "0"
    assert program.until(r"STATE (\w+)") == "DONE"
    assert program.process.wait(20) == 0


def test_a_second_signal_does_not_lose_what_is_in_memory(start: Callable[..., Program]) -> None:
    code = """
    class Node(Base):
        root_data_directory = None
        def process(self, input_data):
            print("BEGUN", input_data["ct"][0][0].PatientID)
            time.sleep(1)
            print("ENDED", input_data["ct"][0][0].PatientID)
    Node()
    """
    program = start(code)
    send(program.address("NODE"), make_series(2, patient_id="A") + make_series(2, patient_id="B"))
    program.until("BEGUN")
    program.process.terminate()
    program.until("ENDED")
    program.process.terminate()
    assert program.process.wait(20) == 0
    program.until("ENDED B")
    program.until("closed")

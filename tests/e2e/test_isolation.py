"""What user code does to its process stays in its case: cases P1 to P7 and S7 of the fault model."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicomnode.errors import IncorrectlyConfigured
from dicomnode.lib.dimse import Address, send
from dicomnode.server import workers
from dicomnode.server.keeper import descendants
from dicomnode.server.node import AbstractPipeline
from dicomnode.server.processes import Ending
from dicomnode.storage.ledger import Case
from dicomnode.testing import (
    State,
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
)

from .misbehaving import Misbehaving, Two

BOTH = pytest.mark.parametrize("isolation", ["thread", "process"])


@contextmanager
def misbehaving(
    tmp_path: Path, kind: type[Misbehaving] = Misbehaving, **settings: Any
) -> Iterator[tuple[Misbehaving, StoringNode]]:
    """A node on disk, and the endpoint of its results."""
    notes = tmp_path / "notes"
    notes.touch()
    before = set(descendants(os.getpid()))
    with running_node(StoringNode) as store:
        settings = {"root_data_directory": tmp_path / "root", **settings}
        with running_node(
            kind, endpoints=[address_of(store)], notes=str(notes), **settings
        ) as node:
            yield node, store
    if "executor" not in settings:
        assert set(descendants(os.getpid())) <= before


def ask(node: AbstractPipeline, *wishes: str) -> None:
    """Send a small series for each, which tells what process() is to do."""
    for wish in wishes:
        assert {one.status for one in send(address_of(node), wishing(wish))} == {0}


def wishing(wish: str) -> list[Dataset]:
    series = make_series(2, patient_id=f"ID-{wish}")
    for one in series:
        one.SeriesDescription = wish
    return series


def case_of(node: AbstractPipeline, wish: str) -> Case:
    return next(case for case in node.cases() if case.identifier == f"ID-{wish}")


def notes(tmp_path: Path) -> list[str]:
    return (tmp_path / "notes").read_text().splitlines()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers_of(node: AbstractPipeline) -> list[int]:
    """The processes below this one that are leaders of a session, and whose parent is one: a keeper."""
    found = []
    for pid in descendants(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if int(fields[3]) == pid and int(fields[1]) != os.getpid():
            found.append(pid)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


@BOTH
@pytest.mark.parametrize(
    "wish", ["RAISE", "SYSEXIT", "INVALID", "NOSTUDY", "SHORT", "TWICE", "TEXT", "HUGE"]
)
def test_p1_p3_p6_what_process_raises_or_gives_fails_its_case_only(
    isolation: str, wish: str, tmp_path: Path
) -> None:
    with misbehaving(tmp_path, isolation=isolation, process_output=2 << 20) as (node, store):
        ask(node, wish, "GOOD")
        wait_for_cases(node, State.DONE)
        wait_for_cases(node, State.FAILED)
        case = case_of(node, wish)
        said = {
            "RAISE": "ValueError: this",
            "SYSEXIT": "SystemExit: 0",
            "INVALID": "a result has no valid SOPClassUID",
            "NOSTUDY": "(0020,000D) StudyInstanceUID is missing or empty",
            "SHORT": "(7FE0,0010) PixelData has 4 bytes, and 1 frames of Rows 3 x Columns 2",
            "TWICE": "two results have the SOPInstanceUID",
            "TEXT": "a str among its results",
            "HUGE": "larger than process_output",
        }[wish]
        assert said in case.error
        assert len(list((tmp_path / "root" / f"ID-{wish}").rglob("*.dcm"))) == 2
        # Those of the other case, and of this one none.
        assert {one.PatientID for one in store.wait_for_images(2)} == {"ID-GOOD"}
        assert len(store.received) == 2


def test_p1_the_traceback_is_that_of_the_user(tmp_path: Path) -> None:
    with misbehaving(tmp_path) as (node, _):
        ask(node, "RAISE")
        wait_for_cases(node, State.FAILED)
        error = case_of(node, "RAISE").error
    assert "misbehaving.py" in error and "in do_raise" in error
    assert "workers.py" not in error


@pytest.mark.parametrize("wish", ["HANG", "DEAF"])
def test_p2_what_hangs_is_ended_and_others_go_on(wish: str, tmp_path: Path) -> None:
    with misbehaving(tmp_path, process_seconds=4.0, workers=2) as (node, _):
        ask(node, wish, "GOOD 1", "GOOD 2")
        wait_for_cases(node, State.DONE, 2)
        wait_for_cases(node, State.FAILED)
        error = case_of(node, wish).error
        assert "not processed within process_seconds 4" in error.splitlines()[-1]
        # Where it hung, unless it did not listen.
        assert ("in do_hang" in error) == (wish == "HANG")
        ask(node, "GOOD 3", "GOOD 4")
        wait_for_cases(node, State.DONE, 4)


def test_p2_in_a_thread_it_keeps_its_worker_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Misbehaving, "do_hang", lambda self, array: go_on.wait(60) and None)
    settings = {"isolation": "thread", "process_seconds": 0.2, "workers": 2}
    with misbehaving(tmp_path, **settings) as (node, _):
        ask(node, "HANG", "GOOD")
        wait_for_cases(node, State.DONE)
        wait_for(lambda: "a thread cannot be ended" in caplog.text)
        assert case_of(node, "HANG").state is State.PROCESSING
        go_on.set()


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("SEGFAULT", "signal 11 (SIGSEGV)"),
        ("GRIND", "signal 11 (SIGSEGV)"),
        ("ABORT", "signal 6 (SIGABRT)"),
        ("EXIT", "exit code 0"),
    ],
)
@pytest.mark.parametrize("memory", [True, False])
def test_p3_a_crash_is_no_success_and_costs_one_worker(
    wish: str, said: str, memory: bool, tmp_path: Path
) -> None:
    root = None if memory else tmp_path / "root"
    with misbehaving(tmp_path, root_data_directory=root) as (node, store):
        ask(node, "GOOD 1", wish, "GOOD 2")
        wait_for_cases(node, State.DONE, 2)
        wait_for_cases(node, State.FAILED)
        case = case_of(node, wish)
        assert said in case.error.splitlines()[-1]
        assert case.attempts == 1
        if wish == "SEGFAULT":
            assert "Segmentation fault" in case.error and "in do_segfault" in case.error
        assert len(store.wait_for_images(4)) == 4
        # It is kept, and can be run again.
        node.retry(case.id)
        assert node.wait(lambda: case_of(node, wish).state is State.FAILED, 20)


@pytest.mark.parametrize("wish", ["MEMORY", "GROW"])
def test_p4_what_takes_too_much_memory_is_ended(wish: str, tmp_path: Path) -> None:
    with misbehaving(tmp_path, process_memory=600 << 20) as (node, _):
        ask(node, wish, "GOOD")
        wait_for_cases(node, State.FAILED)
        wait_for_cases(node, State.DONE)
        error = case_of(node, wish).error.splitlines()
    if wish == "MEMORY":
        # Refused where it was asked for.
        assert "MemoryError" in error[-1] and any("in do_memory" in line for line in error)
    else:
        assert "bytes of memory, process_memory is 629145600" in error[-1]


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with 100 MB of memory, which only root can make, and not everywhere."""
    v1 = Path("/sys/fs/cgroup/memory")
    folder = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"dicomnode-test-{os.getpid()}"
    limit = folder / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")
    try:
        folder.mkdir()
        limit.write_text(str(100 << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group can be made: {error}")
    yield folder
    wait_for(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_p4_the_kernel_ends_a_case_that_takes_all_memory_and_the_next_has_a_fresh_worker(
    small_group: Path, tmp_path: Path
) -> None:
    with misbehaving(tmp_path, small=str(small_group)) as (node, store):
        ask(node, "WHO 1", "OUTOFMEMORY")
        wait_for_cases(node, State.DONE)
        wait_for_cases(node, State.FAILED)
        case = case_of(node, "OUTOFMEMORY")
        assert "killed by signal 9 (SIGKILL), probably out of memory" in case.error.splitlines()[-1]
        assert "set process_memory" in case.error.splitlines()[-1]
        # It may have been the fault of another process, once.
        assert case.attempts == 2
        ask(node, "WHO 2")
        wait_for_cases(node, State.DONE, 2)
        assert len(store.wait_for_images(4)) == 4
    first, *killed, last = notes(tmp_path)
    pids = [first[1:].split(",")[0], *killed, last[1:].split(",")[0]]
    assert "has all" not in killed and len(pids) == 4
    assert pids[0] == pids[1] and len(set(pids)) == 3
    assert not any(is_alive(int(pid)) for pid in pids)


@pytest.mark.parametrize(
    ("is_short", "said"),
    [
        (True, "probably out of memory"),
        (None, "probably out of memory"),
        (False, "not by the kernel for want of memory"),
    ],
)
def test_p4_that_memory_ran_out_is_said_unless_the_kernel_knows_better(
    is_short: bool | None, said: str
) -> None:
    report = str(Ending(signal.SIGKILL, 0, is_short))
    assert "killed by signal 9 (SIGKILL)" in report and said in report


def test_p4_a_fork_bomb_ends_with_its_case_and_the_node_goes_on_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_MOST_PROCESSES", 100)
    with misbehaving(tmp_path, workers=2) as (node, store):
        ask(node, "BOMB")
        wait_for(lambda: bool(notes(tmp_path)))
        ask(node, "GOOD 1")
        wait_for_cases(node, State.DONE)
        wait_for_cases(node, State.FAILED, 1, 60)
        error = case_of(node, "BOMB").error.splitlines()[-1]
        assert "started others without end" in error and "all were ended" in error
        pids = [int(pid) for pid in notes(tmp_path)]
        assert len(pids) > 50
        assert [pid for pid in pids if is_alive(pid)] == []
        ask(node, "GOOD 2", "GOOD 3")
        wait_for_cases(node, State.DONE, 3)
        assert len(store.wait_for_images(6)) == 6


def test_p4_threads_without_end_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MOST_THREADS", 300)
    with misbehaving(tmp_path) as (node, _):
        ask(node, "THREADBOMB", "GOOD")
        wait_for_cases(node, State.FAILED)
        wait_for_cases(node, State.DONE)
        assert "threads are more than 1000 or 300" in case_of(node, "THREADBOMB").error


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("GRIP", ""),
        ("GRIPHANG", "not processed within process_seconds 4"),
        ("GRIPEXIT", "exit code 3"),
    ],
)
def test_p4_a_deaf_process_in_another_session_that_holds_all_open_ends_too(
    wish: str, said: str, tmp_path: Path
) -> None:
    with misbehaving(tmp_path, process_seconds=4.0) as (node, _):
        ask(node, wish)
        wait_for_cases(node, State.FAILED if said else State.DONE)
        assert said in (case_of(node, wish).error or "")
        pid = int(notes(tmp_path)[0])
        wait_for(lambda: not is_alive(pid))
        ask(node, "GOOD")
        wait_for_cases(node, State.DONE, 1 if said else 2)


@pytest.mark.parametrize("wish", ["BOTH", "BOTHRAISE"])
def test_p4_a_forked_process_that_comes_out_of_process_does_not_speak_for_its_case(
    wish: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with misbehaving(tmp_path, process_seconds=20.0) as (node, store):
        ask(node, wish)
        wait_for_cases(node, State.DONE)
        wait_for(lambda: len(notes(tmp_path)) == 1)
        if wish == "BOTH":
            wait_for(lambda: "printed: said by a child" in caplog.text)
        ask(node, "GOOD")
        wait_for_cases(node, State.DONE, 2)
        assert len(store.wait_for_images(4)) == 4
        assert case_of(node, "GOOD").attempts == 1


def test_p4_the_kernel_takes_the_worker_first_where_memory_runs_out(tmp_path: Path) -> None:
    with misbehaving(tmp_path) as (node, _):
        ask(node, "WHO")
        wait_for_cases(node, State.DONE)
        pid = int(notes(tmp_path)[0][1:].split(",")[0])
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
        assert Path("/proc/self/oom_score_adj").read_text().strip() != "1000"
        assert "Max core file size        0" in Path(f"/proc/{pid}/limits").read_text()


def test_p5_workers_are_replaced_so_that_leaks_do_not_add_up(tmp_path: Path) -> None:
    with misbehaving(tmp_path, worker_cases=2) as (node, _):
        ask(node, *(f"LEAK {k}" for k in range(6)))
        wait_for_cases(node, State.DONE, 6)
    pids = notes(tmp_path)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 2]


def test_p5_a_worker_that_has_grown_is_replaced_before_it_reaches_its_limit(tmp_path: Path) -> None:
    with misbehaving(tmp_path, process_memory=400 << 20) as (node, _):
        ask(node, *(f"LEAK {k}" for k in range(25)))
        wait_for_cases(node, State.DONE, 25, 60)
    assert len(set(notes(tmp_path))) > 1


@BOTH
def test_p6_results_without_end_are_ended(isolation: str, tmp_path: Path) -> None:
    with misbehaving(tmp_path, isolation=isolation, process_output=1 << 20) as (node, _):
        ask(node, "ENDLESS", "GOOD")
        wait_for_cases(node, State.FAILED)
        wait_for_cases(node, State.DONE)
        assert "larger than process_output" in case_of(node, "ENDLESS").error
        # Results of a case that is done go in a moment.
        wait_for(lambda: not list((tmp_path / "root" / ".dicomnode" / "outbox").iterdir()))


def test_p7_what_a_case_changes_is_as_before_for_the_next(tmp_path: Path) -> None:
    before = (Path.cwd(), dict(os.environ), signal.getsignal(signal.SIGTERM))
    with misbehaving(tmp_path) as (node, _):
        ask(node, "LOOK 1")
        wait_for_cases(node, State.DONE, 1)
        # They are deleted when it is DONE, which is not the same moment.
        wait_for(lambda: not list((tmp_path / "root").rglob("Image*")))
        ask(node, "CHANGE", "LOOK 2")
        wait_for_cases(node, State.DONE, 3)
        work = tmp_path / "root" / ".dicomnode" / "work"
        wait_for(lambda: not list(work.iterdir()))
    first, changed, second = notes(tmp_path)
    assert changed == "changed"
    assert first != second  # each has a folder of its own
    assert str(work) in first and str(work) in second
    assert first.partition(",")[2] == second.partition(",")[2]
    assert second.partition(", ")[2] == "None, True, True, True, 0.0, '0o77', []]"
    assert before == (Path.cwd(), dict(os.environ), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("wish", ["FORK", "FORKHANG", "FORKCRASH"])
def test_p4_processes_that_a_case_leaves_behind_end_with_it(
    wish: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with misbehaving(tmp_path, process_seconds=8.0) as (node, _):
        ask(node, wish)
        wait_for_cases(node, State.DONE if wish == "FORK" else State.FAILED)
        pids = [int(one) for one in notes(tmp_path) if one.isdigit()]
        assert len(pids) == 2
        wait_for(lambda: not any(map(is_alive, pids)))
        ask(node, "GOOD")
        wait_for_cases(node, State.DONE, 2 if wish == "FORK" else 1)
    assert ("left 2 processes running" in caplog.text) == (wish == "FORK")


def test_s7_a_worker_that_somebody_kills_costs_one_more_attempt(tmp_path: Path) -> None:
    with misbehaving(tmp_path) as (node, store):
        ask(node, "KILL")
        wait_for_cases(node, State.DONE)
        assert case_of(node, "KILL").attempts == 2
        assert notes(tmp_path) == ["killed", "killed"]
        assert len(store.received) == 2


def test_s7_the_second_attempt_gives_the_same_uids(tmp_path: Path) -> None:
    with misbehaving(tmp_path) as (node, _):
        ask(node, "UIDS")
        wait_for_cases(node, State.DONE)
    first, killed, second, _ = notes(tmp_path)
    assert killed == "killed" and first == second and first.startswith("2.25.")


def test_s7_not_for_ever(tmp_path: Path) -> None:
    with misbehaving(tmp_path) as (node, _):
        ask(node, "KILLED", "GOOD")
        wait_for_cases(node, State.FAILED)
        wait_for_cases(node, State.DONE)
        case = case_of(node, "KILLED")
        assert "signal 9 (SIGKILL)" in case.error.splitlines()[-1]
        assert case.attempts == 2 and notes(tmp_path) == ["killed", "killed"]
        assert len(list((tmp_path / "root" / "ID-KILLED").rglob("*.dcm"))) == 2


def test_a_worker_without_work_that_is_killed_is_replaced(tmp_path: Path) -> None:
    with misbehaving(tmp_path) as (node, _):
        ask(node, "WHO 1")
        wait_for_cases(node, State.DONE)
        pid = int(notes(tmp_path)[0][1:].split(",")[0])
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(pid))
        ask(node, "WHO 2")
        wait_for_cases(node, State.DONE, 2)
        assert case_of(node, "WHO 2").attempts == 1


def test_what_the_worker_says_is_in_the_log_of_the_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "node.log"
    with misbehaving(tmp_path, log_path=log) as (node, _):
        ask(node, "CHATTER")
        wait_for_cases(node, State.DONE)
    lines = log.read_text().splitlines()
    assert all(line[:4] == "2026" or line.startswith("20") for line in lines)
    assert any("printed: chatter 0 x" in line and "[case 1]" in line for line in lines)
    assert sum("chatter" in line for line in lines) < 10_001
    assert any("says too much" in line for line in lines)


def test_records_of_the_worker_stay_on_their_line(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    with misbehaving(tmp_path, log_path=log) as (node, _):
        ask(node, "RAISE")
        wait_for_cases(node, State.FAILED)
    lines = log.read_text().splitlines()
    (failed,) = [line for line in lines if "FAILED and is kept" in line]
    assert "ValueError: this\\nbreaks the line" in failed
    assert all(line.startswith(("20", "    ")) for line in lines)


def test_the_settings_of_the_instance_are_those_of_the_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_node(StoringNode) as store:
        node = Misbehaving(start=False)
        (tmp_path / "notes").touch()
        node.endpoints, node.notes = [address_of(store)], str(tmp_path / "notes")
        node.number = 5
        node.model = object()  # type: ignore[attr-defined]
        with node:
            ask(node, "WHO")
            wait_for_cases(node, State.DONE)
    worker, loaded_in, is_worker, number = eval(notes(tmp_path)[0])
    # Its post_init ran in the worker too, and set what the node's did there.
    assert loaded_in == worker != os.getpid()
    assert is_worker and number == 5
    assert "worker processes have no model" in caplog.text


def test_a_class_that_no_other_process_can_import_is_told_when_the_node_opens() -> None:
    class Local(Misbehaving):
        pass

    before = set(descendants(os.getpid()))
    with (
        pytest.raises(IncorrectlyConfigured, match="define it in a file, at the top level"),
        running_node(Local),
    ):
        pass
    assert set(descendants(os.getpid())) <= before


def test_a_class_that_is_not_there_when_its_file_is_imported_is_told(tmp_path: Path) -> None:
    with program(
        tmp_path,
        """
if __name__ == "__main__":
    class Below(Node):
        pass
    Below()
""",
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(30) == 1
    assert "defines no Below when it is imported: define it at the top level, above" in said


def test_inputs_that_no_other_process_can_import_are_told_when_the_node_opens() -> None:
    class Local(Two):
        pass

    with (
        pytest.raises(IncorrectlyConfigured, match="declare them in the class"),
        running_node(Misbehaving, input={"other": Local}),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"isolation": "container"}, "isolation has to be"),
        ({"isolation": "thread", "process_memory": 1 << 30}, "process_memory needs isolation"),
        ({"process_seconds": 0}, "process_seconds has to be"),
        ({"process_output": 0}, "process_output has to be"),
        ({"worker_cases": 0}, "worker_cases has to be"),
        ({"executor": object()}, "executor has to be"),
    ],
)
def test_settings_that_cannot_work_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(IncorrectlyConfigured, match=said), running_node(Misbehaving, **settings):
        pass


PROGRAM = """
import sys, time
from tests.e2e.misbehaving import Misbehaving as Base

class Node(Base):
    root_data_directory = sys.argv[1]
    notes = sys.argv[1] + "-notes"
    process_seconds = None
    log_path = sys.argv[1] + "-log"

{rest}
"""
GUARDED = """
if __name__ == "__main__":
    node = Node(start=False)
    node.open(blocking=False)
    print(node.port, flush=True)
    node._closed.wait()
"""


# A program of its own knows no tests.
TOP = Path(__file__).parents[2]


@contextmanager
def program(tmp_path: Path, rest: str = GUARDED) -> Iterator[subprocess.Popen[str]]:
    """A file of a user, run as such."""
    file = tmp_path / "node.py"
    file.write_text(PROGRAM.format(rest=rest))
    with subprocess.Popen(
        [sys.executable, str(file), str(tmp_path / "root")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TOP), *sys.path])},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_workers_of_a_node_that_is_killed_end_and_let_the_root_go(tmp_path: Path) -> None:
    with program(tmp_path) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        send(Address("127.0.0.1", port, "NODE"), wishing("FORKHANG"))
        told = tmp_path / "root-notes"
        wait_for(lambda: told.exists() and told.read_text().count("\n") == 3)
        pids = [pid for pid in descendants(process.pid) if is_alive(pid)]
        assert len(pids) >= 4  # keeper, worker, and what it started
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(is_alive, pids)))
    with running_node(
        Misbehaving, root_data_directory=tmp_path / "root", workers=0, notes="-"
    ) as node:
        # As when any node dies over a case: it runs again.
        assert [(case.state, case.attempts) for case in node.cases()] == [(State.READY, 1)]
        assert not list((tmp_path / "root" / ".dicomnode").glob("work/*"))


def test_a_file_that_opens_whenever_it_is_imported_is_told(tmp_path: Path) -> None:
    with program(tmp_path, "Node()") as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(30) == 1
    assert 'below `if __name__ == "__main__":`' in said


def test_close_interrupts_what_outlasts_it_without_blame(tmp_path: Path) -> None:
    with misbehaving(tmp_path, stop_seconds=1.0) as (node, _):
        ask(node, "HANG")
        wait_for(lambda: notes(tmp_path) == ["hangs"])
        start = time.monotonic()
        node.close()
        assert time.monotonic() - start < 15
    with running_node(
        Misbehaving, root_data_directory=tmp_path / "root", workers=0, notes="-"
    ) as node:
        assert [(case.state, case.attempts) for case in node.cases()] == [(State.READY, 0)]


def test_a_worker_that_cannot_start_any_more_costs_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with misbehaving(tmp_path) as (node, _):
        monkeypatch.setattr(workers, "_START", "raise SystemExit(3)")
        ask(node, "SEGFAULT", "GOOD")
        wait_for_cases(node, State.FAILED)
        wait_for(lambda: "no worker process: cases wait" in caplog.text)
        assert case_of(node, "GOOD").state is State.READY
        monkeypatch.undo()
        wait_for_cases(node, State.DONE)


def test_a_keeper_that_is_killed_takes_its_worker_along(tmp_path: Path) -> None:
    with misbehaving(tmp_path) as (node, _):
        ask(node, "HANG")
        wait_for(lambda: notes(tmp_path) == ["hangs"])
        (worker,) = workers_of(node)
        keeper = int(Path(f"/proc/{worker}/stat").read_bytes().rpartition(b")")[2].split()[1])
        os.kill(keeper, signal.SIGKILL)
        wait_for_cases(node, State.FAILED)
        assert "its keeper was killed" in case_of(node, "HANG").error
        wait_for(lambda: not is_alive(worker))
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, 0)
        ask(node, "GOOD")
        wait_for_cases(node, State.DONE)

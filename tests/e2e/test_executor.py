"""Cases that an executor processes: threads, processes, and Dask's workers."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy
import pytest

from dicomnode.errors import IncorrectlyConfigured
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.server import executors
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, make_series, running_node, wait_for_cases

from .misbehaving import Misbehaving
from .test_isolation import ask, case_of, misbehaving, notes, wait_for


@contextmanager
def executor(kind: str) -> Iterator[Executor]:
    if kind == "threads":
        with ThreadPoolExecutor(2) as pool:
            yield pool
    elif kind == "processes":
        # A node has threads, so that it must not be forked.
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            yield pool
    else:
        distributed = pytest.importorskip("distributed")
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=1, dashboard_address=None, processes=True
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client.get_executor()


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("kind", ["threads", "processes", "dask"])
def test_cases_are_processed_by_the_executor(kind: str, on_disk: bool, tmp_path: Path) -> None:
    root = tmp_path / "root" if on_disk else None
    with executor(kind) as pool:
        settings: dict[str, Any] = {"isolation": "thread", "executor": pool, "number": 7}
        with misbehaving(tmp_path, root_data_directory=root, **settings) as (node, store):
            ask(node, "WHO", "RAISE")
            wait_for_cases(node, State.DONE)
            wait_for_cases(node, State.FAILED)
            assert "in do_raise" in case_of(node, "RAISE").error
            images = store.wait_for_images(2)
    assert notes(tmp_path)[0].endswith("True, 7]")
    assert numpy.array_equal(numpy_grinder(images), numpy_grinder(make_series(2)) + 7)


@pytest.mark.parametrize("is_seen", [True, False])
def test_paths_go_along_only_where_the_same_folder_is_seen(
    is_seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bool] = []
    real = executors._bytes_of

    def bytes_of(claimed: Any) -> Any:
        sent.append(True)
        return real(claimed)

    monkeypatch.setattr(executors, "_bytes_of", bytes_of)
    if not is_seen:
        monkeypatch.setattr(executors, "_sees", lambda *_: False)
    with (
        executor("threads") as pool,
        misbehaving(tmp_path, isolation="thread", executor=pool) as (node, _),
    ):
        ask(node, "GOOD")
        wait_for_cases(node, State.DONE)
        assert list((tmp_path / "root" / ".dicomnode" / "work").iterdir())
    assert sent == ([] if is_seen else [True])
    assert not list((tmp_path / "root" / ".dicomnode" / "work").iterdir())


def test_a_file_of_the_same_name_on_another_machine_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("theirs")
    assert not executors._sees(str(tmp_path / "seen"), "ours")
    assert not executors._sees(str(tmp_path / "absent"), "ours")


def test_p2_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with executor("processes") as pool:
        settings: dict[str, Any] = {"isolation": "thread", "executor": pool}
        with misbehaving(tmp_path, process_seconds=15.0, **settings) as (node, _):
            ask(node, "HANG", "GOOD")
            wait_for_cases(node, State.FAILED)
            wait_for_cases(node, State.DONE)
            assert "may still be at it" in case_of(node, "HANG").error
        for process in list(pool._processes.values()):
            process.kill()


def test_p3_a_broken_executor_keeps_cases_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        executor("processes") as pool,
        misbehaving(tmp_path, isolation="thread", executor=pool) as (node, _),
    ):
        ask(node, "SEGFAULT", "GOOD")
        wait_for(lambda: "the executor takes no work any more" in caplog.text)
        wait_for(lambda: case_of(node, "SEGFAULT").state is State.READY)
        wait_for(lambda: case_of(node, "GOOD").state is State.READY)
    with misbehaving(tmp_path) as (node, _):
        wait_for_cases(node, State.DONE)
        wait_for_cases(node, State.FAILED)


def test_p3_a_pipeline_that_cannot_be_made_for_one_case_fails_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that another process of the executor has made, for a model that finds no room."""
    real = executors._pipeline
    made = count(1)

    def pipeline(description: str) -> Any:
        # The first is made when the node opens.
        if next(made) == 2:
            raise RuntimeError("CUDA error: out of memory")
        return real(description)

    monkeypatch.setattr(executors, "_pipeline", pipeline)
    with (
        executor("threads") as pool,
        misbehaving(tmp_path, isolation="thread", executor=pool) as (node, _),
    ):
        ask(node, "GOOD")
        wait_for_cases(node, State.FAILED)
        assert "CUDA error: out of memory" in case_of(node, "GOOD").error
        ask(node, "WHO")
        wait_for_cases(node, State.DONE)


def test_an_executor_that_cannot_make_the_pipeline_is_told_when_the_node_opens() -> None:
    class Local(Misbehaving):
        isolation = "thread"

    with executor("threads") as pool:
        kinds: list[type[AbstractPipeline]] = [Local]
        for kind in kinds:
            with (
                pytest.raises(IncorrectlyConfigured, match="define it in a file"),
                running_node(kind, executor=pool),
            ):
                pass

"""A `validate` that hangs holds up its own case, and nothing else, however many hang."""

import json
import pydoc
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode.lib.dimse import Address, send
from dicomnode.lib.grinders import list_grinder
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases


class Hanging:
    """Whose validate() hangs, and until when."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.go_on = threading.Event()
        self.looking = threading.Semaphore(0)

    def validate(self, name: str) -> None:
        if name in self.names and not self.go_on.is_set():
            self.looking.release()
            self.go_on.wait(120)

    def wait_for(self, count: int) -> None:
        """Until so many hang."""
        for _ in range(count):
            assert self.looking.acquire(timeout=30)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    found = Hanging()
    yield found
    found.go_on.set()


def pipeline(hanging: Hanging) -> type[AbstractPipeline]:
    class Two(AbstractInput):
        image_grinder = list_grinder

        def validate(self) -> bool:
            hanging.validate(str(next(iter(self.data.values())).PatientID))
            return self.images >= 2

    class Node(AbstractPipeline):
        ae_title = "NODE"
        input = {"ct": Two}

        def process(self, input_data: dict[str, Any]) -> None:
            if input_data["ct"][0].PatientID == "FAILS":
                hanging.names.add("FAILS")
                raise ValueError("fails")

    return Node


def images(name: str, count: int = 2) -> list[Any]:
    return make_series(count, 8, 8, patient_id=name)


def states(node: AbstractPipeline) -> dict[str, State]:
    return {case.identifier: case.state for case in node.cases()}


def connections(node: AbstractPipeline) -> int:
    assert node._server is not None
    return len(node._server._visits)


def test_patients_of_one_association_wait_for_no_other(hanging: Hanging) -> None:
    hanging.names.add("A")
    with running_node(pipeline(hanging)) as node:
        send(address_of(node), [*images("A"), *images("B")])
        hanging.wait_for(1)
        wait_for_cases(node, State.DONE)
        assert states(node) == {"A": State.RECEIVING, "B": State.DONE}
        hanging.go_on.set()
        wait_for_cases(node, State.DONE, 2)


def test_further_associations_of_a_case_that_is_looked_at_hold_no_thread(hanging: Hanging) -> None:
    hanging.names.add("A")
    with running_node(pipeline(hanging)) as node:
        send(address_of(node), images("A"))
        hanging.wait_for(1)
        assert node.wait(lambda: not connections(node), 20)
        before = threading.active_count()
        for _ in range(10):
            send(address_of(node), images("A", 1))
        assert node.wait(
            lambda: not connections(node) and threading.active_count() <= before, 20
        ), [one.name for one in threading.enumerate()]
        hanging.go_on.set()
        wait_for_cases(node, State.DONE)
        assert len(node.cases()) == 1


def test_however_many_hang_others_are_processed(hanging: Hanging, tmp_path: Path) -> None:
    hanging.names |= {f"A{k}" for k in range(20)}
    with running_node(pipeline(hanging), root_data_directory=tmp_path) as node:
        send(address_of(node), [one for name in sorted(hanging.names) for one in images(name)])
        hanging.wait_for(20)
        start = time.monotonic()
        send(address_of(node), images("B"))
        wait_for_cases(node, State.DONE)
        assert time.monotonic() - start < 15
        assert states(node)["B"] is State.DONE
        hanging.go_on.set()
        wait_for_cases(node, State.DONE, 21, seconds=60)


def health(node: AbstractPipeline) -> list[str]:
    url = f"http://127.0.0.1:{node.health_port}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=30) as page:
            body = page.read()
    except urllib.error.HTTPError as error:
        body = error.read()
    return list(json.loads(body)["reasons"])


def test_that_all_looks_hang_is_told_and_passes(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dicomnode.server.completeness._MOST_LOOKS", 3)
    monkeypatch.setattr("dicomnode.server.completeness._LONG_SECONDS", 0.3)
    hanging.names |= {"A1", "A2", "A3"}
    with running_node(pipeline(hanging), health_port=0) as node:
        send(address_of(node), images("A1"))
        hanging.wait_for(1)
        assert node.wait(lambda: "validate() has not ended" in caplog.text, 20)
        assert health(node) == []
        send(address_of(node), [*images("A2"), *images("A3"), *images("B")])
        hanging.wait_for(2)
        assert node.wait(lambda: health(node) != [], 20)
        assert "validate() of 3 cases does not end" in health(node)[0]
        assert caplog.text.count("NO CASE IS LOOKED AT ANY MORE") == 1
        assert node._storage is not None
        assert "has not ended" in node._storage.waits.of(1).reason
        assert len([one for one in threading.enumerate() if one.name == "look"]) == 3
        hanging.go_on.set()
        wait_for_cases(node, State.DONE, 4)
        assert node.wait(lambda: health(node) == [], 20)


def test_a_case_that_is_retried_and_hangs_keeps_no_worker(hanging: Hanging, tmp_path: Path) -> None:
    with running_node(pipeline(hanging), root_data_directory=tmp_path) as node:
        send(address_of(node), images("FAILS"))
        wait_for_cases(node, State.FAILED)
        node.retry(1)
        hanging.wait_for(1)
        send(address_of(node), images("B"))
        wait_for_cases(node, State.DONE)
        assert states(node) == {"FAILS": State.READY, "B": State.DONE}
        hanging.go_on.set()
        wait_for_cases(node, State.FAILED)


def test_a_case_that_hangs_can_be_processed_as_it_is(hanging: Hanging) -> None:
    hanging.names.add("A")
    with running_node(pipeline(hanging)) as node:
        send(address_of(node), images("A", 1))
        hanging.wait_for(1)
        node.complete(1)
        wait_for_cases(node, State.DONE)
        hanging.go_on.set()


def test_what_fails_after_its_case_went_on_does_not_count(
    hanging: Hanging, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hanging.names.add("A")

    class Failing(AbstractInput):
        image_grinder = list_grinder

        def validate(self) -> bool:
            hanging.validate("A")
            raise ValueError("too late")

    class Node(AbstractPipeline):
        ae_title = "NODE"
        input = {"ct": Failing}
        endpoints = [Address("127.0.0.1", 9, "NOBODY")]

        def process(self, input_data: dict[str, Any]) -> Any:
            return input_data["ct"]

    with running_node(Node, root_data_directory=tmp_path) as node:
        send(address_of(node), images("A"))
        hanging.wait_for(1)
        node.complete(1)
        wait_for_cases(node, State.EXPORTING)
        hanging.go_on.set()
        wait_until(node, lambda: "what failed does not count" in caplog.text)
        assert states(node) == {"A": State.EXPORTING}


def test_what_hangs_keeps_a_node_open_no_longer_than_it_may(
    hanging: Hanging, tmp_path: Path
) -> None:
    hanging.names.add("A")
    with running_node(pipeline(hanging), root_data_directory=tmp_path, stop_seconds=0.5) as node:
        send(address_of(node), images("A"))
        hanging.wait_for(1)
        start = time.monotonic()
        node.close()
        assert time.monotonic() - start < 15


def test_cases_that_are_ready_are_processed_in_their_order_and_looked_at_seldom(
    tmp_path: Path,
) -> None:
    looked: list[str] = []
    processed: list[str] = []
    go_on = threading.Event()

    class Two(AbstractInput):
        image_grinder = list_grinder

        def validate(self) -> bool:
            looked.append(str(next(iter(self.data.values())).PatientID))
            return self.images >= 2

    class Node(AbstractPipeline):
        ae_title = "NODE"
        input = {"ct": Two}

        def process(self, input_data: dict[str, Any]) -> None:
            processed.append(str(input_data["ct"][0].PatientID))
            assert go_on.wait(60)

    names = [f"P{k}" for k in range(8)]
    with running_node(Node, root_data_directory=tmp_path) as node:
        for name in names:
            send(address_of(node), images(name))
            wait_until(node, lambda name=name: states(node)[name] is not State.RECEIVING)
        go_on.set()
        wait_for_cases(node, State.DONE, len(names))
    # A look that takes longer than half a second, on a machine that is busy, lets the next one pass.
    assert sorted(processed) == names
    assert all(abs(processed.index(name) - k) <= 2 for k, name in enumerate(names))
    # Where the association ends after the look, and where what it found was not kept in memory until it
    # was the case's turn, there is one more.
    assert all(looked.count(name) <= 3 for name in names)


def test_what_is_to_be_processed_as_it_is_stays_so_though_a_look_finds_it_incomplete() -> None:
    """The look began before that, and no worker is free."""
    node: AbstractPipeline

    class Never(AbstractInput):
        image_grinder = list_grinder

        def validate(self) -> bool:
            node.complete(1)
            return False

    class Node(AbstractPipeline):
        ae_title = "NODE"
        input = {"ct": Never}

    with running_node(Node, workers=0) as node:
        send(address_of(node), images("A"))
        wait_until(node, lambda: states(node) == {"A": State.READY})
        assert node._runner is not None
        completeness = node._runner._completeness
        wait_until(node, lambda: not completeness.is_pending())
        assert states(node) == {"A": State.READY}


def test_where_all_looks_are_taken_those_that_wait_are_not_looked_through(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.completeness._MOST_LOOKS", 1)
    clock = [1000.0]
    names = {f"P{k}" for k in range(20)}
    with running_node(pipeline(hanging), deadline_seconds=10.0, _clock=lambda: clock[0]) as node:
        assert node._runner is not None
        completeness = node._runner._completeness
        hanging.names = {"A"}
        send(address_of(node), images("A"))
        hanging.wait_for(1)
        send(address_of(node), [one for name in sorted(names) for one in images(name)])
        clock[0] += 20
        begun: list[Any] = []
        begin = completeness._begin
        monkeypatch.setattr(completeness, "_begin", lambda *one: begun.append(one) or begin(*one))
        wait_until(node, lambda: completeness._unchecked.keys() == names)
        completeness.step()
        assert not begun
        hanging.go_on.set()
        wait_for_cases(node, State.DONE, 1 + len(names))


def wait_until(node: AbstractPipeline, condition: Callable[[], bool]) -> None:
    assert node.wait(condition, 30)


def test_of_cases_that_take_no_more_images_no_time_is_kept() -> None:
    with running_node(pipeline(Hanging()), study_expiration_days=300.0, _clock=lambda: 0.0) as node:
        send(address_of(node), [*images("A"), *images("B"), *images("C", 1)])
        wait_for_cases(node, State.DONE, 2)
        assert node._runner is not None
        completeness = node._runner._completeness
        completeness.keep()
        assert list(completeness._clocks) == ["C"]
        assert [name for _, name in completeness._plan] == ["C"]


@pytest.mark.parametrize(
    "broken", ["storage.ledger.Ledger.queue", "server.completeness.Completeness.claimable",
               "server.completeness.Completeness._late", "storage.outbox.Outbox.settled"],
)  # fmt: skip
def test_a_step_that_fails_as_nobody_foresaw_ends_no_thread(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = pydoc.locate(f"dicomnode.{broken}")
    assert callable(real)
    fails = iter([True])

    def failing(*args: Any) -> Any:
        if next(fails, False):
            raise KeyError("unforeseen")
        return real(*args)

    monkeypatch.setattr(f"dicomnode.{broken}", failing)
    with running_node(pipeline(Hanging())) as node:
        send(address_of(node), images("A"))
        wait_for_cases(node, State.DONE)
    assert "a step of the runner failed, it is tried again" in caplog.text

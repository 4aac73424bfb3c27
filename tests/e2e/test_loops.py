"""Results that come back, and results that are made again."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicomnode.lib.dicom import LazyDataset, encode, read
from dicomnode.lib.dimse import send
from dicomnode.lib.grinders import identity_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.lib.uids import Uids
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import State
from dicomnode.testing import StoringNode, address_of, make_series, running_node, wait_for_cases


class Two(AbstractInput):
    image_grinder = many_meta_grinder(identity_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images == 2


class Echoing(AbstractPipeline):
    """Sends back what it got, as a new series."""

    ae_title = "NODE"
    input = {"ct": Two}
    export_give_up_seconds = 0

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array, images)


def test_d6_a_result_that_comes_back_is_not_processed_again(tmp_path: Path) -> None:
    with (
        running_node(StoringNode) as archive,
        running_node(
            Echoing, endpoints=[address_of(archive)], root_data_directory=tmp_path
        ) as node,
    ):
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.DONE)
        # The archive routes what it gets to the node.
        returned = [read(one.source) for one in archive.received]  # type: ignore[attr-defined]
        answers = send(address_of(node), returned)
        assert [one.status for one in answers] == [0xB006, 0xB006]
        assert "this node made it" in answers[0].comment
        assert len(node.cases()) == 1
    # It knows them after a restart too, when the case is over for long.
    with running_node(Echoing, root_data_directory=tmp_path) as node:
        assert [one.status for one in send(address_of(node), returned)] == [0xB006, 0xB006]


def test_d6_the_newest_results_are_known_and_no_more_than_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("ledger", "outbox"):
        monkeypatch.setattr(f"dicomnode.storage.{module}.MOST_MADE", 4)
    with (
        running_node(StoringNode) as archive,
        running_node(
            Echoing, endpoints=[address_of(archive)], root_data_directory=tmp_path
        ) as node,
    ):
        for k in range(8):
            send(address_of(node), make_series(2, 8, 8, patient_id=f"P{k}"))
            wait_for_cases(node, State.DONE, k + 1)
        assert node._storage is not None
        assert 4 <= sum(one.count for one in node._storage.outbox._made) <= 8
        returned = [read(one.source) for one in archive.received[-2:]]  # type: ignore[attr-defined]
        assert [one.status for one in send(address_of(node), returned)] == [0xB006, 0xB006]


def test_d6_a_node_that_is_its_own_endpoint_does_not_go_round(tmp_path: Path) -> None:
    with running_node(Echoing, root_data_directory=tmp_path, workers=0) as node:
        port = node.port
        send(address_of(node), make_series(2))
    with running_node(
        Echoing, port=port, endpoints=[address_of(node)], root_data_directory=tmp_path
    ) as node:
        wait_for_cases(node, State.FAILED)
        assert "this node made it" in node.cases()[0].error
        assert len(node.cases()) == 1


def test_d6_images_that_a_node_returns_unchanged_may_be_sent_to_it_again(tmp_path: Path) -> None:
    class Forwarding(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            return list(input_data["ct"][0])

    series = make_series(2)
    with (
        running_node(StoringNode) as archive,
        running_node(Forwarding, endpoints=[address_of(archive)]) as node,
    ):
        for count in (1, 2):
            assert [one.status for one in send(address_of(node), series)] == [0, 0]
            wait_for_cases(node, State.DONE, count)


def test_s7_results_made_again_after_a_crash_have_the_same_uids(tmp_path: Path) -> None:
    made: list[str] = []

    class Telling(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            results = list(super().process(input_data))
            made.extend(str(one.SOPInstanceUID) for one in results)
            if len(made) == 2:
                # What a crash leaves behind: the case is PROCESSING, and nothing of it is kept.
                arrived.set()
                raise KeyboardInterrupt
            return results

    arrived = threading.Event()
    with (
        running_node(StoringNode) as archive,
        running_node(
            Telling, endpoints=[address_of(archive)], root_data_directory=tmp_path
        ) as node,
    ):
        assert node._storage is not None
        node._storage.fail = lambda *_: None  # type: ignore[method-assign]
        send(address_of(node), make_series(2))
        assert arrived.wait(30)
    with (
        running_node(StoringNode) as archive,
        running_node(
            Telling, endpoints=[address_of(archive)], root_data_directory=tmp_path
        ) as node,
    ):
        wait_for_cases(node, State.DONE)
        sent = [str(one.SOPInstanceUID) for one in archive.received]
    assert made[:2] == made[2:] == sent


def test_a_retry_that_makes_results_anew_gives_them_new_uids() -> None:
    made: list[list[str]] = []

    class Failing(Echoing):
        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            results: list[Dataset] = []
            work = threading.Thread(target=lambda: results.extend(super_process(input_data)))
            work.start()
            work.join()
            made.append([str(one.SOPInstanceUID) for one in results])
            if len(made) == 1:
                raise RuntimeError("a fault of the model")
            return results

    super_process = Echoing(start=False).process
    with (
        running_node(StoringNode) as archive,
        running_node(Failing, endpoints=[address_of(archive)]) as node,
    ):
        send(address_of(node), make_series(2))
        wait_for_cases(node, State.FAILED)
        node.retry(1)
        wait_for_cases(node, State.DONE)
    assert not set(made[0]) & set(made[1])


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_s7_the_uids_are_those_of_the_case_wherever_it_is_processed(isolation: str) -> None:
    images = make_series(2)
    with (
        running_node(StoringNode) as archive,
        running_node(Echoing, endpoints=[address_of(archive)], isolation=isolation) as node,
    ):
        send(address_of(node), images)
        wait_for_cases(node, State.DONE)
        assert node._storage is not None
        uids = Uids(node._storage.ledger.seed(1))
        sent = [str(one.SOPInstanceUID) for one in archive.received]
    mine = [LazyDataset(encode(image)[0], uids=uids) for image in images]
    results = Echoing(start=False).process({"ct": (mine, numpy_grinder(mine))})
    assert sent == [str(one.SOPInstanceUID) for one in results]

"""Eager inputs through real associations: the same volumes as the ordinary way, and nothing lost."""

import random
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom.dataset import Dataset
from tests.unit.test_arena import J2K, JPEG_LS, compressed, cut_off, same

from dicomnode.lib.arena import Arena
from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import send
from dicomnode.lib.grinders import (
    list_grinder,
    many_meta_grinder,
    numpy_grinder,
    volume_grinder,
)
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import (
    State,
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
    write_series,
)

COUNT = 16
# What has to be proposed to dcmtk's storescu; dcmsend looks into the files.
PROPOSED = {J2K: "-xv", JPEG_LS: "-xt"}


class Whole(AbstractInput):
    image_grinder = volume_grinder
    eager = True

    def validate(self) -> bool:
        return self.images >= COUNT


class Recorder(AbstractPipeline):
    ae_title = "RECORDER"
    input = {"ct": Whole}

    def __init__(self, start: bool = True) -> None:
        self.calls: list[Any] = []
        super().__init__(start)

    def process(self, input_data: dict[str, Any]) -> None:
        self.calls.append(input_data["ct"])


def was_decoded(array: numpy.ndarray) -> bool:
    """It is a part of an arena."""
    return not array.flags.owndata


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("syntax", [J2K, JPEG_LS])
@pytest.mark.parametrize("program", ["storescu", "dcmsend"])
def test_a_compressed_series_of_dcmtk_is_the_volume_of_the_ordinary_way(
    program: str, syntax: str, on_disk: bool, peer: Callable[[str], str], tmp_path: Path
) -> None:
    series = compressed(make_series(COUNT, 64, 48), syntax)
    files = write_series(series[::-1] if on_disk else series, tmp_path / "series")
    proposed = [PROPOSED[syntax]] if program == "storescu" else []
    root = tmp_path / "root" if on_disk else None
    with running_node(Recorder, root_data_directory=root) as node:
        subprocess.run(
            [peer(program), *proposed, "-aec", "RECORDER", "127.0.0.1", str(node.port), *files],
            check=True,
            env={"TCP_NODELAY": "1"},
        )
        wait_for_cases(node, State.DONE)
    (volume,) = node.calls
    assert was_decoded(volume.array)
    same(volume, volume_grinder(load(files)))


def test_a_real_series_is_the_volume_of_the_ordinary_way(
    ct_folder: Path, peer: Callable[[str], str], tmp_path: Path
) -> None:
    class All(Whole):
        def validate(self) -> bool:
            return self.images >= 140

    files = sorted(path for path in ct_folder.iterdir() if path.name != "DIRFILE")
    with running_node(Recorder, input={"ct": All}, root_data_directory=tmp_path) as node:
        subprocess.run(
            [peer("dcmsend"), "-aec", "RECORDER", "127.0.0.1", str(node.port), *files],
            check=True,
            env={"TCP_NODELAY": "1"},
        )
        wait_for_cases(node, State.DONE, seconds=60)
    (volume,) = node.calls
    assert was_decoded(volume.array)
    same(volume, volume_grinder(load(files)))


def send_at_once(node: AbstractPipeline, parts: Sequence[list[Dataset]]) -> None:
    with ThreadPoolExecutor(len(parts)) as pool:
        for answers in pool.map(lambda part: send(address_of(node), part), parts):
            assert all(one.status == 0 for one in answers)


def test_several_senders_at_once_in_any_order() -> None:
    series = make_series(COUNT)
    shuffled = random.Random(5).sample(series, COUNT)
    with running_node(Recorder) as node:
        send_at_once(node, [shuffled[k::3] for k in range(3)])
        wait_for_cases(node, State.DONE)
    same(node.calls[0], volume_grinder(series))


def test_patients_at_once_under_a_limit_that_is_too_small_for_all(tmp_path: Path) -> None:
    every = {name: make_series(COUNT, patient_id=name) for name in ("A", "B", "C")}
    # Half of it is for what is decoded: one case and a half.
    limit = 3 * COUNT * 32 * 40 * 4
    with running_node(Recorder, root_data_directory=tmp_path, memory_limit=limit) as node:
        send_at_once(node, list(every.values()))
        wait_for_cases(node, State.DONE, count=3)
    assert len(node.calls) == 3
    by_uid = {volume.sop_instance_uids[0]: volume for volume in node.calls}
    for series in every.values():
        same(by_uid[series[0].SOPInstanceUID], volume_grinder(series))


def test_results_of_an_eager_node_with_its_images_beside_the_array() -> None:
    class Both(Whole):
        image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    class PlusOne(AbstractPipeline):
        ae_title = "PLUSONE"
        input = {"ct": Both}

        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            images, array = input_data["ct"]
            assert was_decoded(array)
            array += 1
            return derive_series(array, images)

    series = make_series(COUNT)
    with (
        running_node(StoringNode) as store,
        running_node(PlusOne, endpoints=[address_of(store)]) as node,
    ):
        send(address_of(node), series)
        wait_for_cases(node, State.DONE)
        arrived = store.wait_for_images(COUNT)
    numpy.testing.assert_array_equal(numpy_grinder(arrived), numpy_grinder(series) + 1)


def test_a_damaged_image_is_answered_and_fails_its_case_as_in_the_ordinary_way() -> None:
    class Later(Whole):
        eager = False

    series = compressed(make_series(COUNT, 32, 32), J2K)
    cut_off(series[5])
    errors = []
    for kind in (Whole, Later):
        with running_node(Recorder, input={"ct": kind}) as node:
            assert all(one.status == 0 for one in send(address_of(node), series))
            wait_for_cases(node, State.FAILED)
            errors.append(node.cases()[0].error.splitlines()[-1])
    assert errors[0] == errors[1] and str(series[5].SOPInstanceUID) in errors[0]


def test_a_retry_decodes_anew(tmp_path: Path) -> None:
    class FailingOnce(Recorder):
        def process(self, input_data: dict[str, Any]) -> None:
            super().process(input_data)
            if len(self.calls) == 1:
                # What process() did to its array is not seen by the next.
                self.calls[0].array[:] = -7
                raise RuntimeError("the first time")

    series = make_series(COUNT)
    with running_node(FailingOnce, root_data_directory=tmp_path) as node:
        send(address_of(node), series)
        wait_for_cases(node, State.FAILED)
        node.retry(1)
        wait_for_cases(node, State.DONE)
    first, second = node.calls
    assert was_decoded(first.array) and not was_decoded(second.array)
    same(second, volume_grinder(series))


def test_what_arrives_after_a_restart_joins_what_came_before(tmp_path: Path) -> None:
    series = make_series(COUNT)
    with running_node(Recorder, root_data_directory=tmp_path) as node:
        assert all(one.status == 0 for one in send(address_of(node), series[:7]))
    with running_node(Recorder, root_data_directory=tmp_path) as node:
        assert all(one.status == 0 for one in send(address_of(node), series[7:]))
        wait_for_cases(node, State.DONE)
    same(node.calls[0], volume_grinder(series))


def test_no_memory_is_kept_for_cases_that_are_over(tmp_path: Path) -> None:
    with running_node(Recorder, root_data_directory=tmp_path) as node:
        for k in range(3):
            send(address_of(node), make_series(COUNT, patient_id=f"P{k}"))
            wait_for_cases(node, State.DONE, count=k + 1)
        assert node._eager is not None and node._eager._arenas == {}
        send(address_of(node), make_series(3))
        (arena,) = node._eager._arenas.values()
        assert isinstance(arena, Arena) and arena.size == 3 * 32 * 40 * 4
    assert arena.size == 0


@pytest.mark.parametrize("method", ["add", "decode"])
def test_what_an_error_of_early_decoding_costs_is_the_time_and_nothing_else(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    series = make_series(COUNT, 16, 16)
    if method == "add":
        monkeypatch.setattr(Arena, "add", fails)
    else:
        monkeypatch.setattr("dicomnode.lib.arena.fill", fails)
    with running_node(Recorder) as node:
        assert {one.status for one in send(address_of(node), series)} == {0}
        wait_for_cases(node, State.DONE)
        (volume,) = node.calls
    assert not was_decoded(volume.array)
    numpy.testing.assert_array_equal(volume.array, numpy_grinder(series))
    assert "not decoded on arrival" in caplog.text and "a mistake of ours" in caplog.text

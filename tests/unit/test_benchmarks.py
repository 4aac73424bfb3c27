"""Every benchmark runs, and finds every peer's result equal to the reference, at a tiny size."""

import shutil
from pathlib import Path

import pytest
from benchmarks import (
    floor,
    grind_files,
    grind_memory,
    header_scan,
    real_ct,
    receive,
    series,
    timing,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return series.write(tmp_path_factory.mktemp("benchmarks") / "ct", 5, 8, 12)


@pytest.mark.parametrize("question", [header_scan, grind_files, grind_memory, real_ct])
def test_every_peer_gives_the_reference(question: timing.Question, folder: Path) -> None:
    table = timing.answer(question, folder, repeats=1, tiny=None)
    assert {row.name: row.wrong for row in table.rows if row.wrong} == {}
    assert all(len(row.seconds) == 1 for row in table.rows)
    assert table.rows[0].name.startswith("dicomnode")


def test_wrong_values_are_reported_and_not_timed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = grind_files.peers(folder)[0]

    def shifted() -> object:
        return good.run().array + 1

    def broken() -> object:
        raise ValueError

    peers = [good, timing.Peer("shifted", shifted), timing.Peer("broken", broken)]
    monkeypatch.setattr(grind_files, "peers", lambda folder: peers)
    table = timing.answer(grind_files, folder, repeats=1, tiny=None)
    assert [row.wrong for row in table.rows] == ["", "wrong values", "fails: ValueError"]
    assert [len(row.seconds) for row in table.rows] == [1, 0, 0]
    assert "wrong values" in table.text() and "wrong values" in table.markdown()


def test_memory_is_measured_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    peak = timing._peak("benchmarks.grind_files", grind_files.peers(folder)[0].name, folder, folder)
    assert peak is not None and 0 <= peak < 64


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_floor_reads_the_same_with_any_number_of_threads(folder: Path) -> None:
    paths = series.in_slice_order(folder)
    wanted = series.reference_volume(folder)
    for threads in (1, 2, 7):
        read = floor.stacker(paths, threads)
        assert read is not None and (read() == wanted).all()


def test_images_of_a_mixed_folder_are_copied(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    (mixed / "notes.txt").write_text("no image")
    assert len(series.paths_of(real_ct.copy_images(mixed, tmp_path / "images"))) == 5


@pytest.mark.skipif(receive.program("dcmsend") is None, reason="dcmtk is missing")
def test_images_that_arrived_are_counted(folder: Path) -> None:
    ours, *_, peer = receive.receivers()
    table = receive.answer("receive", folder, 1, [ours, peer])
    assert table is not None
    assert {row.name: row.wrong for row in table.rows if row.wrong} == {}
    assert [len(row.seconds) for row in table.rows] == [1, 1]

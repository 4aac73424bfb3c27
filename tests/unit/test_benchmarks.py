"""Every benchmark runs, and finds every peer's result equal to the reference, at a tiny size."""

import shutil
from pathlib import Path

import pydicom
import pytest
from benchmarks import (
    associations,
    cine,
    eager,
    floor,
    grind_enhanced,
    grind_files,
    grind_memory,
    grind_mr,
    grind_pet,
    header_scan,
    many,
    real_ct,
    receive,
    send,
    series,
    start,
    timing,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return series.write(tmp_path_factory.mktemp("benchmarks") / "ct", 5, 8, 12)


def answered(question: timing.Question, folder: Path) -> timing.Table:
    """A table in which every peer was right."""
    table = timing.answer(question, folder, repeats=1, tiny=None)
    assert {row.name: row.wrong for row in table.rows if row.wrong} == {}
    assert all(len(row.seconds) == 1 for row in table.rows)
    assert table.rows[0].name.startswith("dicomnode")
    return table


@pytest.mark.parametrize("question", [header_scan, grind_files, grind_memory, real_ct])
def test_every_peer_gives_the_reference(question: timing.Question, folder: Path) -> None:
    answered(question, folder)


@pytest.mark.parametrize(("question", "kind"), [(grind_pet, "PT"), (grind_mr, "MR")])
def test_every_peer_gives_the_reference_of_a_kind(
    question: timing.Question, kind: str, tmp_path: Path
) -> None:
    folder = series.write(tmp_path / kind, 5, 8, 12, kind)
    slopes = {float(pydicom.dcmread(path).RescaleSlope) for path in series.paths_of(folder)}
    assert len(slopes) == (5 if kind == "PT" else 1)
    answered(question, folder)


def test_every_peer_gives_the_reference_of_an_enhanced_object(tmp_path: Path) -> None:
    answered(grind_enhanced, series.write_enhanced(tmp_path / "enhanced", 5, 8, 12))


def test_every_peer_gives_the_reference_of_a_cine(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs")
    folder = cine.write(tmp_path / "cine", 3, 48, 64)
    answered(cine, folder)
    wanted = cine.reference(folder)
    assert cine.same(wanted.copy(), wanted)
    assert not cine.same(wanted[..., ::-1], wanted)


def test_dicomnode_rounds_the_slopes_of_a_pet_once(tmp_path: Path) -> None:
    folder = series.write(tmp_path / "PT", 5, 8, 12, "PT")
    wanted = grind_pet.reference(folder)
    for peer in grind_pet.peers(folder):
        if peer.name.startswith("dicomnode"):
            assert series.same_volume(peer.run(), wanted)
    wanted[0, 0, 0] *= 1 + 1e-6
    assert not grind_pet.same(grind_pet.peers(folder)[0].run(), wanted)


def test_what_one_instance_costs_is_told(folder: Path) -> None:
    table = many.together({5: answered(many, folder), 10: answered(many, folder)})
    row = table.rows[1]
    assert row.name == f"10 instances, {many.peers(folder)[0].name}"
    assert row.extra == (f"{row.median * 1e6 / 10:.1f}", "")
    assert "us/instance" in table.markdown()


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


@pytest.mark.parametrize("contexts", [1, 120])
def test_associations_without_an_image_end_as_they_should(contexts: int) -> None:
    ours, *_ = receive.receivers()
    table = associations.answer([ours], contexts, 5, 1)
    assert [(row.wrong, len(row.seconds)) for row in table.rows] == [("", 1)]


@pytest.mark.skipif(receive.program("dcmsend") is None, reason="dcmtk is missing")
def test_eager_and_later_give_the_same(folder: Path, tmp_path: Path) -> None:
    native = eager.lengthen(folder, tmp_path / "longer", 12)
    assert len(series.paths_of(native)) == 12
    packed = eager.compress(native, tmp_path / "packed", "JPEG 2000 Lossless", 12)
    whole, parts = eager.answer("eager", packed, 1)
    assert [(row.name, row.wrong, len(row.seconds)) for row in whole.rows] == [
        (kind, "", 1) for kind in eager.KINDS
    ]
    assert all(row.seconds[0] > 0 for row in whole.rows)
    steps = len(parts.rows) // len(eager.KINDS)
    for kind, row in enumerate(whole.rows):
        sum_of_steps = sum(
            part.seconds[0] for part in parts.rows[kind * steps : (kind + 1) * steps]
        )
        assert sum_of_steps == pytest.approx(row.seconds[0])


@pytest.mark.skipif(send.program("storescp") is None, reason="dcmtk is missing")
def test_every_sender_sends_all(folder: Path) -> None:
    table = send.answer("send", folder, 1)
    assert table is not None
    assert {row.name: row.wrong for row in table.rows if row.wrong} == {}
    assert [row.name for row in table.rows] == list(send.SENDERS)


def test_a_start_over_few_images_is_measured() -> None:
    table = start.answer([100, 200], repeats=1)
    assert [row.name for row in table.rows] == ["100 images", "200 images"]
    assert all(row.seconds[0] > 0 and not row.wrong for row in table.rows)

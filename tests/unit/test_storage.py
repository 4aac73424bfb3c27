"""Storage without a network: what is kept, what is recovered, what is refused."""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dicomnode.errors import InvalidRootDataDirectory, NoRoom, OutOfResources, UnknownCase
from dicomnode.lib.dicom import encode, link
from dicomnode.storage.instances import KEPT_BESIDES, FileInstances, MemoryInstances
from dicomnode.storage.journal import Journal
from dicomnode.storage.layout import digest_of
from dicomnode.storage.ledger import InstanceRow, Ledger, ResultRow, State
from dicomnode.storage.outbox import Answer
from dicomnode.storage.results import DamagedResult
from dicomnode.storage.shared import SharedInstances
from dicomnode.storage.store import (
    DuplicateInstance,
    Durability,
    Instance,
    Storage,
)
from dicomnode.storage.turns import Turns
from dicomnode.testing import make_series

LOGGER = logging.getLogger("dicomnode.test")


@contextmanager
def opened(
    root: Path | None, limit: int = 10**9, durability: Durability = "power"
) -> Iterator[Storage]:
    storage = Storage(root, ["ct", "mr"], 0x00100020, limit, LOGGER, durability=durability)
    storage.open()
    try:
        yield storage
    finally:
        storage.close()


def instances(count: int, patient_id: str = "P", seed: int = 1) -> list[Instance]:
    made = []
    for one in make_series(count, 8, 8, patient_id=patient_id, seed=seed):
        data = encode(one)[0]
        offset = 144 + int.from_bytes(data[140:144], "little")
        made.append(
            Instance(
                one.SOPInstanceUID,
                f"Image_CT_{one.InstanceNumber}",
                (data[:offset], data[offset:]),
                partial(digest_of, data[offset:]),
            )
        )
    return made


def make_ready(storage: Storage, number: int) -> None:
    identifier = storage.ledger.case(number).identifier
    contents = storage.current(identifier)
    assert contents is not None and storage.settle(identifier, contents, complete=True)


def claim(storage: Storage, number: int) -> bool:
    case = storage.ledger.case(number)
    contents = storage.contents(case) if case.sealed else storage.current(case.identifier)
    assert contents is not None
    return storage.seal(case, contents)


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    with opened(tmp_path / "root" if request.param == "disk" else None) as one:
        yield one


def test_an_instance_is_in_each_input_and_written_once(tmp_path: Path) -> None:
    (one,) = instances(1)
    with opened(tmp_path) as storage:
        storage.add("P", ["ct", "mr"], one)
        paths = [tmp_path / "P" / name / "Image_CT_1.dcm" for name in ("ct", "mr")]
        assert paths[0].samefile(paths[1])
        assert paths[0].read_bytes() == b"".join(one.chunks)
        contents = storage.current("P")
        assert contents is not None and not contents.obstacle
        assert set(contents.sources["ct"]) == set(contents.sources["mr"]) == {one.sop_instance_uid}


def test_other_content_under_a_known_uid_is_refused(storage: Storage) -> None:
    first, second = instances(1)[0], instances(1, seed=2)[0]
    storage.add("P", ["ct"], first)
    clash = Instance(first.sop_instance_uid, "x", second.chunks, second.digest_of)
    with pytest.raises(DuplicateInstance, match=first.sop_instance_uid):
        storage.add("P", ["ct"], clash)
    # In another input it may be stored: the rule is per input, and all inputs or none.
    with pytest.raises(DuplicateInstance):
        storage.add("P", ["mr", "ct"], clash)
    contents = storage.current("P")
    assert contents is not None and contents.sources["mr"] == {}


def test_a_sealed_case_takes_no_images_and_the_next_one_has_its_own_folder(
    storage: Storage,
) -> None:
    first, second = instances(2)
    number = storage.add("P", ["ct"], first)
    make_ready(storage, number)
    assert claim(storage, number)
    assert not claim(storage, number)
    assert storage.add("P", ["ct"], second) != number
    folders = [case.folder for case in storage.ledger.cases()]
    assert folders == ["P", "P~2"]


def test_twins_after_escaping_do_not_share_a_folder(storage: Storage) -> None:
    for name in ("P", "P~2", "p", "P%7E2", "", " "):
        for one in instances(1, name):
            storage.add(name, ["ct"], one)
    folders = [case.folder for case in storage.ledger.cases()]
    assert len(set(folders)) == 6


def test_results_are_kept_in_order_and_none_is_kept_where_one_fails(storage: Storage) -> None:
    number = storage.add("P", ["ct"], instances(1)[0])
    make_ready(storage, number)
    claim(storage, number)

    def failing() -> Iterator[tuple[str, str, str, bytes]]:
        yield "1.1", "1", "1", b"one"
        raise RuntimeError("second")

    with pytest.raises(RuntimeError):
        storage.results.keep(storage.ledger.case(number), failing())
    assert storage.results.undelivered(number, "A") == []
    results = [(f"1.{k}", "1", "1", b"x" * k) for k in (3, 1, 2)]
    assert storage.results.keep(storage.ledger.case(number), iter(results)) == 3
    assert [row.uid for row in storage.results.undelivered(number, "A")] == ["1.3", "1.1", "1.2"]
    storage.outbox.answer(number, "A", [Answer("1.1", 0, True)])
    assert [row.uid for row in storage.results.undelivered(number, "A")] == ["1.3", "1.2"]
    assert len(storage.results.undelivered(number, "B")) == 3
    storage.finish(storage.ledger.case(number))
    assert storage.ledger.case(number).state is State.DONE
    assert storage.ledger.instances(number) == []


def expect(ledger: Ledger, case_id: int, rows: list[InstanceRow]) -> None:
    ledger.expect([(case_id, *row) for row in rows])


def test_a_ledger_that_cannot_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as storage:

        def full(*_: object) -> None:
            raise OutOfResources("the ledger cannot be written: disk full")

        assert storage._journal is not None
        for is_open, place, name in [
            (True, storage._journal, "keep"),
            (False, storage.ledger, "add_instances"),
        ]:
            with monkeypatch.context() as broken:
                broken.setattr(storage._journal, "_is_open", is_open)
                broken.setattr(place, name, full)
                with pytest.raises(OutOfResources):
                    storage.add("P", ["ct", "mr"], instances(1)[0])
            assert not list(tmp_path.glob("P/*/*"))
            assert not list((tmp_path / ".dicomnode" / "incoming").iterdir())


def test_a_file_without_its_row_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = instances(2)
    with opened(tmp_path) as storage:
        storage.add("P", ["ct"], first)
        # The node ends between the file and its row.
        assert storage._journal is not None
        monkeypatch.setattr(storage._journal, "keep", lambda *place: link(*place[6:]))
        storage.add("P", ["ct"], second)
    with opened(tmp_path) as storage:
        contents = storage.current("P")
        assert contents is not None
        assert set(contents.sources["ct"]) == {first.sop_instance_uid, second.sop_instance_uid}
        # A resend of it is recognised as the same.
        storage.add("P", ["ct"], second)
        assert len(list(tmp_path.glob("P/ct/*"))) == 2


@pytest.mark.parametrize("damage", ["deleted", "shorter", "other", "same size"])
def test_a_damaged_file_blocks_its_case_until_it_is_sent_again(damage: str, tmp_path: Path) -> None:
    first, second = instances(2)
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], first)
        storage.add("P", ["ct"], second)
        make_ready(storage, number)
    victim = tmp_path / "P" / "ct" / "Image_CT_1.dcm"
    data = victim.read_bytes()
    if damage == "deleted":
        victim.unlink()
    elif damage == "shorter":
        victim.write_bytes(data[:-1])
    elif damage == "other":
        victim.write_bytes(b"".join(second.chunks))
    else:
        victim.write_bytes(bytes(len(data)))
    with opened(tmp_path) as storage:
        if victim.exists() and victim.stat().st_size == len(data):
            # A start looks at sizes only; what is in a file is read before it is processed.
            storage.verify(storage.ledger.case(number))
        else:
            assert storage.ledger.case(number).state is State.RECEIVING
        contents = storage.current("P")
        assert contents is not None
        assert first.sop_instance_uid in contents.obstacle
        assert storage.add("P", ["ct"], first) == number
        contents = storage.current("P")
        assert contents is not None and not contents.obstacle
    with opened(tmp_path) as storage:
        contents = storage.current("P")
        assert contents is not None and not contents.obstacle


def test_a_case_that_ends_the_node_three_times_is_failed(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        make_ready(storage, number)
    for attempt in (1, 2, 3):
        with opened(tmp_path) as storage:
            case = storage.ledger.case(number)
            assert case.state is State.READY
            assert claim(storage, case.id)
            assert storage.ledger.case(number).attempts == attempt
    with opened(tmp_path) as storage:
        case = storage.ledger.case(number)
        assert case.state is State.FAILED and "3 times" in case.error
        storage.ledger.retry(number)
        assert storage.ledger.case(number).attempts == 0


def test_files_of_a_case_that_was_done_are_deleted_at_the_next_start(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        make_ready(storage, number)
        claim(storage, number)
        storage.results.keep(storage.ledger.case(number), [("1.1", "1", "1", b"result")])
        storage.ledger.move(number, State.EXPORTING, State.DONE)
    assert list(tmp_path.glob("P/ct/*")) and list(tmp_path.glob(".dicomnode/outbox/*/*"))
    with opened(tmp_path):
        pass
    assert not list(tmp_path.glob("P")) and not list(tmp_path.glob(".dicomnode/outbox/*"))


def test_a_ledger_in_use_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as storage:
        storage.add("P", ["ct"], instances(1)[0])

    def locked(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    with monkeypatch.context() as broken:
        broken.setattr(sqlite3, "connect", locked)
        with pytest.raises(InvalidRootDataDirectory, match="locked"), opened(tmp_path):
            pass
    for trouble in ("database is locked", "disk I/O error"):

        def fails(*_: object, said: str = trouble) -> None:
            raise sqlite3.OperationalError(said)

        with monkeypatch.context() as broken:
            broken.setattr("dicomnode.storage.ledger.check_values", fails)
            with pytest.raises(InvalidRootDataDirectory, match=trouble), opened(tmp_path):
                pass
    assert not list((tmp_path / ".dicomnode").glob("ledger-lost*"))
    with opened(tmp_path) as storage:
        assert len(storage.ledger.instances(1)) == 1


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE cases SET identifier = CAST(x'50FF51' AS TEXT)",
        "UPDATE cases SET identifier = CAST(identifier AS BLOB)",
        "UPDATE cases SET folder = CAST(folder AS BLOB)",
        "UPDATE cases SET state = 'RECEIVINH'",
        "UPDATE cases SET created = 'long ago'",
        "UPDATE instances SET file = CAST(x'FF' AS TEXT) WHERE uid IN (SELECT max(uid) FROM instances)",
        "UPDATE instances SET file = CAST(file AS BLOB)",
        "UPDATE instances SET uid = CAST(uid AS BLOB) WHERE uid IN (SELECT max(uid) FROM instances)",
        "ALTER TABLE cases RENAME COLUMN attempts TO attemptz",
        # What damage to one page does: its index, or the table, has another value.
        "INDEX case_state",
        "INDEX case_folder",
    ],
)
def test_a_ledger_with_rows_that_none_can_be_is_rebuilt_from_the_files(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as storage:
        for one in instances(3, "PATIENT"):
            storage.add("PATIENT", ["ct"], one)
    path = tmp_path / ".dicomnode/ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        if change.startswith("INDEX "):
            ((page, size),) = db.execute(
                "SELECT rootpage, page_size FROM sqlite_master, pragma_page_size WHERE name = ?",
                (change.removeprefix("INDEX "),),
            )
        else:
            db.execute(change)
            db.commit()
    if change.startswith("INDEX "):
        whole = bytearray(path.read_bytes())
        start, end = (page - 1) * size, page * size
        word = b"RECEIVING" if "state" in change else b"PATIENT"
        at = whole.index(word, start, end)
        whole[at] = 0xFF
        path.write_bytes(whole)
    with opened(tmp_path) as storage:
        (case,) = storage.ledger.cases()
        assert (case.identifier, case.state) == ("PATIENT", State.RECEIVING)
        assert storage.ledger.case(case.id) == case
        rows = storage.ledger.instances(case.id)
        assert len(rows) == 3 and not any(row.damaged for row in rows)
    assert "set aside" in caplog.text
    assert "PATIENT" not in caplog.text.replace("PATIENT/", "") and "x50" not in caplog.text


def test_a_schema_that_is_no_text_is_damage_too(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        storage.add("P", ["ct"], instances(1)[0])
    path = tmp_path / ".dicomnode/ledger.sqlite"
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"CREATE TABLE instances") + len(b"CREATE TABLE ")] = 0xFF
    path.write_bytes(whole)
    with opened(tmp_path) as storage:
        assert len(storage.ledger.instances(1)) == 1
    assert list((tmp_path / ".dicomnode").glob("ledger-lost*"))


def test_a_rebuild_that_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as storage:
        first = storage.add("P", ["ct"], instances(1)[0])
        make_ready(storage, first)
        claim(storage, first)
        for one in instances(3, seed=2):
            storage.add("P", ["ct"], one)
    for path in (tmp_path / ".dicomnode").glob("ledger.sqlite*"):
        path.unlink()
    calls = []
    real = Ledger.add_instances

    def dying(self: Ledger, case_id: int, rows: list[InstanceRow]) -> None:
        calls.append(case_id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, case_id, rows)

    with monkeypatch.context() as broken:
        broken.setattr(Ledger, "add_instances", dying)
        with pytest.raises(KeyboardInterrupt), opened(tmp_path):
            pass
    with opened(tmp_path) as storage:
        found = {c.folder: len(storage.ledger.instances(c.id)) for c in storage.ledger.cases()}
        assert found == {"P": 1, "P~2": 3}


def test_memory_is_limited_and_let_go() -> None:
    memory = MemoryInstances(KEPT_BESIDES + 100)
    with memory.staging([b"x" * 60]) as staged:
        with pytest.raises(OutOfResources), memory.staging([b"x" * 60]):
            pass
        assert memory.place(staged, "a", "1")
        assert memory.place(staged, "b", "1")
    memory.remove("a", ["1"])
    with pytest.raises(OutOfResources), memory.staging([b"x" * 60]):
        pass
    memory.remove("b", ["1", "2"])
    with memory.staging([b"x" * 60]):
        pass
    assert memory.size("a", "1") is None


def test_the_same_bytes_twice_are_counted_and_let_go_twice() -> None:
    memory, data = MemoryInstances(2 * (KEPT_BESIDES + 50)), b"x" * 40
    with memory.staging([data]) as one, memory.staging([data]) as other:
        assert memory.place(one, "a", "1")
        assert memory.place(other, "b", "1")
    for folder in ("a", "b"):
        memory.remove(folder, ["1"])
    with memory.staging([b"x" * 100]):
        pass


@pytest.mark.parametrize("kind", [MemoryInstances, SharedInstances])
def test_what_is_kept_of_an_image_besides_its_bytes_counts(kind: type[MemoryInstances]) -> None:
    memory, count = kind(1 << 20), 0
    with closing(memory), suppress(OutOfResources), ExitStack() as stack:
        while count < 1000:
            staged = stack.enter_context(memory.staging([b"x"]))
            assert memory.place(staged, "a", str(count))
            count += 1
    # In shared memory each has a page at least.
    assert count == (1 << 20) // (KEPT_BESIDES + (1 if kind is MemoryInstances else 4096))


def test_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "own" / "incoming").mkdir(parents=True)
    files = FileInstances(tmp_path, tmp_path / "own" / "incoming")
    with files.staging([b"one"]) as staged:
        assert files.place(staged, "a/b", "1")
    with files.staging([b"two"]) as staged:
        assert not files.place(staged, "a/b", "1")
        assert files.place(staged, "a/b", "2")
    assert (tmp_path / "a" / "b" / "1").read_bytes() == b"one"
    files.remove("a/b", ["1"])
    assert (tmp_path / "a" / "b" / "2").read_bytes() == b"two"
    files.remove("a/b", ["2"])
    assert not (tmp_path / "a").exists() and tmp_path.exists()


def test_a_ledger_says_what_cannot_be_done() -> None:
    ledger = Ledger(None)
    with pytest.raises(UnknownCase, match="no case 5"):
        ledger.case(5)
    case = ledger.open_case("P", "P")
    with pytest.raises(UnknownCase, match="only a FAILED case"):
        ledger.retry(case.id)
    with pytest.raises(UnknownCase, match="not being processed"):
        ledger.export(case.id, [ResultRow(1, "1", "1", "1", "1", b"")])
    assert not ledger.results(case.id)


def test_old_cases_that_are_done_are_forgotten_and_others_never() -> None:
    ledger = Ledger(None)
    for k in range(10):
        case = ledger.open_case(f"P{k}", f"P{k}")
        ledger.move(case.id, State.RECEIVING, State.DONE if k % 2 else State.FAILED, seal=True)
    ledger.forget(2)
    assert [case.identifier for case in ledger.cases(State.DONE)] == ["P7", "P9"]
    assert len(ledger.cases(State.FAILED)) == 5


def test_those_who_bring_an_image_that_is_on_its_way_wait_for_it_also_where_it_fails(
    storage: Storage,
) -> None:
    (image,) = instances(1)
    begun, go = threading.Event(), threading.Event()

    def fails(size: int) -> bytes:
        begun.set()
        assert go.wait(10) and size
        raise OutOfResources("no room")

    def bring_in_vain() -> None:
        with pytest.raises(OutOfResources):
            storage.add("P", ["ct"], image._replace(digest_of=fails))
        found.append(0)

    found: list[int] = []
    threads = [threading.Thread(target=bring_in_vain)]
    threads[0].start()
    assert begun.wait(10)
    for _ in range(5):
        threads.append(
            threading.Thread(target=lambda: found.append(storage.add("P", ["ct"], image)))
        )
        threads[-1].start()
    while not storage._arriving["P"][image.sop_instance_uid]:
        time.sleep(0.001)
    assert not found
    # Nobody else waits.
    storage.add("other", ["ct"], instances(1, "other")[0])
    go.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    (number,) = set(found) - {0}
    assert found == [0] + [number] * 5
    assert [row.uid for row in storage.ledger.instances(number)] == [image.sop_instance_uid]
    assert not storage._arriving


def test_many_threads_add_to_one_case_and_to_many(storage: Storage) -> None:
    batches = [(f"P{k % 3}", instances(10, f"P{k % 3}", seed=k)) for k in range(9)]

    def work(identifier: str, batch: list[Instance]) -> None:
        for one in batch:
            storage.add(identifier, ["ct"], one)

    threads = [threading.Thread(target=work, args=batch) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        contents = storage.current(f"P{k}")
        assert contents is not None
        wanted = {
            one.sop_instance_uid for name, batch in batches if name == f"P{k}" for one in batch
        }
        assert set(contents.sources["ct"]) == wanted
        rows = storage.ledger.instances(contents.case_id)
        assert len({row.file for row in rows}) == len(rows) == 30


def test_a_result_that_is_not_what_was_kept_is_not_given(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        make_ready(storage, number)
        claim(storage, number)
        storage.results.keep(
            storage.ledger.case(number), [(f"1.{k}", "1", "1", b"result") for k in range(3)]
        )
        rows = storage.results.undelivered(number, "A")
        assert storage.results.read(number, rows[0]) == b"result"
        outbox = tmp_path / ".dicomnode" / "outbox" / str(number)
        (outbox / rows[1].file).write_bytes(b"resulT")
        (outbox / rows[2].file).unlink()
        for row in rows[1:]:
            with pytest.raises(DamagedResult, match=row.uid):
                storage.results.read(number, row)
        storage.outbox.answer(number, "A", [Answer("1.0", 0, True)])
        storage.results.drop(number, "damaged")
        assert storage.results.undelivered(number, "A") == [] and not outbox.exists()
        assert storage.ledger.case(number).state is State.FAILED
        assert storage.ledger.retry(number) is State.READY


def test_odd_things_in_the_own_folder_do_not_keep_a_node_from_starting(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        storage.add("P", ["ct"], instances(1)[0])
    own = tmp_path / ".dicomnode"
    (own / "outbox" / "link").symlink_to(tmp_path)
    for name in ("outbox/zz/sub", "outbox/²", "outbox/7/8", "incoming/folder"):
        (own / name).mkdir(parents=True)
    (own / "outbox" / "file").touch()
    with opened(tmp_path) as storage:
        assert len(storage.ledger.instances(1)) == 1


def test_an_image_that_changed_without_changing_its_size_is_found_before_it_is_used(
    tmp_path: Path,
) -> None:
    first, second = instances(2)
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], first)
        storage.add("P", ["ct"], second)
        make_ready(storage, number)
    victim = tmp_path / "P" / "ct" / "Image_CT_1.dcm"
    data = victim.read_bytes()
    victim.write_bytes(data[:-20] + b"\xff" * 20)
    with opened(tmp_path) as storage:
        storage.verify(storage.ledger.case(number))
        contents = storage.current("P")
        assert contents is not None and first.sop_instance_uid in contents.obstacle
        storage.add("P", ["ct"], first)
        contents = storage.current("P")
        assert contents is not None and not contents.obstacle
        assert victim.read_bytes() == data


def test_a_ledger_of_another_version_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    path = tmp_path / ".dicomnode" / "ledger.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InvalidRootDataDirectory, match="version 99"), opened(tmp_path):
        pass
    assert path.exists()


def test_a_run_with_another_durability_knows_the_images_of_an_earlier_one(tmp_path: Path) -> None:
    series = instances(3)
    changed = instances(1, seed=2)[0]
    other = Instance(series[0].sop_instance_uid, "x", changed.chunks, changed.digest_of)
    for durability, size in (("power", 32), ("process", 16), ("power", 32)):
        storage = Storage(tmp_path, ["ct", "mr"], 0x00100020, 10**9, LOGGER, durability=durability)  # type: ignore[arg-type]
        storage.open()
        try:
            case = storage.add("P", ["ct"], series[0])
            assert storage.add("P", ["ct"], series[1]) == case
            with pytest.raises(DuplicateInstance):
                storage.add("P", ["ct"], other)
            rows = storage.ledger.instances(case)
            assert {len(row.digest) for row in rows} == {size}
            assert len(rows) == 2
            storage.verify(storage.ledger.case(case))
            assert not any(row.damaged for row in storage.ledger.instances(case))
        finally:
            storage.close()
    assert len(list((tmp_path / "P" / "ct").iterdir())) == 2


def test_a_file_that_changed_is_damaged_also_for_a_run_with_another_durability(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
    (file,) = (tmp_path / "P" / "ct").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    storage = Storage(tmp_path, ["ct"], 0x00100020, 10**9, LOGGER, durability="process")
    storage.open()
    try:
        storage.verify(storage.ledger.case(number))
        assert [row.damaged for row in storage.ledger.instances(number)] == [True]
    finally:
        storage.close()


@pytest.mark.parametrize("state", [State.DONE, State.FAILED])
@pytest.mark.parametrize("runs", [("power", "process"), ("process", "power")])
def test_what_is_sent_again_is_a_repeat_also_for_a_run_with_another_durability(
    runs: tuple[Durability, Durability], state: State, tmp_path: Path
) -> None:
    series = instances(2)
    changed = instances(1, seed=2)[0]
    other = Instance(series[0].sop_instance_uid, "x", changed.chunks, changed.digest_of)
    with opened(tmp_path, durability=runs[0]) as storage:
        for one in series:
            number = storage.add("P", ["ct"], one)
        storage.interrupt([number])
        make_ready(storage, number)
        assert claim(storage, number)
        if state is State.DONE:
            storage.results.keep(storage.ledger.case(number), [])
            storage.finish(storage.ledger.case(number))
        else:
            storage.fail(number, "process() failed")
        assert storage.ledger.case(number).state is state
    with opened(tmp_path, durability=runs[1]) as storage:
        for sent, earlier in (([series[1], other], None), (series, number), (series[:1], number)):
            for one in sent:
                again = storage.add("P", ["ct"], one)
            contents = storage.current("P")
            assert contents is not None
            assert storage.park("P", contents) == earlier
            if earlier is None:
                assert again != number
                assert storage.expire("P", contents)


def test_a_sender_that_is_released_while_its_case_is_done_is_no_longer_awaited(
    storage: Storage,
) -> None:
    released: list[threading.Thread] = []
    is_open = [True]

    def is_open_for(case_id: int) -> bool:
        if not released:
            # Its association ends just after that was looked at.
            released.append(threading.Thread(target=storage.released, args=([case_id],)))
            is_open[0] = False
            released[0].start()
            released[0].join(0.2)
            return True
        return is_open[0]

    number = storage.add("P", ["ct"], instances(1)[0])
    make_ready(storage, number)
    claim(storage, number)
    storage.results.keep(storage.ledger.case(number), [])
    storage.is_open_for = is_open_for
    storage.finish(storage.ledger.case(number))
    released[0].join(20)
    assert not storage.ledger.rows("SELECT * FROM interrupted", ())


def test_results_are_known_as_ours_before_anybody_can_send_them_or_not_kept(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = storage.add("P", ["ct"], instances(1)[0])
    make_ready(storage, number)
    claim(storage, number)

    def fails(uids: Iterable[str]) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(storage.outbox, "remember", fails)
    with pytest.raises(sqlite3.OperationalError):
        storage.results.keep(
            storage.ledger.case(number), [("1.2", "1.3", "1.2.840.10008.1.2.1", b"result")]
        )
    assert storage.ledger.case(number).state is State.PROCESSING
    assert not storage.ledger.results(number)
    monkeypatch.undo()
    known: list[bool] = []
    export = storage.ledger.export

    def exported(case_id: int, rows: list[ResultRow]) -> None:
        known.append("1.2" in storage.outbox._made[0])
        export(case_id, rows)

    monkeypatch.setattr(storage.ledger, "export", exported)
    storage.results.keep(
        storage.ledger.case(number), [("1.2", "1.3", "1.2.840.10008.1.2.1", b"result")]
    )
    assert known == [True]
    (row,) = storage.ledger.results(number)
    assert storage.results.read(number, row) == b"result"


def test_rows_that_are_expected_are_there_whatever_the_ledger_is_asked() -> None:
    ledger = Ledger(None)
    case = ledger.open_case("P", "P")
    rows = [InstanceRow("ct", f"1.{k}", f"{k}", 1, b"") for k in range(40)]
    expect(ledger, case.id, rows[:30])
    assert len(ledger.instances(case.id)) == 30
    expect(ledger, case.id, rows[30:32])
    with suppress(ZeroDivisionError), ledger.transaction() as db:
        assert db.execute("SELECT count(*) FROM instances").fetchone() == (32,)
        # What comes meanwhile is not part of it, and so not taken back with it.
        expect(ledger, case.id, rows[32:33])
        assert len(ledger.instances(case.id)) == 32
        raise ZeroDivisionError
    assert ledger.counts(case.id) == {"ct": (33, 0)}
    # A later word counts.
    expect(ledger, case.id, rows[33:34])
    ledger.add_instances(case.id, [rows[33]._replace(damaged=True)])
    assert ledger.counts(case.id) == {"ct": (34, 1)}
    expect(ledger, case.id, [rows[34]])
    ledger.clear(case.id)
    assert ledger.instances(case.id) == []


def test_many_rows_that_are_expected_are_written_though_nobody_asks(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    case = ledger.open_case("P", "P")
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        for k in range(600):
            expect(ledger, case.id, [InstanceRow("ct", f"1.{k}", f"{k}", 1, b"")])
        assert other.execute("SELECT count(*) FROM instances").fetchone() == (512,)
        ledger.close()
        assert other.execute("SELECT count(*) FROM instances").fetchone() == (600,)


@pytest.mark.parametrize("kind", [sqlite3.OperationalError, MemoryError])
def test_rows_that_are_expected_and_cannot_be_written_are_written_later(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    case = ledger.open_case("P", "P")
    real, calls = Ledger._insert, []

    def insert(self: Ledger, rows: Any) -> None:
        calls.append(len(rows))
        real(self, rows)
        if len(calls) % 3:
            raise kind("disk is full")

    monkeypatch.setattr(Ledger, "_insert", insert)

    def expect_many(number: int) -> None:
        for k in range(200):
            uid = f"1.{number}.{k}"
            expect(ledger, case.id, [InstanceRow("ct", uid, uid, 1, b"")])

    threads = [threading.Thread(target=expect_many, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    # Nothing is told of a case while some of it is not there.
    outcomes: list[int] = []
    while not outcomes:
        with suppress(OutOfResources, MemoryError):
            outcomes.append(len(ledger.instances(case.id)))
    assert outcomes == [1600] and len(calls) > 2
    ledger.close()


@pytest.mark.parametrize("count", [3, 33, 80])
def test_rows_for_which_there_is_no_room_say_so_and_none_is_there(
    count: int, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    case = ledger.open_case("P", "P")
    ledger.add_instances(case.id, [])
    ((pages,),) = ledger._db.execute("PRAGMA page_count")
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    # Of 33 the last one is a statement of its own.
    rows = [InstanceRow("ct", f"1.{k}", "x" * 4000, 1, b"") for k in range(count)]
    if count == 33:
        rows = [row._replace(file="x") for row in rows[:32]] + [
            rows[32]._replace(file="x" * 100_000)
        ]
    with pytest.raises(NoRoom, match="full"):
        ledger.add_instances(case.id, rows)
    assert not ledger.instances(case.id)
    ledger._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    ledger.add_instances(case.id, rows)
    assert len(ledger.instances(case.id)) == count
    ledger.close()


def test_the_own_folders_stay_also_where_the_root_is_named_by_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root, own = Path(), Path(".dicomnode")
    for folder in ("incoming", "outbox"):
        (own / folder).mkdir(parents=True)
    kept = FileInstances(root, own / "incoming")
    for folder in (".dicomnode/outbox/1", "P/ct"):
        with kept.staging([b"image"]) as staged:
            assert kept.place(staged, folder, "one.dcm")
        kept.remove(folder, ["one.dcm", "gone.dcm"])
    assert sorted(one.name for one in own.iterdir()) == ["incoming", "outbox"]
    assert [one.name for one in tmp_path.iterdir()] == [".dicomnode"]


def test_turns_are_one_after_the_other_and_their_locks_do_not_pile_up() -> None:
    turns, running, most, order = Turns(), 0, 0, []

    def work(name: str, number: int) -> None:
        nonlocal running, most
        with turns.of(name), turns.of(name):
            if name == "P":
                running += 1
                most = max(most, running)
                time.sleep(0.001)
                running -= 1
            order.append((name, number))

    threads = [
        threading.Thread(target=work, args=(name, number))
        for number in range(20)
        for name in ("P", f"Q{number}")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == 1 and len(order) == 40
    assert not turns.held and len(turns.spare) <= 21
    with ExitStack() as stack:
        for number in range(200):
            stack.enter_context(turns.of(str(number)))
    assert not turns.held and len(turns.spare) == 64


def test_somebody_who_reads_the_ledger_does_not_hold_up_a_start(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
    with closing(sqlite3.connect(tmp_path / ".dicomnode/ledger.sqlite")) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM cases").fetchone()
        start = time.monotonic()
        with opened(tmp_path) as storage:
            assert time.monotonic() - start < 10
            assert len(storage.ledger.instances(number)) == 1
            assert storage.ledger.rows("PRAGMA busy_timeout", ()) == [(30_000,)]


def test_a_start_that_is_broken_off_lets_the_root_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Journal) -> None:
        raise KeyboardInterrupt

    storage = Storage(tmp_path, ["ct"], 0x00100020, 10**9, LOGGER)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "open", broken)
        with pytest.raises(KeyboardInterrupt):
            storage.open()
    with opened(tmp_path) as storage:
        assert not storage.ledger.cases()


def test_a_turn_that_is_interrupted_is_given_to_nobody() -> None:
    turns = Turns()
    with turns.of("P"):
        pass
    (turn,) = turns.spare
    real = turn.condition.acquire

    def acquire(*given: Any) -> bool:
        real(*given)
        raise KeyboardInterrupt

    turn.condition.acquire = acquire  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), turns.of("Q"):
        pass
    assert not turns.held and not turns.spare

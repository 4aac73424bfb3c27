"""The journal: what was answered for is there after a crash, and what is over stays over."""

import errno
import logging
import resource
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.e2e import wire
from tests.unit.test_storage import instances, make_ready

from dicomnode.errors import InvalidRootDataDirectory, OutOfResources
from dicomnode.lib.dicom import JournalFile, Received, Receiver
from dicomnode.storage import journal, journal_file, replay
from dicomnode.storage import ledger as ledger_module
from dicomnode.storage.commitments import Commitment
from dicomnode.storage.instances import Instance, Staged
from dicomnode.storage.ledger import State
from dicomnode.storage.store import Durability, Storage

CT = "1.2.840.10008.5.1.4.1.1.2"
LOGGER = logging.getLogger("dicomnode.test")


def started(root: Path, durability: Durability = "power") -> Storage:
    storage = Storage(root, ["ct", "mr"], 0x00100020, 10**9, LOGGER, durability=durability)
    storage.open()
    return storage


@contextmanager
def running(root: Path, durability: Durability = "power") -> Iterator[Storage]:
    storage = started(root, durability)
    try:
        yield storage
    finally:
        storage.close()


def cut(root: Path, copy: Path, *, files: bool = False, ledger: Path | None = None) -> Path:
    """What is there when the node ends now: without images that were not flushed, and with an older ledger."""
    shutil.copytree(root, copy)
    if not files:
        for one in copy.glob("[!.]*"):
            shutil.rmtree(one)
    if ledger is not None:
        for one in copy.glob(".dicomnode/ledger.sqlite*"):
            one.unlink()
        for one in ledger.glob("ledger.sqlite*"):
            shutil.copy(one, copy / ".dicomnode" / one.name)
    return copy


def saved_ledger(root: Path, place: Path) -> Path:
    place.mkdir()
    for one in root.glob(".dicomnode/ledger.sqlite*"):
        shutil.copy(one, place / one.name)
    return place


def uids_of(storage: Storage, identifier: str, name: str = "ct") -> set[str]:
    contents = storage.current(identifier)
    if contents is None or contents.obstacle:
        return set()
    return set(contents.sources[name])


def _io_error(descriptor: int) -> None:
    raise OSError(5, "Input/output error")


def _full(ledger: Any) -> None:
    raise OutOfResources("the ledger cannot be written")


def digests_hold(storage: Storage) -> bool:
    """Whether each file is what was received."""
    for case in storage.ledger.cases():
        storage.verify(case)
    return not any(
        one.damaged for case in storage.ledger.cases() for one in storage.ledger.instances(case.id)
    )


@pytest.mark.parametrize("is_ledger_older", [False, True])
@pytest.mark.parametrize("has_files", [False, True])
def test_images_that_were_not_flushed_are_restored(
    has_files: bool, is_ledger_older: bool, tmp_path: Path
) -> None:
    root, images = tmp_path / "root", instances(5)
    with running(root) as storage:
        storage.add("P", ["ct", "mr"], images[0])
        ledger = saved_ledger(root, tmp_path / "ledger") if is_ledger_older else None
        for one in images[1:]:
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left", files=has_files, ledger=ledger)
    for _ in range(2):
        with running(left) as storage:
            assert uids_of(storage, "P") == {one.sop_instance_uid for one in images}
            assert uids_of(storage, "P", "mr") == {images[0].sop_instance_uid}
            assert digests_hold(storage)
            # What its sender brings again is known.
            for one in images:
                storage.add("P", ["ct"], one)
            assert len(list(left.glob("P/ct/*"))) == 5


@pytest.mark.parametrize("damage", [b"", b"part", b"x" * 5000])
def test_a_file_that_the_disk_has_in_part_is_made_whole(damage: bytes, tmp_path: Path) -> None:
    root, images = tmp_path / "root", instances(2)
    with running(root) as storage:
        for one in images:
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left", files=True)
    for path in left.glob("P/ct/*"):
        path.write_bytes(damage)
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 2 and digests_hold(storage)


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_killed_node_has_the_rows_that_were_expected(
    durability: Durability, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, images = tmp_path / "root", instances(3)
    # A large one, too: its file is flushed, and its row is here only.
    monkeypatch.setattr(journal, "MOST_BYTES", len(b"".join(images[2].chunks)) - 1)
    with running(root, durability) as storage:
        for one in images:
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left", files=True)
    with closing(sqlite3.connect(left / ".dicomnode" / "ledger.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM instances").fetchone() == (0,)
        database.rollback()
    with running(left, durability) as storage:
        assert len(uids_of(storage, "P")) == 3 and digests_hold(storage)
    # A file that was lost is waited for, though the ledger did not know of it.
    again = tmp_path / "again"
    with running(root, durability) as storage:
        monkeypatch.setattr(journal, "MOST_BYTES", 0)
        storage.add("Q", ["ct"], instances(1, "Q", 2)[0])
        shutil.copytree(root, again)
    shutil.rmtree(again / "Q")
    with running(again, durability) as storage:
        contents = storage.current("Q")
        assert contents is not None and "is damaged" in contents.obstacle


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_a_case_that_is_over_does_not_come_back(is_forgotten: bool, tmp_path: Path) -> None:
    root = tmp_path / "root"
    with running(root) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        make_ready(storage, number)
        contents = storage.current("P")
        assert contents is not None and storage.seal(storage.ledger.case(number), contents)
        assert storage.results.keep(storage.ledger.case(number), []) == 0
        storage.finish(storage.ledger.case(number))
        assert storage.ledger.case(number).state is State.DONE
        if is_forgotten:
            storage.ledger.forget(0)
        left = cut(root, tmp_path / "left")
    with running(left) as storage:
        assert storage.current("P") is None and not list(left.glob("P/*/*"))
        assert len(storage.ledger.cases()) == (0 if is_forgotten else 1)
        # The same folder again, and the same images.
        storage.add("P", ["ct"], instances(1)[0])
        again = cut(left, tmp_path / "again")
    with running(again) as storage:
        assert len(uids_of(storage, "P")) == 1 and digests_hold(storage)


def test_images_are_restored_where_the_ledger_was_lost_as_well(tmp_path: Path) -> None:
    root, images = tmp_path / "root", instances(3)
    with running(root) as storage:
        for one in images:
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left")
    for one in left.glob(".dicomnode/ledger.sqlite*"):
        one.unlink()
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 3 and digests_hold(storage)


def test_one_file_follows_the_other_and_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "FILE_BYTES", 8 << 10)
    root, images = tmp_path / "root", instances(40)
    starts: list[int] = []
    real = journal_file.File.start

    def start(self: Any, head: Any) -> JournalFile:
        starts.append(head.generation)
        return real(self, head)

    monkeypatch.setattr(journal_file.File, "start", start)
    with running(root) as storage:
        for count, one in enumerate(images, 1):
            storage.add("P", ["ct"], one)
            if count % 10 == 0:
                # Of the images whose files were flushed in between the disk has all.
                left = cut(root, tmp_path / f"left-{count}", files=True)
                with running(left) as other:
                    assert len(uids_of(other, "P")) == count and digests_hold(other)
        threads = [
            threading.Thread(
                target=lambda k=k: [
                    storage.add(f"Q{k}", ["ct"], one) for one in instances(30, f"Q{k}", k)
                ]
            )
            for k in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for k in range(6):
            assert len(uids_of(storage, f"Q{k}")) == 30
        left = cut(root, tmp_path / "left", files=True)
    assert max(starts) > 10
    with running(left) as storage:
        assert sum(len(uids_of(storage, f"Q{k}")) for k in range(6)) == 180 and digests_hold(
            storage
        )


def test_only_what_the_disk_has_not_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    with running(root) as storage:
        for one in instances(3):
            storage.add("P", ["ct"], one)
    # Closed, it tells of nothing.
    assert not cut(root, tmp_path / "closed").joinpath("P").exists()
    with running(tmp_path / "closed") as storage:
        assert not list((tmp_path / "closed").glob("P/ct/*"))
    with running(root) as storage:
        storage.add("P", ["ct"], instances(4)[3])
        left = cut(root, tmp_path / "left", files=True)
    with caplog.at_level(logging.WARNING), running(left) as storage:
        assert len(uids_of(storage, "P")) == 4
    assert "0 images and 1 rows are from the journal" in caplog.text


def test_a_damaged_record_does_not_hide_the_others(tmp_path: Path) -> None:
    root, images = tmp_path / "root", instances(5)
    with running(root) as storage:
        for one in images:
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left", files=True)
    for one in left.glob("P/ct/Image_CT_[1245].dcm"):
        one.unlink()
    path = left / ".dicomnode" / "journal-1"
    data = bytearray(path.read_bytes())
    nonce = bytes(data[16:32])
    at, starts = 0, []
    while (at := data.find(nonce, at)) >= 0:
        starts.append(at)
        at += 16
    # The first two of them are those of the head.
    assert len(starts) == 7
    for start in (starts[2], starts[4]):
        data[start + 60] ^= 1
    path.write_bytes(data)
    with running(left) as storage:
        wanted = {images[k].sop_instance_uid for k in (1, 2, 3, 4)}
        assert uids_of(storage, "P") == wanted and digests_hold(storage)


@pytest.mark.parametrize(
    "head", [b"", b"\0" * 4096, b"dicomnode jrnl 1" + b"x" * 5000, secrets.token_bytes(3000)]
)
def test_whatever_is_in_the_files_of_the_journal_a_node_starts(head: bytes, tmp_path: Path) -> None:
    root, images = tmp_path / "root", instances(2)
    with running(root) as storage:
        storage.add("P", ["ct"], images[0])
    for number in (1, 2):
        (root / ".dicomnode" / f"journal-{number}").write_bytes(head)
    with running(root) as storage:
        storage.add("P", ["ct"], images[1])
        left = cut(root, tmp_path / "left", files=True)
        (left / "P" / "ct" / "Image_CT_2.dcm").unlink()
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 2 and digests_hold(storage)


@pytest.mark.parametrize(
    ("folder", "file", "is_ours"),
    [
        ("P", "evil.dcm", True),
        ("../../P", "evil.dcm", False),
        ("..", "evil.dcm", False),
        ("P/..", "evil.dcm", False),
        ("", "evil.dcm", False),
        ("P", "../../../evil.dcm", False),
        ("P", "..", False),
    ],
)
def test_no_record_leads_out_of_the_root(
    folder: str, file: str, is_ours: bool, tmp_path: Path
) -> None:
    image = instances(1)[0]
    with running(tmp_path / "root") as storage:
        storage.add("P", ["ct"], image)
        assert storage._journal is not None
        records = storage._journal._records
        with (tmp_path / "image").open("w+b") as opened:
            opened.write(b"evil")
            opened.flush()
            text = f'[1, "{folder}", [["ct", "1.2", "{file}", 4, ""]]]'
            assert records.keep(text, opened.fileno(), 4, True, str(tmp_path), "linked")
            records.settle()
        left = cut(tmp_path / "root", tmp_path / "left")
    known = set(tmp_path.iterdir())
    with running(left) as storage:
        found = [row.uid for row in storage.ledger.instances(1)]
        assert found == (["1.2", image.sop_instance_uid] if is_ours else [image.sop_instance_uid])
    assert set(tmp_path.iterdir()) == known
    assert bool(list(tmp_path.rglob("evil.dcm"))) == is_ours


def test_a_disk_that_fails_to_keep_files_has_them_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_file, "FILE_BYTES", 8 << 10)

    root, images = tmp_path / "root", instances(30)
    stored: list[Instance] = []
    with monkeypatch.context() as broken:
        broken.setattr(journal, "sync_filesystem", _io_error)
        storage = started(root)
        for one in images:
            try:
                storage.add("P", ["ct"], one)
            except OutOfResources:
                continue
            stored.append(one)
        assert storage._journal is not None and not storage._journal._is_open
        assert len(stored) >= 29
        storage.close()
    assert "the journal cannot be used any more" in caplog.text
    # The page cache has what the disk has not: nothing tells by looks.
    written: list[str] = []
    real = replay.Replay._write

    def write(self: Any, record: Any, images: Any, anew: bool) -> int:
        written.extend(row.file for row in images if anew)
        return real(self, record, images, anew)

    monkeypatch.setattr(replay.Replay, "_write", write)
    with running(root) as storage:
        assert len(uids_of(storage, "P")) == len(stored) and digests_hold(storage)
    assert len(written) >= 2


def test_a_start_on_a_disk_that_fails_does_not_have_the_next_one_trust_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    with running(root) as storage:
        for one in instances(3):
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left", files=True)

    with monkeypatch.context() as broken:
        broken.setattr(journal, "sync_filesystem", _io_error)
        with pytest.raises(InvalidRootDataDirectory, match="EIO"):
            started(left)
    moments = {path.stat().st_ctime_ns for path in left.glob("P/ct/*")}
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 3
    assert moments.isdisjoint(path.stat().st_ctime_ns for path in left.glob("P/ct/*"))


def test_what_a_disk_may_not_have_kept_is_compared_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        assert storage.is_verified(number) and storage._journal is not None
        storage._journal._give_up(OSError(5, "Input/output error"))
        assert not storage.is_verified(number)
        (path,) = tmp_path.glob("P/ct/*")
        path.write_bytes(bytes(path.stat().st_size))
        storage.verify(storage.ledger.case(number))
        contents = storage.current("P")
        assert contents is not None and "is damaged" in contents.obstacle
        assert storage.is_verified(number)


def test_a_case_that_is_over_stays_so_where_the_ledger_is_lost_and_its_folder_has_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, images = tmp_path / "root", instances(2, seed=7)
    with running(root) as storage:
        number = 0
        for one in instances(3):
            number = storage.add("P", ["ct"], one)
        make_ready(storage, number)
        contents = storage.current("P")
        assert contents is not None and storage.seal(storage.ledger.case(number), contents)
        storage.results.keep(storage.ledger.case(number), [])
        storage.finish(storage.ledger.case(number))
        with monkeypatch.context() as large:
            large.setattr(journal, "MOST_BYTES", 0)
            for one in images:
                storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left", files=True)
        # Without the record that says so they come back, and nothing that is there goes.
        for path in (tmp_path / "left" / ".dicomnode").glob("ledger.sqlite*"):
            path.unlink()
        unsaid = shutil.copytree(left, tmp_path / "unsaid")
    path = unsaid / ".dicomnode" / "journal-1"
    data = path.read_bytes()
    at = data.index(f'[{number}, "", []]'.encode())
    path.write_bytes(data[:at] + b"x" + data[at + 1 :])
    wanted = {one.sop_instance_uid for one in images}
    with running(left) as storage:
        assert uids_of(storage, "P") == wanted
    with running(unsaid) as storage:
        assert uids_of(storage, "P") > wanted


def test_an_image_that_was_refused_does_not_join_a_case_that_takes_no_more(tmp_path: Path) -> None:
    root, images = tmp_path / "root", instances(3)
    with running(root) as storage:
        number = storage.add("P", ["ct"], images[0])
        storage.add("P", ["ct"], images[1])
        make_ready(storage, number)
        contents = storage.current("P")
        assert contents is not None and storage.seal(storage.ledger.case(number), contents)
        # As a record of which the flush failed.
        assert storage._journal is not None
        with (tmp_path / "image").open("wb+") as file:
            file.write(b"".join(images[2].chunks))
            file.flush()
            size = file.tell()
            text = f'[{number}, "P", [["ct", "{images[2].sop_instance_uid}", "x.dcm", {size}, ""]]]'
            records = storage._journal._records
            assert records.keep(text, file.fileno(), size, True, str(tmp_path), "linked")
            records.settle()
        left = cut(root, tmp_path / "left")
    with running(left) as storage:
        assert len(storage.ledger.instances(number)) == 2 and digests_hold(storage)
        assert not list(left.glob("P/ct/x.dcm"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_head_that_is_damaged_is_there_once_more_or_is_told(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    with running(root) as storage:
        for one in instances(3):
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left")
    path = left / ".dicomnode" / "journal-1"
    data = bytearray(path.read_bytes())
    for number in range(count):
        data[256 * number + 40] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.ERROR), running(left) as storage:
        assert len(uids_of(storage, "P")) == (3 if count == 1 else 0)
    assert ("journal-1 is damaged where it begins" in caplog.text) == (count == 2)


def test_a_journal_that_cannot_be_read_is_told_as_that(tmp_path: Path) -> None:
    with running(tmp_path):
        pass
    path = tmp_path / ".dicomnode" / "journal-2"
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidRootDataDirectory, match="journal-2 cannot be read: Is a directory"):
        started(tmp_path)
    path.rmdir()
    with running(tmp_path):
        pass


def test_without_a_thread_more_it_is_cleaned_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "FILE_BYTES", 8 << 10)

    class Thread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    images = instances(20)
    with running(tmp_path) as storage:
        with monkeypatch.context() as broken:
            broken.setattr(journal.threading, "Thread", Thread)
            for one in images[:10]:
                storage.add("P", ["ct"], one)
        for one in images[10:]:
            storage.add("P", ["ct"], one)
        assert storage._journal is not None and storage._journal._is_open
        assert len(uids_of(storage, "P")) == 20


def test_a_ledger_that_is_damaged_at_the_end_lets_the_root_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Any) -> None:
        raise sqlite3.DatabaseError("malformed")

    with monkeypatch.context() as broken:
        storage = started(tmp_path)
        storage.add("P", ["ct"], instances(1)[0])
        broken.setattr(type(storage.ledger), "write_expected", damaged)
        storage.close()
    with running(tmp_path) as storage:
        assert len(uids_of(storage, "P")) == 1


def test_what_tells_of_no_image_is_told_while_the_ledger_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        with monkeypatch.context() as broken:
            broken.setattr(type(storage.ledger), "write_expected", _full)
            ledger = storage.ledger
            assert ledger.changes() >= 0 and ledger.case(number).state is State.RECEIVING
            assert len(ledger.cases()) == 1 and ledger.summary() and ledger.queue(State.READY) == []
            for asked in (ledger.instances, ledger.counts, ledger.repeated):
                with pytest.raises(OutOfResources):
                    asked(number)
        assert len(storage.ledger.instances(number)) == 1


def test_a_ledger_without_room_holds_the_journal_up_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "FILE_BYTES", 8 << 10)
    root, images = tmp_path / "root", instances(60)
    stored: list[Instance] = []
    with running(root) as storage:
        storage.add("P", ["ct"], images[0])
        with monkeypatch.context() as broken:
            broken.setattr(type(storage.ledger), "write_expected", _full)
            # What cannot be written now is in the journal all the same.
            broken.setattr("dicomnode.storage.ledger._MOST_EXPECTED", 3)
            for one in images[1:40]:
                try:
                    storage.add("P", ["ct"], one)
                except OutOfResources:
                    continue
                stored.append(one)
            assert 0 < len(stored) < 39
            left = cut(root, tmp_path / "left")
        for one in images[40:]:
            storage.add("P", ["ct"], one)
        assert storage._journal is not None and storage._journal._is_open
        assert len(uids_of(storage, "P")) == 1 + len(stored) + 20
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 1 + len(stored)


def test_a_start_without_room_to_restore_says_so_and_the_next_one_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    with running(root) as storage:
        for one in instances(3):
            storage.add("P", ["ct"], one)
        left = cut(root, tmp_path / "left")
    with monkeypatch.context() as full:

        def place(*_: object) -> bool:
            raise OutOfResources("cannot write: ENOSPC")

        full.setattr("dicomnode.storage.instances.FileInstances.place", place)
        with pytest.raises(InvalidRootDataDirectory, match="no room for a start"):
            started(left)
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 3


@pytest.mark.parametrize("trouble", ["old system", "FUSE", "no room", "no file"])
def test_without_a_journal_images_are_flushed_one_by_one(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "old system":
        monkeypatch.setattr(journal, "_linux_version", lambda: (5, 7))
    elif trouble == "FUSE":
        monkeypatch.setattr(journal, "filesystem_type", lambda _: 0x65735546)
    elif trouble == "no room":
        monkeypatch.setattr("dicomnode.storage.disk.Disk.has_room", lambda _, size: size < 1 << 20)
    else:

        def failing(self: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(journal_file.File, "widen", failing)
    with running(tmp_path / "root") as storage:
        staged = Staged(1)
        assert storage._journal is not None
        storage._journal.prepare(staged, None)
        assert not staged.is_kept and storage.named_above is None
        for one in instances(3):
            storage.add("P", ["ct"], one)
        left = cut(tmp_path / "root", tmp_path / "left", files=True)
    with closing(sqlite3.connect(left / ".dicomnode" / "ledger.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM instances").fetchone() == (3,)


def test_a_run_of_another_durability_restores_what_the_one_before_kept(tmp_path: Path) -> None:
    with running(tmp_path / "root") as storage:
        for one in instances(3):
            storage.add("P", ["ct"], one)
        left = cut(tmp_path / "root", tmp_path / "left")
    with running(left, "process") as storage:
        assert len(uids_of(storage, "P")) == 3 and digests_hold(storage)
        storage.add("P", ["ct"], instances(4)[3])
        again = cut(left, tmp_path / "again", files=True)
    with running(again, "power") as storage:
        assert len(uids_of(storage, "P")) == 4 and digests_hold(storage)


def test_a_file_of_the_journal_takes_wrong_arguments_for_what_they_are(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        for wrong in (b"", b"x" * 15, b"x" * 17):
            with pytest.raises(ValueError, match="16"):
                JournalFile(file.fileno(), wrong, 0, 4096, True)
        with pytest.raises(ValueError, match="open descriptor"):
            JournalFile(-1, b"x" * 16, 0, 4096, True)
        records = JournalFile(file.fileno(), b"x" * 16, 512, 4096, True)
        with pytest.raises(ValueError, match="open descriptor"):
            records.keep("text", -1, 1, True, tmp_path, "name")
        for with_image in (True, False):
            with pytest.raises(OSError, match="0 of 10 bytes"):
                records.keep("text", file.fileno(), 10, with_image, tmp_path, "name")
        with pytest.raises(FileNotFoundError):
            records.keep("text", file.fileno(), 0, True, tmp_path / "missing", "name")
        assert records.keep("text", file.fileno(), 0, True, tmp_path, "file") is False
        assert records.keep("x" * 4096, file.fileno(), 0, True, tmp_path, "name") is None
        assert not records.append("x" * 4096)
        assert not records.has_failed and not (tmp_path / "name").exists()
        assert records.append("text")
        records.settle()
        records.finish()
        assert not records.append("text")
        data = Path(file.name).read_bytes()
        assert len(data) == 1024
        assert data[512:528] == b"x" * 16 and struct.unpack_from("<II", data, 544) == (4, 0)


def requested(image: Instance) -> Instance:
    """An image with the request that may have brought it."""
    receiver = Receiver([(3, wire.EXPLICIT)], 1 << 20, 1 << 20, 1 << 20)
    request = receiver.offer(wire.store(image.sop_instance_uid, bytes(image.chunks[1])))
    assert isinstance(request, Received)
    return image._replace(request=request, is_awaited=True)


def status_of(image: Instance) -> int | None:
    assert image.request is not None
    return image.request.status


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_request_is_answered_when_its_image_is_kept_and_not_seen_yet(
    durability: Durability, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, another = map(requested, instances(2))
    with running(tmp_path / "root", durability) as storage:
        seen: list[object] = []

        def on_added(number: int) -> None:
            left = cut(tmp_path / "root", tmp_path / "left", files=durability == "process")
            with running(left, durability) as other:
                seen.append((status_of(one), uids_of(other, "P"), storage._arriving))
            assert storage._open_cases["P"].rows == {}

        storage.add("P", ["ct", "mr"], one, on_added)
        assert seen == [(0, {one.sop_instance_uid}, {})]
        # Once.
        assert one.request is not None
        one.request.answer(0xA700)
        assert status_of(one) == 0
        assert storage._journal is not None
        with monkeypatch.context() as full:
            full.setattr(storage._journal, "_turn", lambda _: _full(None))
            full.setattr(storage._journal, "_records", _FullRecords())
            with pytest.raises(OutOfResources):
                storage.add("P", ["ct", "mr"], another)
        assert status_of(another) is None and len(list((tmp_path / "root").glob("P/*/*"))) == 2
        storage.add("P", ["ct", "mr"], another)
        assert status_of(another) == 0 and uids_of(storage, "P", "mr") == uids_of(storage, "P")


class _FullRecords:
    def keep(self, *_: object) -> None:
        """There is no room."""


@pytest.mark.parametrize("trouble", ["lost", "unwritable"])
def test_a_journal_that_cannot_go_on_is_given_up_and_the_node_is_not(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "FILE_BYTES", 8 << 10)
    root, images = tmp_path / "root", [requested(one) for one in instances(20)]
    refused: list[Instance] = []
    with running(root) as storage:
        assert storage._journal is not None
        for number, one in enumerate(images):
            if number == 5 and trouble == "lost":
                for path in root.glob(".dicomnode/journal-*"):
                    path.unlink()
            elif number == 5:
                real = storage._journal._records
                with (root / "sealed").open("w+b") as file, (root / "sealed").open("rb") as sealed:
                    file.truncate(8 << 10)
                    broken = JournalFile(sealed.fileno(), b"x" * 16, 512, 8 << 10, True)
                real.finish()
                storage._journal._records = broken
            try:
                storage.add("P", ["ct"], one)
            except OutOfResources:
                refused.append(one)
                assert status_of(one) is None
        # What of its own is lost, and nothing else.
        assert len(refused) == (trouble == "unwritable") and not storage._journal._is_open
        assert not any(list(root.glob(f"P/ct/{one.name}.dcm")) for one in refused)
        left = cut(root, tmp_path / "left", files=True)
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 20 - len(refused) and digests_hold(storage)


def test_a_journal_that_finds_no_descriptor_goes_on_when_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "FILE_BYTES", 8 << 10)
    images, kept = instances(12), []
    with running(tmp_path / "root") as storage:
        assert storage._journal is not None
        with monkeypatch.context() as scarce:
            scarce.setattr(journal_file.File, "start", lambda *_: _no_descriptor())
            for one in images[:6]:
                with suppress(OutOfResources):
                    storage.add("P", ["ct"], one)
                    kept.append(one.sop_instance_uid)
        assert 0 < len(kept) < 6 and uids_of(storage, "P") == set(kept)
        for one in images:
            storage.add("P", ["ct"], one)
        assert storage._journal._is_open and len(uids_of(storage, "P")) == 12
        left = cut(tmp_path / "root", tmp_path / "left", files=True)
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 12 and digests_hold(storage)


def _no_descriptor() -> JournalFile:
    raise OSError(errno.EMFILE, "Too many open files")


@contextmanager
def held_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """What comes after an answer waits until this ends; free for each that was answered."""
    go_on, real = threading.Event(), ledger_module.Ledger.expect
    answered = threading.Semaphore(0)

    def late(self: ledger_module.Ledger, *given: Any) -> None:
        answered.release()
        assert go_on.wait(60)
        real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module.Ledger, "expect", late)
        try:
            yield answered
        finally:
            go_on.set()


def test_what_is_answered_and_not_in_its_case_yet_holds_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = map(requested, instances(3))
    with running(tmp_path) as storage, ThreadPoolExecutor(8) as pool:
        storage.commitments.ask("SENDER", Commitment("1.2", {second.sop_instance_uid: CT}))
        number = storage.add("P", ["ct"], first)
        before = storage.current("P")
        assert before is not None
        with held_after_the_answer(monkeypatch) as answered:
            adding = pool.submit(storage.add, "P", ["ct"], second)
            assert answered.acquire(timeout=30) and status_of(second) == 0
            other = pool.submit(storage.add, "Q", ["ct"], third)
            assert answered.acquire(timeout=30) and status_of(third) == 0
            assert not storage.expire("P", before)
            make_ready(storage, number)
            case = storage.ledger.case(number)
            assert not storage.seal(case, before)
            waiting = [
                pool.submit(storage.add, "P", ["ct"], second),
                pool.submit(storage.kept, "1.2", [second.sop_instance_uid]),
            ]
            # The other file is used at once, and this one is cleared when all of it is expected.
            assert storage._journal is not None
            storage._journal._begin_other(storage._journal._records)
            cleaning = storage._journal._cleaning
            assert not wait([adding, other, *waiting], 0.2, FIRST_COMPLETED).done
            assert cleaning is not None and cleaning.is_alive()
            assert all(file.head is not None for file in storage._journal._files)
        assert [one.result(30) for one in waiting] == [number, {second.sop_instance_uid: CT}]
        cleaning.join(30)
        assert storage._journal._files[1].head is None
        assert adding.result(30) == number and other.result(30)
        assert not storage.seal(case, before)
        after = storage.current("P")
        assert after is not None and len(after.sources["ct"]) == 2
        make_ready(storage, number)
        assert storage.seal(storage.ledger.case(number), after)


def test_an_image_that_is_answered_is_in_its_case_whatever_fails_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, one, another = map(requested, instances(3))

    def no_memory(*_: object) -> None:
        raise MemoryError

    with running(tmp_path) as storage:
        storage.add("P", ["ct"], first)
        with monkeypatch.context() as broken:
            broken.setattr(ledger_module, "_MOST_EXPECTED", 1)
            broken.setattr(storage.ledger, "write_expected", no_memory)
            assert storage.add("P", ["ct", "mr"], one) == 1
        with monkeypatch.context() as broken:
            broken.setattr(storage.ledger, "expect", no_memory)
            with pytest.raises(MemoryError):
                storage.add("P", ["ct"], another)
        assert status_of(one) == status_of(another) == 0
        contents = storage.current("P")
        assert contents is not None
        assert [len(contents.sources[name]) for name in ("ct", "mr")] == [3, 1]
        left = cut(tmp_path, tmp_path.with_name("left"))
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 3 and digests_hold(storage)


@pytest.mark.parametrize("is_distrusted", [False, True])
def test_a_record_that_failed_does_not_leave_its_image_in_the_case(
    is_distrusted: bool, tmp_path: Path
) -> None:
    image = instances(1)[0]
    with running(tmp_path / "root") as storage:
        number = storage.add("P", ["ct"], image)
        assert storage._journal is not None and storage._journal._records is not None
        # As that of a large image, whose file has lost its name again.
        text = f'[{number}, "P", [["ct", "1.2", "x.dcm", 100000, ""]]]'
        assert storage._journal._records.append(text)
        storage._journal._records.settle()
        if is_distrusted:
            storage._journal._give_up(OSError(5, "Input/output error"))
        left = cut(tmp_path / "root", tmp_path / "left")
    with running(left) as storage:
        found = {row.uid: row.damaged for row in storage.ledger.instances(number)}
        lost = {} if is_distrusted else {"1.2": True}
        assert found == {image.sop_instance_uid: False, **lost}


def test_what_is_kept_settles_before_its_file_is_let_go_also_after_a_failure(
    tmp_path: Path,
) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(4096)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        records = JournalFile(file.fileno(), b"x" * 16, 512, 1 << 20, False)
        assert records.append("kept")
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                records.append("fails" * 1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
        assert records.has_failed
        with ThreadPoolExecutor(1) as pool:
            finishing = pool.submit(records.finish)
            assert not wait([finishing], 0.1).done
            records.settle()
            finishing.result(10)


def test_a_record_that_fails_while_the_journal_is_closed_has_images_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = started(tmp_path)
    storage.add("P", ["ct"], instances(1)[0])
    assert storage._journal is not None
    with (tmp_path / "sealed").open("w+b") as file, (tmp_path / "sealed").open("rb") as sealed:
        file.truncate(8 << 10)
        broken = JournalFile(sealed.fileno(), b"x" * 16, 512, 8 << 10, True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        broken.append("fails")
    # Whoever brought it has not come to deal with it.
    real, storage._journal._records = storage._journal._records, broken
    real.finish()
    storage.close()
    heads = [
        journal_file.head_of((tmp_path / ".dicomnode" / f"journal-{k}").read_bytes())
        for k in (1, 2)
    ]
    assert [one.is_distrusted for one in heads if one is not None] == [True]
    with running(tmp_path) as storage:
        assert len(uids_of(storage, "P")) == 1 and digests_hold(storage)


#: After so many large images of an association files have names ahead.
UNNAMED = 2


@contextmanager
def brought(root: Path, images: Sequence[Instance]) -> Iterator[list[Instance]]:
    """Images as an association brings them, large ones, one after the other into files."""
    incoming, brought = root / ".dicomnode" / "incoming", []
    ours, theirs = socket.socketpair()
    with ours, theirs, ExitStack() as requests:
        receiver = Receiver(
            [(3, wire.EXPLICIT)], 1 << 20, 1 << 20, 1 << 20, ours.fileno(), ours.fileno(),
            folder=incoming, named_above=0,
        )  # fmt: skip
        requests.callback(receiver.close)
        for image in images:
            theirs.sendall(wire.store(image.sop_instance_uid, bytes(image.chunks[1])))
            request = receiver.receive(10)
            assert isinstance(request, Received) and request.file is not None
            requests.callback(request.close)
            descriptor, size = request.file
            staged = Staged(size, descriptor)
            brought.append(image._replace(chunks=(), arrived=staged, request=request))
        yield brought


def names_in(root: Path) -> list[str]:
    """The names of files that are in the folder of incoming ones."""
    return sorted(one.name for one in (root / ".dicomnode" / "incoming").iterdir())


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_BYTES", 0)


def without_names_ahead(root: Path, copy: Path, *, ledger: bool) -> Path:
    """What a power cut leaves of images of which the names had not to be flushed."""
    shutil.copytree(root, copy)
    for path in copy.glob("[!.]*/*/*"):
        if int(path.stem.rsplit("_", 1)[1]) > UNNAMED:
            path.unlink()
    if not ledger:
        for one in copy.glob(".dicomnode/ledger.sqlite*"):
            one.unlink()
    return copy


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("has_ledger", [False, True])
@pytest.mark.parametrize("is_distrusted", [False, True])
def test_large_images_have_the_names_again_that_were_not_flushed(
    has_ledger: bool, is_distrusted: bool, tmp_path: Path
) -> None:
    root, images = tmp_path / "root", instances(7)
    with running(root) as storage, brought(root, images) as arrived:
        for number, one in enumerate(arrived):
            assert one.request is not None
            assert (one.request.name_ahead is not None) == (number >= UNNAMED)
            storage.add("P", ["ct", "mr"] if number % 2 else ["ct"], one)
        if is_distrusted:
            assert storage._journal is not None
            storage._journal._give_up(OSError(5, "Input/output error"))
        left = without_names_ahead(root, tmp_path / "left", ledger=has_ledger)
    for _ in range(2):
        with running(left) as storage:
            assert uids_of(storage, "P") == {one.sop_instance_uid for one in images}
            assert uids_of(storage, "P", "mr") == {one.sop_instance_uid for one in images[1::2]}
            assert digests_hold(storage) and len(list(left.glob("P/*/*"))) == 10
        assert not names_in(left)
    # Where nothing fails nothing is left either.
    assert bool(names_in(root)) == is_distrusted


@pytest.mark.usefixtures("large")
def test_names_ahead_go_when_the_disk_has_others_or_their_case_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    with running(root) as storage, brought(root, instances(6)) as first:
        assert storage._journal is not None
        with brought(root, instances(6, "Q", 1)) as second:
            for one in first:
                number = storage.add("P", ["ct"], one)
            for one in second:
                storage.add("Q", ["ct"], one)
            # One is that of a file that is here already.
            storage.add("P", ["ct"], first[-1])
        held = set(storage._journal._names_ahead)
        assert len(held) == 8 and held <= set(names_in(root))
        make_ready(storage, number)
        contents = storage.current("P")
        assert contents is not None and storage.seal(storage.ledger.case(number), contents)
        storage.results.keep(storage.ledger.case(number), [])
        storage.finish(storage.ledger.case(number))
        assert len(held & set(names_in(root))) == len(storage._journal._names_ahead) == 4
        flushed: list[int] = []

        def flush(descriptor: int) -> None:
            # They are there until it has ended.
            flushed.append(len(held & set(names_in(root))))

        monkeypatch.setattr(journal, "sync_filesystem", flush)
        storage._journal._begin_other(storage._journal._records)
        assert storage._journal._cleaning is not None
        storage._journal._cleaning.join(30)
        assert flushed == [4] and not held & set(names_in(root))
        assert not storage._journal._names_ahead
        left = cut(root, tmp_path / "left", files=True)
    with running(left) as storage:
        assert len(uids_of(storage, "Q")) == 6 and digests_hold(storage)
    assert not names_in(root) and not names_in(left)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("is_answered", [True, False])
def test_a_name_ahead_that_nobody_needs_is_deleted(is_answered: bool, tmp_path: Path) -> None:
    root, images = tmp_path / "root", instances(4)
    with running(root) as storage:
        with brought(root, images) as arrived:
            assert len(names_in(root)) == 4
            if is_answered:
                with running(tmp_path / "other", "process") as process:
                    for one in arrived:
                        process.add("P", ["ct"], one)
        assert not names_in(root)
        assert storage.named_above == 0
        with running(tmp_path / "another", "process") as process:
            assert process.named_above is None


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("found", [b"", b"part", "other"])
def test_what_a_disk_has_instead_of_a_large_image_is_looked_at(
    found: bytes | str, tmp_path: Path
) -> None:
    root, images = tmp_path / "root", instances(4)
    with running(root) as storage, brought(root, images) as arrived:
        for one in arrived:
            storage.add("P", ["ct"], one)
        left = shutil.copytree(root, tmp_path / "left")
    path = sorted(left.glob("P/ct/*"))[-1]
    image = path.read_bytes()
    path.unlink()
    another = b"".join(instances(1, "Q", 9)[0].chunks)
    path.write_bytes(another if isinstance(found, str) else found)
    with running(left) as storage:
        if found == "other":
            # That is whole, and somebody's; and what was answered is there, too.
            aside = (left / ".dicomnode" / "damaged").rglob("*.*")
            assert {image, another} <= {one.read_bytes() for one in aside if one.is_file()}
            return
        assert len(uids_of(storage, "P")) == 4 and digests_hold(storage)


@pytest.mark.usefixtures("large")
def test_large_images_that_have_their_names_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, images = tmp_path / "root", instances(4)
    with running(root) as storage, brought(root, images) as arrived:
        for one in arrived:
            storage.add("P", ["ct"], one)
        # Without hard links, and with names of which the disk has a part.
        left = shutil.copytree(root, tmp_path / "left")
    for name in (left / ".dicomnode" / "incoming").iterdir():
        name.write_bytes(name.read_bytes()[:300])
    known = {path: path.stat().st_ino for path in left.glob("P/ct/*")}
    with running(left) as storage:
        assert len(uids_of(storage, "P")) == 4 and digests_hold(storage)
    assert "0 images and 4 rows are from the journal" in caplog.text
    assert known == {path: path.stat().st_ino for path in left.glob("P/ct/*")}
    # Where such a place is gone, what is left is no image.
    again = without_names_ahead(left, tmp_path / "again", ledger=True)
    with running(again) as storage:
        assert storage.current("P").obstacle  # type: ignore[union-attr]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "name",
    [
        '"../../secret"', '".."', '"a/b"', "5", "null", '["x"]', '"x.ahead", "y.ahead"', "{folder}",
        "{link}", "{missing}",
    ],
)  # fmt: skip
def test_no_name_ahead_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    image = instances(1)[0]
    with running(tmp_path / "root") as storage:
        number = storage.add("P", ["ct"], image)
        assert storage._journal is not None and storage._journal._records is not None
        kinds = {"folder": "a", "link": "b", "missing": "c"}
        names = {kind: f'"{digit * 32}.ahead"' for kind, digit in kinds.items()}
        text = f'[{number}, "P", [["ct", "1.2", "x.dcm", 6, ""]], {name.format(**names)}]'
        assert storage._journal._records.append(text)
        storage._journal._records.settle()
        left = cut(tmp_path / "root", tmp_path / "left", files=True)
    for path in (left / "secret", left.parent / "secret"):
        path.write_bytes(b"secret")
    incoming = left / ".dicomnode" / "incoming"
    (incoming / f"{'a' * 32}.ahead").mkdir()
    (incoming / f"{'b' * 32}.ahead").symlink_to(left / "secret")
    with running(left) as storage:
        rows = {row.uid: row.damaged for row in storage.ledger.instances(number)}
        lost = {"1.2": True} if name.startswith(("{", "null")) else {}
        assert rows == {image.sop_instance_uid: False, **lost}
    assert not list(left.glob("P/ct/x.dcm")) and (left / "secret").read_bytes() == b"secret"


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "trouble", ["head", "other head", "record", "moved away", "both moved away"]
)
def test_files_that_only_a_damaged_journal_knew_are_set_aside(
    trouble: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, images = tmp_path / "root", instances(4)
    with running(root) as storage, brought(root, images) as arrived:
        for one in arrived:
            storage.add("P", ["ct"], one)
        (root / ".dicomnode" / "incoming" / "folder").mkdir()
        left = without_names_ahead(root, tmp_path / "left", ledger=True)
    journals = [left / ".dicomnode" / f"journal-{number}" for number in (1, 2)]
    data = bytearray(journals[0].read_bytes())
    match trouble:
        case "head":
            data[30] ^= 1
            data[256 + 30] ^= 1
            journals[0].write_bytes(data)
        case "other head":
            journals[1].write_bytes(b"dicomnode jrnl 1" + bytes(4000))
        case "record":
            data[data.index(images[-1].sop_instance_uid.encode())] ^= 1
            journals[0].write_bytes(data)
        case "moved away":
            journals[0].unlink()
        case _:
            journals[0].unlink()
            journals[1].unlink()
    lost = {"other head": 0, "record": 1}.get(trouble, 2)
    for _ in range(2):
        with running(left) as storage:
            known = [row.uid for row in storage.ledger.instances(1) if not row.damaged]
            assert len(known) == 4 - lost and digests_hold(storage)
    aside = left / ".dicomnode" / "damaged" / ".dicomnode" / "incoming"
    assert len(list(aside.glob("*"))) == lost and names_in(left) == ["folder"]
    assert caplog.text.count("files may be images that were answered") == bool(lost)
    # Nothing of it stays for the next start.
    heads = [journal_file.head_of(path.read_bytes()) for path in journals]
    assert heads == [None, None] and b"jrnl" not in journals[1].read_bytes()

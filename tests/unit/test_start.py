"""A start, and keeping one more, with many images there; a ledger that is lost."""

import shutil
import sqlite3
import time
from pathlib import Path

from benchmarks import start

from dicomnode.storage.ledger import Ledger, State


def test_a_start_and_one_more_image_take_as_long_as_before_with_ten_times_as_many(
    tmp_path: Path,
) -> None:
    times = {}
    for count in (1000, 10_000):
        start.fill(tmp_path / str(count), count)
        seconds, one = start.measure(tmp_path / str(count), count, 3)
        times[count] = min(seconds), one
    (few, one_of_few), (many, one_of_many) = times.values()
    # Half a second is what a start takes at all; the machine may be busy with other things.
    assert many < 10 * few + 2.0 and many < 10.0
    assert one_of_many < 5 * one_of_few + 1000


def test_a_lost_ledger_is_rebuilt_from_ten_thousand_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    start.fill(root, 10_000)
    own = root / ".dicomnode"
    with sqlite3.connect(own / "ledger.sqlite") as database:
        before = set(database.execute("SELECT uid, file, size, digest FROM instances"))
    database.close()
    for path in own.glob("ledger.sqlite*"):
        path.unlink()
    began = time.monotonic()
    start.open_storage(root).close()
    assert time.monotonic() - began < 60
    ledger = Ledger(own / "ledger.sqlite")
    try:
        found = [
            (row.uid, row.file, row.size, row.digest)
            for case in ledger.cases(State.RECEIVING)
            for row in ledger.instances(case.id)
        ]
    finally:
        ledger.close()
    assert set(found) == before and len(found) == 10_000
    assert not (own / "damaged").exists()


def test_a_damaged_ledger_is_rebuilt_from_a_thousand_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    start.fill(root, 1000)
    ledger = root / ".dicomnode" / "ledger.sqlite"
    data = bytearray(ledger.read_bytes())
    data[4096 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4096)
    ledger.write_bytes(data)
    storage = start.open_storage(root)
    assert sum(total for case in storage.ledger.cases()
               for total, _ in storage.ledger.counts(case.id).values()) == 1000  # fmt: skip
    storage.close()
    shutil.rmtree(root)

"""How long does a node take to start over the images that it holds, and one more image to be kept?

Each start is a whole one: the ledger is checked, every file is looked at, every case asked whether it
is complete. `python -m benchmarks.start FOLDER IMAGES` fills a root and prints its figures.
"""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.timing import Row, Table, memory_mb
from dicomnode.lib.dicom import encode
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.layout import digest_of
from dicomnode.storage.store import Instance, Storage
from dicomnode.testing import make_series, running_node

TITLE = "A start over images that wait, in cases of 100"
EXTRA = ("us/image", "us to keep one more")
_TOGETHER = 100


class Waiting(AbstractInput):
    """Takes every image, and is never complete."""

    def validate(self) -> bool:
        """Asked for each case at each start."""
        return False


class Node(AbstractPipeline):
    """Our node over one root."""

    input = {"images": Waiting}
    durability = "process"
    log_level = logging.ERROR

    def process(self, input_data: dict[str, Any]) -> None:
        """Never called."""


class Images:
    """Small images that differ in their UID and patient."""

    def __init__(self) -> None:
        dataset = make_series(1, 16, 16)[0]
        self._data = encode(dataset)[0]
        self._uid = str(dataset.SOPInstanceUID).encode()
        self._start = 144 + int.from_bytes(self._data[140:144], "little")

    def keep(self, storage: Storage, number: int) -> None:
        """Keep the image of that number, as one that was received."""
        uid = self._uid[:-10] + f"{number:010}".encode()
        patient = f"P{number // _TOGETHER:08}"
        data = self._data.replace(self._uid, uid).replace(b"PHANTOM-1", patient.encode())
        digest = partial(digest_of, memoryview(data)[self._start :])
        name = f"Image_CT_{number % _TOGETHER + 1}"
        storage.add(patient, ["images"], Instance(uid.decode(), name, [data], digest))


def open_storage(root: Path) -> Storage:
    """The storage of such a node."""
    storage = Storage(
        root,
        ["images"],
        0x00100020,
        1 << 30,
        logging.getLogger("start"),
        durability="process",
        least_free=0,
    )
    storage.open()
    return storage


def fill(root: Path, count: int) -> None:
    """A root with so many images."""
    images, storage = Images(), open_storage(root)
    for number in range(count):
        images.keep(storage, number)
    storage.close()


def measure(root: Path, count: int, repeats: int) -> tuple[list[float], float]:
    """Seconds of each start, and microseconds that one more of many images takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        with running_node(Node, root_data_directory=root) as node:
            seconds.append(time.perf_counter() - start)
            assert len(node.cases()) == -(-count // _TOGETHER)
    images, storage = Images(), open_storage(root)
    start = time.perf_counter()
    for number in range(count, count + 10 * _TOGETHER):
        images.keep(storage, number)
    one = (time.perf_counter() - start) / (10 * _TOGETHER) * 1e6
    storage.close()
    return seconds, one


def answer(counts: Sequence[int], repeats: int) -> Table:
    """One row for each number of images, each in a process of its own."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.start", folder, str(count), str(repeats)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        *seconds, one, peak = map(float, done.stdout.split())
        median = sorted(seconds)[len(seconds) // 2]
        extra = (f"{median / count * 1e6:.1f}", f"{one:.0f}")
        rows.append(Row(f"{count} images", tuple(seconds), peak, extra))
    return Table(TITLE, tuple(rows), EXTRA)


def main(root: Path, count: int, repeats: int) -> None:
    """The figures of one root."""
    before = memory_mb("VmRSS")
    # In another process, whose memory does not count.
    filling = f"from pathlib import Path; from benchmarks import start; start.fill(Path({str(root)!r}), {count})"
    subprocess.run([sys.executable, "-c", filling], check=True)
    seconds, one = measure(root, count, repeats)
    print(*seconds, one, memory_mb("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

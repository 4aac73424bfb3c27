"""The volume exists once: in the worker, or in memory that node and worker share."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom.dataset import Dataset

from dicomnode.lib.dimse import send
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.server.channel import Channel
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

SLICES, SIDE = 64, 512
#: Of the array, which is float32, and of the files.
ARRAY, FILES = SLICES * SIDE * SIDE * 4, SLICES * SIDE * SIDE * 2


def memory() -> dict[str, int]:
    """Bytes of this process: of its own, and its share of what it shares with others."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return {"own": found["Pss_Anon"], "shared": found["Pss_Shmem"]}


def lies_in_shared_memory(array: numpy.ndarray) -> bool:
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return "memfd:dicomnode" in line
    return False


class Volume(AbstractInput):
    image_grinder = numpy_grinder

    def validate(self) -> bool:
        return self.images >= SLICES


class Eager(Volume):
    eager = True


class Weighing(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": Volume}
    isolation = "process"
    notes: str = ""
    #: How much the worker takes before it has anything.
    idle: Any = None

    def post_init(self) -> None:
        self.idle = memory() if self.is_worker else None

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset] | None:
        array = input_data["ct"]
        digest = hashlib.sha256(memoryview(array).cast("B")).hexdigest()
        # Pages count once they were looked at.
        now = memory()
        Path(self.notes).write_text(
            json.dumps(
                {
                    "grown": {name: now[name] - self.idle[name] for name in now},
                    "shared": lies_in_shared_memory(array),
                    "digest": digest,
                }
            )
        )
        # The node is looked at while this one has the array.
        with Path(self.notes + "-go").open() as go:
            go.read()
        return []


class WeighingEager(Weighing):
    input = {"ct": Eager}


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("kind", [Weighing, WeighingEager])
def test_the_volume_exists_once_and_nothing_large_goes_through_the_channel(
    kind: type[Weighing], on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels: list[Channel] = []
    real = Channel.__init__

    def init(self: Channel, *arguments: Any) -> None:
        channels.append(self)
        real(self, *arguments)

    monkeypatch.setattr(Channel, "__init__", init)
    file = tmp_path / "notes"
    os.mkfifo(f"{file}-go")
    series = make_series(SLICES, SIDE, SIDE)
    expected = numpy_grinder(series)
    digest = hashlib.sha256(memoryview(expected).cast("B")).hexdigest()
    root = tmp_path / "root" if on_disk else None
    with running_node(kind, notes=str(file), root_data_directory=root) as node:
        before = memory()
        send(address_of(node), series)
        # Opens once the worker is in process().
        with Path(f"{file}-go").open("w"):
            after = memory()
        wait_for_cases(node, State.DONE)
    told = json.loads(file.read_text())
    assert told["digest"] == digest
    is_eager = kind is WeighingEager
    assert told["shared"] == is_eager
    # The worker has the array and nothing else of that size.
    assert ARRAY * 0.9 < sum(told["grown"].values()) < ARRAY * 1.25
    assert told["grown"]["shared" if is_eager else "own"] > ARRAY * 0.9
    # The node has mapped none of it, nor the images. It took memory to receive them, as always.
    assert after["shared"] - before["shared"] < ARRAY * 0.05
    assert after["own"] - before["own"] < FILES * 0.5
    assert 0 < max(channel.longest for channel in channels) < 100_000


def test_what_rests_in_memory_is_given_back(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    Path(f"{file}-go").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with running_node(Weighing, notes=str(file), input={"ct": Few}) as node:
        for k in range(3):
            send(address_of(node), make_series(4, patient_id=f"P{k}"))
        wait_for_cases(node, State.DONE, 3)
        # A case is done a moment before its images are deleted.
        assert node.wait(
            lambda: not [one for one in Path("/proc/self/fd").iterdir() if int(one.name) >= 4096],
            20,
        )
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

from dicomnode.lib.dimse import send
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

class Few(AbstractInput):
    def validate(self):
        return self.images >= 20

class Node(AbstractPipeline):
    ip, port, isolation, input = "127.0.0.1", 0, "process", {"ct": Few}

    def process(self, input_data):
        pass

if __name__ == "__main__":
    with running_node(Node) as node:
        assert {one.status for one in send(address_of(node), make_series(20))} == {0}
        wait_for_cases(node, State.DONE)
"""


def test_images_rest_in_shared_memory_where_few_files_may_be_open(tmp_path: Path) -> None:
    program = tmp_path / "few_files.py"
    program.write_text(FEW_FILES)
    subprocess.run([sys.executable, program], check=True, timeout=120)


class Few(AbstractInput):
    image_grinder = numpy_grinder

    def validate(self) -> bool:
        return self.images >= 4

"""Nodes that are killed, at random and at each step of keeping an image (S1, S2); `make crash` does more."""

import hashlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest
from pydicom.dataset import Dataset
from tests.e2e.programs import Command, pipeline_file
from tests.faults import crash

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import Response, send
from dicomnode.storage.layout import digest_of_file, input_folder
from dicomnode.storage.ledger import InstanceRow, Ledger
from dicomnode.testing import StoringNode, make_series, running_node

NODE = """
from dicomnode.storage import journal

{more}
print("PID", os.getpid(), flush=True)

class Four(Two):
    eager = False
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    def validate(self):
        return self.images >= 4

class Node(Base):
    input = {{"ct": Four}}
    durability = {durability!r}
    endpoints = [Address("127.0.0.1", {port}, "STORE")]
    def process(self, input_data):
        images, array = input_data["ct"]
        return derive_series(array + 1, images)
"""


@pytest.fixture
def strace(peer: Callable[[str], str]) -> str:
    return peer("strace")


@contextmanager
def attached(strace: str, node: Command, *options: str) -> Iterator[None]:
    """Trace a node that runs, so that its start is not counted; threads to come are counted anew."""
    command = [strace, "-f", "-o", "/dev/null", "-p", str(node.process.pid), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        while "attached with" not in tracer.stderr.readline():
            assert tracer.poll() is None
        # What it says later must not fill the pipe.
        reader = Thread(target=tracer.stderr.read, daemon=True)
        reader.start()
        try:
            yield
        finally:
            tracer.terminate()
            reader.join(30)


@pytest.mark.timeout(300)
def test_s1_nothing_is_lost_or_doubled_by_ten_kills(
    tmp_path: Path, peer: Callable[[str], str], strace: str
) -> None:
    senders = [peer("dcmsend"), peer("storescu")]
    seen = crash.run(tmp_path, 10, 20, senders, peer("storescp"))
    assert sum(seen.kills.values()) == 10
    assert seen.figures["results, each once"] == seen.figures["images acknowledged"] > 0


#: As if each image were large: its own file is flushed.
LARGE = "journal.MOST_BYTES = 0"

#: The nth call of the thread that keeps the images.
STEPS = [
    # Also by whoever keeps a result.
    ("writev", 1),
    ("writev", 2),
    ("writev", 4),
    ("fsync", 1),
    ("fsync", 3),
    ("fsync", 6),
    ("mkdir", 1),
    ("mkdir", 2),
    ("linkat", 1),
    ("linkat", 3),
    ("pwrite64", 2),
    ("pwrite64", 11),
    ("fdatasync", 1),
    ("fdatasync", 3),
    ("sendto", 3),
]


@pytest.mark.parametrize(("call", "number"), STEPS)
@pytest.mark.parametrize("kind", ["power", "power, large", "process"])
def test_s1_killed_at_a_step_of_keeping_an_image(
    call: str, number: int, kind: str, tmp_path: Path, strace: str
) -> None:
    durability = kind.split(",", maxsplit=1)[0]
    more = LARGE if "large" in kind else ""
    if durability == "process" and "sync" in call:
        # It calls neither.
        return
    series = make_series(4, 16, 16)
    answered: list[str] = []

    def count(response: Response) -> None:
        assert response.status == 0x0000
        answered.append(response.sop_instance_uid)

    with running_node(StoringNode) as store:
        file = pipeline_file(
            tmp_path, NODE.format(durability=durability, port=store.port, more=more)
        )
        fault = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
        with Command("run", file) as node:
            address = node.address("NODE")
            with attached(strace, node, *fault):
                with suppress(CouldNotCompleteDIMSEMessage):
                    send(address, series, on_response=count)
                assert node.process.wait(30) == -signal.SIGKILL
        kept = {path.name for path in (tmp_path / "root").glob("*/*/*.dcm")}
        assert len(kept) >= len(answered)
        with Command("run", file) as node:
            left = [one for one in series if one.SOPInstanceUID not in answered]
            assert [one.status for one in send(node.address("NODE"), left)] == [0] * len(left)
            node.until("case 1 is done")
        assert len({one.SOPInstanceUID for one in store.received}) == 4
    own = tmp_path / "root" / ".dicomnode"
    assert not list((own / "incoming").iterdir()) and not (own / "damaged").exists()
    assert [path.name for path in own.parent.iterdir()] == [".dicomnode"]


@dataclass(frozen=True)
class Call:
    """A system call that ended well, and when it began and ended."""

    thread: str
    name: str
    text: str
    begin: int
    end: int


def calls_of(trace: str) -> list[Call]:
    """The calls in what strace wrote, in the order in which they ended."""
    found: list[Call] = []
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        thread, _, text = line.partition(" ")
        text = text.lstrip()
        if text.endswith("<unfinished ...>"):
            begun[thread] = (number, text)
            continue
        begin = number
        if text.startswith("<... "):
            begin, first = begun.pop(thread)
            text = first + text
        match = re.match(r"(\w+)\(", text)
        if match and re.search(r"\) += \d", text):
            found.append(Call(thread, match[1], text, begin, number))
    return found


def traced(
    node_file: str, trace: Path, strace: str, batches: list[list[Dataset]]
) -> list[list[Response]]:
    """Send each batch over an association of its own, all at once; what was answered."""
    prefix = [strace, "-f", "--seccomp-bpf", "-y", "-qqq", "-s", "40000", "-o", str(trace), "-e"]
    prefix += ["trace=writev,fsync,fdatasync,linkat,pwrite64,sendto"]
    answers: list[list[Response]] = []
    with Command("run", node_file, prefix=prefix) as node:
        address = node.address("NODE")

        def bring(batch: list[Dataset]) -> None:
            answers.append(send(address, batch))

        threads = [Thread(target=bring, args=(batch,)) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        # Not strace, which would let the node go on alone.
        os.kill(int(node.until(r"PID (\d+)")), signal.SIGTERM)
        node.ended()
    return answers


@pytest.mark.parametrize("durability", ["power", "process"])
def test_s2_nothing_is_acknowledged_before_it_is_durable(
    durability: str, tmp_path: Path, strace: str
) -> None:
    """The order of system calls, for each image, with four associations at once (L21 too)."""
    # Two associations bring images of the same patient; large images go to the disk as they arrive.
    batches = [make_series(3, 32, 32, patient_id=f"P{k // 2}", seed=k) for k in range(4)]
    batches[0] += make_series(4, 1600, 1600, patient_id="P0", seed=9)
    file = pipeline_file(
        tmp_path,
        NODE.format(durability=durability, port=1, more="").replace("self.images >= 4", "False"),
    )
    trace = tmp_path / "trace"
    answers = traced(file, trace, strace, batches)
    assert [one.status for batch in answers for one in batch] == [0] * 16
    calls = calls_of(trace.read_text("latin-1"))
    journal = [one for one in calls if "/journal-1>" in one.text]
    for batch in batches:
        for image in batch:
            kind = "large" if image.Rows > 1000 and durability == "power" else durability
            _is_in_order(str(image.SOPInstanceUID), calls, journal, kind)
    # After two large ones the others had names ahead.
    written = [one for one in calls if one.name == "writev" and ".ahead>" in one.text]
    uids = [str(one.SOPInstanceUID) for one in batches[0][-2:]]
    named = [uid for uid in uids if any(uid in one.text for one in written)]
    assert named == (uids if durability == "power" else [])


def _is_in_order(uid: str, calls: list[Call], journal: list[Call], kind: str) -> None:
    # Of a large one more is written after that.
    written = next(
        c
        for c in calls
        if c.name == "writev" and re.search(r"incoming/(#|\w+\.ahead>)", c.text) and uid in c.text
    )
    is_named = ".ahead>" in written.text
    mine = [one for one in calls if one.thread == written.thread and one.begin > written.end]
    descriptor = re.search(r"writev\((\d+)<", written.text)
    assert descriptor is not None
    # One that fails is tried in another way.
    linked = next(one for one in mine if one.name == "linkat" and one.text.endswith("= 0"))
    rest = [one for one in mine if one.name == "writev" and f"writev({descriptor[1]}<" in one.text]
    # A small one comes at once, with what comes before its dataset.
    last = max((one.end for one in rest if one.end < linked.begin), default=written.end)
    sources = f"linkat({descriptor[1]}<", f"/proc/self/fd/{descriptor[1]}"
    assert any(one in linked.text for one in sources) and "Image_CT_" in linked.text
    # The answer is the next that this thread says to its sender.
    answer = next(one for one in mine if one.name == "sendto" and one.begin > linked.end)
    # Another thread may write and flush what comes at the same time.
    record = next(one for one in journal if one.name == "pwrite64" and uid in one.text)
    assert linked.end < record.begin and record.end < answer.begin
    flushed = [one for one in mine if one.name == "fsync" and one.end < answer.begin]
    if kind == "process":
        assert not flushed
        return
    assert any(
        one.name == "fdatasync" and record.end < one.begin and one.end < answer.begin
        for one in journal
    )
    place = re.search(r'"([^"]*)/Image_CT_|<([^<>]*)>, "Image_CT_', linked.text)
    assert place is not None
    folder = place[1] or place[2]
    if kind == "large":
        begun = f"fsync({descriptor[1]}<"
        assert any(begun in one.text and last < one.begin < linked.begin for one in flushed)
        if is_named:
            # That name was flushed before, and the record tells it.
            (name,) = re.findall(r"incoming/(\w+\.ahead)>", written.text)
            early = [c for c in calls if c.name == "fsync" and c.end < written.begin]
            assert any("/incoming>" in c.text for c in early)
            assert name in record.text
        else:
            assert any(f"{folder}>" in one.text and one.begin > linked.end for one in flushed)
    else:
        # All of it is in the record.
        assert len(record.text) > 2 * 32 * 32
    # The folders above were flushed, by whoever made them, before anybody was answered.
    for above in (Path(folder).parent, Path(folder).parent.parent):
        assert any(
            one.name == "fsync" and f"<{above}>" in one.text and one.end < answer.begin
            for one in calls
        )


FAULTS = [
    ("writev", "ENOSPC", 1),
    ("writev", "ENOSPC", 2),
    ("writev", "EDQUOT", 3),
    ("writev", "EIO", 2),
    ("statfs", "EIO", 1),
    ("statfs", "EIO", 2),
    ("fsync", "EIO", 1),
    ("fsync", "ENOSPC", 2),
    ("fsync", "EIO", 5),
    ("fsync", "EIO", 6),
    ("fsync", "EIO", 7),
    ("linkat", "ENOSPC", 2),
    ("linkat", "EMLINK", 3),
    ("linkat", "EROFS", 1),
    ("mkdir", "ENOSPC", 1),
    ("mkdir", "ENOSPC", 2),
    ("fstat", "EIO", 2),
    ("pwrite64", "ENOSPC", 4),
    ("pwrite64", "EIO", 12),
    ("fdatasync", "EIO", 1),
    ("fdatasync", "EIO", 3),
    ("close", "EIO", 2),
    ("close", "ENOSPC", 3),
    ("close", "EIO", 4),
    ("close", "EIO", 6),
]


@pytest.mark.parametrize(("call", "error", "number"), FAULTS)
@pytest.mark.parametrize("more", ["", LARGE], ids=["small", "large"])
def test_s4_what_the_disk_refuses_is_answered_with_out_of_resources(
    call: str, error: str, number: int, more: str, tmp_path: Path, strace: str
) -> None:
    series = make_series(4, 16, 16)
    digests = {
        str(one.SOPInstanceUID): hashlib.sha256(_dataset_bytes(one)).digest() for one in series
    }
    with running_node(StoringNode) as store:
        file = pipeline_file(tmp_path, NODE.format(durability="power", port=store.port, more=more))
        # Once for each thread: in that which keeps the images, and in others.
        fault = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}"]
        with Command("run", file) as node, ExitStack() as stack:
            address = node.address("NODE")
            stack.enter_context(attached(strace, node, *fault))
            answers = send(address, series[:3])
            # The association has survived.
            assert len(answers) == 3 and {one.status for one in answers} <= {0x0000, 0xA700}
            stored = [one.sop_instance_uid for one in answers if one.status == 0x0000]
            assert len(stored) >= 1
            ledger = Ledger(tmp_path / "root" / ".dicomnode" / "ledger.sqlite")
            rows: dict[str, InstanceRow] = {}
            # The ledger is behind the journal until the association has ended.
            end = time.monotonic() + 10
            while not set(stored) <= set(rows):
                assert time.monotonic() < end
                rows = {row.uid: row for row in ledger.instances(1)}
            folder = input_folder(ledger.case(1).folder, "ct")
            ledger.close()
            for row in rows.values():
                path = tmp_path / "root" / folder / row.file
                assert digest_of_file(path) == row.digest == digests[row.uid]
            stack.close()
            # It heals without help, and what was refused comes again.
            left = [one for one in series if one.SOPInstanceUID not in stored]
            assert [one.status for one in send(address, left)] == [0x0000] * len(left)
            node.until("case 1 is done", 20)
        assert len({one.SOPInstanceUID for one in store.received}) == 4
    assert [path.name for path in (tmp_path / "root").iterdir()] == [".dicomnode"]


def _dataset_bytes(dataset: Dataset) -> bytes:
    """As they are sent: the dataset without its file meta."""
    data = encode(dataset)[0]
    return data[144 + int.from_bytes(data[140:144], "little") :]

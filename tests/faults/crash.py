"""Kill a node at any moment, again and again, and look whether anything is lost: `make crash`.

Real senders send patients to a real node, whose results go to two endpoints. In every round the node
is killed with SIGKILL: after a random time, while it starts, after a line of its log, or at the nth
system call of a kind. Then it is started again, and each sender sends what was not acknowledged, or,
as many do, everything. What has to hold is asked after every kill and at the end.
"""

import argparse
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from tests.e2e.programs import Command, pipeline_file, serving
from tests.faults import endpoint

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dimse import Address, Response, send
from dicomnode.storage.journal_file import File
from dicomnode.storage.layout import digest_of_file, input_folder, outbox_folder
from dicomnode.storage.ledger import Case, InstanceRow, Ledger, State
from dicomnode.testing import make_series, write_series

IMAGES = 6
NODE = """
import random
from dicomnode.storage import journal, journal_file

# So that one file follows the other, and as if images were large.
journal_file.FILE_BYTES = int(os.environ["JOURNAL"])
journal.MOST_BYTES = int(os.environ["SMALL"])
print("PID", os.getpid(), flush=True)

class All(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    eager = os.environ["EAGER"] == "1"
    def validate(self):
        return self.images >= {images}

class Node(Base):
    input = {{"ct": All}}
    workers = 2
    durability = os.environ["DURABILITY"]
    isolation = os.environ["ISOLATION"]
    endpoints = [
        Address("127.0.0.1", int(os.environ["RECORDER"]), "RECORDER"),
        Address("127.0.0.1", int(os.environ["STORESCP"]), "STORESCP"),
    ]
    export_retry_seconds = 0.2

    def process(self, input_data):
        images, array = input_data["ct"]
        time.sleep(random.uniform(0, 0.05))
        return derive_series(array + 1, images)
"""
#: Where a node that stores, processes, sends and deletes can be killed. How often a thread makes
#: each of them in a round is up to chance; a call that does not come is no kill.
CALLS = {
    "write": 30,
    "writev": 8,
    "fsync": 16,
    "linkat": 8,
    "pwrite64": 60,
    "fdatasync": 12,
    "sendto": 12,
    "unlink": 8,
    "mkdir": 4,
    "rmdir": 3,
    "ftruncate": 2,
}
LINES = (
    r"association with .* opened",
    r"association with .* closed",
    r"case \d+ is ready",
    r"case \d+ ground",
    r"case \d+ processed",
    r"acknowledged \d+",
    r"case \d+ is done",
    r"adopted",
    r"listens on",
)


@dataclass
class Patient:
    """A series that a sender has to bring to the node."""

    name: str
    files: list[Path]
    images: list[Dataset]
    #: {SOPInstanceUID: digest of the values that its result has to have}.
    expected: dict[str, str]
    program: str
    sends_all: bool
    acknowledged: set[str] = field(default_factory=set)

    @property
    def is_sent(self) -> bool:
        """Whether the sender is at ease."""
        return len(self.acknowledged) == len(self.images)

    def send(self, address: Address) -> None:
        """Send, and remember what was acknowledged."""
        left = [
            k
            for k, one in enumerate(self.images)
            if self.sends_all or one.SOPInstanceUID not in self.acknowledged
        ]
        if self.program == "dicomnode":
            with suppress(CouldNotCompleteDIMSEMessage):
                send(address, [self.images[k] for k in left], on_response=self._count)
            return
        done = subprocess.run(
            [self.program, "-v", "-aec", address.ae_title, address.ip, str(address.port)]
            + [str(self.files[k]) for k in left],
            env={**os.environ, "TCP_NODELAY": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = done.stdout + done.stderr
        answers = re.findall(r"Received (?:C-STORE|Store) Response \(([^)]*)\)", said)
        for k, answer in zip(left, answers, strict=False):
            if answer == "Success":
                self.acknowledged.add(str(self.images[k].SOPInstanceUID))
            else:
                raise Broken(f"{self.program} was answered {answer!r}")

    def _count(self, response: Response) -> None:
        if response.status != 0x0000:
            raise Broken(f"answered 0x{response.status:04X} {response.comment}")
        self.acknowledged.add(response.sop_instance_uid)


class Broken(AssertionError):
    """A promise was not kept."""


class Crash:
    """One run over one folder."""

    def __init__(self, folder: Path, seed: int, programs: Sequence[str], storescp: str) -> None:
        self._random = random.Random(seed)
        self._folder = folder
        self._programs = programs
        self._root = folder / "root"
        self._patients: list[Patient] = []
        self._stack = ExitStack()
        self._durability = "power"
        self._file = pipeline_file(folder, NODE.format(images=IMAGES))
        self._journal = folder / "journal"
        self._journal.touch()
        self._kept = folder / "storescp"
        self._kept.mkdir()
        self._ports = {"RECORDER": free_port(), "STORESCP": free_port()}
        self._storescp = storescp
        self.kills: Counter[str] = Counter()
        self.figures: Counter[str] = Counter()
        self.starts: list[float] = []

    def open(self) -> None:
        """Start the endpoints."""
        self._serve(
            "RECORDER",
            sys.executable,
            "-m",
            "tests.faults.endpoint",
            str(self._ports["RECORDER"]),
            str(self._journal),
        )
        self._serve(
            "STORESCP",
            self._storescp,
            "+B",
            "-aet",
            "STORESCP",
            "-od",
            str(self._kept),
            "--fork",
            str(self._ports["STORESCP"]),
        )

    def _serve(self, title: str, *command: str) -> None:
        address = Address("127.0.0.1", self._ports[title], title)
        self._stack.enter_context(serving(command, address))

    def close(self) -> None:
        """End the endpoints."""
        self._stack.close()

    # One round

    def round(self) -> None:
        """Start, send, kill, and look what is there."""
        for _ in range(self._random.choice((1, 1, 2, 3))):
            self._patients.append(self._new_patient())
        self._durability = self._random.choice(("power", "process"))
        way = self._random.choices(("time", "start", "line", "call"), (4, 2, 3, 4))[0]
        prefix: list[str] = []
        if way == "call":
            call = self._random.choice(list(CALLS))
            number = self._random.randint(1, CALLS[call])
            prefix = ["strace", "-f", "--seccomp-bpf", "-qqq", "-o", "/dev/null"]
            prefix += ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
        with ThreadPoolExecutor(1 + len(self._patients)) as pool, self._node(prefix) as node:
            killer = pool.submit(self._killer(node, way))
            try:
                address = self._address(node)
            except AssertionError:
                killer.result(120)
                is_worker = "a worker process ended while" in "".join(node.said)
                if way == "call" and node.process.wait(30) > 0 and is_worker:
                    # The system call was one of its worker process.
                    self.kills["the worker process while it started"] += 1
                    self._look()
                    return
                if node.process.wait(30) not in (-signal.SIGKILL, 128 + signal.SIGKILL):
                    raise Broken("".join(["the node did not start:\n", *node.said[-30:]])) from None
                self.kills["while it started"] += 1
                self._look()
                return
            senders = [pool.submit(one.send, address) for one in self._patients if not one.is_sent]
            killer.result(120)
            for sender in senders:
                sender.result(60)
            self.kills[call if way == "call" and node.process.returncode else way] += 1
        self._look()

    def _node(self, prefix: Sequence[str] = ()) -> Command:
        return Command(
            "run",
            self._file,
            prefix=prefix,
            environment={
                **{name: str(port) for name, port in self._ports.items()},
                "DURABILITY": self._durability,
                "ISOLATION": self._random.choice(("thread", "thread", "process")),
                "EAGER": str(self._random.randint(0, 1)),
                "JOURNAL": str(self._random.choice((6 << 10, 4 << 20))),
                "SMALL": str(self._random.choice((0, 64 << 10))),
            },
        )

    def _address(self, node: Command) -> Address:
        start = time.monotonic()
        address = node.address("NODE")
        self.starts.append(time.monotonic() - start)
        return address

    def _killer(self, node: Command, way: str) -> Callable[[], None]:
        delay, line = self._random.uniform(0, 1.5), self._random.choice(LINES)
        if way == "start":
            delay = self._random.uniform(0, 0.6)
        elif way == "line":
            delay = self._random.choice((0.0, self._random.uniform(0, 0.02)))

        def kill() -> None:
            with suppress(AssertionError):
                node.until(r"PID \d+")
                if way == "time":
                    node.until("listens on")
                elif way == "line":
                    node.until(line, 3)
            with suppress(subprocess.TimeoutExpired):
                node.process.wait(3 if way == "call" else delay)
            with suppress(AssertionError, ProcessLookupError):
                os.kill(int(node.until(r"PID (\d+)", 1)), signal.SIGKILL)
            node.process.wait(30)

        return kill

    def _new_patient(self) -> Patient:
        name = f"P{len(self._patients) + 1}"
        images = make_series(IMAGES, 24, 24, patient_id=name, seed=len(self._patients))
        files = write_series(images, self._folder / "sent" / name)
        expected = {
            str(one.SOPInstanceUID): endpoint.digest_of_values(endpoint.values_of(one) + 1)
            for one in map(dcmread, files)
        }
        program = self._random.choice(("dicomnode", *self._programs))
        return Patient(name, files, images, expected, program, self._random.random() < 0.4)

    # What has to hold

    def _look(self) -> None:
        """Every acknowledged image is in a case, or its result has arrived; on what a kill left."""
        own = self._root / ".dicomnode"
        recorded: list[tuple[str, str, InstanceRow]] = []
        with tempfile.TemporaryDirectory() as copy:
            for name in ("ledger.sqlite", "ledger.sqlite-wal", "journal-1", "journal-2"):
                if (own / name).exists():
                    shutil.copyfile(own / name, Path(copy, name))
            for path in Path(copy).glob("journal-*"):
                recorded += [
                    (record.folder, row.input, row)
                    for record in File(path, is_flushed=False).read()
                    for row in record.rows
                ]
            if not any(one.acknowledged for one in self._patients):
                return
            database = sqlite3.connect(Path(copy, "ledger.sqlite"))
            try:
                (sound,) = database.execute("PRAGMA integrity_check").fetchone()
                rows = database.execute(
                    "SELECT i.uid, c.folder, i.input, i.file, i.digest, c.state, i.damaged "
                    "FROM instances AS i JOIN cases AS c ON c.id = i.case_id"
                ).fetchall()
            finally:
                database.close()
        if sound != "ok":
            raise Broken(f"the ledger is damaged: {sound}")
        there = set()
        for uid, folder, name, file, digest, state, damaged in rows:
            path = self._root / input_folder(folder, name) / file
            if state == State.DONE.value:
                continue
            if damaged or not path.exists() or digest_of_file(path, len(digest)) != digest:
                raise Broken(f"{path} of a case that is {state} is missing or damaged")
            there.add(uid)
        for folder, name, row in recorded:
            # Of cases that are over nothing is there.
            path = self._root / input_folder(folder, name) / row.file
            if path.exists() and digest_of_file(path, len(row.digest)) == row.digest:
                there.add(row.uid)
        arrived = {source for _, source, _ in self._results()}
        for patient in self._patients:
            lost = patient.acknowledged - there - arrived
            if lost:
                raise Broken(f"{patient.name}: {len(lost)} acknowledged images are lost: {lost}")

    def _results(self) -> list[list[str]]:
        return [line.split() for line in self._journal.read_text().splitlines()]

    def finish(self) -> None:
        """Send what is left, wait until all is done, and count."""
        with self._node() as node:
            address = self._address(node)
            for _ in range(10):
                left = [patient for patient in self._patients if not patient.is_sent]
                if not left:
                    break
                for patient in left:
                    patient.send(address)
            self._until_all_is_done()
            node.process.terminate()
            node.ended()
            if node.process.returncode != 0:
                raise Broken("".join(["the node did not stop well:\n", *node.said[-30:]]))
        self._check()

    def _until_all_is_done(self) -> None:
        ledger = Ledger(self._root / ".dicomnode" / "ledger.sqlite")
        try:
            end = time.monotonic() + 120
            while True:
                for case in ledger.cases(State.FAILED):
                    if "it was sent again" not in case.error:
                        if "while it processed this case" not in case.error:
                            raise Broken(f"case {case.id} FAILED: {case.error}")
                        # Killed three times in a row by us: an operator's decision.
                        ledger.retry(case.id)
                        self.figures["retried"] += 1
                cases = [case for case in ledger.cases() if _is_open(case)]
                if not cases:
                    return
                if time.monotonic() > end:
                    raise Broken(f"cases do not end: {cases}")
                time.sleep(0.2)
        finally:
            ledger.close()

    def _check(self) -> None:
        results = self._results()
        made: dict[str, set[str]] = {}
        for uid, source, digest in results:
            made.setdefault(source, set()).add(uid)
            expected = next(p.expected[source] for p in self._patients if source in p.expected)
            if digest != expected:
                raise Broken(f"the result {uid} of {source} has wrong values")
        for patient in self._patients:
            if not patient.is_sent:
                raise Broken(f"{patient.name}: not all images can be sent")
            for uid in patient.expected:
                if len(made.get(uid, ())) != 1:
                    raise Broken(f"{patient.name}: {len(made.get(uid, ()))} results of {uid}")
        everything = set().union(*made.values())
        kept = [str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
                for path in self._kept.iterdir()]  # fmt: skip
        if set(kept) != everything or len(kept) != len(everything):
            raise Broken(f"storescp has {len(kept)} results, the other endpoint {len(everything)}")
        self.figures["patients"] = len(self._patients)
        self.figures["images acknowledged"] = sum(len(p.acknowledged) for p in self._patients)
        self.figures["results, each once"] = len(everything)
        self.figures["results sent again after a kill"] = len(results) - len(everything)
        self._check_root()

    def _check_root(self) -> None:
        """Nothing is left but the cases that were sent again and wait for an operator."""
        own = self._root / ".dicomnode"
        ledger = Ledger(own / "ledger.sqlite")
        try:
            wanted = {
                str(Path(input_folder(case.folder, row.input), row.file))
                for case in ledger.cases(State.FAILED)
                for row in ledger.instances(case.id)
            }
            waiting = len(ledger.cases(State.FAILED))
            folders = {outbox_folder(case.id) for case in ledger.cases() if _is_open(case)}
        finally:
            ledger.close()
        self.figures["cases set aside, since sent again"] = waiting
        found = {str(path.relative_to(self._root)) for path in self._root.glob("*/*/*.dcm")}
        found = {path for path in found if not path.startswith(".dicomnode")}
        if found != wanted:
            raise Broken(f"files that are in no case: {found ^ wanted}")
        for name in ("incoming", "outbox", "damaged"):
            left = list((own / name).iterdir()) if (own / name).exists() else []
            if left or (name == "outbox" and folders):
                raise Broken(f"{name} is not empty: {left}")


def _is_open(case: Case) -> bool:
    return case.state not in (State.DONE, State.FAILED)


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection takes while nobody does."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise Broken("there is no free port")


def run(folder: Path, rounds: int, seed: int, programs: Sequence[str], storescp: str) -> Crash:
    """That many kills; what was seen. Raises Broken."""
    crash = Crash(folder, seed, programs, storescp)
    try:
        crash.open()
        for number in range(1, rounds + 1):
            crash.round()
            if number % 20 == 0:
                print(f"{number} kills", flush=True)
        crash.finish()
    finally:
        crash.close()
    return crash


def main() -> None:
    """`make crash`."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.crash", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--keep", type=Path, help="a folder that stays, with all that was sent")
    options = parser.parse_args()
    print(f"{options.rounds} rounds, seed {options.seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = options.keep or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        programs = ("/usr/bin/dcmsend", "/usr/bin/storescu")
        crash = run(place, options.rounds, options.seed, programs, "/usr/bin/storescp")
    print(f"kills: {dict(crash.kills)}")
    print(f"slowest start: {max(crash.starts):.1f} s of {len(crash.starts)}")
    for name, count in crash.figures.items():
        print(f"{name}: {count}")
    print(f"nothing lost, nothing doubled; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

"""A node under load for a long time, and what it uses afterwards: `make soak`.

Series are sent again and again, beside them associations that are aborted, connections that say
nothing or nonsense, and ones that just stay. Now and then the node is stopped and started. Threads,
memory and open files have to return to where they were.
"""

import argparse
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.timing import memory_mb
from tests.e2e.programs import Command, pipeline_file
from tests.faults.crash import Broken, free_port

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dimse import Address, Response, echo, send
from dicomnode.storage.ledger import Ledger, State
from dicomnode.testing import make_series

IMAGES = 20
# A warm node may keep as much more than it had when it was warm: pools of the allocator.
MOST_MB = 40.0
NODE = """
class Some(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    def validate(self):
        return self.images >= {images}

class Node(Base):
    input = {{"ct": Some}}
    port = {port}
    workers = 2
    durability = "process"
    log_level = "WARNING"

    def process(self, input_data):
        images, array = input_data["ct"]
        assert array.shape[0] == {images}
        return None

print("PID", os.getpid(), flush=True)
"""


class Soak:
    """One run over one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.address = Address("127.0.0.1", self.port, "NODE")
        self._file = pipeline_file(folder, NODE.format(images=IMAGES, port=self.port))
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._numbers = iter(range(1, sys.maxsize))
        self._pausing = threading.Event()
        self.errors: list[str] = []
        # Always the same, so that what waits for the rest of them does not grow.
        self._broken_off = [make_series(3, 16, 16, patient_id=f"ABORTED-{k}") for k in range(20)]

    @contextmanager
    def node(self) -> Iterator[Command]:
        """The node, until it is stopped as a service is."""
        with Command("run", self._file) as node:
            until_it_is_there(self.address, node)
            yield node
            node.process.terminate()
            said = node.ended(90)
            if node.process.returncode != 0:
                raise Broken(f"it did not stop well:\n{said[-2000:]}")
            self.errors += [line for line in said.splitlines() if "Traceback" in line]

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.counts[name] += number

    # Who comes

    def bring(self) -> None:
        """A series, whole: as often as it takes."""
        images = make_series(IMAGES, 16, 16, patient_id=f"P{next(self._numbers)}")
        acknowledged: set[str] = set()

        def count(response: Response) -> None:
            if response.status == 0x0000:
                acknowledged.add(response.sop_instance_uid)
            self._count(f"answers 0x{response.status:04X}")

        end = time.monotonic() + 120
        while len(acknowledged) < IMAGES:
            left = [one for one in images if str(one.SOPInstanceUID) not in acknowledged]
            try:
                send(self.address, left, on_response=count)
            except CouldNotCompleteDIMSEMessage:
                self._count("associations that a restart ended")
                if time.monotonic() > end:
                    raise
                self._pausing.wait(0.2)
        self._count("series")

    def abort(self) -> None:
        """An association that ends in the middle of a series."""

        def stop(response: Response) -> None:
            raise KeyError(response.sop_instance_uid)

        with suppress(KeyError, CouldNotCompleteDIMSEMessage):
            send(self.address, random.choice(self._broken_off), on_response=stop)
        self._count("aborted associations")

    def connect(self) -> None:
        """A connection that says nothing, or what is no DICOM, and goes."""
        with suppress(OSError), socket.create_connection((self.address.ip, self.port), 5) as one:
            what = random.randint(0, 3)
            if what == 1:
                one.sendall(b"GET / HTTP/1.0\r\n\r\n")
            elif what == 2:
                one.sendall(b"\x01\x00\x00\x00\x01\x00" + bytes(100))
            elif what == 3:
                # With a reset instead of an end.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._count("bare connections")

    def idle(self) -> None:
        """A connection that stays for a while."""
        with suppress(OSError), socket.create_connection((self.address.ip, self.port), 5):
            self._pausing.wait(random.uniform(1, 5))
        self._count("idle connections")

    # The load

    def load(self, seconds: float) -> None:
        """All of these at once, for so long."""
        end = time.monotonic() + seconds
        troubles: list[BaseException] = []

        def repeat(what: str, pause: float) -> None:
            try:
                while time.monotonic() < end:
                    getattr(self, what)()
                    self._pausing.wait(pause)
            except BaseException as error:  # noqa: BLE001 - told by the thread that waits
                troubles.append(error)

        threads = [
            threading.Thread(target=repeat, args=given)
            for given in [("bring", 0.0)] * 3
            + [("abort", 0.1), ("connect", 0.02), ("idle", 0.1), ("idle", 0.1)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 180)
        if troubles:
            raise troubles[0]
        if any(thread.is_alive() for thread in threads):
            raise Broken("somebody hangs")

    def use(self, node: Command) -> tuple[int, int, float]:
        """Threads, open files and memory (MB) of a node, once nobody is there any more."""
        pid = int(node.until(r"PID (\d+)"))
        lowest = (sys.maxsize, sys.maxsize, 0.0)
        for _ in range(100):
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
            handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            lowest = min(lowest, (threads, handles, memory_mb("VmRSS", pid)))
            self._pausing.wait(0.1)
        return lowest

    def run(self, seconds: float) -> None:
        """Restarts for a third of the time, then one node; raises Broken."""
        restarts = max(1, min(10, int(seconds / 90)))
        for _ in range(restarts):
            with self.node():
                loader = threading.Thread(target=self.load, args=(seconds / 3 / restarts,))
                loader.start()
                self._pausing.wait(seconds / 3 / restarts / 2)
            # Senders find nobody, and then the next one.
            with self.node():
                loader.join()
            self._count("restarts", 2)
        with self.node() as node:
            self.load(max(5.0, seconds / 12))
            before = self.use(node)
            self.load(seconds * 7 / 12)
            after = self.use(node)
            self._until_done()
        for name, one, other in zip(
            ("threads", "open files", "MB of memory"), before, after, strict=True
        ):
            print(f"{name}: {one:.0f} when warm, {other:.0f} at the end")
        if after[0] > before[0] or after[1] > before[1] or after[2] > before[2] + MOST_MB:
            raise Broken(f"threads, open files, MB: {before} when warm, {after} at the end")
        if self.errors:
            raise Broken(f"tracebacks: {self.errors[:3]}")

    def _until_done(self) -> None:
        """Every series that was acknowledged is processed."""
        ledger = Ledger(self._folder / "root" / ".dicomnode" / "ledger.sqlite")
        try:
            end = time.monotonic() + 60
            while True:
                open_cases = [
                    case
                    for case in ledger.cases(*(one for one in State if one is not State.DONE))
                    if not case.identifier.startswith("ABORTED")
                ]
                # A restart ended the association before the last answer: it was sent again.
                left = [one for one in open_cases if "it was sent again" not in one.error]
                if not left:
                    return
                if time.monotonic() > end:
                    raise Broken(f"{len(left)} cases are not done: {left[:3]}")
                self._pausing.wait(0.2)
        finally:
            ledger.close()


def until_it_is_there(address: Address, node: Command) -> None:
    """Wait until a node answers."""
    end = time.monotonic() + 60
    while True:
        try:
            echo(address)
        except CouldNotCompleteDIMSEMessage:
            if time.monotonic() > end or node.process.poll() is not None:
                raise
            time.sleep(0.1)
        else:
            return


def main() -> None:
    """`make soak`."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        start = time.monotonic()
        try:
            soak.run(options.seconds)
        finally:
            for name, count in sorted(soak.counts.items()):
                print(f"{name}: {count}")
    print(f"all came back; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

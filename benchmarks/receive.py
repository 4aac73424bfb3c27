"""How many images per second does a node receive, and what do they cost it?

The sender is dcmtk's dcmsend or storescu, without Nagle's algorithm or with its defaults, or as many of them as
there are associations, each with its part of the images. The clock runs from the first request for an association to the last
release, by the senders' own logs. What arrived is counted, since dcmsend ends with success after losing
images. Every run has a fresh receiver, because a node that has an image already does not store it again.
"""

import atexit
import functools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.series import paths_of
from benchmarks.timing import Row, Table, cpu_seconds, memory_mb, scratch

_SLOW_SECONDS = 20.0
#: Built by `make bench`.
FLOOR = Path(__file__).parent.parent / "target/release/examples/receive_floor"
#: What dcmtk's programs log, and how, with a clock.
LOG = """log4cplus.rootLogger = INFO, console
log4cplus.appender.console = log4cplus::ConsoleAppender
log4cplus.appender.console.logToStdErr = true
log4cplus.appender.console.ImmediateFlush = true
log4cplus.appender.console.layout = log4cplus::PatternLayout
log4cplus.appender.console.layout.ConversionPattern = %D{%H:%M:%S.%q} %m%n
"""


def program(name: str) -> str | None:
    """A program of dcmtk, not pynetdicom's script of the same name in the virtual environment."""
    own = Path(sys.prefix, "bin")
    folders = [one for one in os.environ["PATH"].split(os.pathsep) if Path(one) != own]
    return shutil.which(name, path=os.pathsep.join(["/usr/bin", "/usr/sbin", *folders]))


class Receiver(ABC):
    """A process that receives into a folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def start(self, folder: Path) -> tuple["subprocess.Popen[str]", int]:
        """The process and its port."""

    @contextmanager
    def running(self, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
        """The process and its port, which ends with this."""
        process, port = self.start(folder)
        try:
            yield process, port
        finally:
            if process.stdin is not None:
                process.stdin.close()
            else:
                process.terminate()
            process.wait(30)
            if process.stdout is not None:
                process.stdout.close()

    @abstractmethod
    def count(self, process: "subprocess.Popen[str]", folder: Path) -> int:
        """How many images it has."""


class Python(Receiver):
    """One of `benchmarks.receiver`."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name)
        self._kind = kind
        self._on_disk = kind in ("power", "process")

    def start(self, folder: Path) -> tuple["subprocess.Popen[str]", int]:
        root = str(folder) if self._on_disk else ""
        return telling_its_port([sys.executable, "-m", "benchmarks.receiver", self._kind, root])

    def count(self, process: "subprocess.Popen[str]", folder: Path) -> int:
        if self._on_disk:
            return sum(1 for path in folder.glob("*/*/*.dcm") if path.parts[-3] != ".dicomnode")
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("count\n")
        process.stdin.flush()
        return int(process.stdout.readline())


class Orthanc(Receiver):
    """Orthanc with its defaults: it flushes each file, and its SQLite database less strictly than we do."""

    def start(self, folder: Path) -> tuple["subprocess.Popen[str]", int]:
        port, http = free_ports(2)
        settings = {
            "StorageDirectory": str(folder),
            "IndexDirectory": str(folder),
            "DicomPort": port,
            "HttpPort": http,
            "DicomAet": "ANY-SCP",
            "AuthenticationEnabled": False,
            "RemoteAccessAllowed": False,
            "Plugins": [],
        }
        config = folder.parent / "orthanc.json"
        config.write_text(json.dumps(settings))
        self._address = f"http://127.0.0.1:{http}/statistics"
        process = subprocess.Popen(
            [str(program("Orthanc")), str(config)],
            env=environment(no_delay=True),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(http)
        wait_for(port)
        return process, port

    def count(self, process: "subprocess.Popen[str]", folder: Path) -> int:
        del process, folder
        with urllib.request.urlopen(self._address, timeout=30) as answer:
            return int(json.load(answer)["CountInstances"])


class Storescp(Receiver):
    """dcmtk's storescp; it writes files and does not flush them."""

    def __init__(self, name: str, *options: str, no_delay: bool) -> None:
        super().__init__(name)
        self._options = options
        self._no_delay = no_delay

    def start(self, folder: Path) -> tuple["subprocess.Popen[str]", int]:
        (port,) = free_ports(1)
        found = program("storescp")
        assert found is not None
        process = subprocess.Popen(
            [found, *self._options, "-od", str(folder), str(port)],
            env=self._environment(),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        wait_for(port)
        return process, port

    def _environment(self) -> dict[str, str]:
        return environment(self._no_delay)

    def count(self, process: "subprocess.Popen[str]", folder: Path) -> int:
        del process
        return sum(1 for _ in folder.iterdir())


class FlushingStorescp(Storescp):
    """storescp made to flush each file and its folder: what "power" promises, without digest and row."""

    def __init__(self) -> None:
        super().__init__("storescp, made to flush file and folder, TCP_NODELAY=1", no_delay=True)

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "LD_PRELOAD": str(flushing())}


@functools.cache
def flushing() -> Path | None:
    """The library that makes a program flush what it writes; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    target = Path(tempfile.mkdtemp(), "flush.so")
    source = Path(__file__).with_name("flush.c")
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"]
    subprocess.run(command, check=True)
    atexit.register(shutil.rmtree, target.parent, ignore_errors=True)
    return target


class Floor(Receiver):
    """The same bytes, digest, files and flushes in Rust, and nothing else: rust/core/examples."""

    def __init__(self, durability: str) -> None:
        super().__init__(f'floor: Rust, as durable as "{durability}", no more than that')
        self._durability = durability

    def start(self, folder: Path) -> tuple["subprocess.Popen[str]", int]:
        return telling_its_port([str(FLOOR), str(folder), self._durability])

    def count(self, process: "subprocess.Popen[str]", folder: Path) -> int:
        del process
        return sum(1 for _ in folder.glob("patient/images/*.dcm"))


def telling_its_port(command: Sequence[str]) -> tuple["subprocess.Popen[str]", int]:
    """A program that prints its port, and ends with its standard input."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(port: int) -> None:
    """Until somebody listens there."""
    for _ in range(1500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError(f"nobody listens on port {port}")


def receivers() -> list[Receiver]:
    """Ours first."""
    found: list[Receiver] = [
        Python('dicomnode, durability="power"', "power"),
        Python('dicomnode, durability="process"', "process"),
        Python("dicomnode, in memory", "memory"),
        Python("pynetdicom alone, our socket settings, stores nothing", "tuned"),
        Python("pynetdicom alone, defaults, stores nothing", "bare"),
    ]
    if FLOOR.exists():
        found += [Floor("power"), Floor("process")]
    if program("Orthanc") is not None:
        found.append(Orthanc("Orthanc, defaults, TCP_NODELAY=1"))
    if program("storescp") is not None:
        found += [
            Storescp(
                "storescp +B -pdu 131072, TCP_NODELAY=1", "+B", "-pdu", "131072", no_delay=True
            ),
            Storescp("storescp, TCP_NODELAY=1", no_delay=True),
            Storescp("storescp --fork, TCP_NODELAY=1", "--fork", no_delay=True),
        ]
        if flushing() is not None:
            found.append(FlushingStorescp())
    return found


def closest() -> list[Receiver]:
    """What is compared where one more run costs much: ours on disk, what bounds them, and storescp."""
    apart = ("in memory", "pynetdicom", "Orthanc", "+B", "--fork")
    return [one for one in receivers() if not any(word in one.name for word in apart)]


def targets() -> list[Receiver]:
    """Ours on disk, and what they are to be as fast as."""
    wanted = ('"power"', '"process"', "storescp, TCP_NODELAY=1")
    return [one for one in closest() if one.name.endswith(wanted)]


def with_defaults() -> list[Receiver]:
    """What a sender meets that was not told to do without Nagle's algorithm."""
    found = [one for one in receivers() if one.name.startswith("dicomnode")]
    if program("storescp") is not None:
        found.append(Storescp("storescp, defaults", no_delay=False))
    return found


def answer(
    title: str,
    folder: Path,
    repeats: int,
    everyone: Sequence[Receiver] | None = None,
    associations: int = 1,
    sender: str = "dcmsend",
    no_delay: bool = True,
) -> Table | None:
    """Send a folder to every receiver, in turn; None without the sender."""
    found = program(sender)
    if found is None:
        return None
    senders = Senders(found, associations, no_delay)
    images = len(paths_of(folder))
    results: dict[str, list[tuple[float, float, float]]] = {}
    wrong: dict[str, str] = {}
    everyone = receivers() if everyone is None else everyone
    for number in range(repeats):
        # Each comes behind each other one: what that has left to the disk is no one's alone.
        first = number % len(everyone)
        for receiver in (*everyone[first:], *everyone[:first]):
            if receiver.name in wrong or _is_slow(results.get(receiver.name, [])):
                continue
            try:
                seconds, cpu, peak, count = _run(receiver, senders, folder, scratch())
            except RuntimeError as error:
                wrong[receiver.name] = f"fails: {str(error).splitlines()[-1][:60]}"
                continue
            if count != images:
                wrong[receiver.name] = f"{count} of {images} arrived"
            results.setdefault(receiver.name, []).append((seconds, cpu, peak))
    rows = []
    for receiver in everyone:
        name = receiver.name
        if name in wrong:
            rows.append(Row(name, wrong=wrong[name]))
            continue
        seconds_all, cpu_all, peaks = zip(*results[name], strict=True)
        rate = f"{images / statistics.median(seconds_all):.0f}"
        cost = f"{1000 * statistics.median(cpu_all) / images:.2f}"
        rows.append(Row(name, seconds_all, statistics.median(peaks), (rate, cost)))
    return Table(title, tuple(rows), ("images/s", "CPU ms/image"))


def _is_slow(runs: Sequence[tuple[float, float, float]]) -> bool:
    """A run of half a minute is not repeated: storescp with its defaults."""
    return bool(runs) and runs[0][0] > _SLOW_SECONDS


def _run(
    receiver: Receiver, senders: "Senders", folder: Path, place: Path
) -> tuple[float, float, float, int]:
    """Seconds, CPU seconds and memory growth of the receiver, and how many images arrived."""
    target = place / "received"
    target.mkdir(parents=True)
    try:
        with receiver.running(target) as (process, port):
            cpu, memory = cpu_seconds(process.pid), memory_mb("VmRSS", process.pid)
            seconds = senders.send(port, paths_of(folder), place)
            used = cpu_seconds(process.pid) - cpu
            peak = memory_mb("VmHWM", process.pid) - memory
            count = receiver.count(process, target)
    finally:
        forget(place)
    return seconds, used, peak, count


def forget(place: Path) -> None:
    """Let the page cache of all files go: the next run begins with the same memory as this one.

    A host gives a machine fresh memory for what it has not used yet, which takes longer than to write there.
    """
    for path in place.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Senders:
    """One of dcmtk's senders, as often as there are associations at once."""

    program: str
    associations: int
    no_delay: bool

    def send(self, port: int, paths: Sequence[Path], place: Path) -> float:
        """Send all files to a port of this machine; seconds from the first request to the last release."""
        config = place / "log.cfg"
        config.write_text(LOG)
        processes = [
            subprocess.Popen(
                [self.program, "-lc", str(config), "127.0.0.1", str(port), *map(str, part)],
                env=environment(self.no_delay),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for part in (paths[k :: self.associations] for k in range(self.associations))
        ]
        starts, ends = [], []
        for process in processes:
            said = process.communicate()[1]
            start = end = None
            for line in said.splitlines():
                clock, _, message = line.partition(" ")
                if message.lower().startswith("requesting association") and start is None:
                    start = datetime.strptime(clock, "%H:%M:%S.%f")
                if message.lower().startswith(("releasing association", "aborting association")):
                    end = datetime.strptime(clock, "%H:%M:%S.%f")
            if start is None or end is None:
                raise RuntimeError(f"{self.program} told no times: {said[-500:]}")
            starts.append(start)
            ends.append(end)
        return (max(ends) - min(starts)).total_seconds() % 86400


def environment(no_delay: bool) -> dict[str, str]:
    """That of a program of dcmtk, with or without Nagle's algorithm."""
    kept = {name: value for name, value in os.environ.items() if name != "TCP_NODELAY"}
    return {**kept, "TCP_NODELAY": "1"} if no_delay else kept

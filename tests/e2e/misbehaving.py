"""A pipeline that does what the SeriesDescription tells it, for tests of what contains it.

In a module of its own, since a worker process has to import it.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline


class Two(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= 2


class Grinding(Two):
    """Its get_data does harm."""

    def get_data(self) -> Any:
        if next(iter(self.data.values())).SeriesDescription == "GRIND":
            ctypes.string_at(0)
        return super().get_data()


def secondary_capture(rows: int = 2, columns: int = 2) -> Dataset:
    """What an archive takes, black, and in a study of its own."""
    one = Dataset()
    one.SOPClassUID, one.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    one.StudyInstanceUID, one.SeriesInstanceUID, one.Modality = generate_uid(), generate_uid(), "OT"
    one.Rows, one.Columns, one.SamplesPerPixel = rows, columns, 1
    one.PhotometricInterpretation, one.PixelRepresentation = "MONOCHROME2", 0
    one.BitsAllocated, one.BitsStored, one.HighBit = 8, 8, 7
    one.PixelData = bytes(rows * columns)
    return one


class Misbehaving(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": Grinding}
    isolation = "process"
    #: Where a test reads what it cannot see otherwise.
    notes: str = ""
    #: A control group with little memory, if the test could make one.
    small: str = ""
    number = 1
    _kept: list[Any] = []

    def post_init(self) -> None:
        self.where = os.getpid()

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset] | None:
        images, array = input_data["ct"]
        wish = str(images[0].SeriesDescription).partition(" ")[0]
        action = getattr(self, f"do_{wish.lower()}", None)
        if wish == "UIDS":
            self.note(next(iter(derive_series(array, images))).SOPInstanceUID)
            action = self.do_kill
        given = action(array) if action is not None else None
        return derive_series(array + self.number, images) if given is None else given

    def note(self, text: object) -> None:
        with Path(self.notes).open("a") as file:
            file.write(f"{text}\n")

    def do_raise(self, array: Any) -> None:
        raise ValueError("this\nbreaks the line")

    def do_segfault(self, array: Any) -> None:
        ctypes.string_at(0)

    def do_exit(self, array: Any) -> None:
        os._exit(0)

    def do_sysexit(self, array: Any) -> None:
        sys.exit(0)

    def do_abort(self, array: Any) -> None:
        os.abort()

    def do_hang(self, array: Any) -> None:
        self.note("hangs")
        while True:
            time.sleep(60)

    def do_deaf(self, array: Any) -> None:
        """Hangs, and does not listen to SIGTERM."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.do_hang(array)

    def do_kill(self, array: Any) -> None:
        """Is killed from outside, the first time."""
        self.note("killed")
        if Path(self.notes).read_text().count("killed") == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def do_killed(self, array: Any) -> None:
        """Is killed from outside, each time."""
        self.note("killed")
        os.kill(os.getpid(), signal.SIGKILL)

    def do_memory(self, array: Any) -> None:
        """More than the limit at once."""
        numpy.ones(10 << 30, numpy.uint8)

    def do_grow(self, array: Any) -> None:
        """More than the limit, bit by bit, in many processes of which each is small."""
        program = "x = bytearray(b'1' * (150 << 20)); import time; time.sleep(60)"
        started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(8)]
        started[0].wait()

    def do_leak(self, array: Any) -> None:
        self._kept.append(numpy.ones(20 << 20, numpy.uint8))
        self.note(os.getpid())

    def do_endless(self, array: Any) -> Iterable[Dataset]:
        while True:
            one = secondary_capture()
            one.PatientComments = "x" * 9000
            yield one

    def do_huge(self, array: Any) -> Iterable[Dataset]:
        return [secondary_capture(1536, 2048)]

    def do_invalid(self, array: Any) -> Iterable[Any]:
        one = Dataset()
        one.SOPInstanceUID = "no UID"
        return [one]

    def do_twice(self, array: Any) -> Iterable[Dataset]:
        return 2 * [secondary_capture()]

    def do_short(self, array: Any) -> Iterable[Dataset]:
        """The second of two has fewer pixels than it says."""
        one, other = secondary_capture(), secondary_capture()
        other.Rows = 3
        return [one, other]

    def do_nostudy(self, array: Any) -> Iterable[Dataset]:
        one = secondary_capture()
        one.StudyInstanceUID = ""
        return [one]

    def do_text(self, array: Any) -> Any:
        return ["a text"]

    def do_chatter(self, array: Any) -> None:
        for k in range(30_000):
            print(f"chatter {k} " + "x" * 100)
        self.logger.warning("last words\n2026/01/01 NODE ERROR not a line of its own")
        logging.getLogger("another").warning("of another library")

    def do_fork(self, array: Any) -> None:
        """Leaves processes behind: one in its group, one that left group, session and parent."""
        self.note(subprocess.Popen(["/bin/sleep", "600"]).pid)
        away = (
            "import os, sys\nos.setsid()\n"
            "if os.fork(): os._exit(0)\n"
            "print(os.getpid(), flush=True)\nos.execv('/bin/sleep', ['sleep', '600'])"
        )
        program = subprocess.Popen([sys.executable, "-c", away], stdout=subprocess.PIPE)
        assert program.stdout is not None
        self.note(int(program.stdout.readline()))
        program.wait()

    def do_forkhang(self, array: Any) -> None:
        self.do_fork(array)
        self.do_hang(array)

    def do_forkcrash(self, array: Any) -> None:
        self.do_fork(array)
        ctypes.string_at(0)

    def do_bomb(self, array: Any) -> None:
        """Forks, as do its children: 512 processes, of which many leave their group and session."""
        self.note(os.getpid())
        for k in range(9):
            if not os.fork():
                self.note(os.getpid())
                if k % 3 == 0:
                    os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    def do_threadbomb(self, array: Any) -> None:
        """Many threads, in a process of its own."""
        program = (
            "import threading, time\n"
            "for k in range(400): threading.Thread(target=time.sleep, args=(600,)).start()"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

    def do_outofmemory(self, array: Any) -> None:
        """Takes more than its control group has: the kernel ends it."""
        Path(self.small, "cgroup.procs").write_text(str(os.getpid()))
        self.note(os.getpid())
        self._kept.extend(bytearray(b"1" * (10 << 20)) for _ in range(100))
        self.note("has all")

    def do_grip(self, array: Any) -> None:
        """Leaves a deaf process behind, which holds all that this one has open."""
        reading, writing = os.pipe()
        if os.fork():
            os.read(reading, 1)
            return
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self.note(os.getpid())
        os.write(writing, b"!")
        while True:
            time.sleep(60)

    def do_griphang(self, array: Any) -> None:
        self.do_grip(array)
        self.do_deaf(array)

    def do_gripexit(self, array: Any) -> None:
        self.do_grip(array)
        os._exit(3)

    def do_both(self, array: Any) -> None:
        """A process that is forked returns from process() too."""
        if not os.fork():
            logging.getLogger("another").warning("said by a child")
            self.note("a child returns")

    def do_bothraise(self, array: Any) -> None:
        if not os.fork():
            self.note("a child raises")
            raise ValueError("raised by a child")

    def do_change(self, array: Any) -> None:
        """Changes all that it can reach for the next case."""
        os.chdir("/")
        os.environ["DICOMNODE_TEST_CHANGED"] = "1"
        os.environ.pop("PATH", None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 1000)
        os.umask(0)
        array[:] = 7
        self.note("changed")

    def do_look(self, array: Any) -> None:
        self.note(
            [
                str(Path.cwd()),
                os.environ.get("DICOMNODE_TEST_CHANGED"),
                "PATH" in os.environ,
                signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
                signal.getsignal(signal.SIGALRM) is signal.SIG_DFL,
                signal.getitimer(signal.ITIMER_REAL)[0],
                oct(os.umask(0o077)),
                list(Path().iterdir()),
            ]
        )
        Path("scratch").write_text("left behind")

    def do_who(self, array: Any) -> None:
        self.note([os.getpid(), self.where, self.is_worker, self.number])

    def do_threads(self, array: Any) -> None:
        """A thread that goes on for ever."""
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

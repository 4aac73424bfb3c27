"""The node's side of worker processes: starts, feeds, watches, ends and replaces them.

Solves that processing cannot hurt the node. Whatever a case does to its worker (a crash, too much time
or memory, results without end, processes left behind) ends that worker and everything below it, fails
that case with the reason, and the next case gets a fresh worker.
"""

import contextlib
import contextvars
import json
import logging
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from dicomnode.errors import (
    DicomnodeError,
    IncorrectlyConfigured,
    InvalidDataset,
    NoRoom,
    ProcessingFailed,
)
from dicomnode.lib.arena import HandedOver
from dicomnode.lib.dicom import printable
from dicomnode.lib.shared import is_sealed, view_shared
from dicomnode.server.channel import MOST_BYTES, BrokenChannel, Channel, bounded
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.job import CaseLimits, Claimed, Result, Stopped, WorkerLost, verify_result
from dicomnode.server.keeper import END, END_TELLING, descendants
from dicomnode.server.logs import tell
from dicomnode.server.processes import Ending, kills_for_memory, memory_of

# How long a worker may take to import and to make the pipeline, which may load a model.
_START_SECONDS = 600.0
# How long a keeper may take to end all below it.
_END_SECONDS = 20.0
# How often is looked at how much memory it takes, and at how many processes and threads it is.
_WATCH_SECONDS, _COUNT_SECONDS = 0.1, 0.5
# So many do not come from any sensible case, and the machine still has room for as many.
_MOST_PROCESSES, _MOST_THREADS = 1000, 10_000
# For how long nothing is started after that has failed.
_MOST_PAUSE_SECONDS = 60.0
# Of what a worker prints or logs in one case; more is dropped.
_MOST_LINES, _MOST_LINE, _TAIL_LINES = 10_000, 4096, 200
_START = (
    "import sys; n = sys.argv.index('--'); sys.path[:] = sys.argv[n + 1:]; "
    "from dicomnode.server.keeper import start; start()"
)


class Worker:
    """One worker process and its keeper. One on trial makes the pipeline without `post_init`."""

    def __init__(
        self,
        description: Mapping[str, Any],
        limits: CaseLimits,
        logger: logging.Logger,
        is_trial: bool = False,
    ) -> None:
        self._limits = limits
        self._logger = logger
        self._case_id = 0
        self._lines = 0
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._context = contextvars.copy_context()
        self._is_told = False
        self._ending = threading.Lock()
        self._report: Ending | None = None
        self._own: set[int] = set()
        self._watched = 0.0
        self._kills = kills_for_memory()
        #: How many cases it has processed, and whether it has to be replaced.
        self.cases = 0
        self.is_used_up = False
        job, job_there = socket.socketpair()
        control, control_there = socket.socketpair()
        output, output_there = os.pipe()
        ends = (job_there.fileno(), control_there.fileno())
        try:
            self._keeper = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _START,
                    *map(str, ends),
                    str(os.getpid()),
                    "--",
                    *dict.fromkeys(sys.path),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output_there,
                stderr=output_there,
                pass_fds=ends,
                start_new_session=True,
            )
        except (OSError, ValueError):
            for end in (job, control):
                end.close()
            os.close(output)
            raise
        finally:
            job_there.close()
            control_there.close()
            os.close(output_there)
        self.channel = Channel(bounded(job), MOST_BYTES)
        self._control = control
        self._output = threading.Thread(
            target=self._read_output, args=(output,), name="worker-output", daemon=True
        )
        self._output.start()
        with contextlib.suppress(BrokenChannel):
            # One that ended already tells so where its answer is awaited.
            self.channel.send({**description, "memory": limits.memory, "is_trial": is_trial})

    @property
    def is_alive(self) -> bool:
        """A keeper ends with its worker."""
        return self._keeper.poll() is None

    def memory(self, limit: int) -> int:
        """Bytes that it and all processes below it take, exactly where that is beyond a limit."""
        return memory_of(descendants(self._keeper.pid), limit)

    def wait_until_ready(self, input_names: set[str]) -> list[str]:
        """The attributes of the node that its pipeline lacks.

        Raises IncorrectlyConfigured where it cannot be made in a worker process.
        """
        message, _ = self._next(time.monotonic() + _START_SECONDS, "starting", watches=False)
        if "failed" in message:
            text = "the pipeline cannot be made in a worker process"
            tell(self._logger, logging.ERROR, text, str(message.get("trace")))
            raise IncorrectlyConfigured(
                f"the pipeline cannot be made in a worker process: {printable(str(message['failed']))}"
            )
        if set(message.get("ready") or ()) != input_names:
            raise IncorrectlyConfigured(
                f"the pipeline has the inputs {sorted(input_names)}, the one in a worker process has "
                f"{message.get('ready')}; declare them in the class"
            )
        self._own = set(descendants(self._keeper.pid))
        return [str(name) for name in message.get("lacks") or ()]

    def process(
        self,
        case_id: int,
        claimed: Claimed,
        on_ground: Callable[[float], None],
        handed: Mapping[str, HandedOver],
        folder: Path,
    ) -> Generator[Result]:
        """The results of a case, as they come.

        Raises ProcessingFailed, whatever happened to the worker; WorkerLost where that was not the
        case's doing.
        """
        self._case_id, self._lines = case_id, 0
        self._context = contextvars.copy_context()
        self._tail.clear()
        self._kills, self._watched = kills_for_memory(), time.monotonic()
        self.cases += 1
        end = None if self._limits.seconds is None else time.monotonic() + self._limits.seconds
        job = {
            "case": case_id,
            # It works in another folder than the node.
            "inputs": {
                name: {uid: os.path.abspath(source) for uid, source in found.items()}  # noqa: PTH100
                for name, found in claimed.sources.items()
            },
            "decoded": {name: _described(one) for name, one in handed.items()},
            "folder": str(folder),
            "grinds_only": claimed.grinds_only,
            "seed": claimed.seed.hex(),
        }
        with contextlib.suppress(BrokenChannel):
            # A worker that is gone is told of below.
            self.channel.send(job, [one.descriptor for one in handed.values()])
        is_over = False
        try:
            while True:
                message, descriptors = self._next(end, "processing")
                try:
                    if "raised" in message:
                        is_over = True
                        self.is_used_up |= bool(message.get("retires"))
                        raise ProcessingFailed(str(message["raised"]), str(message.get("trace")))
                    if "done" in message:
                        is_over = True
                        return
                    if "ground" in message:
                        on_ground(float(message["ground"]))
                        continue
                    result = _received(message.get("result"), descriptors)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)
                before = time.monotonic()
                yield result
                del result
                if end is not None:
                    # That the node keeps a result is not the worker's time.
                    end += time.monotonic() - before
                with contextlib.suppress(BrokenChannel):
                    self.channel.send({"kept": True})
        except DicomnodeError:
            raise
        except (BrokenChannel, TypeError, ValueError) as error:
            raise ProcessingFailed(
                f"its worker process said what is no message: {error}"
            ) from error
        finally:
            if is_over:
                self._look_for_leftovers()
            else:
                self.end()

    def end(self, tells: bool = False) -> Ending:
        """End the process and everything below it, and tell how it ended. At most once."""
        with self._ending:
            if self._report is None:
                self.is_used_up = True
                with contextlib.suppress(OSError):
                    self._control.sendall(END_TELLING if tells else END)
                self._report = self._read_report()
                self.channel.close()
                self._control.close()
            return self._report

    def _read_report(self) -> Ending:
        waiting = select.poll()
        waiting.register(self._control, select.POLLIN)
        told = b""
        if waiting.poll(1000 * _END_SECONDS):
            with contextlib.suppress(OSError):
                told = self._control.recv(4096)
        if not told:
            self._keeper.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_END_SECONDS)
        # Everything that holds the other end is gone, so that the last words are all there.
        self._output.join(1.0)
        try:
            found = json.loads(told)
            kills = kills_for_memory()
            is_short = None if kills is None else kills != self._kills
            return Ending(int(found["status"]), int(found["left"]), is_short)
        except (ValueError, TypeError, KeyError):
            return Ending()

    # What it says

    def _next(
        self, end: float | None, doing: str, watches: bool = True
    ) -> tuple[dict[str, Any], list[int]]:
        """The next message that is no log record."""
        waiting = select.poll()
        waiting.register(self.channel, select.POLLIN)
        waiting.register(self._control, select.POLLIN)
        pause = _COUNT_SECONDS if self._limits.memory is None else _WATCH_SECONDS
        while True:
            now = time.monotonic()
            if end is not None and now > end:
                self._fail_for_time(doing)
            if watches and now >= self._watched + pause:
                self._watched = now
                self._watch()
            left = pause if end is None else max(0.0, end - now)
            ready = dict(waiting.poll(1000 * min(left + 0.001, pause)))
            if self._report is not None:
                raise Stopped
            if self.channel.fileno() in ready:
                found = self.channel.receive()
                if found is not None:
                    message, descriptors = found
                    if "log" not in message:
                        return found
                    for descriptor in descriptors:
                        os.close(descriptor)
                    self._log(message["log"])
                    continue
            if ready:
                self._fail_for_end(doing)

    def _fail_for_time(self, doing: str) -> None:
        self.end(tells=True)
        if doing == "starting":
            raise IncorrectlyConfigured(
                f"the pipeline cannot be made in a worker process within {_START_SECONDS:g} s"
            )
        raise ProcessingFailed(
            f"not processed within process_seconds {self._limits.seconds:g}; its worker process was "
            "ended",
            self._last_words(),
        )

    def _fail_for_end(self, doing: str) -> None:
        """The worker ended, or closed its end."""
        report = self.end()
        if self._is_told:
            raise Stopped
        if doing == "starting":
            raise IncorrectlyConfigured(
                f"a worker process ended while the pipeline was made in it: {report}; "
                f"{printable(self._last_words())[-_MOST_LINE:]}"
            )
        kind = WorkerLost if report.is_from_outside else ProcessingFailed
        raise kind(f"its worker process ended before process() did: {report}", self._last_words())

    def _watch(self) -> None:
        found = descendants(self._keeper.pid)
        count, threads = len(found), sum(threads for _, threads in found.values())
        if count > _MOST_PROCESSES or threads > _MOST_THREADS:
            self.end()
            raise ProcessingFailed(
                f"its worker process started others without end: {count} processes with {threads} threads "
                f"are more than {_MOST_PROCESSES} or {_MOST_THREADS}; all were ended",
                self._last_words(),
            )
        limit = self._limits.memory
        if limit is not None and (used := memory_of(found, limit)) > limit:
            self.end()
            raise ProcessingFailed(
                f"its worker process took {used} bytes of memory, process_memory is {limit}; it was ended"
            )

    def _look_for_leftovers(self) -> None:
        """A worker in which a case left processes behind is not used again."""
        left = set(descendants(self._keeper.pid)) - self._own
        if left:
            self.is_used_up = True
            self._logger.warning(
                "case %d left %d processes running; they are ended with their worker process",
                self._case_id,
                len(left),
            )

    def stop(self) -> None:
        """End it because the node stops. From any thread."""
        self._is_told = True
        with contextlib.suppress(OSError):
            self._control.sendall(END)

    def _log(self, record: Any) -> None:
        level, text, trace = record
        if isinstance(level, int) and self._may_say(str(text)):
            tell(self._logger, min(max(level, 0), logging.CRITICAL), str(text), str(trace))

    def _may_say(self, text: str) -> bool:
        self._lines += 1
        if self._lines == _MOST_LINES:
            self._logger.warning("case %d says too much; the rest is dropped", self._case_id)
        return bool(text) and self._lines < _MOST_LINES

    def _read_output(self, output: int) -> None:
        """What is printed, line by line, into the log; also where nobody else listens."""
        with os.fdopen(output, "rb") as file:
            while line := file.readline(_MOST_LINE):
                text = printable(line.decode("utf-8", "replace").rstrip("\r\n"))
                self._tail.append(text)
                # Said where the case is processed, since it is about that one.
                self._context.copy().run(self._say, text)

    def _say(self, text: str) -> None:
        if self._may_say(text):
            tell(self._logger, logging.INFO, f"printed: {text}")

    def _last_words(self) -> str:
        return "\n".join(list(self._tail))


def try_import(
    description: Mapping[str, Any], input_names: set[str], logger: logging.Logger
) -> None:
    """Make a pipeline in a worker process, which then ends; post_init is left out.

    Raises IncorrectlyConfigured, with what helps, where that cannot be done.
    """
    try:
        worker = Worker(description, CaseLimits(), logger, is_trial=True)
    except OSError as error:
        raise IncorrectlyConfigured(f"worker processes cannot be started: {error}") from error
    try:
        worker.wait_until_ready(input_names)
    finally:
        worker.end()


class Workers:
    """The worker processes of a node: as many as cases are processed at once.

    `description` is that of `dicomnode.server.reference`. `root` is the node's own folder for what
    cases write into their working directory; None has them in the system's folder for such.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        input_names: set[str],
        count: int,
        limits: CaseLimits,
        most_cases: int | None,
        eager: EagerDecoding,
        root: Path | None,
        logger: logging.Logger,
    ) -> None:
        self._description = description
        self._input_names = input_names
        self._count = count
        self._limits = limits
        self._most_cases = most_cases
        self._eager = eager
        self._root = root
        self._logger = logger
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._first_memory = 0
        self._is_closed = False
        # How many of them somebody uses or is about to use.
        self._reserved = 0
        self._is_missing = False
        self._pause, self._next_start = 1.0, 0.0

    def open(self) -> None:
        """Start all of them, and wait until they are ready.

        Raises IncorrectlyConfigured where the pipeline cannot be made in a worker process.
        """
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root.mkdir(mode=0o700, exist_ok=True)
        try:
            for _ in range(self._count):
                self._idle.append(self._new())
            for worker in list(self._idle):
                lacks = worker.wait_until_ready(self._input_names)
        except OSError as error:
            raise IncorrectlyConfigured(f"worker processes cannot be started: {error}") from error
        if self._idle and lacks:
            self._logger.warning(
                "worker processes have no %s: only plain settings (numbers, texts, paths, and lists and "
                "dicts of them) go along; make anything else in post_init()",
                ", ".join(lacks),
            )

    def reserve(self) -> bool:
        """Whether another case can be processed now; starts a worker where one is missing."""
        with self._lock:
            if self._is_closed:
                return False
            dead = [one for one in self._idle if not one.is_alive]
            for worker in dead:
                self._idle.remove(worker)
        # To read how one has ended may take a while.
        for worker in dead:
            self._logger.warning("a worker process without work ended: %s", worker.end())
        with self._lock:
            if self._is_closed:
                return False
            if len(self._idle) + len(self._busy) > self._reserved:
                self._reserved += 1
                return True
            if time.monotonic() < self._next_start:
                return False
        if not self._start_another():
            return False
        return self.reserve()

    def release(self) -> None:
        """What was reserved is not needed any more."""
        with self._lock:
            self._reserved -= 1

    def is_waiting(self) -> bool:
        """Whether workers are missing, for which another start is tried later."""
        return self._is_missing

    def _start_another(self) -> bool:
        worker = None
        try:
            worker = self._new()
            with self._lock:
                self._busy.add(worker)
            if self._is_closed:
                raise Stopped
            worker.wait_until_ready(self._input_names)
        except (IncorrectlyConfigured, OSError, BrokenChannel, Stopped) as error:
            if worker is not None:
                worker.end()
            with self._lock:
                if worker is not None:
                    self._busy.discard(worker)
                self._is_missing = True
                self._pause = min(2 * self._pause, _MOST_PAUSE_SECONDS)
                self._next_start = time.monotonic() + self._pause
            if not self._is_closed:
                self._logger.error(
                    "no worker process: cases wait, the next try is in %g s: %s", self._pause, error
                )
            return False
        with self._lock:
            self._busy.discard(worker)
            self._pause, self._is_missing = 1.0, False
            is_wanted = not self._is_closed
            if is_wanted:
                self._idle.append(worker)
        if not is_wanted:
            worker.end()
        return is_wanted

    def _new(self) -> Worker:
        return Worker(self._description, self._limits, self._logger)

    def process(
        self, case_id: int, claimed: Claimed, on_ground: Callable[[float], None]
    ) -> Generator[Result]:
        """The results of a case. Raises as `Worker.process` does."""
        with self._lock:
            if self._is_closed:
                raise Stopped
            if not self._idle:
                # Another thread has found it dead, and starts one in its place.
                raise WorkerLost("its worker process ended before the case began")
            worker = self._idle.pop()
            self._busy.add(worker)
        handed: dict[str, HandedOver] = {}

        def on_taken(seconds: float) -> None:
            on_ground(seconds)
            _let_go(handed)

        try:
            self._hand_over(case_id, claimed, handed)
            with _working_folder(self._root, case_id) as folder:
                yield from worker.process(case_id, claimed, on_taken, handed, folder)
        finally:
            _let_go(handed)
            self._give_back(worker)

    def _hand_over(self, case_id: int, claimed: Claimed, handed: dict[str, HandedOver]) -> None:
        """What was decoded on arrival, by input."""
        try:
            for name, found in claimed.sources.items():
                arena = self._eager.decoded(case_id, name)
                given = None if arena is None else arena.hand_over(found.values())
                if given is not None:
                    handed[name] = given
        finally:
            self._eager.drop(case_id)

    def _give_back(self, worker: Worker) -> None:
        """A worker is free, or replaced before the next case has to wait for that."""
        if not worker.is_used_up and not self._is_worn_out(worker):
            with self._lock:
                self._busy.discard(worker)
                self._idle.append(worker)
            return
        worker.end()
        if not self._is_closed:
            self._start_another()
        with self._lock:
            self._busy.discard(worker)

    def _is_worn_out(self, worker: Worker) -> bool:
        """Whether a worker has processed enough cases, or its memory has grown much since the first."""
        if self._most_cases is not None and worker.cases >= self._most_cases:
            return True
        limit = self._limits.memory
        if limit is None or worker.is_used_up:
            return False
        used = worker.memory(limit)
        self._first_memory = self._first_memory or used
        return used > (self._first_memory + limit) / 2

    def stop(self) -> bool:
        """End what is being processed, because the node stops."""
        self._is_closed = True
        with self._lock:
            for worker in self._busy:
                worker.stop()
        return True

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._is_closed = True
            # The thread that uses one ends it itself.
            idle, workers = self._idle, [*self._idle, *self._busy]
            self._idle = []
        for worker in workers:
            worker.stop()
        for worker in idle:
            worker.end()
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)


def _described(handed: HandedOver) -> dict[str, Any]:
    reading = handed.reading
    return {
        "as": None if reading.dtype is None else reading.dtype.str,
        "values": reading.values,
        "color": reading.color,
        "first": handed.first,
        "shape": handed.shape,
        "dtype": handed.dtype.str,
        "frames": handed.frames,
    }


def _let_go(handed: dict[str, HandedOver]) -> None:
    """The memory is its receiver's alone."""
    for one in handed.values():
        os.close(one.descriptor)
    handed.clear()


@contextlib.contextmanager
def _working_folder(root: Path | None, case_id: int) -> Iterator[Path]:
    """An empty folder for one case, gone after it."""
    folder = (
        Path(tempfile.mkdtemp(prefix="dicomnode-"))
        if root is None
        else root / f"{case_id}-{secrets.token_hex(4)}"
    )
    try:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=root is None)
        except OSError as error:
            raise NoRoom(f"no working directory: {error.strerror}") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _received(result: Any, descriptors: list[int]) -> Result:
    """A result out of a worker: what is not as it says, or may still change, is none."""
    if not isinstance(result, list) or len(result) != 3 or len(descriptors) != 1:
        raise ProcessingFailed("its worker process said what is no message")
    uid, sop_class, syntax = map(str, result)
    (memory,) = descriptors
    if not is_sealed(memory):
        raise InvalidDataset(f"result {uid!r:.80} of the worker process may still change")
    verify_result(uid, sop_class, syntax, f"/proc/self/fd/{memory}")
    return uid, sop_class, syntax, view_shared(memory)

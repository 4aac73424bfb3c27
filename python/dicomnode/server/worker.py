"""A worker process: makes the pipeline once, and processes one case after the other.

Solves that user code runs where it can hurt nobody. Images come as paths, what was decoded and what
results as shared memory, and everything else is small messages. The process is one of
`dicomnode.server.keeper`, started by `dicomnode.server.workers`.
"""

import contextlib
import faulthandler
import gc
import io
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from dicomnode.errors import DicomnodeError, IncorrectlyConfigured
from dicomnode.lib.arena import Arena
from dicomnode.lib.images import Reading
from dicomnode.lib.quiet import quiet_pydicom
from dicomnode.lib.shared import shared_array, write_shared
from dicomnode.lib.uids import Uids
from dicomnode.server.channel import MOST_BYTES, BrokenChannel, Channel
from dicomnode.server.input import Datasets
from dicomnode.server.job import run
from dicomnode.server.node import AbstractPipeline
from dicomnode.server.reference import pipeline_of

# What a text of user code may take of a message.
_MOST_TEXT = MOST_BYTES // 64
# For each core so much may be reserved without being used, such as stacks of threads.
_RESERVED_BYTES = 16 << 20
_OPEN = "open"


def serve(descriptor: int) -> None:
    """Process what comes over a socket, until it is closed."""
    # What is printed is in the log at once, and not lost where this process is killed.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    # A crash in C tells where it was; so does the signal that ends what takes too long.
    faulthandler.enable()
    _tell_at_the_end()
    with contextlib.suppress(BrokenChannel):
        _serve(Channel(socket.socket(fileno=descriptor)))


def _serve(channel: Channel) -> None:
    first = channel.receive()
    if first is None:
        return
    description = first[0]
    forwarding = _Forwarding(channel)
    logging.getLogger().addHandler(forwarding)
    logging.getLogger().setLevel(description["level"])
    os.register_at_fork(after_in_child=partial(_leave, channel, forwarding))
    # What is opened on import would be opened again here.
    setattr(AbstractPipeline, _OPEN, refuse_to_open)
    sys.argv[:] = description["arguments"]
    try:
        pipeline, lacks = pipeline_of(description)
        quiet_pydicom()
        forwarding.own = pipeline.logger.name
        if not description["is_trial"]:
            pipeline.post_init()
        pipeline.input = dict(pipeline.input)
        memory = description["memory"]
        if memory is not None:
            _limit_memory(memory)
    except BaseException as error:  # noqa: BLE001  (an edge: told to the node, which refuses to open)
        told = str(error) if isinstance(error, DicomnodeError) else _line(error)
        channel.send({"failed": _cut(told), "trace": _trace(error)})
        return
    channel.send({"ready": sorted(pipeline.input), "lacks": lacks})
    while (message := channel.receive()) is not None:
        case, descriptors = message
        with _as_before(case["folder"]):
            ending = _process(channel, pipeline, case, descriptors)
        channel.send(ending)
        gc.collect()


def _leave(channel: Channel, forwarding: logging.Handler) -> None:
    """What user code forks does not speak to the node, whatever it does: what it logs is printed."""
    logging.getLogger().removeHandler(forwarding)
    channel.close()


def _process(
    channel: Channel, pipeline: AbstractPipeline, case: Mapping[str, Any], descriptors: list[int]
) -> dict[str, Any]:
    """One case; what the node is told at its end."""
    try:
        inputs, uids = {}, Uids(bytes.fromhex(case["seed"]))
        for name, sources in case["inputs"].items():
            decoded = None
            if name in case["decoded"]:
                decoded = _arena(case["decoded"][name], list(sources.values()), descriptors.pop(0))
            inputs[name] = pipeline.input[name](Datasets(sources, decoded, uids))
            del decoded
        process = None if case["grinds_only"] else pipeline.process
        results = run(process, inputs, lambda seconds: channel.send({"ground": seconds}))
        for uid, sop_class, syntax, data in results:
            memory = write_shared([data])
            try:
                channel.send({"result": [uid, sop_class, syntax]}, [memory])
            finally:
                os.close(memory)
            # The next one is made when this one is kept: however many there are, few are in memory.
            if channel.receive() is None:
                raise BrokenChannel("the node is gone")
    except BrokenChannel:
        raise
    except BaseException as error:  # noqa: BLE001  (an edge: told to the node, which marks the case FAILED)
        return {
            "raised": _cut(_line(error)),
            "trace": _trace(error),
            "retires": isinstance(error, MemoryError),
        }
    return {"done": True}


def _arena(decoded: Mapping[str, Any], sources: list[str], descriptor: int) -> Arena:
    """What the node decoded when the images came, in its place."""
    reading = Reading(
        None if decoded["as"] is None else numpy.dtype(decoded["as"]),
        decoded["values"],
        decoded["color"],
    )
    try:
        array = shared_array(
            descriptor, tuple(decoded["shape"]), numpy.dtype(decoded["dtype"]), decoded["first"]
        )
    finally:
        os.close(descriptor)
    return Arena.received(reading, array, dict(zip(sources, decoded["frames"], strict=True)))


def refuse_to_open(self: AbstractPipeline, *args: Any, **options: Any) -> None:
    """Stands for `AbstractPipeline.open` where the file of a pipeline is only imported."""
    del args, options
    raise IncorrectlyConfigured(
        f"the file of {type(self).__name__} opens it whenever it is imported, in a worker process "
        'too: put that below `if __name__ == "__main__":`'
    )


def _limit_memory(limit: int) -> None:
    """Have what is beyond the limit refused, as a MemoryError at the line that asks for it.

    What is reserved so far without being used, as by the threads of numpy, does not count; shared
    memory and files that are mapped do not either. The node watches what is really used.
    """
    used = _status()
    reserved = max(0, used["VmData"] - used["RssAnon"])
    most = limit + reserved + _RESERVED_BYTES * (os.cpu_count() or 1)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _status() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {one[0][:-1]: 1024 * int(one[1]) for one in lines if len(one) == 3 and one[2] == "kB"}


@contextmanager
def _as_before(folder: str) -> Iterator[None]:
    """In a folder of its own; afterwards all that a case can change for the next one is as before."""
    place, environment = Path.cwd(), dict(os.environ)
    numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    handlers = {number: signal.getsignal(number) for number in numbers}
    mask = os.umask(0o077)
    try:
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        yield
    finally:
        os.chdir(place)
        os.umask(mask)
        tempfile.tempdir = None
        os.environ.clear()
        os.environ.update(environment)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        _tell_at_the_end()


def _tell_at_the_end() -> None:
    faulthandler.register(signal.SIGTERM, chain=True)


def _line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _trace(error: BaseException) -> str:
    return _cut("".join(traceback.format_exception(error)))


def _cut(text: str) -> str:
    """A text that fits into a message: its end counts most."""
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[: _MOST_TEXT // 4]}\n[...]\n{text[-_MOST_TEXT // 2 :]}"


class _Forwarding(logging.Handler):
    """Sends what is logged in this process to the node."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        #: The pipeline's own logger. Of others only what is a warning is told.
        self.own = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != self.own and record.levelno < logging.WARNING:
            return
        try:
            text = record.getMessage()
            if record.name != self.own:
                text = f"{record.name}: {text}"
            trace = ""
            if record.exc_info and record.exc_info[1] is not None:
                trace = _trace(record.exc_info[1])
            self._channel.send({"log": [record.levelno, _cut(text), trace]})
        except BrokenChannel:
            pass
        except Exception:  # noqa: BLE001  (as every handler of the standard library)
            self.handleError(record)

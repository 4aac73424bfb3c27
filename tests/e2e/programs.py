"""Programs in processes of their own: nodes, and what they say; servers of others. For tests."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dimse import Address, echo

_COMMAND = "from dicomnode.cli.main import main; main()"


class Program:
    """A program, and what it says, killed at the end of a `with` block where it still runs."""

    def __init__(
        self, command: Sequence[object], environment: Mapping[str, str] | None = None
    ) -> None:
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # As where nobody has set it: what is said has to be there in time without.
            env={**os.environ, "PYTHONUNBUFFERED": "", **(environment or {})},
        )
        self.said: list[str] = []
        self._is_over = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.said.append(line)
                self._news.notify_all()
        with self._news:
            self._is_over = True
            self._news.notify_all()

    def until(self, pattern: str, seconds: float = 60.0) -> str:
        """Wait for a line that holds a pattern; its last group, or all of it."""

        def found() -> Any:
            return next(filter(None, (re.search(pattern, line) for line in self.said)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._is_over, seconds)
            match = found()
            assert match, f"{pattern!r} was not said, but: {''.join(self.said[-30:])}"
            return str(match.group(match.lastindex or 0))

    def address(self, ae_title: str) -> Address:
        """Where the node listens."""
        return Address("127.0.0.1", int(self.until(r"listens on [^ ]*:(\d+)")), ae_title)

    def ended(self, seconds: float = 60.0) -> str:
        """Wait for its end; all that it said."""
        self.process.wait(seconds)
        self._reader.join(10)
        return "".join(self.said)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


class Command(Program):
    """`dicomnode <arguments>`; `prefix` is a program that runs it, such as strace."""

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        super().__init__([*prefix, sys.executable, "-u", "-c", _COMMAND, *arguments], environment)


@contextmanager
def serving(
    command: Sequence[object], address: Address, calling: str = "DICOMNODE"
) -> Iterator[None]:
    """A server that is not ours, from when it answers a C-ECHO at `address`."""
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "TCP_NODELAY": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until_it_answers(address, calling, process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


def until_it_answers(
    address: Address, calling: str = "DICOMNODE", process: "subprocess.Popen[Any] | None" = None
) -> None:
    """Wait for a program that begins to listen."""
    end = time.monotonic() + 60
    while True:
        try:
            echo(address, calling)
        except CouldNotCompleteDIMSEMessage:
            if time.monotonic() > end or (process is not None and process.poll() is not None):
                raise
            time.sleep(0.05)
        else:
            return


def pipeline_file(folder: Path, code: str) -> str:
    """A file with the code of a pipeline `Node`, as an argument of `dicomnode run`."""
    file = folder / "pipeline.py"
    file.write_text(_IMPORTS + code)
    return f"{file}:Node"


_IMPORTS = """
import logging, os, sys, threading, time
from pathlib import Path
from dicomnode.lib.dimse import Address
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline

class Two(AbstractInput):
    image_grinder = list_grinder
    def validate(self):
        return self.images >= 2

class Base(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": Two}
    root_data_directory = Path(__file__).parent / "root"

"""

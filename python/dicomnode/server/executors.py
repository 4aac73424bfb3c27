"""Cases are processed by a `concurrent.futures.Executor`, for example Dask's, on whatever it runs.

Solves that a group that has a cluster need not learn another one. What is sent to it is the name of the
pipeline's class, plain settings, and for each image its path, where what runs there sees the same
folder, else its bytes. What comes back are Part 10 objects. How that is transported is the executor's
business: most of them pickle, between programs that their owner has started.
"""

import json
import logging
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from functools import lru_cache
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from dicomnode.errors import IncorrectlyConfigured, OutOfResources, ProcessingFailed
from dicomnode.lib.dicom import printable
from dicomnode.lib.quiet import quiet_pydicom
from dicomnode.lib.uids import Uids
from dicomnode.server.input import Datasets
from dicomnode.server.job import (
    CaseLimits,
    Claimed,
    Result,
    Stopped,
    WorkerLost,
    checked,
    run,
    verify_result,
)
from dicomnode.server.logs import tell
from dicomnode.server.reference import pipeline_of

_LOOK_SECONDS = 0.5
_START_SECONDS = 600.0
_MOST_RECORDS, _MOST_TEXT = 1000, 16_384
_making = threading.Lock()


class Executing:
    """The place of an executor. `folder` is where the node shows that its folder is seen there."""

    def __init__(
        self,
        executor: Executor,
        description: Mapping[str, Any],
        limits: CaseLimits,
        folder: Path | None,
        logger: logging.Logger,
    ) -> None:
        self._executor = executor
        self._description = json.dumps(description)
        self._limits = limits
        self._folder = folder
        self._logger = logger
        self._proof: tuple[str, str] | None = None
        self._is_broken = self._is_stopping = False

    def open(self) -> None:
        """Make the pipeline there. Raises IncorrectlyConfigured where that cannot be done."""
        if self._folder is not None:
            content = secrets.token_hex(16)
            file = self._folder.absolute() / f"seen-{secrets.token_hex(8)}"
            try:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                file.write_text(content)
            except OSError as error:
                raise IncorrectlyConfigured(
                    f"{file} cannot be written: {error.strerror}"
                ) from error
            self._proof = (str(file), content)
        failure: BaseException | None
        try:
            future = self._executor.submit(_prepare, self._description)
            # Whatever the executor, the import there or the user's __init__ raises.
            failure = future.exception(_START_SECONDS)
        except (RuntimeError, TimeoutError, CancelledError) as error:
            failure = error
        if failure is not None:
            raise IncorrectlyConfigured(
                f"the pipeline cannot be made by the executor: {type(failure).__name__}: {failure}"
            ) from failure
        if lacks := future.result():
            self._logger.warning(
                "the executor's processes have no %s: only plain settings (numbers, texts, paths, and "
                "lists and dicts of them) go along; make anything else in post_init()",
                ", ".join(map(printable, lacks)),
            )

    def reserve(self) -> bool:
        """Whether it still takes anything."""
        return not (self._is_broken or self._is_stopping)

    def release(self) -> None:
        """Nothing to do: the executor has a queue of its own."""

    def is_waiting(self) -> bool:
        """Never: a broken executor stays broken."""
        return False

    def process(
        self, case_id: int, claimed: Claimed, on_ground: Callable[[float], None]
    ) -> Generator[Result]:
        """The results of a case, after the last was made."""
        del case_id
        end = None if self._limits.seconds is None else time.monotonic() + self._limits.seconds
        job = {
            "output": self._limits.output,
            "grinds_only": claimed.grinds_only,
            "seed": claimed.seed.hex(),
        }
        answer: dict[str, Any] = {"unseen": True}
        if self._proof is not None:
            paths = {
                name: {
                    uid: os.path.abspath(source)  # noqa: PTH100
                    for uid, source in found.items()
                    if isinstance(source, str)
                }
                for name, found in claimed.sources.items()
            }
            answer = self._answer({**job, "paths": paths, "proof": self._proof}, {}, end)
        if "unseen" in answer:
            answer = self._answer(job, _bytes_of(claimed), end)
        for level, text, trace in answer["log"]:
            tell(self._logger, level, text, trace)
        if "raised" in answer:
            raise ProcessingFailed(answer["raised"], answer["trace"])
        on_ground(answer["ground"])
        for uid, sop_class, syntax, data in answer["results"]:
            verify_result(uid, sop_class, syntax, data)
            yield uid, sop_class, syntax, data

    def _answer(
        self,
        job: dict[str, Any],
        images: Mapping[str, Sequence[tuple[str, bytes]]],
        end: float | None,
    ) -> dict[str, Any]:
        failure: BaseException | None
        try:
            future = self._executor.submit(_process, self._description, json.dumps(job), images)
            failure = self._failure_of(future, end)
        except (RuntimeError, CancelledError) as error:
            failure = error
        if failure is None:
            return future.result()
        told = f"{type(failure).__name__}: {failure}"
        if not isinstance(failure, RuntimeError):
            # What an executor raises where its own process was lost is its own kind of error.
            raise ProcessingFailed(f"the executor failed: {told}") from failure
        # BrokenExecutor is one; another is what an executor raises that was shut down.
        self._is_broken = True
        self._logger.critical(
            "the executor takes no work any more, cases wait: %s; start the node again", told
        )
        raise WorkerLost(f"the executor is broken: {told}") from failure

    def _failure_of(
        self, future: "Future[dict[str, Any]]", end: float | None
    ) -> BaseException | None:
        """Wait until something came of it; what was raised instead of an answer."""
        while True:
            try:
                return future.exception(_LOOK_SECONDS)
            except TimeoutError:
                if future.done():
                    continue
            if self._is_stopping:
                future.cancel()
                raise Stopped
            if end is not None and time.monotonic() > end:
                future.cancel()
                raise ProcessingFailed(
                    f"not processed within process_seconds {self._limits.seconds:g}; the executor may "
                    "still be at it"
                )

    def stop(self) -> bool:
        """Wait for nothing any more; what the executor does with it is not known."""
        self._is_stopping = True
        return True

    def close(self) -> None:
        """The executor is its owner's; only the proof is ours."""
        if self._proof is not None:
            Path(self._proof[0]).unlink(missing_ok=True)


def _bytes_of(claimed: Claimed) -> dict[str, list[tuple[str, bytes]]]:
    try:
        return {
            name: [
                (uid, source if isinstance(source, bytes) else Path(source).read_bytes())
                for uid, source in found.items()
            ]
            for name, found in claimed.sources.items()
        }
    except OSError as error:
        raise OutOfResources(f"images cannot be read: {error.strerror}") from error


# What runs there


@lru_cache(maxsize=8)
def _made(description: str) -> tuple[Any, list[str]]:
    pipeline, lacks = pipeline_of(json.loads(description))
    quiet_pydicom()
    # What it logs goes back with the results.
    pipeline.logger.propagate = False
    pipeline.post_init()
    return pipeline, lacks


def _pipeline(description: str) -> tuple[Any, list[str]]:
    """Made once in each process, since it may hold a model."""
    with _making:
        return _made(description)


def _prepare(description: str) -> list[str]:
    """The attributes that the pipeline lacks there."""
    return _pipeline(description)[1]


def _process(
    description: str, text: str, images: Mapping[str, Sequence[tuple[str, bytes]]]
) -> dict[str, Any]:
    """One case: what `Executing.process` takes apart."""
    job = json.loads(text)
    sources: Mapping[str, Mapping[str, Any]] = {name: dict(found) for name, found in images.items()}
    if "paths" in job:
        if not _sees(*job["proof"]):
            return {"unseen": True}
        sources = job["paths"]
    try:
        pipeline, _ = _pipeline(description)
    except BaseException as error:  # noqa: BLE001  (the same edge as below)
        # Another process may have made it, when the node opened.
        return _raised(error, [])
    records = _Records()
    seconds: list[float] = []
    pipeline.logger.addHandler(records)
    try:
        uids = Uids(bytes.fromhex(job["seed"]))
        inputs = {
            name: pipeline.input[name](Datasets(found, uids=uids))
            for name, found in sources.items()
        }
        limits = CaseLimits(output=job["output"])
        process = None if job["grinds_only"] else pipeline.process
        results = [
            (uid, sop_class, syntax, bytes(data))
            for uid, sop_class, syntax, data in checked(
                run(process, inputs, seconds.append), limits
            )
        ]
    except BaseException as error:  # noqa: BLE001  (an edge: told to the node, which marks the case FAILED)
        return _raised(error, records.found)
    finally:
        pipeline.logger.removeHandler(records)
    return {"ground": seconds[0], "results": results, "log": records.found}


def _raised(error: BaseException, found: list[tuple[int, str, str]]) -> dict[str, Any]:
    line = "".join(traceback.format_exception_only(error)).strip()
    return {"raised": line, "trace": "".join(traceback.format_exception(error)), "log": found}


def _sees(file: str, content: str) -> bool:
    """Whether the node's folder is here: a folder of the same name may be another one."""
    try:
        return Path(file).read_text() == content
    except (OSError, ValueError):
        return False


class _Records(QueueHandler):
    """What the pipeline logs in this thread. A record that cannot be made text is told on stderr."""

    def __init__(self) -> None:
        super().__init__(SimpleQueue())
        self.found: list[tuple[int, str, str]] = []
        self._thread = threading.get_ident()

    def prepare(self, record: logging.LogRecord) -> tuple[int, str, str]:
        trace = ""
        if record.exc_info and record.exc_info[1] is not None:
            trace = "".join(traceback.format_exception(record.exc_info[1]))
        return record.levelno, record.getMessage()[:_MOST_TEXT], trace[-_MOST_TEXT:]

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and len(self.found) < _MOST_RECORDS:
            super().emit(record)

    def enqueue(self, record: Any) -> None:
        self.found.append(record)

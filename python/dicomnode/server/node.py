"""The node: one class that a user subclasses, declares and opens."""

import atexit
import contextlib
import inspect
import ipaddress
import logging
import math
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, get_args

from pydicom.dataset import Dataset
from pydicom.tag import TagType

from dicomnode.errors import IncorrectlyConfigured, OutOfResources, UnknownCase
from dicomnode.lib.dicom import tag_of
from dicomnode.lib.dimse import Address
from dicomnode.lib.quiet import quiet_pydicom
from dicomnode.lib.tls import TLS
from dicomnode.server.association import AssociationServer, Reception, default_contexts
from dicomnode.server.completeness import AtDeadline, Patience
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.executors import Executing
from dicomnode.server.exporter import Retries
from dicomnode.server.health import Health
from dicomnode.server.input import AbstractInput, eager_reading, expected_of
from dicomnode.server.job import CaseLimits, Place
from dicomnode.server.limits import Limits
from dicomnode.server.listener import Network
from dicomnode.server.logs import Annotating, LogFile, formatter
from dicomnode.server.meters import Meters
from dicomnode.server.reference import describe
from dicomnode.server.routing import compile_rules
from dicomnode.server.runner import Runner, Work
from dicomnode.server.threads import Threads
from dicomnode.server.workers import Workers
from dicomnode.storage.layout import OWN
from dicomnode.storage.ledger import Case
from dicomnode.storage.store import Durability, Storage

# How often a blocking node looks whether a signal came.
_LOOK_SECONDS = 0.2
_ALL_ADDRESSES = ("", "0.0.0.0", "::")  # noqa: S104  (it is warned of)
_AE_TITLE = re.compile(r"[ -\[\]-~]{1,16}")


class AbstractPipeline:
    """A DICOM node that receives images, waits for its inputs, processes, and sends the results.

    Subclass it, set its attributes, override `process`. `MyPipeline()` opens the node and blocks
    until it is stopped; `MyPipeline(start=False)` does not open it. A `with` block opens without
    blocking, and closes.

    Raises IncorrectlyConfigured for settings that cannot work.
    """

    #: Address to listen on. `0.0.0.0` is every address of this machine.
    ip: str = "localhost"
    #: Port to listen on; 0 finds a free one, which `port` then tells.
    port: int = 104
    #: AE title of this node, as receiver and as sender.
    ae_title: str = "DICOMNODE"

    #: Argument name -> input class.
    input: Mapping[str, type[AbstractInput]] = {}
    #: Where every result goes.
    endpoints: Sequence[Address] = []
    #: How long to wait before what an endpoint did not take is sent again. It doubles with each
    #: attempt, to at most 15 minutes, and the wait is a random part of it.
    export_retry_seconds: float = 5.0
    #: What has waited so long for an endpoint is given up: the case is FAILED, and kept.
    export_give_up_seconds: float = 5 * 24 * 3600.0
    #: Whether endpoints have to promise to keep the results (storage commitment) before the case is
    #: DONE and its files are deleted.
    commit: bool = False
    #: The attribute that tells which images belong together.
    patient_identifier_tag: TagType = 0x00100020
    #: A case is ready when no image came for it for so long, whether or not its sender has ended the
    #: association. None: as soon as its inputs validate after an association.
    quiet_seconds: float | None = None
    #: A case that is not complete when no image came for so long is dealt with by `at_deadline`:
    #: "fail" it, which keeps it, or "process" it as it is. None: it waits without end.
    deadline_seconds: float | None = None
    at_deadline: AtDeadline = "fail"
    #: A case that is not complete when no image came for so many days is deleted, with its images.
    #: None: nothing is.
    study_expiration_days: float | None = None
    #: Where images rest until they are done with; None keeps them in memory, lost at the end.
    root_data_directory: str | os.PathLike[str] | None = None
    #: What an answer 0x0000 promises with a `root_data_directory`: the image survives a power cut
    #: ("power"), or only a killed process ("process"), which is faster.
    durability: Durability = "power"
    #: At most so many bytes of images in memory, and of images that are arriving; None is half of
    #: what the machine has. Decoded images of eager inputs take at most half of it on top.
    memory_limit: int | None = None
    #: How many cases are processed at once; 0 only receives.
    workers: int = 1
    #: How long `close`, a signal too, waits for images that arrive and cases that are processed.
    stop_seconds: float = 30.0
    #: Where cases are processed: `"thread"` is in this process, `"process"` in worker processes, which
    #: can do no harm to the node.
    isolation: Literal["thread", "process"] = "thread"
    #: At most so long for one case, by the clock; then its worker process is ended. A thread cannot be
    #: ended: that it takes longer is logged. None is no limit.
    process_seconds: float | None = 3600.0
    #: At most so many bytes of memory for a worker process and all that it starts; None is no limit.
    process_memory: int | None = None
    #: At most so many bytes of results of one case.
    process_output: int = 16 << 30
    #: A worker process is replaced after so many cases, so that what leaks does not add up; None keeps it.
    worker_cases: int | None = 1000
    #: Processes the cases instead, for example on other machines: any `concurrent.futures.Executor`.
    executor: Executor | None = None
    #: True where this is the instance of a worker process; do not set it.
    is_worker: bool = False

    #: Port of the pages `/healthz` and `/metrics`; None has none, 0 finds a free one, which
    #: `health_port` then tells.
    health_port: int | None = None
    #: Address of these pages. They tell nothing of a patient, but do not show them to everybody.
    health_ip: str = "127.0.0.1"

    #: Where the log goes, rotated every Monday at midnight, and where it is large; None is the screen.
    log_path: str | os.PathLike[str] | None = None
    log_level: int | str = logging.INFO
    #: As in the module logging, also with `%(association)s` and `%(case)s`; or `"json"`: one object
    #: in each line.
    log_format: str = "%(asctime)s %(name)s %(levelname)s %(message)s"
    #: Show in the log what exceptions and log lines of your own code tell of a patient. For
    #: debugging: without it the values that are known of the patient are `***`.
    log_patient_data: bool = False
    #: The logs of so many weeks are kept; 0 is all.
    backup_weeks: int = 8
    #: At most so many bytes of logs, the oldest go first.
    log_bytes: int = 1 << 30

    #: pynetdicom presentation contexts; C-ECHO is always answered.
    supported_contexts: Sequence[Any] = default_contexts()
    #: Whether a sender has to call this node by its AE title.
    require_called_aet: bool = True
    #: The AE titles that may send; empty lets everybody. A mapping also tells from which addresses or
    #: networks: `{"SCANNER": ["10.1.2.3"], "PACS": ["10.1.0.0/16"]}`.
    require_calling_aet: Sequence[str] | Mapping[str, Sequence[str]] = []
    #: Addresses or networks that may connect, such as "10.1.0.0/16"; empty lets all.
    allowed_networks: Sequence[str] = []
    #: Certificates for receiving over TLS; None receives without.
    tls: TLS | None = None
    #: What strangers may take of this node.
    limits: Limits = Limits()

    _numbers: ClassVar[Iterator[int]] = count(1)
    #: What counts how long cases wait. For tests.
    _clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, start: bool = True) -> None:
        self.input = dict(_checked(self.input))
        self.endpoints = list(_addresses(self.endpoints))
        self._stop_seconds = 0.0
        self._check_settings()
        self.logger = logging.getLogger(f"dicomnode.{type(self).__name__}-{next(self._numbers)}")
        self.logger.addFilter(Annotating(lambda: self.log_patient_data))
        self._handler: logging.Handler | None = None
        self._state = threading.RLock()
        self._closed = threading.Event()
        self._is_told_to_stop = self._is_opening = False
        self._process_id = 0
        self._storage: Storage | None = None
        self._eager: EagerDecoding | None = None
        self._runner: Runner | None = None
        self._server: AssociationServer | None = None
        self._health: Health | None = None
        if start:
            self.open()

    def _check_settings(self) -> None:
        """Find what cannot work before the first image comes."""
        self._rules = compile_rules(_checked(self.input))
        try:
            self._identifier_tag = tag_of(self.patient_identifier_tag)
        except (ValueError, TypeError, OverflowError) as error:
            raise IncorrectlyConfigured(
                f"patient_identifier_tag {self.patient_identifier_tag!r} is no DICOM tag"
            ) from error
        _addresses(self.endpoints)
        if isinstance(self.require_calling_aet, str) or not isinstance(
            self.require_calling_aet, Sequence | Mapping
        ):
            raise IncorrectlyConfigured(
                "require_calling_aet has to be a list of AE titles, or to map them to addresses, not "
                f"{self.require_calling_aet!r}"
            )
        calling = self.require_calling_aet
        self._calling = {
            title: _networks("require_calling_aet", calling[title])
            if isinstance(calling, Mapping)
            else ()
            for title in calling
        }
        self._networks = _networks("allowed_networks", self.allowed_networks)
        if self.durability not in get_args(Durability):
            raise IncorrectlyConfigured(
                f"durability has to be one of {get_args(Durability)}, not {self.durability!r}"
            )
        if not isinstance(self.limits, Limits):
            raise IncorrectlyConfigured(f"limits has to be Limits(...), not {self.limits!r}")
        if self.tls is not None and not isinstance(self.tls, TLS):
            raise IncorrectlyConfigured(f"tls has to be TLS(...) or None, not {self.tls!r}")
        for name, ip in (("ip", self.ip), ("health_ip", self.health_ip)):
            if not isinstance(ip, str):
                raise IncorrectlyConfigured(
                    f"{name} has to be a text such as '0.0.0.0', not {ip!r}"
                )
        for name, folder in (
            ("root_data_directory", self.root_data_directory),
            ("log_path", self.log_path),
        ):
            if folder is not None and not isinstance(folder, str | os.PathLike):
                raise IncorrectlyConfigured(f"{name} has to be a path or None, not {folder!r}")
            if folder is not None and not str(folder):
                raise IncorrectlyConfigured(f"{name} is empty; None means that there is none")
        if not isinstance(self.log_patient_data, bool):
            raise IncorrectlyConfigured(
                f"log_patient_data has to be True or False, not {self.log_patient_data!r}"
            )
        if not isinstance(self.stop_seconds, int | float) or not 0 <= self.stop_seconds < 1e6:
            raise IncorrectlyConfigured(
                f"stop_seconds has to be a number of seconds, not {self.stop_seconds!r}"
            )
        self._stop_seconds = float(self.stop_seconds)
        for name, time_limit in (
            ("quiet_seconds", self.quiet_seconds),
            ("deadline_seconds", self.deadline_seconds),
            ("study_expiration_days", self.study_expiration_days),
        ):
            is_number = isinstance(time_limit, int | float) and not isinstance(time_limit, bool)
            if time_limit is not None and not (is_number and 0 < time_limit < math.inf):
                raise IncorrectlyConfigured(
                    f"{name} has to be a number greater than zero, or None, not {time_limit!r}"
                )
        if self.at_deadline not in ("fail", "process"):
            raise IncorrectlyConfigured(
                f'at_deadline has to be "fail" or "process", not {self.at_deadline!r}'
            )
        if (self.deadline_seconds or math.inf) < (self.quiet_seconds or 0):
            raise IncorrectlyConfigured(
                f"deadline_seconds {self.deadline_seconds} is less than quiet_seconds "
                f"{self.quiet_seconds}: no case would ever be ready"
            )
        self._check_processing()
        for name, value, least in (
            ("port", self.port, 0),
            ("health_port", 0 if self.health_port is None else self.health_port, 0),
            ("workers", self.workers, 0),
            ("backup_weeks", self.backup_weeks, 0),
            ("log_bytes", self.log_bytes, 1 << 16),
            ("memory_limit", 1 if self.memory_limit is None else self.memory_limit, 1),
            ("process_memory", 1 if self.process_memory is None else self.process_memory, 1),
            ("process_output", self.process_output, 1),
            ("worker_cases", 1 if self.worker_cases is None else self.worker_cases, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise IncorrectlyConfigured(
                    f"{name} has to be a whole number, at least {least}, not {value!r}"
                )
        if not isinstance(self.commit, bool):
            raise IncorrectlyConfigured(f"commit has to be True or False, not {self.commit!r}")
        for name, seconds in (
            ("export_retry_seconds", self.export_retry_seconds),
            ("export_give_up_seconds", self.export_give_up_seconds),
        ):
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not (is_number and 0 <= seconds < math.inf):
                raise IncorrectlyConfigured(f"{name} has to be 0 or more seconds, not {seconds!r}")
        for name, titles in (
            ("ae_title", [self.ae_title]),
            ("require_calling_aet", self.require_calling_aet),
        ):
            for title in titles:
                if not (isinstance(title, str) and _AE_TITLE.fullmatch(title) and title.strip()):
                    raise IncorrectlyConfigured(
                        f"{name} has to have 1 to 16 ASCII characters without backslash, not {title!r}"
                    )

    def _check_processing(self) -> None:
        if self.isolation not in ("thread", "process"):
            raise IncorrectlyConfigured(
                f"isolation has to be 'thread' or 'process', not {self.isolation!r}"
            )
        if self.executor is not None and not isinstance(self.executor, Executor):
            raise IncorrectlyConfigured(
                f"executor has to be a concurrent.futures.Executor, not {self.executor!r}"
            )
        if self.executor is not None and self.isolation == "process":
            raise IncorrectlyConfigured(
                "an executor decides itself where cases are processed: leave isolation as it is"
            )
        if self.process_memory is not None and self.isolation == "thread":
            raise IncorrectlyConfigured(
                'process_memory needs isolation = "process": the memory of one thread has no limit'
            )
        seconds = self.process_seconds
        if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise IncorrectlyConfigured(
                f"process_seconds has to be a number above 0 or None, not {seconds!r}"
            )

    # What a user overrides

    def filter(self, dataset: Dataset) -> bool:
        """Whether to take an image. Called for each before it is offered to the inputs.

        `dataset` is lazy: its pixel data is not read unless you ask for it. False answers 0xB006.
        """
        del dataset
        return True

    def post_init(self) -> None:
        """Called each time the node opens, after its storage is there and before it listens."""

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset] | None:
        """From the data of all inputs to results. Called for each case, in a worker thread.

        `input_data` maps each key of `input` to what its `get_data` returned. Every Dataset that is
        returned goes to every address in `endpoints`; None or nothing means there is no output. An
        exception marks the case FAILED and keeps it.
        """
        del input_data
        raise IncorrectlyConfigured(
            f"{type(self).__name__} has inputs but does not define process()"
        )

    # Opening and closing

    def open(self, blocking: bool = True, notify: Callable[[str], None] | None = None) -> None:
        """Recover what an earlier run left, listen, and with `blocking` stay until it is stopped.

        From then on pydicom warns of nothing in this process, see `dicomnode.lib.quiet`.

        Ctrl-C and SIGTERM stop a blocking node that was opened in the main thread. May be called
        from any thread. `notify` gets the words of sd_notify(3) from a blocking node: `READY=1`
        when it listens, `WATCHDOG=1` all the time while it works, `STOPPING=1` when it closes.

        Raises CannotListen, InvalidRootDataDirectory, IncorrectlyConfigured.
        """
        with self._stopped_by_signals(blocking):
            with self._state:
                if self._server is not None:
                    raise IncorrectlyConfigured(f"{type(self).__name__} is open already")
                self._closed.clear()
                self._is_told_to_stop = False
                self._process_id = os.getpid()
                self._is_opening = True
                try:
                    self._check_settings()
                    quiet_pydicom()
                    self._open_log()
                    self._open()
                except BaseException:
                    self._close()
                    raise
                finally:
                    self._is_opening = False
            if blocking:
                tell = notify or _nobody
                try:
                    with contextlib.suppress(KeyboardInterrupt):
                        tell("READY=1")
                        # The handler of a signal may not touch a lock, so it sets a flag only.
                        while not (self._is_told_to_stop or self._closed.wait(_LOOK_SECONDS)):
                            if self._is_at_work():
                                tell("WATCHDOG=1")
                finally:
                    tell("STOPPING=1")
                    self.close()

    def _is_at_work(self) -> bool:
        """Whether the ledger answers, which nothing happens without; does not return else."""
        storage = self._storage
        try:
            return storage is not None and storage.ledger.changes() >= 0
        except sqlite3.Error:
            return False

    @property
    def is_open_to_all(self) -> bool:
        """Whether every machine in every network may send."""
        return self.ip in _ALL_ADDRESSES and not (
            self.require_calling_aet
            or self.allowed_networks
            or (self.tls is not None and self.tls.ca is not None)
        )

    @contextlib.contextmanager
    def _stopped_by_signals(self, wanted: bool) -> Iterator[None]:
        """SIGTERM ends the opening or the waiting; only in the main thread."""
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            if self._is_opening:
                raise SystemExit(0)
            self._is_told_to_stop = True

        previous = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _open(self) -> None:
        limit = _half_of_memory() if self.memory_limit is None else self.memory_limit
        storage = Storage(
            None if self.root_data_directory is None else Path(self.root_data_directory),
            self.input,
            self._identifier_tag,
            limit,
            self.logger,
            durability=self.durability,
            least_free=self.limits.free_bytes,
            is_shared=self.isolation == "process",
        )
        tls = None if self.tls is None else self.tls.server()
        for endpoint in self.endpoints:
            if endpoint.tls is not None:
                # What is wrong with its files is told now, and not by the first case.
                endpoint.tls.client()
        storage.open()
        self._storage = storage
        self.post_init()
        if self._storage is not storage:
            raise IncorrectlyConfigured(f"post_init() of {type(self).__name__} closed the node")
        self._check_settings()
        if self.input and type(self).process is AbstractPipeline.process:
            self.logger.warning("%s does not define process()", type(self).__name__)
        readings = {
            name: None if self.executor is not None else eager_reading(kind)
            for name, kind in self.input.items()
        }
        eager = EagerDecoding(
            {name: reading for name, reading in readings.items() if reading is not None},
            storage,
            limit // 2,
            self.logger,
            is_shared=self.isolation == "process",
        )
        self._eager = eager
        meters = Meters()
        days = self.study_expiration_days
        case_limits = CaseLimits(self.process_seconds, self.process_memory, self.process_output)
        work = Work(
            self.ae_title,
            self.input,
            tuple(self.endpoints),
            Retries(self.export_retry_seconds, self.export_give_up_seconds, self.commit),
            Patience(
                self.quiet_seconds,
                self.deadline_seconds,
                self.at_deadline,
                None if days is None else days * 24 * 3600,
            ),
            self._clock,
            self._place(eager, case_limits),
            case_limits,
        )
        self._runner = runner = Runner(work, storage, eager, self.logger, self.workers, meters)

        server = AssociationServer(
            Reception(
                ae_title=self.ae_title,
                rules=self._rules,
                identifier_tag=self._identifier_tag,
                supported_contexts=self.supported_contexts,
                require_called_aet=self.require_called_aet,
                calling=self._calling,
                networks=self._networks,
                tls=tls,
                limits=self.limits,
                meters=meters,
                committing=runner.committing,
                accept=None if type(self).filter is AbstractPipeline.filter else self.filter,
                most_bytes=limit,
                on_stored=runner.arrived,
                decode=eager.add if eager.is_wanted else None,
                on_end=runner.left,
            ),
            storage,
            self.logger,
        )
        if self.health_port is not None:
            self._health = Health(
                storage,
                meters,
                lambda: self._server is not None,
                [str(endpoint) for endpoint in work.endpoints],
                runner.trouble,
                self.logger,
            )
            self.health_port = self._health.open(self.health_ip, self.health_port)
            self.logger.info("health is told on %s:%d", self.health_ip, self.health_port)
        storage.is_open_for = server.is_open_for
        runner.watch(server)
        runner.open()
        # Before images come, whose time counts from then on.
        runner.recall()
        self.port = server.open(self.ip, self.port)
        self._server = server
        self._is_opening = False
        runner.start()
        # A program that ends without close() does not leave a step half done.
        atexit.register(self.close)
        self.logger.info("%s listens on %s:%d", self.ae_title, self.ip, self.port)
        if self.is_open_to_all:
            self.logger.warning(
                "ANYBODY WHO REACHES THIS MACHINE CAN SEND TO %s: it listens on all addresses "
                "(ip = %r) without any restriction. Set `ip` to one address, `allowed_networks`, "
                "`tls` with a ca, or `require_calling_aet`; or let a firewall decide who reaches "
                "port %d",
                self.ae_title,
                self.ip,
                self.port,
            )

    def _place(self, eager: EagerDecoding, limits: CaseLimits) -> Place:
        """Where cases are processed."""
        root = self.root_data_directory
        folder = None if root is None else Path(root).absolute() / OWN / "work"
        if self.executor is not None:
            return Executing(self.executor, describe(self), limits, folder, self.logger)
        if self.isolation == "thread":
            return Threads(self.process, limits, self.logger)
        return Workers(
            describe(self),
            set(self.input),
            self.workers,
            limits,
            self.worker_cases,
            eager,
            folder,
            self.logger,
        )

    def close(self) -> None:
        """Stop to listen, finish the step that runs, and let everything go. Nothing is deleted.

        Without `root_data_directory` all complete cases are processed first, since what is in
        memory would be lost. Waits for at most `stop_seconds`. May be called from any thread, and more
        than once.
        """
        if self._process_id not in (0, os.getpid()):
            # A fork of the program that opened the node: it is not ours.
            return
        thread, runner, server = threading.current_thread(), self._runner, self._server
        if (runner is not None and runner.is_worker(thread)) or (
            server is not None and server.is_busy(thread)
        ):
            # process(), filter() and validate() cannot wait for their own end.
            threading.Thread(target=self.close, name="close-later").start()
            return
        try:
            with self._state:
                self._close()
        finally:
            atexit.unregister(self.close)
            self._closed.set()

    def cases(self) -> list[Case]:
        """All cases of this node, oldest first; empty while it is closed."""
        storage = self._storage
        return [] if storage is None else storage.ledger.cases()

    def retry(self, case_id: int) -> None:
        """Run a FAILED case again: from its results where they are kept, else from its images.

        Raises UnknownCase for a case that is not there or has not failed.
        """
        if self._storage is None or self._runner is None:
            raise UnknownCase(
                f"{self.ae_title} is closed, so that case {case_id} cannot be retried"
            )
        self._storage.ledger.retry(case_id)
        self._runner.wake()

    def complete(self, case_id: int) -> None:
        """Process a case as it is, though it is not complete.

        Where its inputs cannot be ground it is FAILED, and takes images as before. Raises
        UnknownCase for a case that is not there, holds no image, or was processed.
        """
        if self._storage is None or self._runner is None:
            raise UnknownCase(
                f"{self.ae_title} is closed, so that case {case_id} cannot be processed"
            )
        self._storage.waits.force(case_id)
        self._runner.wake()

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds, looked at after every step of a case; whether it does."""
        runner = self._runner
        return condition() if runner is None else runner.wait(condition, seconds)

    def _close(self) -> None:
        end = time.monotonic() + self._stop_seconds
        if self._server is not None:
            self._server.close(self._stop_seconds)
            self._server = None
        runner, eager, storage = self._runner, self._eager, self._storage
        health, self._health = self._health, None
        # Its workers are known as such until they end: their code may call `close`, too.
        self._eager = self._storage = None
        if storage is not None:
            drain = self.root_data_directory is None and self.workers > 0
            # If it is killed before its step has ended, that is not the case's fault.
            try:
                storage.ledger.excuse()
            except (OutOfResources, sqlite3.Error) as error:
                self.logger.error("the attempts under way cannot be taken back: %s", error)
            has_stopped = runner is None or runner.stop(drain, max(0.0, end - time.monotonic()))
            self._runner = None
            if eager is not None:
                eager.close()
            if has_stopped:
                storage.close()
            else:
                after = "is lost" if drain else "runs again after the next start"
                self.logger.error(
                    "a case is still being processed; unless it ends before the program does, it %s",
                    after,
                )
                threading.Thread(
                    target=_close_later,
                    args=(runner, storage, drain),
                    name="close-later",
                    daemon=True,
                ).start()
            self.logger.info("%s closed", self.ae_title)
        if health is not None:
            health.close()
        if self._handler is not None:
            self.logger.removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def __enter__(self) -> "AbstractPipeline":
        if self._server is None:
            self.open(blocking=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_log(self) -> None:
        handler: logging.Handler
        if self.log_path is None:
            if _shows_on_screen(logging.getLogger()):
                # The program shows what its loggers say already: not every line twice.
                self._set_level()
                return
            handler = logging.StreamHandler(sys.stdout)
        else:
            path = Path(self.log_path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handler = LogFile(path, self.backup_weeks, self.log_bytes)
            except OSError as error:
                raise IncorrectlyConfigured(
                    f"log_path {path} cannot be written: {error.strerror}"
                ) from error
        try:
            handler.setFormatter(formatter(self.log_format))
        except IncorrectlyConfigured:
            handler.close()
            raise
        self._set_level()
        self.logger.addHandler(handler)
        self._handler = handler

    def _set_level(self) -> None:
        try:
            self.logger.setLevel(self.log_level)
        except (ValueError, TypeError) as error:
            raise IncorrectlyConfigured(f"log_level {self.log_level!r} is no level") from error


def _nobody(word: str) -> None:
    del word


def _shows_on_screen(logger: logging.Logger) -> bool:
    screens = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return any(getattr(handler, "stream", None) in screens for handler in logger.handlers)


def _checked(inputs: Mapping[str, Any]) -> Mapping[str, type[AbstractInput]]:
    if not isinstance(inputs, Mapping):
        raise IncorrectlyConfigured(f"input has to map names to input classes, not {inputs!r}")
    for name, kind in inputs.items():
        if not isinstance(name, str) or not name:
            raise IncorrectlyConfigured(f"the name {name!r} of an input has to be a text")
        if not (isinstance(kind, type) and issubclass(kind, AbstractInput)):
            raise IncorrectlyConfigured(
                f"input {name!r} has to be a subclass of AbstractInput (the class itself, not an "
                f"instance), not {kind!r}"
            )
        missing = sorted(getattr(kind, "__abstractmethods__", ()))
        if missing:
            raise IncorrectlyConfigured(
                f"input {name!r}: {kind.__name__} has to define {', '.join(missing)}()"
            )
        if not isinstance(kind.eager, bool):
            raise IncorrectlyConfigured(
                f"input {name!r}: eager of {kind.__name__} has to be True or False, not {kind.eager!r}"
            )
        if not isinstance(kind.gapless, bool):
            raise IncorrectlyConfigured(
                f"input {name!r}: gapless of {kind.__name__} has to be True or False, not "
                f"{kind.gapless!r}"
            )
        try:
            expected_of(kind)
        except ValueError as error:
            raise IncorrectlyConfigured(
                f"input {name!r}: expected_images of {kind.__name__} has to be a number, an attribute "
                f"such as 'ImagesInAcquisition', or a function of an image: {error}"
            ) from error
        grinder = inspect.getattr_static(kind, "image_grinder")
        if not callable(grinder) and not isinstance(grinder, classmethod):
            raise IncorrectlyConfigured(
                f"input {name!r}: image_grinder of {kind.__name__} has to be a function, not "
                f"{grinder!r}"
            )
        if kind.eager and eager_reading(kind) is None:
            raise IncorrectlyConfigured(
                f"input {name!r}: {kind.__name__} is eager, so its image_grinder has to be "
                "numpy_grinder or volume_grinder, with values rescaled or stored and without out, or "
                "many_meta_grinder with one of them"
            )
    return inputs


def _addresses(endpoints: object) -> Sequence[Address]:
    if isinstance(endpoints, Address) or not isinstance(endpoints, Sequence):
        raise IncorrectlyConfigured(f"endpoints has to be a list of Address, not {endpoints!r}")
    for one in endpoints:
        if not isinstance(one, Address):
            raise IncorrectlyConfigured(f"endpoints holds {one!r}; it has to hold Address objects")
        is_address = isinstance(one.ip, str) and isinstance(one.ae_title, str)
        if not is_address or not isinstance(one.port, int) or len(one.ae_title) > 16:
            raise IncorrectlyConfigured(
                f"endpoints holds {one!r}; ip and ae_title (at most 16 characters) have to be texts, "
                "port a number"
            )
        if one.tls is not None and not isinstance(one.tls, TLS):
            raise IncorrectlyConfigured(f"endpoints holds {one!r}; tls has to be TLS(...) or None")
    return endpoints


def _networks(name: str, given: object) -> tuple[Network, ...]:
    """Addresses and networks as the standard library knows them."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise IncorrectlyConfigured(f"{name} has to list addresses or networks, not {given!r}")
    try:
        return tuple(ipaddress.ip_network(one) for one in given)
    except ValueError as error:
        raise IncorrectlyConfigured(
            f"{name}: {error}; it takes addresses such as '10.1.2.3' and networks such as "
            "'10.1.0.0/16'"
        ) from error


def _close_later(runner: Runner, storage: Storage, drain: bool) -> None:
    """Let the storage go once the step that outlasted `close` has ended."""
    runner.stop(drain, seconds=None)
    storage.close()


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

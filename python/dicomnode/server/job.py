"""What processing a case is, wherever that happens: grind, call process(), encode what it gives.

A `Place` is where: threads of the node (`threads.py`), worker processes (`workers.py`), or an
executor (`executors.py`).
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from pydicom.dataset import Dataset

from dicomnode.errors import InvalidDataset, InvalidDicom, ProcessingFailed
from dicomnode.lib.dicom import Header, Source, encode, is_uid, scan
from dicomnode.lib.results import check_result
from dicomnode.server.input import AbstractInput
from dicomnode.storage.instances import Buffer

#: SOPInstanceUID, SOPClassUID, transfer syntax UID, Part 10 bytes.
Result: TypeAlias = tuple[str, str, str, Buffer]
#: What a user's process() is.
Process: TypeAlias = Callable[[dict[str, Any]], Iterable[Dataset] | None]

# No pipeline needs more; a generator without end has to end.
MOST_RESULTS = 100_000


@dataclass(frozen=True)
class CaseLimits:
    """What a case may take. None is no limit."""

    #: Wall-clock seconds for grinding, processing and giving results.
    seconds: float | None = None
    #: Bytes of memory of the worker and of all that it started.
    memory: int | None = None
    #: Bytes of all results.
    output: int | None = None


@dataclass(frozen=True)
class Claimed:
    """A case that is to be processed."""

    #: For each input the sources of its images, by SOPInstanceUID.
    sources: Mapping[str, Mapping[str, Source]]
    #: The inputs that were asked whether they validate.
    inputs: Mapping[str, AbstractInput]
    #: Whether process() is left out: nothing comes of it but what grinding raises.
    grinds_only: bool = False
    #: What the UIDs of results are made from.
    seed: bytes = b""


class WorkerLost(ProcessingFailed):
    """Somebody else ended the process in which a case was processed; the case did not."""


class Stopped(Exception):
    """The node stops before the case was processed."""


class Place(Protocol):
    """Where cases are processed."""

    def open(self) -> None:
        """Make it ready. Raises IncorrectlyConfigured where it cannot work."""

    def reserve(self) -> bool:
        """Whether another case can be processed now; `release` has to follow."""

    def release(self) -> None:
        """What was reserved is not needed any more."""

    def is_waiting(self) -> bool:
        """Whether to ask again soon, though nothing has happened."""

    def process(
        self, case_id: int, claimed: Claimed, on_ground: Callable[[float], None]
    ) -> Generator[Result]:
        """The results of a case, which are made as they are taken.

        `on_ground` gets the seconds that grinding took. Raises what process() raises, or what became of it instead; WorkerLost where that was not its
        doing, Stopped after `stop`.
        """

    def stop(self) -> bool:
        """Interrupt what is being processed, and tell whether that can be done; from any thread."""

    def close(self) -> None:
        """Let everything go, after the last case."""


def run(
    process: Process | None,
    inputs: Mapping[str, AbstractInput],
    on_ground: Callable[[float], None],
) -> Iterator[Result]:
    """The results of a case, one by one; `on_ground` gets the seconds that grinding took.

    Without `process` it is only ground.
    """
    start = time.perf_counter()
    data = {name: one.get_data() for name, one in inputs.items()}
    on_ground(time.perf_counter() - start)
    if process is not None:
        yield from encoded(process(data))


def encoded(results: object) -> Iterator[Result]:
    """What process() returned, one by one as Part 10 objects. Raises InvalidDataset."""
    if results is None:
        return
    if isinstance(results, Dataset):
        results = [results]
    if not isinstance(results, Iterable):
        raise InvalidDataset(
            f"process() returned {type(results).__name__}; it has to return an iterable of Datasets"
        )
    for dataset in results:
        if not isinstance(dataset, Dataset):
            raise InvalidDataset(
                f"process() gave a {type(dataset).__name__} among its results; it has to give Datasets"
            )
        data, syntax = encode(dataset)
        check_result(_scanned(str(dataset.SOPInstanceUID), data))
        yield str(dataset.SOPInstanceUID), str(dataset.SOPClassUID), syntax, data


def checked(results: Iterable[Result], limits: CaseLimits) -> Iterator[Result]:
    """Results that are not too many, not too large, and each with a UID of its own.

    Raises InvalidDataset.
    """
    seen: set[str] = set()
    size = 0
    for result in results:
        uid, _, _, data = result
        if uid in seen:
            raise InvalidDataset(
                f"two results have the SOPInstanceUID {uid}; give each a new one "
                "(pydicom.uid.generate_uid)"
            )
        seen.add(uid)
        size += len(data)
        if len(seen) > MOST_RESULTS:
            raise InvalidDataset(f"process() gives more than {MOST_RESULTS} results")
        if limits.output is not None and size > limits.output:
            raise InvalidDataset(
                f"the results of process() are larger than process_output {limits.output} bytes"
            )
        yield result


def verify_result(uid: str, sop_class: str, syntax: str, source: Source) -> None:
    """Whether a result that another process made is what it says. Raises InvalidDataset."""
    if not all(map(is_uid, (uid, sop_class, syntax))):
        raise InvalidDataset(f"a result of another process has no valid UIDs ({uid!r:.80})")
    header = _scanned(uid, source)
    for tag, told in ((0x00080018, uid), (0x00080016, sop_class)):
        if header.text(tag) != told:
            raise InvalidDataset(f"result {uid} of another process is another object")
    if header.transfer_syntax != syntax:
        raise InvalidDataset(f"result {uid} of another process has another transfer syntax")


def _scanned(uid: str, source: Source) -> Header:
    try:
        return scan(source)
    except InvalidDicom as error:
        raise InvalidDataset(f"result {uid} is no valid object: {error}") from error

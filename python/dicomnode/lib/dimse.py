"""DIMSE as a client: who a peer is, is it there, and send it objects.

Solves sending so that each object has its own answer: one association for a batch, one status for
every instance, deadlines that hold, and never an exception half way that hides what arrived. What a
peer does not take as it is stored goes to it uncompressed, if it takes that.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomnode.errors import (
    CouldNotCompleteDIMSEMessage,
    DicomnodeError,
    IncorrectlyConfigured,
    InvalidDataset,
    PeerRefuses,
    PeerUnreachable,
)
from dicomnode.lib.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST, Commitment
from dicomnode.lib.dicom import (
    LazyDataset,
    Source,
    dataset_of,
    encode,
    is_uid,
    part10_prefix,
    read,
    scan,
)
from dicomnode.lib.requestor import IMPLEMENTATION_UID as IMPLEMENTATION_UID
from dicomnode.lib.requestor import PeerBusy, Requestor
from dicomnode.lib.tls import TLS
from dicomnode.lib.transcode import EXPLICIT, IMPLICIT, transcode

# 0x0000, the storage warnings of PS3.4 B.2.3, and 0x0111: the peer has this instance already.
_STORED = frozenset({0x0000, 0xB000, 0xB006, 0xB007, 0x0111})
# A node of ours answers a warning for what it does not keep.
_STORED_BY_US = frozenset({0x0000})
_NOT_SUPPORTED = 0x0122
# Cannot understand: our own answer for an instance that cannot be encoded, and was not sent.
_NOT_ENCODED = 0xC000
_VERIFICATION = "1.2.840.10008.1.1"
_MOST_CONTEXTS = 128
# How long to ask again after a transient rejection (PS3.8 9.3.4): a peer that takes only so many
# associations may still be closing the one before.
_BUSY_SECONDS = 10.0
_AE_TITLE = re.compile(r"[ -\[\]-~]{1,16}")


@dataclass(frozen=True)
class Address:
    """Where a DICOM peer listens: IP address or host name, port, AE title of the peer.

    With `tls` the connection to it is encrypted.
    """

    ip: str
    port: int
    ae_title: str
    tls: TLS | None = None

    def __str__(self) -> str:
        return f"{self.ae_title}@{self.ip}:{self.port}"


@dataclass(frozen=True)
class Response:
    """What a peer answered for one instance.

    `is_stored` is true for success, for a warning with which the instance counts as stored (PS3.4
    B.2.3), and where the peer has it already (0x0111). A node of this package answers these for
    what it does not keep; then it is false.
    """

    sop_instance_uid: str
    status: int
    comment: str = ""
    is_stored: bool = False


@dataclass(frozen=True)
class Outgoing:
    """An instance that is read when it is its turn: `read` gives the whole Part 10 object."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    read: Callable[[], bytes]


class _NotEncodable(Exception):
    """A dataset that cannot be written as DICOM."""


def echo(address: Address, ae_title: str = "DICOMNODE") -> None:
    """C-ECHO: ask whether a peer answers.

    Raises CouldNotCompleteDIMSEMessage with the reason, and IncorrectlyConfigured for an AE title
    that is none.
    """
    association = associate(address, ae_title, [(_VERIFICATION, IMPLICIT)])
    if association.echo(association.accepted[_VERIFICATION, IMPLICIT]) != 0x0000:
        association.abort()
        raise CouldNotCompleteDIMSEMessage(f"{address} did not answer the C-ECHO with success")
    association.release()


def send(
    address: Address,
    datasets: Iterable[Dataset | Outgoing],
    ae_title: str = "DICOMNODE",
    *,
    on_response: Callable[[Response], None] | None = None,
) -> list[Response]:
    """C-STORE all datasets to one peer over one association; one response for each.

    An object goes as its bytes are where the peer accepts its transfer syntax, else in Explicit or
    Implicit VR Little Endian, compressed pixels decompressed. A dataset without a transfer syntax is
    sent as Explicit VR Little Endian. Kinds of objects that need more than the 128 presentation
    contexts of an association are sent over several, one after the other.

    An `Outgoing` is read when it is its turn, so that only one is in memory at a time. So is a dataset
    that was loaded and not looked at.

    `on_response` is called after each answer, also before an error that ends the association.

    Raises InvalidDataset for a dataset without SOPClassUID or SOPInstanceUID, before anything is
    sent; IncorrectlyConfigured for an AE title that is none; PeerUnreachable where the peer cannot
    be reached or rejects the association; CouldNotCompleteDIMSEMessage where it accepts no
    presentation context at all, or stops answering. A status that refuses one instance is no
    exception: look at `Response.is_stored`. An instance for which no context was accepted has
    status 0x0122, and one that cannot be encoded 0xC000; neither was sent.
    """
    if isinstance(datasets, str | os.PathLike):
        raise TypeError(
            f"expected datasets, found {datasets!r}; read them: send(address, load(path))"
        )
    batch = [_outgoing(item) for item in datasets]
    responses: dict[int, Response] = {}

    def answered(k: int, response: Response) -> None:
        responses[k] = response
        if on_response is not None:
            on_response(response)

    groups = list(_groups(batch))
    for contexts, numbers in groups:
        try:
            association = associate(address, ae_title, contexts)
        except PeerRefuses as error:
            if len(groups) == 1:
                raise
            for k in numbers:
                answered(k, Response(batch[k].sop_instance_uid, _NOT_SUPPORTED, str(error)))
            continue
        try:
            for k in numbers:
                answered(k, _store(association, batch[k]))
        except BaseException:
            # A release would wait for the answer of a peer that may not give one.
            association.abort()
            raise
        association.release()
    for k, item in enumerate(batch):
        if k not in responses:
            told = "a UID of it is none"
            answered(k, Response(item.sop_instance_uid, _NOT_ENCODED, told))
    return [responses[k] for k in range(len(batch))]


def ask_commitment(
    address: Address,
    asked: Commitment,
    ae_title: str = "DICOMNODE",
    *,
    is_reported: Callable[[], bool] = lambda: False,
    seconds: float = 10.0,
) -> Commitment | None:
    """Ask a peer to keep instances that were sent to it (N-ACTION, PS3.4 J.3.2).

    The peer reports over this association, or later over one to us. Waits so many seconds for the
    first, unless `is_reported` tells that the second has happened. None where no report came here.

    Raises what `echo` does; PeerRefuses where the peer does no storage commitment, or not this one.
    """
    association = associate(address, ae_title, [(PUSH_MODEL, EXPLICIT), (PUSH_MODEL, IMPLICIT)])
    (_, syntax), context = min(association.accepted.items(), key=lambda one: one[0][1] != EXPLICIT)
    dataset = _plain(asked.to_dataset(), syntax)
    answer = association.action(context, PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST, dataset)
    status = answer.number(0x0900)
    if status != 0x0000:
        association.release()
        raise PeerRefuses(
            f"{address} refused the storage commitment with status 0x{status & 0xFFFF:04X} "
            f"{answer.text(0x0902)}".rstrip()
        )
    end, report = time.monotonic() + seconds, None
    try:
        while report is None and not is_reported() and time.monotonic() < end:
            if association.has_message(0.1):
                report = association.take_report()
    except CouldNotCompleteDIMSEMessage:
        # It ended the association: the report comes over another one.
        return None
    association.release()
    if report is None:
        return None
    prefix = part10_prefix(PUSH_MODEL, PUSH_MODEL_INSTANCE, syntax)
    return Commitment.of(read(prefix + report.dataset))


def report_commitment(address: Address, report: Commitment, ae_title: str = "DICOMNODE") -> None:
    """Tell a peer which of the instances are kept that it asked for (N-EVENT-REPORT, PS3.4 J.3.3).

    Raises what `echo` does.
    """
    association = associate(
        address, ae_title, [(PUSH_MODEL, EXPLICIT), (PUSH_MODEL, IMPLICIT)], serves=PUSH_MODEL
    )
    (_, syntax), context = min(association.accepted.items(), key=lambda one: one[0][1] != EXPLICIT)
    dataset = _plain(report.to_dataset(), syntax)
    association.report(context, PUSH_MODEL, PUSH_MODEL_INSTANCE, report.event_type, dataset)
    association.release()


def _plain(dataset: Dataset, syntax: str) -> memoryview:
    """A small dataset without pixels, encoded."""
    encoded = DicomBytesIO()
    encoded.is_implicit_VR, encoded.is_little_endian = syntax == IMPLICIT, True
    write_dataset(encoded, dataset)
    return memoryview(encoded.getvalue())


def associate(
    address: Address, ae_title: str, contexts: Iterable[tuple[str, str]], serves: str = ""
) -> Requestor:
    """An association with (abstract syntax, transfer syntax) contexts.

    Asks again while the peer is too busy to take one.

    Raises IncorrectlyConfigured for an AE title that is none, and what `Requestor` raises.
    """
    if not _is_title(ae_title):
        raise IncorrectlyConfigured(f"{ae_title!r} is no AE title")
    if not address.ip or not _is_title(address.ae_title):
        raise PeerUnreachable(f"{address} cannot be reached: it has no host or no AE title")
    end, pause = time.monotonic() + _BUSY_SECONDS, 0.05
    wanted, tls = list(contexts), None if address.tls is None else address.tls.client()
    while True:
        try:
            return Requestor(
                str(address),
                (address.ip, address.port),
                address.ae_title,
                ae_title,
                wanted,
                serves,
                tls,
            )
        except PeerBusy:
            if time.monotonic() + pause >= end:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


def _is_title(title: object) -> bool:
    return isinstance(title, str) and bool(_AE_TITLE.fullmatch(title) and title.strip())


def _outgoing(item: object) -> Outgoing:
    if isinstance(item, Outgoing):
        return item
    if not isinstance(item, Dataset):
        raise TypeError(
            f"expected a Dataset, found {type(item).__name__}; read files with "
            "dicomnode.lib.dicom.load"
        )
    if isinstance(item, LazyDataset) and "_dict" not in item.__dict__:
        header = scan(item.source)
        uids = {"SOPClassUID": header.text(0x00080016)}
        uids["SOPInstanceUID"] = header.text(0x00080018)
        syntax, read = header.transfer_syntax, partial(_bytes_of, item.source)
    else:
        keywords = ("SOPClassUID", "SOPInstanceUID")
        uids = {keyword: str(item.get(keyword) or "") for keyword in keywords}
        meta = getattr(item, "file_meta", None)
        syntax = str((meta.get("TransferSyntaxUID") if meta is not None else None) or EXPLICIT)
        read = partial(_encoded, item)
    for keyword, value in uids.items():
        if not value:
            raise InvalidDataset(
                f"a dataset (SOPInstanceUID {uids['SOPInstanceUID']!r}) has no {keyword}, "
                "so it cannot be sent"
            )
    return Outgoing(uids["SOPClassUID"], uids["SOPInstanceUID"], syntax, read)


def _bytes_of(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    return Path(source).read_bytes()


def _encoded(dataset: Dataset) -> bytes:
    try:
        return encode(dataset)[0]
    except InvalidDataset as error:
        raise _NotEncodable(str(error)) from error


def _groups(batch: list[Outgoing]) -> Iterator[tuple[list[tuple[str, str]], list[int]]]:
    """The associations that a batch needs: the contexts of each, and the instances that go over it.

    One context for each pair, so that the peer's choice never forces a conversion; and for each class
    the two that every object can be converted to.
    """
    by_class: dict[str, set[str]] = {}
    for item in batch:
        uids = (item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid)
        if all(map(is_uid, uids)):
            syntaxes = by_class.setdefault(item.sop_class_uid, {EXPLICIT, IMPLICIT})
            syntaxes.add(item.transfer_syntax_uid)
    contexts: list[tuple[str, str]] = []
    for kind, syntaxes in by_class.items():
        own = [(kind, syntax) for syntax in sorted(syntaxes)][:_MOST_CONTEXTS]
        if len(contexts) + len(own) > _MOST_CONTEXTS:
            yield contexts, _over(batch, contexts)
            contexts = []
        contexts = [*contexts, *own]
    if contexts:
        yield contexts, _over(batch, contexts)


def _over(batch: list[Outgoing], contexts: list[tuple[str, str]]) -> list[int]:
    known = set(contexts)
    return [
        k
        for k, item in enumerate(batch)
        if (item.sop_class_uid, item.transfer_syntax_uid) in known and is_uid(item.sop_instance_uid)
    ]


def _store(association: Requestor, item: Outgoing) -> Response:
    kind, uid = item.sop_class_uid, item.sop_instance_uid
    for syntax in (item.transfer_syntax_uid, EXPLICIT, IMPLICIT):
        context = association.accepted.get((kind, syntax))
        if context is not None:
            break
    else:
        return Response(uid, _NOT_SUPPORTED, "no presentation context of its SOP class is accepted")
    try:
        data = item.read()
    except _NotEncodable as error:
        return Response(uid, _NOT_ENCODED, str(error))
    if syntax == item.transfer_syntax_uid:
        dataset = dataset_of(data)
    else:
        try:
            dataset = memoryview(transcode(data, syntax))
        except DicomnodeError as error:
            told = f"its transfer syntax is not accepted, and it cannot be converted: {error}"
            return Response(uid, _NOT_SUPPORTED, told)
    answer = association.store(context, kind, uid, dataset)
    code = answer.number(0x0900)
    stored = _STORED_BY_US if association.implementation_uid == IMPLEMENTATION_UID else _STORED
    return Response(uid, code, answer.text(0x0902), code in stored)

"""DIMSE as a client: who a peer is, is it there, and send it objects.

Solves sending so that each object has its own answer: one association for a batch, one status for
every instance, deadlines that hold, and never an exception half way that hides what arrived.
"""

import contextlib
import copy
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from dicomnode.errors import (
    CouldNotCompleteDIMSEMessage,
    IncorrectlyConfigured,
    InvalidDataset,
    PeerRefuses,
    PeerRejects,
    PeerUnreachable,
)
from dicomnode.lib.dicom import printable

# Tells a peer that it speaks with this package.
IMPLEMENTATION_UID = "2.25.220906513937283452218462934771205593021"
# 0x0000, the storage warnings of PS3.4 B.2.3, and 0x0111: the peer has this instance already.
_STORED = frozenset({0x0000, 0xB000, 0xB006, 0xB007, 0x0111})
# A node of ours answers a warning for what it does not keep.
_STORED_BY_US = frozenset({0x0000})
_NOT_SUPPORTED = 0x0122
# Cannot understand: our own answer for an instance that cannot be encoded, and was not sent.
_NOT_ENCODED = 0xC000
_VERIFICATION = "1.2.840.10008.1.1"
_MOST_CONTEXTS = 128
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
# How long to ask again after a transient rejection (PS3.8 9.3.4): a peer that takes only so many
# associations may still be closing the one before.
_BUSY_SECONDS = 10.0
_REJECTED_TRANSIENT = 2


@dataclass(frozen=True)
class Address:
    """Where a DICOM peer listens: IP address or host name, port, AE title of the peer."""

    ip: str
    port: int
    ae_title: str

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


def echo(address: Address, ae_title: str = "DICOMNODE") -> None:
    """C-ECHO: ask whether a peer answers.

    Raises CouldNotCompleteDIMSEMessage with the reason, and IncorrectlyConfigured for an AE title
    that is none.
    """
    association = _associate(address, ae_title, [build_context(_VERIFICATION)])
    try:
        status = association.send_c_echo()
        if status.get("Status") != 0x0000:
            raise CouldNotCompleteDIMSEMessage(f"{address} did not answer the C-ECHO")
    finally:
        _leave(association)


def send(
    address: Address,
    datasets: Iterable[Dataset | Callable[[], Dataset]],
    ae_title: str = "DICOMNODE",
    *,
    contexts: Iterable[tuple[str, str]] | None = None,
    on_response: Callable[[Response], None] | None = None,
) -> list[Response]:
    """C-STORE all datasets to one peer over one association; one response for each.

    A dataset may be given as a function that reads it, so that only one is in memory at a time;
    then `contexts` has to tell the (SOP class UID, transfer syntax UID) pairs among them. A dataset
    without a transfer syntax is sent as Explicit VR Little Endian.

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
    batch = list(datasets)
    for item in batch:
        if not isinstance(item, Dataset) and not callable(item):
            raise TypeError(
                f"expected a Dataset, found {type(item).__name__}; read files with "
                "dicomnode.lib.dicom.load"
            )
    if not batch:
        return []
    if contexts is None:
        read = [item if isinstance(item, Dataset) else item() for item in batch]
        contexts = [_context_of(item) for item in read]
        batch = list(read)
    wanted = _presentation_contexts(set(contexts))
    association = _associate(address, ae_title, wanted)
    responses: list[Response] = []
    try:
        for item in batch:
            response = _store(association, address, item if isinstance(item, Dataset) else item())
            responses.append(response)
            if on_response is not None:
                on_response(response)
    except BaseException:
        # A release would wait for the answer of a peer that may not give one.
        if association.is_established:
            association.abort()
        raise
    _leave(association)
    return responses


def _context_of(dataset: Dataset) -> tuple[str, str]:
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not dataset.get(keyword):
            raise InvalidDataset(
                f"a dataset (SOPInstanceUID {dataset.get('SOPInstanceUID', '')!r}) has no {keyword}, "
                "so it cannot be sent"
            )
    meta = getattr(dataset, "file_meta", None)
    syntax = meta.get("TransferSyntaxUID") if meta is not None else None
    return str(dataset.SOPClassUID), str(syntax or ExplicitVRLittleEndian)


def _presentation_contexts(pairs: set[tuple[str, str]]) -> list[PresentationContext]:
    """One context for each pair, so that the peer's choice never forces a conversion.

    The two little endian syntaxes carry the same pixels: offering both lets a peer that takes only
    one of them have it.
    """
    little = {str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian)}
    contexts = [build_context(kind, syntax) for kind, syntax in sorted(pairs)]
    for kind in sorted({kind for kind, syntax in pairs if syntax in little}):
        contexts += [build_context(kind, one) for one in sorted(little) if (kind, one) not in pairs]
    if len(contexts) > _MOST_CONTEXTS:
        raise CouldNotCompleteDIMSEMessage(
            f"{len(contexts)} presentation contexts are needed, an association has at most "
            f"{_MOST_CONTEXTS} (PS3.8 9.3.2.2); send fewer kinds of objects at once"
        )
    return contexts


def _associate(address: Address, ae_title: str, contexts: list[PresentationContext]) -> Association:
    """An established association; asks again while the peer is too busy to take one."""
    end, pause = time.monotonic() + _BUSY_SECONDS, 0.05
    while True:
        association, is_connected = _ask_for_association(address, ae_title, contexts)
        if association.is_established:
            _keep_answers_for_sender(association)
            return association
        answer = association.acceptor.primitive
        if association.is_rejected:
            is_busy = answer is not None and answer.result == _REJECTED_TRANSIENT
            if is_busy and time.monotonic() + pause < end:
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
                continue
            reason = getattr(answer, "reason_str", "") if answer is not None else ""
            told = (
                f"{address} rejected the association of {ae_title!r}: {reason or 'no reason given'}"
            )
            raise PeerUnreachable(told) if is_busy else PeerRejects(told)
        if not is_connected:
            raise PeerUnreachable(
                f"{address} cannot be reached: nobody listens there, or it does not answer"
            )
        if answer is not None:
            raise PeerRefuses(f"{address} accepted none of the presentation contexts")
        raise PeerUnreachable(f"{address} did not answer the request for an association")


def _ask_for_association(
    address: Address, ae_title: str, contexts: list[PresentationContext]
) -> tuple[Association, bool]:
    """One request for an association, whatever comes of it; and whether there was a connection."""
    try:
        ae = AE(ae_title=ae_title)
    except (ValueError, TypeError) as error:
        raise IncorrectlyConfigured(f"{ae_title!r} is no AE title: {error}") from error
    ae.connection_timeout = _CONNECT_SECONDS
    ae.acse_timeout = _ANSWER_SECONDS
    ae.dimse_timeout = _ANSWER_SECONDS
    ae.network_timeout = _ANSWER_SECONDS
    ae.maximum_pdu_size = 131072
    connections = []

    def on_open(event: Any) -> None:
        connections.append(event)
        _tune_socket(event)

    try:
        association = ae.associate(
            address.ip,
            address.port,
            contexts=contexts,
            ae_title=address.ae_title,
            evt_handlers=[(evt.EVT_CONN_OPEN, on_open)],
        )
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PeerUnreachable(f"{address} cannot be reached: {reason}") from error
    return association, bool(connections)


def _keep_answers_for_sender(association: Association) -> None:
    """Let only the thread that sent a request take its answer.

    pynetdicom pauses the association's own thread while a request is out, but between "paused" and
    paused that thread may still take the answer from the queue ("unexpected C-STORE message"); the
    sender then waits for its time-out and an image that was stored counts as lost. As a client we
    serve no requests, so that thread has nothing to take.
    """
    take = association.dimse.get_msg

    def get_msg(block: bool = False) -> Any:
        if threading.current_thread() is association:
            return None, None
        return take(block)

    association.dimse.get_msg = get_msg  # type: ignore[method-assign]


def _tune_socket(event: Any) -> None:
    """Without TCP_NODELAY every small message waits 40 ms for a delayed acknowledgement.

    The time-out ends a send to a peer that never reads.
    """
    client = event.assoc.dul.socket.socket
    with contextlib.suppress(OSError):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.settimeout(_ANSWER_SECONDS)


def _store(association: Association, address: Address, dataset: Dataset) -> Response:
    uid = str(dataset.SOPInstanceUID)
    if not association.is_established:
        raise CouldNotCompleteDIMSEMessage(f"{address} ended the association before {uid}")
    if getattr(dataset, "file_meta", None) is None or "TransferSyntaxUID" not in dataset.file_meta:
        dataset = copy.copy(dataset)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    try:
        status = association.send_c_store(dataset)
    except ValueError as error:
        # No accepted context, or not encodable: this instance cannot go, the others can.
        no_context = "presentation context" in str(error)
        return Response(uid, _NOT_SUPPORTED if no_context else _NOT_ENCODED, str(error))
    except (AttributeError, RuntimeError) as error:
        raise CouldNotCompleteDIMSEMessage(f"{uid} cannot be sent to {address}: {error}") from error
    if "Status" not in status:
        raise CouldNotCompleteDIMSEMessage(f"{address} did not answer the C-STORE of {uid}")
    ours = association.acceptor.implementation_class_uid == IMPLEMENTATION_UID
    code = int(status.Status)
    comment = printable(str(status.get("ErrorComment", "") or ""))
    return Response(uid, code, comment, code in (_STORED_BY_US if ours else _STORED))


def _leave(association: Association) -> None:
    if association.is_established:
        association.release()

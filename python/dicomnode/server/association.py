"""Associations: from pynetdicom's events to routing and storage, and to a DIMSE status.

The bytes that arrive are scanned, routed and stored as they are; nothing decodes them here and
nothing of a case is processed here. 0x0000 is answered after storage has kept its promise.
"""

import contextlib
import logging
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from dicomnode.errors import CannotListen, IncorrectlyConfigured, InvalidDicom, OutOfResources
from dicomnode.lib.dicom import (
    Header,
    LazyDataset,
    header_text,
    is_uid,
    part10_prefix,
    safe_name,
    scan,
)
from dicomnode.lib.dimse import IMPLEMENTATION_UID
from dicomnode.lib.redaction import patient_words
from dicomnode.server.logs import Scope, about, hide_patient
from dicomnode.server.meters import Meters
from dicomnode.server.routing import Rule, route
from dicomnode.storage.layout import digest_of
from dicomnode.storage.store import DuplicateInstance, Instance, Storage

_VERIFICATION = "1.2.840.10008.1.1"
_SUCCESS = 0x0000
_DUPLICATE = 0x0111
_INVALID_INSTANCE = 0x0117
_OUT_OF_RESOURCES = 0xA700
_DOES_NOT_MATCH = 0xA900
_REFUSED = 0xB006
_NO_IDENTIFIER = 0xB007
_NOT_UNDERSTOOD = 0xC000
# The type of an A-RELEASE-RQ PDU (PS3.8 section 9.3.6).
_RELEASE_REQUEST = b"\x05"

# What a sender may choose from: everything that can be kept as it is sent. Explicit Little Endian
# first, because it is the cheapest to read. Deflated is left out: a small object may inflate
# without end, and hardly any sender needs it.
TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless SV1
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.110",  # JPEG XL Lossless
    "1.2.840.10008.1.2.4.111",  # JPEG XL JPEG Recompression
    "1.2.840.10008.1.2.4.112",  # JPEG XL
    "1.2.840.10008.1.2.4.100",  # MPEG2 Main Profile / Main Level
    "1.2.840.10008.1.2.4.102",  # MPEG-4 AVC/H.264 High Profile
    "1.2.840.10008.1.2.4.107",  # HEVC/H.265 Main Profile
)


def default_contexts() -> list[PresentationContext]:
    """Every storage SOP class, each with `TRANSFER_SYNTAXES`."""
    return [
        build_context(str(context.abstract_syntax), list(TRANSFER_SYNTAXES))
        for context in AllStoragePresentationContexts
    ]


class _SharedContexts(list[PresentationContext]):
    """pynetdicom copies the contexts for each association, which takes longer than the rest of
    the negotiation; they are never changed, so all associations may share them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedContexts":
        return self


@dataclass(eq=False)
class _Visit:
    """One connection: its number in the log, which cases it touched, and whether it is over."""

    number: int = 0
    is_accepted: bool = False
    #: The sender asked for its release, so that it has got all answers.
    is_released: bool = False
    #: Bytes that came since the last whole image.
    arriving: int = 0
    is_cut_off: bool = False

    touched: dict[str, set[int]] = field(default_factory=dict)
    stored: int = 0
    refused: int = 0
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Reception:
    """What an association server needs to know about its node."""

    ae_title: str
    rules: tuple[Rule, ...]
    identifier_tag: int
    supported_contexts: Sequence[PresentationContext]
    require_called_aet: bool
    require_calling_aet: Sequence[str]
    #: Most bytes of images that are arriving, over all connections.
    most_bytes: int
    #: The user's filter, None where it was not overridden; gets a lazy dataset.
    accept: Callable[[Dataset], bool] | None
    meters: Meters
    #: Called after an image was stored, before the answer, with its identifier and SOPInstanceUID.
    on_stored: Callable[[str, str], None]
    #: Called after an association, with the identifiers that it touched.
    on_end: Callable[[Iterable[str]], None]


class AssociationServer:
    """Listens, and stores what arrives."""

    def __init__(self, reception: Reception, storage: Storage, logger: logging.Logger) -> None:
        self._reception = reception
        self._storage = storage
        self._logger = logger
        self._visits: dict[Association, _Visit] = {}
        self._numbers = count(1)
        self._lock = threading.Lock()
        # The threads that store an image or end an association, and how deep they are in it.
        self._busy: Counter[int] = Counter()
        self._idle = threading.Condition(self._lock)
        self._arriving = 0
        self._ae = AE(ae_title=reception.ae_title)
        self._ae.require_called_aet = reception.require_called_aet
        self._ae.require_calling_aet = list(reception.require_calling_aet)
        self._ae.implementation_class_uid = UID(IMPLEMENTATION_UID)
        self._ae.maximum_associations = 100
        self._ae.maximum_pdu_size = 131072
        self._server: Any = None

    def open(self, ip: str, port: int) -> int:
        """Start to listen, and tell the port. Raises CannotListen, naming port and remedy."""
        try:
            self._server = self._ae.start_server(
                (ip, port),
                block=False,
                contexts=_SharedContexts(self._contexts()),
                evt_handlers=[
                    (evt.EVT_C_STORE, self._on_store),
                    (evt.EVT_C_ECHO, self._on_echo),
                    (evt.EVT_CONN_OPEN, self._on_open),
                    (evt.EVT_DATA_RECV, self._on_data),
                    (evt.EVT_ACCEPTED, self._on_accepted),
                    (evt.EVT_REJECTED, self._on_rejected),
                    (evt.EVT_ABORTED, self._on_aborted),
                    (evt.EVT_CONN_CLOSE, self._on_close),
                ],
            )
        except (OSError, OverflowError) as error:
            raise CannotListen(_why_not(ip, port, error)) from error
        return int(self._server.server_address[1])

    def _contexts(self) -> list[PresentationContext]:
        given = self._reception.supported_contexts
        if not isinstance(given, Sequence) or not all(
            isinstance(context, PresentationContext) for context in given
        ):
            raise IncorrectlyConfigured(
                "supported_contexts has to be a list of pynetdicom presentation contexts"
            )
        contexts = list(given)
        if all(context.abstract_syntax != _VERIFICATION for context in contexts):
            contexts.append(build_context(_VERIFICATION))
        return contexts

    def close(self, seconds: float) -> None:
        """Stop to listen, end the associations that are open, and wait until all are dealt with."""
        if self._server is None:
            return
        self._ae.shutdown()
        self._server = None
        for association in list(self._visits):
            self._end(association)
        own = threading.get_ident()
        with self._idle:
            self._idle.wait_for(lambda: not any(k != own for k in self._busy), seconds)

    def is_busy(self, thread: threading.Thread) -> bool:
        """Whether a thread is storing an image or ending an association, where user code runs."""
        with self._lock:
            return thread.ident in self._busy

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """What `close` waits for."""
        thread = threading.get_ident()
        with self._lock:
            self._busy[thread] += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy[thread] -= 1
                if not self._busy[thread]:
                    del self._busy[thread]
                    self._idle.notify_all()

    # Events

    def _on_open(self, event: Any) -> None:
        with self._lock:
            self._visits[event.assoc] = _Visit(next(self._numbers))
        with contextlib.suppress(OSError):
            event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _about(self, association: Association) -> AbstractContextManager[Scope]:
        """What is logged inside is about this association."""
        visit = self._visits.get(association)
        return about(association=None if visit is None else visit.number)

    def _on_echo(self, event: Any) -> int:
        with self._about(event.assoc):
            self._logger.info("C-ECHO from %s", _peer(event.assoc))
        return _SUCCESS

    def _on_data(self, event: Any) -> None:
        """A sender with Nagle's algorithm waits for our TCP acknowledgement; do not delay it 40 ms.

        What arrives is held until the image is whole. One that never ends must not take the memory
        of all.
        """
        client = event.assoc.dul.socket.socket
        size = len(event.data)
        with self._lock:
            visit = self._visits.get(event.assoc)
            if visit is not None:
                visit.arriving += size
                self._arriving += size
                # pynetdicom's own event may come after that of the closed connection.
                visit.is_released |= event.data[:1] == _RELEASE_REQUEST
            greatest: Any = None
            if self._arriving > self._reception.most_bytes:
                greatest, its_visit = max(self._visits.items(), key=lambda one: one[1].arriving)
                greatest = None if its_visit.is_cut_off else greatest
                its_visit.is_cut_off = True
        with contextlib.suppress(OSError, AttributeError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if greatest is not None:
            self._logger.error(
                "association with %s is cut off: %d bytes of images are arriving at once, most of "
                "them there, and memory_limit is %d",
                _peer(greatest),
                self._arriving,
                self._reception.most_bytes,
            )
            with contextlib.suppress(OSError, AttributeError):
                greatest.dul.socket.socket.shutdown(socket.SHUT_RDWR)

    def _arrived(self, visit: _Visit) -> None:
        """An image is whole, or its connection is over."""
        with self._lock:
            self._arriving -= visit.arriving
            visit.arriving = 0

    def _on_accepted(self, event: Any) -> None:
        with self._lock:
            visit = self._visits.get(event.assoc)
            if visit is not None:
                visit.is_accepted = True
                self._reception.meters.associations_open.add(1)
        self._reception.meters.associations.add(label="accepted")
        with self._about(event.assoc):
            self._logger.info("association with %s opened", _peer(event.assoc))

    def _on_rejected(self, event: Any) -> None:
        self._reception.meters.associations.add(label="rejected")
        with self._about(event.assoc):
            self._logger.warning(
                "association with %s rejected (called AE title %r)",
                _peer(event.assoc),
                str(event.assoc.requestor.primitive.called_ae_title).strip(),
            )

    def _on_aborted(self, event: Any) -> None:
        with self._about(event.assoc):
            self._logger.warning("association with %s aborted", _peer(event.assoc))

    def _on_close(self, event: Any) -> None:
        self._end(event.assoc)

    def _end(self, association: Association) -> None:
        with self._working():
            with self._lock:
                visit = self._visits.pop(association, None)
            if visit is not None:
                self._arrived(visit)
                # An image that was cut off would stay until the collector of cycles comes by.
                association.dimse.message = None
                if visit.is_accepted:
                    self._reception.meters.associations_open.add(-1)
                    with about(association=visit.number):
                        self._leave(association, visit)

    def _leave(self, association: Association, visit: _Visit) -> None:
        with visit.lock:
            visit.over = True
            touched = list(visit.touched)
            cases = sorted(set().union(*visit.touched.values()))
        self._logger.info(
            "association with %s closed: %d stored, %d refused",
            _peer(association),
            visit.stored,
            visit.refused,
        )
        try:
            if not visit.is_released:
                self._storage.interrupt(cases)
        except OutOfResources as error:
            self._logger.error("what may be sent again is not remembered: %s", error)
        self._reception.on_end(touched)

    def _on_store(self, event: Any) -> Dataset:
        with self._lock:
            # Without a visit the connection has closed while this image was on its way.
            visit = self._visits.get(event.assoc) or _Visit(over=True)
        self._arrived(visit)
        with self._working(), about(association=visit.number):
            return self._answered(event, visit)

    def _answered(self, event: Any, visit: _Visit) -> Dataset:
        try:
            status, comment, identifier, case_id = self._store(event)
        except OutOfResources as error:
            self._logger.error("not stored: %s", error)
            status, comment, identifier, case_id = _OUT_OF_RESOURCES, "out of resources", "", 0
        except Exception:
            # filter() and functions in required_values are the user's: anything can come here.
            self._logger.exception("%s not stored", event.request.AffectedSOPInstanceUID)
            status, comment, identifier = _NOT_UNDERSTOOD, "the node failed, see its log", ""
            case_id = 0
        self._reception.meters.instances.add(label=f"0x{status:04X}")
        with visit.lock:
            if identifier:
                visit.stored += 1
                visit.touched.setdefault(identifier, set()).add(case_id)
            else:
                visit.refused += 1
            late = visit.over
        if late and identifier:
            # The connection closed while this image was being stored.
            self._storage.interrupt([case_id])
            self._reception.on_end([identifier])
        return _answer(status, comment)

    def _store(self, event: Any) -> tuple[int, str, str, int]:
        """Status, comment, and identifier and number of the case where the image was stored."""
        request = event.request
        uid = str(request.AffectedSOPInstanceUID or "")
        sop_class = str(request.AffectedSOPClassUID or "")
        if not is_uid(uid):
            return self._refuse(uid, _INVALID_INSTANCE, "SOPInstanceUID is no UID")
        if sop_class != str(event.context.abstract_syntax):
            return self._refuse(uid, _DOES_NOT_MATCH, "SOP class is not that of the context")
        syntax = str(event.context.transfer_syntax)
        dataset = b"" if request.DataSet is None else request.DataSet.getvalue()
        self._reception.meters.bytes_received.add(len(dataset))
        try:
            header = scan(dataset, syntax)
        except InvalidDicom as error:
            self._logger.error("%s cannot be understood: %s", uid, error)
            return self._refuse(uid, _NOT_UNDERSTOOD, "dataset cannot be understood")
        hide_patient(partial(patient_words, header))
        for tag, wanted, name in (
            (0x00080018, uid, "SOPInstanceUID"),
            (0x00080016, sop_class, "SOPClassUID"),
        ):
            if header_text(header, tag) != wanted:
                return self._refuse(uid, _DOES_NOT_MATCH, f"{name} differs from the request")
        prefix = part10_prefix(sop_class, uid, syntax, str(event.assoc.requestor.ae_title).strip())
        accept = self._reception.accept
        if accept is not None and not accept(LazyDataset(prefix + dataset)):
            return self._refuse(uid, _REFUSED, "refused by filter")
        return self._keep(uid, header, prefix, dataset)

    def _keep(
        self, uid: str, header: Header, prefix: bytes, dataset: bytes
    ) -> tuple[int, str, str, int]:
        reception = self._reception
        try:
            target = route(header, reception.rules, reception.identifier_tag)
        except InvalidDicom as error:
            self._logger.error("%s cannot be understood: %s", uid, error)
            return self._refuse(uid, _NOT_UNDERSTOOD, "dataset cannot be understood")
        if not target.identifier:
            return self._refuse(uid, _NO_IDENTIFIER, "no patient identifier")
        for name, reason in target.refused.items():
            self._logger.log(
                logging.DEBUG if target.accepted else logging.WARNING,
                "%s: input %r does not take it: %s",
                uid,
                name,
                reason,
            )
        if not target.accepted:
            return self._refuse(uid, _REFUSED, "no input takes it")
        try:
            case_id = self._storage.add(
                target.identifier,
                target.accepted,
                Instance(uid, _file_stem(header, uid), (prefix, dataset), digest_of(dataset)),
            )
        except DuplicateInstance as error:
            self._logger.error("%s; the first is kept", error)
            return self._refuse(uid, _DUPLICATE, "same SOPInstanceUID, other content")
        self._logger.debug("%s stored in case %d: %s", uid, case_id, ", ".join(target.accepted))
        reception.on_stored(target.identifier, uid)
        return _SUCCESS, "", target.identifier, case_id

    def _refuse(self, uid: str, status: int, comment: str) -> tuple[int, str, str, int]:
        self._logger.warning("%r answered 0x%04X: %s", uid, status, comment)
        return status, comment, "", 0


def _file_stem(header: Header, uid: str) -> str:
    """The seed's name without `.dcm`: `Image_<modality>_<instance number>`.

    Without a modality `Image_unknown_...`, without an instance number its UID instead.
    """
    modality = safe_name(header_text(header, 0x00080060)[:16] or "unknown")
    number = header_text(header, 0x00200013)
    if re.fullmatch(r"[+-]?[0-9]{1,12}", number) is None:
        return f"Image_{modality}_{uid}"
    return f"Image_{modality}_{int(number)}"


def _answer(status: int, comment: str) -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment[:64]
    return answer


def _peer(association: Association) -> str:
    requestor = association.requestor
    title = str(requestor.ae_title or "").strip()
    return f"{title!r} at {requestor.address}:{requestor.port}"


def _why_not(ip: str, port: int, error: OSError | OverflowError) -> str:
    text = f"cannot listen on {ip}:{port}: {getattr(error, 'strerror', None) or error}"
    if isinstance(error, PermissionError):
        return (
            f"{text}. Ports below 1024 need privileges: set `port` of the pipeline to a higher one, "
            "such as 11112"
        )
    if isinstance(error, OSError) and error.errno == 98:
        return (
            f"{text}. Another program uses port {port}: stop it, or set `port` of the pipeline to "
            "another one (0 finds a free one)"
        )
    return f"{text}. Set `ip` and `port` of the pipeline to an address of this machine"

"""Associations: from pynetdicom's events to routing and storage, and to a DIMSE status.

The bytes that arrive are scanned, routed and stored as they are; nothing decodes them here and
nothing of a case is processed here. 0x0000 is answered after storage has kept its promise.
"""

import errno
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from dicomnode.errors import CannotListen, IncorrectlyConfigured, InvalidDicom, OutOfResources
from dicomnode.lib.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST, Commitment
from dicomnode.lib.dicom import (
    Header,
    LazyDataset,
    Received,
    forget_source,
    is_uid,
    part10_prefix,
    safe_name,
    scan,
)
from dicomnode.lib.dimse import IMPLEMENTATION_UID
from dicomnode.lib.redaction import patient_words
from dicomnode.server.commitment import Asking, Committing
from dicomnode.server.limits import Limits
from dicomnode.server.listener import Network, NodeEntity, Server, is_within
from dicomnode.server.logs import Scope, about, hide_patient
from dicomnode.server.meters import Meters
from dicomnode.server.routing import Rule, route
from dicomnode.server.transport import Keeping, NodeAssociation
from dicomnode.storage.instances import Instance, Staged
from dicomnode.storage.layout import digest_of, digest_of_file
from dicomnode.storage.store import DuplicateInstance, Storage

_VERIFICATION = "1.2.840.10008.1.1"
_SUCCESS = 0x0000
_PROCESSING_FAILURE = 0x0110
_NO_SUCH_ACTION = 0x0123
_DUPLICATE = 0x0111
_INVALID_INSTANCE = 0x0117
_OUT_OF_RESOURCES = 0xA700
_DOES_NOT_MATCH = 0xA900
_REFUSED = 0xB006
_NO_IDENTIFIER = 0xB007
_NOT_UNDERSTOOD = 0xC000
_CLASS_NOT_SUPPORTED = 0x0122
# Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 section 9.3.4).
_NOT_RECOGNIZED = 0x01, 0x01, 0x03
_LIMIT_EXCEEDED = 0x02, 0x03, 0x02
# Of its first element, little endian.
_GROUP_OF_META = b"\x02\x00"
# As it is in the name of a file.
_INSTANCE_NUMBER = re.compile(r"[+-]?[0-9]{1,12}")
# An image larger than this goes to the disk while it arrives.
_MOST_IN_MEMORY = 4 << 20

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


@dataclass(eq=False)
class _Visit:
    """One connection: its number in the log, which cases it touched, and whether it is over."""

    number: int = 0
    is_accepted: bool = False
    is_ending: bool = False
    #: The sender asked for its release, so that it has got all answers.
    is_released: bool = False
    is_cut_off: bool = False

    touched: dict[str, set[int]] = field(default_factory=dict)
    stored: int = 0
    refused: int = 0
    #: Bytes of all images.
    size: int = 0
    over: bool = False
    #: Identifier and case of the image that is being dealt with, once it is in a case.
    newest: tuple[str, int] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def touch(self, identifier: str, case_id: int) -> None:
        """An image of this association is in a case."""
        with self.lock:
            self.touched.setdefault(identifier, set()).add(case_id)
            self.newest = identifier, case_id


class _Working:
    """The threads that store an image or end an association, and how deep they are in it."""

    def __init__(self) -> None:
        # Each thread changes only what is of itself, so that none waits for another for each image.
        self._busy: dict[int | None, int] = {}
        self._idle = threading.Condition(threading.Lock())
        self._is_awaited = False

    def __enter__(self) -> None:
        thread = threading.get_ident()
        self._busy[thread] = self._busy.get(thread, 0) + 1

    def __exit__(self, *error: object) -> None:
        thread = threading.get_ident()
        depth = self._busy[thread] - 1
        if depth:
            self._busy[thread] = depth
            return
        del self._busy[thread]
        # Whoever waits has said so before it looks.
        if self._is_awaited:
            with self._idle:
                self._idle.notify_all()

    def __contains__(self, thread: int | None) -> bool:
        return thread in self._busy

    def wait(self, seconds: float) -> None:
        """Until there is none but this one."""
        own = threading.get_ident()
        with self._idle:
            self._is_awaited = True
            self._idle.wait_for(lambda: not any(one != own for one in list(self._busy)), seconds)


@dataclass(frozen=True)
class Reception:
    """What an association server needs to know about its node."""

    ae_title: str
    rules: tuple[Rule, ...]
    identifier_tag: int
    supported_contexts: Sequence[PresentationContext]
    require_called_aet: bool
    #: The AE titles that may send, each with the networks that it may send from; empty for all.
    calling: Mapping[str, Sequence[Network]]
    #: The networks that may connect; empty for all.
    networks: Sequence[Network]
    tls: ssl.SSLContext | None
    limits: Limits
    #: Most bytes of images that are arriving, over all connections.
    most_bytes: int
    #: The user's filter, None where it was not overridden; gets a lazy dataset.
    accept: Callable[[Dataset], bool] | None
    meters: Meters
    committing: Committing
    #: Called after an image was stored, with its identifier and SOPInstanceUID.
    on_stored: Callable[[str, str], None]
    #: Called after that: begins to decode it, None where nothing is decoded on arrival. Whatever becomes of it,
    #: the image is stored.
    decode: Callable[[str, str], None] | None
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
        self._working = _Working()
        limits = reception.limits
        self._ae = NodeEntity(reception.ae_title, limits.associations_per_address)
        self._ae.require_called_aet = reception.require_called_aet
        self._ae.require_calling_aet = list(reception.calling)
        self._ae.implementation_class_uid = UID(IMPLEMENTATION_UID)
        self._ae.maximum_associations = limits.associations
        self._ae.maximum_pdu_size = limits.pdu_bytes
        self._server: Server | None = None

    def open(self, ip: str, port: int) -> int:
        """Start to listen, and tell the port. Raises CannotListen, naming port and remedy."""
        reception, contexts = self._reception, self._contexts()
        handlers = [
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_N_ACTION, self._on_action),
            (evt.EVT_N_EVENT_REPORT, self._on_report),
            (evt.EVT_CONN_OPEN, self._on_open),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_CONN_CLOSE, self._on_close),
        ]
        try:
            server = Server(
                self._ae,
                (ip, port),
                contexts,
                handlers,
                self,
                reception.limits,
                Keeping(
                    # What is kept in memory has to be there anyway.
                    reception.most_bytes if self._storage.root is None else _MOST_IN_MEMORY,
                    self._storage.digest_size,
                    reception.identifier_tag,
                    self._storage.incoming,
                    self._storage.disk.floor,
                    self._storage.named_above,
                ),
                reception.networks,
                reception.tls,
                self._logger,
            )
        except (OSError, OverflowError) as error:
            raise CannotListen(_why_not(ip, port, error)) from error
        self._server = server
        self._ae._servers.append(server)
        # It looks so often whether it has to end.
        listen = partial(server.serve_forever, poll_interval=0.05)
        threading.Thread(target=listen, name="listener", daemon=True).start()
        return int(server.server_address[1])

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
        if all(context.abstract_syntax != PUSH_MODEL for context in contexts):
            commitment = build_context(PUSH_MODEL)
            # Senders ask us, and those that we asked report.
            commitment.scu_role = commitment.scp_role = True
            contexts.append(commitment)
        return contexts

    def close(self, seconds: float) -> None:
        """Stop to listen, end the associations that are open, and wait until all are dealt with."""
        server, self._server = self._server, None
        if server is None:
            return
        end = time.monotonic() + seconds
        server.shutdown()
        server.end_all(seconds / 2)
        for association in list(self._visits):
            self._end(association)
        self._working.wait(max(0.0, end - time.monotonic()))

    def is_busy(self, thread: threading.Thread) -> bool:
        """Whether a thread is storing an image or ending an association, where user code runs."""
        return thread.ident in self._working

    def is_open_for(self, case_id: int) -> bool:
        """Whether an association that brought images to a case is open."""
        return bool(self._brought_to(case_id))

    def is_arriving_for(self, case_id: int) -> bool:
        """Whether a further image, or a part of one, is here on such an association."""
        return any(
            isinstance(one, NodeAssociation) and one.is_arriving
            for one in self._brought_to(case_id)
        )

    def _brought_to(self, case_id: int) -> list[Association]:
        """The open associations that brought images to a case."""
        with self._lock:
            visits = list(self._visits.items())
        found = []
        for one, visit in visits:
            with visit.lock:
                if any(case_id in cases for cases in visit.touched.values()):
                    found.append(one)
        return found

    # Events

    def _on_open(self, event: Any) -> None:
        with self._lock:
            event.assoc.number = next(self._numbers)
            self._visits[event.assoc] = _Visit(event.assoc.number)

    def _about(self, association: Association) -> AbstractContextManager[Scope]:
        """What is logged inside is about this association."""
        return about(association=getattr(association, "number", None))

    def _on_echo(self, event: Any) -> int:
        with self._about(event.assoc):
            self._logger.info("C-ECHO from %s", _peer(event.assoc))
        return _SUCCESS

    def _on_action(self, event: Any) -> tuple[int, None]:
        """A sender asks for storage commitment."""
        # What is kept of it must not keep the event, and all that was sent with it.
        association = event.assoc
        calling = str(association.requestor.ae_title or "").strip()
        with self._working, self._about(association):
            try:
                if event.action_type != REQUEST:
                    return _NO_SUCH_ACTION, None
                return self._reception.committing.asked(
                    partial(_action_information, event),
                    Asking(
                        calling,
                        str(association.requestor.address),
                        partial(self._reply, association),
                        lambda: bool(association.is_established),
                    ),
                ), None
            except Exception:
                # What a peer sends may fail anywhere in pydicom.
                self._logger.exception("a request for storage commitment is not understood")
                return _PROCESSING_FAILURE, None

    def _on_report(self, event: Any) -> tuple[int, None]:
        """A peer that was asked for storage commitment reports."""
        calling = str(event.assoc.requestor.ae_title or "").strip()
        with self._working, self._about(event.assoc):
            try:
                _check_dataset(event.request.EventInformation, event.context)
                return self._reception.committing.reported(event.event_information, calling), None
            except Exception:
                # As above.
                self._logger.exception("a report of storage commitment is not understood")
                return _PROCESSING_FAILURE, None

    def _reply(self, association: Association, report: Commitment) -> bool:
        """Report over the association of the request, if that is still there."""
        if not association.is_established:
            return False
        try:
            status, _ = association.send_n_event_report(
                report.to_dataset(), report.event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE
            )
        except (RuntimeError, ValueError):
            return False
        return bool(status.get("Status") == _SUCCESS)

    def _on_requested(self, event: Any) -> None:
        """Reject an AE title that is called from a network that is not its own, and what is too much."""
        association = event.assoc
        title = str(association.requestor.primitive.calling_ae_title or "").strip()
        networks = self._reception.calling.get(title, ())
        if networks and not is_within(str(association.requestor.address), networks):
            self._reject(association, title, _NOT_RECOGNIZED, "not an address of this AE title")
        elif too_many := self._ae.let_in(association):
            self._reject(association, title, _LIMIT_EXCEEDED, too_many)

    def _reject(
        self, association: Any, title: str, answer: tuple[int, int, int], reason: str
    ) -> None:
        association.requestor.ae_title = title
        association.acse.send_reject(*answer)
        association.is_rejected = True
        self._reception.meters.associations.add(label="rejected")
        with self._about(association):
            self._logger.warning("association with %s rejected: %s", _peer(association), reason)
        association.kill()

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
        with self._working:
            with self._lock:
                visit = self._visits.get(association)
                if visit is None or visit.is_ending:
                    return
                visit.is_ending = True
            with about(association=visit.number):
                self._leave(association, visit)

    def _leave(self, association: Association, visit: _Visit) -> None:
        with visit.lock:
            visit.over = True
            touched = list(visit.touched)
            cases = sorted(set().union(*visit.touched.values()))
        try:
            # Before it counts as closed: a case that is done meanwhile knows that it was open.
            if not visit.is_released:
                self._interrupt(cases)
        finally:
            with self._lock:
                self._visits.pop(association, None)
            if visit.is_accepted:
                self._reception.meters.associations_open.add(-1)
                self._logger.info(
                    "association with %s closed: %d stored, %d refused",
                    _peer(association),
                    visit.stored,
                    visit.refused,
                )
            try:
                if visit.is_released:
                    self._storage.released(cases)
            finally:
                # Others that brought the same cases count on it, whatever fails here.
                self._reception.on_end(touched)

    def _interrupt(self, cases: Iterable[int]) -> None:
        """Remember what these cases hold, since their sender has not got all answers."""
        try:
            self._storage.interrupt(cases)
        except OutOfResources as error:
            self._logger.error("what may be sent again is not remembered: %s", error)

    # What the transport asks

    def released(self, association: Association) -> None:
        """The sender has got all answers."""
        visit = self._visits.get(association)
        if visit is not None:
            visit.is_released = True

    def closed(self, association: Association) -> None:
        """Also where pynetdicom does not tell it."""
        self._end(association)

    def turned_away(self) -> None:
        """A connection was not let in."""
        self._reception.meters.associations.add(label="refused")

    def arriving(self, association: Association) -> None:
        """What is arriving must take neither all memory nor all of the disk."""
        if isinstance(association, NodeAssociation) and not self._storage.disk.has_room(0):
            association.keep_no_more(errno.ENOSPC)
        with self._lock:
            held = {
                one: one.arriving
                for one, visit in self._visits.items()
                if isinstance(one, NodeAssociation) and not visit.is_cut_off
            }
            total = sum(held.values())
            if total <= self._reception.most_bytes:
                return
            greatest = max(held, key=lambda one: held[one])
            self._visits[greatest].is_cut_off = True
        with self._about(greatest):
            self._logger.error(
                "association with %s is cut off: %d bytes of images are arriving at once, most of "
                "them there, and memory_limit is %d",
                _peer(greatest),
                total,
                self._reception.most_bytes,
            )
        greatest.cut_off()

    def store(self, association: NodeAssociation, received: Received) -> None:
        """Keep an image, and answer it as soon as it is kept."""
        # Without a visit the connection has closed while this image was on its way.
        visit = self._visits.get(association) or _Visit(over=True)
        try:
            with self._working, Scope(association.number):
                self._store(association, received, visit)
        finally:
            # A log may keep an error, with all that it has seen.
            received.close()

    def _store(self, association: NodeAssociation, received: Received, visit: _Visit) -> None:
        uid = received.sop_instance_uid
        visit.newest = None
        try:
            status, comment, identifier, case_id = self._kept(association, received, uid, visit)
        except OutOfResources as error:
            self._logger.error("%s not stored: %s", uid, error)
            status, comment, identifier, case_id = _OUT_OF_RESOURCES, "out of resources", "", 0
        except Exception:
            # filter() and functions in required_values are the user's: anything can come here.
            if visit.newest is not None:
                self._logger.exception("%s is stored, but the node failed", uid)
                status, comment, (identifier, case_id) = _SUCCESS, "", visit.newest
            else:
                self._logger.exception("%s not stored", uid)
                status, comment, identifier = _NOT_UNDERSTOOD, "the node failed, see its log", ""
                case_id = 0
        meters = self._reception.meters
        meters.instances.add(label=f"0x{status:04X}")
        meters.bytes_received.add(received.size)
        with visit.lock:
            if identifier:
                visit.stored += 1
            else:
                visit.refused += 1
            late = visit.over
        decode = self._reception.decode
        if identifier and decode is not None:
            # Which may take a while: this association has brought an image before that.
            self._decode(decode, identifier, uid)
        received.answer(status, comment[:64])
        if late and identifier:
            # The connection closed while this image was being stored.
            self._interrupt([case_id])
            self._reception.on_end([identifier])

    def _decode(self, decode: Callable[[str, str], None], identifier: str, uid: str) -> None:
        try:
            decode(identifier, uid)
        except Exception:
            # The same edge: it is stored, and answered so; it is decoded when it is ground.
            self._logger.exception("%s is stored, but not decoded on arrival", uid)

    def _kept(
        self,
        association: NodeAssociation,
        received: Received,
        uid: str,
        visit: _Visit,
    ) -> tuple[int, str, str, int]:
        """Status, comment, and identifier and number of the case where the image was stored."""
        sop_class = received.sop_class_uid
        agreed_class, syntax = association.agreed[received.context_id]
        header, ordinary = received.known() or (None, None)
        if ordinary is None and not is_uid(uid):
            return self._refuse(uid, _INVALID_INSTANCE, "SOPInstanceUID is no UID")
        if sop_class != agreed_class:
            return self._refuse(uid, _CLASS_NOT_SUPPORTED, "SOP class is not that of the context")
        reception, limits = self._reception, self._reception.limits
        size, is_large = received.size, received.is_large
        visit.size += size
        if (
            visit.stored + visit.refused >= limits.instances
            or visit.size > limits.association_bytes
        ):
            return self._refuse(uid, _OUT_OF_RESOURCES, "too many images in one association")
        file = received.file
        arrived = None if file is None else Staged(file[1], file[0])
        if is_large and arrived is None:
            self._storage.disk.check_room(size)
            raise OutOfResources(
                "cannot write: " + errno.errorcode.get(received.errno or 0, "no file for it")
            )
        # What is too large for memory is read from its file.
        apart = arrived if is_large else None
        if header is None or ordinary is None:
            head = received.head if apart is None else _head_of(apart, received.size)
            if head.startswith(_GROUP_OF_META):
                # Readers take that for more of the file meta information: in the file another transfer syntax would
                # count than the one that it came in, also the deflated one, which is not taken.
                return self._refuse(
                    uid, _NOT_UNDERSTOOD, "dataset begins with file meta information"
                )
            try:
                if header is None:
                    header = scan(received, syntax) if apart is None else scan(apart.path)
                said = [(header.text(0x00080018), uid), (header.text(0x00080016), sop_class)]
            except InvalidDicom as error:
                self._logger.error("%s cannot be understood: %s", uid, error)
                return self._refuse(uid, _NOT_UNDERSTOOD, "dataset cannot be understood")
            for (found, wanted), what in zip(said, ("SOPInstanceUID", "SOPClassUID"), strict=True):
                if found != wanted:
                    return self._refuse(uid, _DOES_NOT_MATCH, f"{what} differs from the request")
        hide_patient(partial(patient_words, header))
        identifier, name = ordinary or (None, "")
        accept = reception.accept
        if accept is not None:
            offered = LazyDataset(
                self._prefix(association, received) + received.data if apart is None else apart.path
            )
            try:
                is_accepted = accept(offered)
            finally:
                if apart is not None:
                    forget_source(offered)
            if not is_accepted:
                return self._refuse(uid, _REFUSED, "refused by filter")
        chunks: tuple[bytes | memoryview, ...] = ()
        if arrived is None:
            chunks = self._prefix(association, received), received.data
        return self._keep(
            header,
            Instance(
                uid,
                name or file_stem(header, uid),
                chunks,
                partial(_digest_of, received, apart),
                arrived,
                received,
                # The answer waits for an image that is decoded on arrival.
                reception.decode is None,
            ),
            identifier,
            visit,
        )

    def _prefix(self, association: NodeAssociation, received: Received) -> bytes:
        """What its Part 10 object has before the dataset."""
        return part10_prefix(
            received.sop_class_uid,
            received.sop_instance_uid,
            association.agreed[received.context_id][1],
            str(association.requestor.ae_title or "").strip(),
        )

    def _keep(
        self, header: Header, instance: Instance, identifier: str | None, visit: _Visit
    ) -> tuple[int, str, str, int]:
        reception, uid = self._reception, instance.sop_instance_uid
        try:
            target = route(header, reception.rules, reception.identifier_tag, identifier)
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
        if self._storage.outbox.maker(uid) is not None:
            # To process it would make another one of it, which may come back too, without end.
            return self._refuse(uid, _REFUSED, "this node made it, and does not process it")
        # An ordinary one has all.
        if identifier is None and (missing := header.missing_pixels()):
            # A part of it got lost, and its sender has to know: what is kept here would be in the way of the whole image.
            return self._refuse(uid, _NOT_UNDERSTOOD, f"PixelData lacks {missing} bytes")
        try:
            case_id = self._storage.add(
                target.identifier,
                target.accepted,
                instance,
                partial(visit.touch, target.identifier),
            )
        except DuplicateInstance as error:
            self._logger.error("%s; the first is kept", error)
            return self._refuse(uid, _DUPLICATE, "same SOPInstanceUID, other content")
        if self._logger.isEnabledFor(logging.DEBUG):
            names = ", ".join(target.accepted)
            self._logger.debug("%s stored in case %d: %s", uid, case_id, names)
        reception.on_stored(target.identifier, uid)
        return _SUCCESS, "", target.identifier, case_id

    def _refuse(self, uid: str, status: int, comment: str) -> tuple[int, str, str, int]:
        # What is no UID may be long.
        self._logger.warning("%.70r answered 0x%04X: %s", uid, status, comment)
        return status, comment, "", 0


def _head_of(apart: Staged, size: int) -> bytes:
    """The first two bytes of a dataset of so many, at the end of a file."""
    return os.pread(apart.descriptor, 2, apart.size - size)


def _digest_of(received: Received, apart: Staged | None, size: int) -> bytes:
    """A digest of the dataset; what was received comes with one of the kind that is kept."""
    digest = received.digest
    if len(digest) == size:
        return digest
    return digest_of(received.data, size) if apart is None else digest_of_file(apart.path, size)


def file_stem(header: Header, uid: str) -> str:
    """The seed's name without `.dcm`: `Image_<modality>_<instance number>`.

    Without a modality `Image_unknown_...`, without an instance number its UID instead.
    """
    modality = safe_name(header.text(0x00080060)[:16] or "unknown")
    number = header.text(0x00200013)
    if _INSTANCE_NUMBER.fullmatch(number) is None:
        return f"Image_{modality}_{uid}"
    return f"Image_{modality}_{int(number)}"


def _action_information(event: Any) -> Dataset:
    _check_dataset(event.request.ActionInformation, event.context)
    return event.action_information  # type: ignore[no-any-return]


def _check_dataset(encoded: Any, context: Any) -> None:
    """Raise InvalidDicom where pydicom could take very long: nested too deep, or lying lengths."""
    scan(b"" if encoded is None else encoded.getvalue(), str(context.transfer_syntax))


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

"""The listener: which connections come in, and the associations that are made of them.

A connection counts before there is a thread for it. Neither a TLS handshake nor a silent peer keeps it from
the next one.
"""

import contextlib
import errno
import functools
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import (
    AddressInformation,
    RequestHandler,
    ThreadedAssociationServer,
)

from dicomnode.server.agreements import Requests
from dicomnode.server.limits import Limits
from dicomnode.server.logs import about
from dicomnode.server.transport import Keeping, NodeAssociation, Service

# Connections beyond the associations, and how long one may take to ask before others need its place.
_MOST_SILENT = 32
_MOMENT = 2.0
# So long nothing is accepted where no file can be opened.
_PAUSE_SECONDS = 0.5

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class _Contexts(list[PresentationContext]):
    """pynetdicom copies the contexts for each association, which takes longer than the rest of
    the negotiation; they are never changed, so all associations may share them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Contexts":
        return self


@functools.lru_cache(256)
def _address(host: str) -> AddressInformation:
    """Of a peer; pynetdicom looks it up in the names of the system."""
    return AddressInformation(host, 0)


class _Handler(RequestHandler):
    """Makes an association of a connection."""

    server: "Server"
    _made: NodeAssociation | None = None

    def _create_association(self) -> Association:
        server = self.server
        association = server.pattern.again()
        association.on_end = partial(server.forget, association)
        association.on_trouble = partial(server.complain, association)
        association.requestor.address_info = self.remote
        association.use(self.request)
        server.add(self.request, association)
        self._made = association
        return association

    @property
    def remote(self) -> AddressInformation:
        host, port, *more = self.client_address
        found = copy(_address(host))
        found.port = port
        if more:
            found.flowinfo, found.scope_id = more
        return found

    def handle(self) -> None:
        client = self.request
        if isinstance(client, ssl.SSLSocket):
            client.do_handshake()
        try:
            super().handle()
        except RuntimeError:
            # There is no thread for it, which would do that in its end.
            if self._made is not None and self._made.ident is None:
                self._made.provider.end()
            raise


@dataclass(eq=False)
class _Connection:
    """Since when it is there, and what became of it."""

    since: float = field(default_factory=time.monotonic)
    association: NodeAssociation | None = None

    @property
    def is_established(self) -> bool:
        return self.association is not None and self.association.is_established


class Server(ThreadedAssociationServer):
    """Listens. `networks` are those that may connect, empty for all."""

    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        ae: AE,
        address: tuple[str, int],
        contexts: Sequence[PresentationContext],
        handlers: list[Any],
        service: Service,
        limits: Limits,
        keeping: Keeping,
        networks: Sequence[Network],
        tls: ssl.SSLContext | None,
        logger: logging.Logger,
    ) -> None:
        self.service = service
        self.limits = limits
        self.keeping = keeping
        self.requests = Requests()
        self._networks = networks
        self._logger = logger
        self._guard = threading.Lock()
        self._fewer = threading.Condition(self._guard)
        # Oldest first.
        self._connections: dict[socket.socket, _Connection] = {}
        super().__init__(ae, address, ae.ae_title, _Contexts(contexts), tls, handlers, _Handler)
        #: What all its associations have in common.
        self.pattern = self._pattern(ae)

    def _pattern(self, ae: AE) -> NodeAssociation:
        made = NodeAssociation(ae, self.service, self.limits, self.keeping, self.requests)
        made.provider.wake.close()
        made._server = self
        made.name = "AcceptorThread"
        made._handlers = self._handlers
        acceptor = made.acceptor
        acceptor.maximum_length = ae.maximum_pdu_size
        acceptor.ae_title = self.ae_title
        acceptor.address_info = AddressInformation.from_tuple(self.server_address)
        acceptor.implementation_class_uid = ae.implementation_class_uid
        acceptor.implementation_version_name = ae.implementation_version_name
        acceptor.supported_contexts = self.contexts
        return made

    def _bind_defaults(self) -> None:
        """Without pynetdicom's own log of all that comes, where nobody reads it when the node opens: it costs
        as much.
        """
        super()._bind_defaults()
        if not logging.getLogger("pynetdicom").isEnabledFor(logging.INFO):
            for event in (
                evt.EVT_DIMSE_RECV,
                evt.EVT_DIMSE_SENT,
                evt.EVT_PDU_RECV,
                evt.EVT_PDU_SENT,
            ):
                self._handlers.pop(event, None)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make an association; a handshake takes as long as the peer likes, and a thread of its own."""
        if isinstance(request, ssl.SSLSocket):
            super().process_request(request, client_address)
        else:
            self.process_request_thread(request, client_address)

    def get_request(self) -> tuple[socket.socket, Any]:
        assert self.socket is not None
        try:
            client, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The connection stays in the queue, and would be tried again at once for ever.
                time.sleep(_PAUSE_SECONDS)
            raise
        client.settimeout(self.limits.stall_seconds)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.ssl_context is not None:
            client = self.ssl_context.wrap_socket(
                client, server_side=True, do_handshake_on_connect=False
            )
        return client, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection may come in; a stranger that says nothing makes room for it."""
        host = str(client_address[0])
        if self._networks and not is_within(host, self._networks):
            self._logger.warning("connection from %s refused: not among allowed_networks", host)
            self.service.turned_away()
            return False
        with self._guard:
            silent = self._make_room()
            # Connections that have not become associations do not count as such, but end too.
            is_full = len(self._connections) >= self.limits.associations + _MOST_SILENT
            if not is_full:
                self._connections[request] = _Connection()
        if is_full:
            self._logger.warning("connection from %s refused: too many are open", host)
            self.service.turned_away()
            return False
        if silent is not None:
            self._logger.warning("a connection that asked for nothing makes room for %s", host)
            with contextlib.suppress(OSError):
                silent.shutdown(socket.SHUT_RDWR)
        return True

    def _make_room(self) -> socket.socket | None:
        """Wait until there is room for one more; the connection that has to end for it.

        Those who are being answered are done in a moment. Only who had time to ask and did not is
        silent.
        """
        for client in [one for one in self._connections if one.fileno() < 0]:
            del self._connections[client]
        end = time.monotonic() + _MOMENT
        while len(self._connections) >= self.limits.associations + _MOST_SILENT:
            now = time.monotonic()
            for client, one in self._connections.items():
                if now - one.since > _MOMENT and not one.is_established:
                    del self._connections[client]
                    return client
            if now >= end:
                break
            self._fewer.wait(0.1)
        return None

    def add(self, request: socket.socket, association: NodeAssociation) -> None:
        """Remember which association a connection has."""
        with self._guard:
            if request in self._connections:
                self._connections[request].association = association

    def forget(self, association: NodeAssociation) -> None:
        """The connection of an association has ended."""
        with self._guard:
            for client, one in self._connections.items():
                if one.association is association:
                    del self._connections[client]
                    self._fewer.notify_all()
                    break

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._connections.pop(request, None)
            self._fewer.notify_all()
        super().shutdown_request(request)

    @property
    def active_associations(self) -> list[Association]:
        """Those that are established, and connections that will be or not."""
        with self._guard:
            found = [one.association for one in self._connections.values()]
        return [one for one in found if one is not None]

    def end_all(self, seconds: float) -> None:
        """Abort all associations, after the image that each stores now, and close what is left then."""
        threads = [
            threading.Thread(target=one.abort, daemon=True, name="abort")
            for one in self.active_associations
            if isinstance(one, NodeAssociation) and one.is_established
        ]
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._guard:
            left = list(self._connections)
        for client in left:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def complain(self, association: Association, trouble: str) -> None:
        """Tell why an association is aborted; also strangers that have none."""
        level = logging.ERROR if getattr(association, "was_let_in", False) else logging.WARNING
        with about(association=getattr(association, "number", None)):
            self._logger.log(
                level,
                "association with %r at %s is aborted: %s",
                str(association.requestor.ae_title or "").strip(),
                association.requestor.address,
                trouble,
            )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A handshake that failed, mostly; one line, and no traceback on the screen."""
        del request
        self._logger.warning(
            "connection from %s ended before there was an association", client_address[0],
            exc_info=self._logger.isEnabledFor(logging.DEBUG),
        )  # fmt: skip

    def service_actions(self) -> None:
        """Nothing: pynetdicom collects garbage here, while everybody waits."""


def is_within(host: str, networks: Sequence[Network]) -> bool:
    """Whether an address is in one of these networks."""
    try:
        address = ipaddress.ip_address(host.split("%", maxsplit=1)[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in network for network in networks)


class NodeEntity(AE):
    """The application entity of a node, which counts associations, not connections."""

    def __init__(self, ae_title: str, most_of_one_address: int) -> None:
        super().__init__(ae_title=ae_title)
        self._most_of_one_address = most_of_one_address
        self._letting_in = threading.Lock()

    def let_in(self, asking: NodeAssociation) -> str:
        """Count an association from now on, unless there are too many: then why it is not let in.

        Many may ask at the same moment, before the first of them is established.
        """
        address = asking.requestor.address
        with self._letting_in:
            found = self.active_associations
            if len(found) >= self.maximum_associations:
                return "too many associations"
            of_one = sum(one.requestor.address == address for one in found)
            if of_one >= self._most_of_one_address:
                return "too many associations of this address"
            asking.was_let_in = True
        return ""

    @property
    def active_associations(self) -> list[Association]:
        """Those that were let in."""
        return [
            one
            for server in self._servers
            for one in server.active_associations
            if isinstance(one, NodeAssociation) and one.is_in
        ]


__all__ = ["Network", "NodeEntity", "Server", "is_within"]

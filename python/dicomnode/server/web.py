"""A very small HTTP server: fixed pages for a supervisor, and nothing to attack.

Solves that a page which tells how the node is must not be a way to hurt it. One thread serves all
connections without waiting for any: each has a deadline, at most so many bytes of a request are
kept, and the oldest connection makes room for a new one. Only GET and HEAD, no body, no header is
looked at. It answers also when the process has no file descriptor left.
"""

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dicomnode.errors import CannotListen

_MOST_CONNECTIONS = 32
_MOST_REQUEST_BYTES = 8192
_MOST_IGNORED_BYTES = 1 << 20
_DEADLINE_SECONDS = 5.0
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Page:
    """What is answered."""

    status: int
    body: str
    content_type: str = "text/plain; charset=utf-8"


@dataclass
class _Connection:
    deadline: float
    received: bytearray = field(default_factory=bytearray)
    to_send: bytes = b""
    is_answered: bool = False
    ignored: int = 0


class WebServer:
    """Serves what `page` gives for a path; None is answered with 404."""

    def __init__(self, page: Callable[[str], Page | None], logger: logging.Logger) -> None:
        self._page = page
        self._logger = logger
        self._connections: dict[socket.socket, _Connection] = {}
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def open(self, ip: str, port: int) -> int:
        """Start to listen, and tell the port. Raises CannotListen."""
        try:
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            self._listener = socket.create_server((ip, port), family=family, backlog=64)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CannotListen(
                f"cannot listen on {ip}:{port} for health_port: {reason}. Set `health_port` of the "
                "pipeline to another one (0 finds a free one), or `health_ip`"
            ) from error
        self._listener.setblocking(False)
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Stop to listen, and end all connections."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._is_closing = True
        with contextlib.suppress(OSError):
            # It may have seen it already.
            self._waker.send(b"\0")
        thread.join(_DEADLINE_SECONDS)
        # One that waits for a disk that does not answer ends when that does.

    def _run(self) -> None:
        try:
            self._serve_all()
        finally:
            for one in (*self._connections, self._listener, self._waker, self._woken):
                one.close()
            self._connections.clear()
            self._selector.close()
            self._give_reserve()

    def _serve_all(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(1.0):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._connections:
                    self._serve(key.fileobj)
            now = time.monotonic()
            for client, connection in list(self._connections.items()):
                if connection.deadline < now:
                    self._drop(client)

    def _accept(self) -> None:
        if len(self._connections) >= _MOST_CONNECTIONS:
            self._drop(next(iter(self._connections)))
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                return
            # One descriptor is kept for this moment: a node without any has to say so.
            self._give_reserve()
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
        client.setblocking(False)
        self._connections[client] = _Connection(time.monotonic() + _DEADLINE_SECONDS)
        self._selector.register(client, selectors.EVENT_READ)

    def _serve(self, client: socket.socket) -> None:
        connection = self._connections[client]
        try:
            if not connection.is_answered:
                self._receive(client, connection)
            if connection.to_send:
                sent = client.send(connection.to_send)
                connection.to_send = connection.to_send[sent:]
                if connection.to_send:
                    self._selector.modify(client, selectors.EVENT_WRITE)
                else:
                    # Closed by the client first, or what it still sends would reset the connection.
                    client.shutdown(socket.SHUT_WR)
                    self._selector.modify(client, selectors.EVENT_READ)
            elif connection.is_answered:
                self._ignore(client, connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)

    def _receive(self, client: socket.socket, connection: _Connection) -> None:
        data = client.recv(_MOST_REQUEST_BYTES)
        connection.received += data
        is_whole = b"\r\n\r\n" in connection.received or b"\n\n" in connection.received
        if is_whole or len(connection.received) > _MOST_REQUEST_BYTES:
            connection.to_send = self._answer(bytes(connection.received[:_MOST_REQUEST_BYTES]))
            connection.is_answered = True
            connection.received.clear()
        elif not data:
            self._drop(client)

    def _ignore(self, client: socket.socket, connection: _Connection) -> None:
        data = client.recv(65536)
        connection.ignored += len(data)
        if not data or connection.ignored > _MOST_IGNORED_BYTES:
            self._drop(client)

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b"\n", 1)[0].decode("latin-1").split()
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            page: Page | None = Page(400, "what is asked for is no HTTP\n")
        elif words[0] not in ("GET", "HEAD"):
            page = Page(405, "only GET\n")
        else:
            page = self._page(words[1].partition("?")[0])
        page = page or Page(404, "no such page\n")
        body = page.body.encode()
        head = (
            f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\n"
            f"Content-Type: {page.content_type}\r\nContent-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n"
            f"{'Allow: GET, HEAD' + chr(13) + chr(10) if page.status == 405 else ''}\r\n"
        )
        return head.encode() + (b"" if words[:1] == ["HEAD"] else body)

    def _drop(self, client: socket.socket) -> None:
        del self._connections[client]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client)
        client.close()
        if self._reserve < 0:
            with contextlib.suppress(OSError):
                self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _give_reserve(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

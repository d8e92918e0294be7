"""A hostile HTTP server: it reads one request a connection and answers it as one of :data:`BEHAVIOURS` says."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HOST = "127.0.0.1"
LIMIT_S = 300.0
BOMB_MB = 2048 if os.environ.get("ATTACK") == "full" else 64
_OK = b"HTTP/1.1 200 OK\r\n"
_CHUNK = b"10000\r\n" + bytes(65536) + b"\r\n"


@dataclass
class HostileServer:
    """Listens while the block runs.

    Attributes:
        connections: how many were made.
        sent: bytes that clients took.
        drip_s: seconds between two bytes of a slow behaviour.
    """

    behaviour: Callable[[HostileServer, socket.socket], None]
    drip_s: float
    certificate: Path | None = None
    elsewhere: str = ""
    connections: int = 0
    sent: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> HostileServer:
        self._listener = socket.create_server((HOST, 0))
        self._context: ssl.SSLContext | None = None
        if self.certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(self.certificate, self.certificate.with_suffix(".key"))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        # Wakes the thread that accepts.
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), timeout=1).close()
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://{HOST}:{self._listener.getsockname()[1]}"

    def send(self, connection: socket.socket, content: bytes) -> None:
        """Send, and raise OSError when the client has gone or the test has ended."""
        if self.stopped.is_set():
            raise OSError
        connection.sendall(content)
        self.sent += len(content)

    def drip(self, connection: socket.socket, content: Iterator[bytes]) -> None:
        """Send piece by piece, slowly."""
        for piece in content:
            self.send(connection, piece)
            if self.stopped.wait(self.drip_s):
                return

    def _accept(self) -> None:
        while not self.stopped.is_set():
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(LIMIT_S)
        with connection, contextlib.suppress(OSError):
            self.connections += not self.stopped.is_set()
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            self.behaviour(self, connection)
            self.stopped.wait(LIMIT_S if self.behaviour is silent else 0)
            connection.close()


def read_request(connection: socket.socket) -> None:
    """Headers and body."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            raise OSError
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields.get(b"content-length", b"0")) - len(body)
    while left > 0:
        left -= len(connection.recv(65536))


def _answering(head: bytes, body: bytes = b"") -> Callable[[HostileServer, socket.socket], None]:
    def behave(server: HostileServer, connection: socket.socket) -> None:
        read_request(connection)
        server.send(connection, head + b"\r\n" + body)

    return behave


@cache
def bomb_body(kind: str) -> bytes:
    """:data:`BOMB_MB` of zeros: "gzip", "deflate", or "gzip, gzip"."""
    squeeze = zlib.compressobj(9, wbits=15 if kind == "deflate" else 31)
    pieces = [squeeze.compress(bytes(2**20)) for _ in range(BOMB_MB)]
    content = b"".join(pieces) + squeeze.flush()
    return gzip.compress(content, 9) if kind == "gzip, gzip" else content


def bomb(encoding: str, kind: str = "gzip", head: bytes = _OK) -> Callable[[HostileServer, socket.socket], None]:
    """A small body that says how it is compressed."""
    content = bomb_body(kind)
    named = f"Content-Encoding: {encoding}\r\nContent-Length: {len(content)}\r\n"
    return _answering(head + named.encode(), content)


def charset_bomb() -> Callable[[HostileServer, socket.socket], None]:
    """An error page in a charset of Python's that decompresses."""
    content = bomb_body("deflate")
    named = f"HTTP/1.1 500 No\r\nContent-Type: text/plain; charset=zlib\r\nContent-Length: {len(content)}\r\n"
    return _answering(named.encode(), content)


def endless_body(server: HostileServer, connection: socket.socket) -> None:
    read_request(connection)
    server.send(connection, _OK + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        server.send(connection, _CHUNK)


def endless_error(server: HostileServer, connection: socket.socket) -> None:
    read_request(connection)
    server.send(connection, b"HTTP/1.1 500 No\r\n\r\n")
    while True:
        server.send(connection, bytes(65536))


def endless_headers(server: HostileServer, connection: socket.socket) -> None:
    read_request(connection)
    server.send(connection, _OK)
    while True:
        server.send(connection, b"X: a\r\n" * 1000)


def endless_cookies(server: HostileServer, connection: socket.socket) -> None:
    read_request(connection)
    cookies = b"".join(b"Set-Cookie: c%d-%d=%s\r\n" % (server.connections, i, bytes(b"v" * 900)) for i in range(80))
    server.send(connection, _OK + cookies + b"Content-Length: 1\r\n\r\n?")


def dripping_body(server: HostileServer, connection: socket.socket) -> None:
    read_request(connection)
    server.send(connection, _OK + b"Content-Length: 90000\r\n\r\n")
    server.drip(connection, iter(lambda: b"a", b""))


def dripping_headers(server: HostileServer, connection: socket.socket) -> None:
    read_request(connection)
    server.send(connection, _OK + b"X: ")
    server.drip(connection, iter(lambda: b"a", b""))


def dripping_continues(server: HostileServer, connection: socket.socket) -> None:
    """Informational responses, each of which is a whole one."""
    read_request(connection)
    server.drip(connection, iter(lambda: b"HTTP/1.1 103 Early Hints\r\n\r\n", b""))


def silent(server: HostileServer, connection: socket.socket) -> None:
    """Takes the connection, and neither reads nor answers."""


def slow_reader(server: HostileServer, connection: socket.socket) -> None:
    while connection.recv(1) and not server.stopped.wait(server.drip_s):
        pass


def redirect(server: HostileServer, connection: socket.socket) -> None:
    read_request(connection)
    server.send(
        connection,
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + server.elsewhere.encode() + b"/x\r\n\r\n",
    )


BEHAVIOURS: dict[str, Callable[[HostileServer, socket.socket], None]] = {
    "gzip bomb": bomb("gzip"),
    "gzip bomb in a gzip": bomb("gzip, gzip", "gzip, gzip"),
    "gzip bomb after identity": bomb("identity, gzip"),
    "deflate bomb": bomb("deflate", "deflate"),
    "br": bomb("br"),
    "zstd": bomb("zstd"),
    "gzip bomb in an error": bomb("gzip", head=b"HTTP/1.1 409 Conflict\r\n"),
    "charset that decompresses": charset_bomb(),
    "body without end": endless_body,
    "error without end": endless_error,
    "headers without end": endless_headers,
    "length of 10 exabytes": _answering(_OK + b"Content-Length: 10000000000000000000\r\n", b"a"),
    "length below the body": _answering(_OK + b"Content-Length: 3\r\n", bytes(100_000)),
    "length above the body": _answering(_OK + b"Content-Length: 300\r\n", b"abc"),
    "deep JSON": _answering(_OK + b"Content-Length: 90000\r\n", b"[" * 90_000),
    "deep JSON in an error": _answering(b"HTTP/1.1 500 No\r\nContent-Length: 60000\r\n", b"[" * 60_000),
    "cookies": endless_cookies,
    "redirect to another server": redirect,
    "body of one byte at a time": dripping_body,
    "headers of one byte at a time": dripping_headers,
    "one early hint at a time": dripping_continues,
    "silence": silent,
    "one byte read at a time": slow_reader,
}

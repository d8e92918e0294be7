"""HTTP connections to other servers: URL check, TLS, bearer token, and exchanges of bounded time and size.

Every response is read by :func:`exchange`. The server may be hostile: it may send without end, slowly, or compressed.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpcore
import httpx

from fedvit.errors import IntegrityError, UsageError

LEAST_BYTES_PER_S = 32 * 1024
"""A body that arrives more slowly on average is given up, after the first :data:`GRACE_S` seconds."""
GRACE_S = 10.0
MAX_PROBLEM_BYTES = 64 * 1024
"""The most that is read of a response that is no success."""
# Small, because the deadline is looked at between two of them.
_WRITE_BYTES = 16 * 1024


Sink = Callable[[httpx.Response], Callable[[bytes], object]]
"""Takes the body of a response while it arrives; see :func:`exchange`."""


def open_http(
    base_url: str,
    *,
    timeout_s: float,
    token: str | None = None,
    verify: Path | bool = True,
    transport: httpx.BaseTransport | None = None,
    max_connections: int = 100,
) -> httpx.Client:
    """An HTTP client of one server; paths of requests are relative to ``base_url``. Use it with :func:`exchange`.

    Redirects are not followed, cookies are not kept, and no compressed response is asked for.

    Args:
        base_url: ``http://HOST:PORT``.
        timeout_s: the longest silence on the line before a request is given up.
        token: a bearer token that every request carries.
        verify: a file of certificates to trust, PEM, instead of the machine's; False trusts any server.
        transport: replaces the network, for tests.
        max_connections: how many requests may be under way at once.

    Raises:
        UsageError: ``base_url`` is no http(s) URL, ``token`` no token, or ``verify`` names no certificates.
    """
    url = _checked(base_url)
    return httpx.Client(
        base_url=base_url.rstrip("/"),
        timeout=timeout_s,
        headers={"Accept-Encoding": "identity", **_bearer(token)},
        # A server that sets another cookie with every response would fill the memory.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        transport=transport or _Transport(_trust(verify), _proxy_for(url), max_connections),
        trust_env=False,
    )


def exchange(
    http: httpx.Client,
    request: httpx.Request,
    *,
    max_bytes: int,
    deadline_s: float,
    upload_s: float = 0.0,
    download_s: float = 0.0,
    sink: Sink | None = None,
) -> httpx.Response:
    """Send a request and read its whole response; its content is at hand afterwards, and its text is UTF-8.

    A response that is no success is cut at :data:`MAX_PROBLEM_BYTES`, and its body is dropped where it is compressed.

    Args:
        max_bytes: the longest body.
        deadline_s: seconds for all of it: connecting, sending, headers and body.
        upload_s: further seconds for sending the request's body.
        download_s: further seconds for receiving the response's body.
        sink: called with a response that is a success before its body is read; what it returns gets every part of the
            body as it arrives, also of a body that breaks off, and the content of the result is empty.

    Raises:
        IntegrityError: the body is longer than ``max_bytes``, or compressed.
        httpx.HTTPError: the server does not answer, or not within the deadline, or more slowly than
            :data:`LEAST_BYTES_PER_S`.
    """
    with _deadline_in(deadline_s + upload_s) as deadline:
        if upload_s:
            request.extensions = {**request.extensions, "trace": deadline.after_upload(deadline_s)}
        response = http.send(request, stream=True)
        try:
            deadline.at_s += download_s
            content = _read(response, max_bytes, deadline, sink)
        finally:
            response.close()
    result = httpx.Response(
        response.status_code,
        headers=response.headers if content else _without_encoding(response.headers),
        content=content,
        request=request,
        extensions={name: response.extensions[name] for name in ("reason_phrase",) if name in response.extensions},
    )
    # The charset that a server names may be any codec of Python, "zlib" among them.
    result.encoding = "utf-8"
    return result


def transfer_s(num_bytes: int) -> float:
    """The longest time that a transfer of so many bytes may take, seconds."""
    return num_bytes / LEAST_BYTES_PER_S


def json_of(response: httpx.Response) -> Any:
    """The JSON value in a response.

    Raises:
        ValueError: it is none, or nests too deeply.
    """
    try:
        return response.json()
    except RecursionError:
        raise ValueError("the JSON nests too deeply") from None


def read_token(path: Path) -> str:
    """The one bearer token in a file.

    Raises:
        UsageError: there is none.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"The token file {path} cannot be read: {error}.") from None
    if not token or not token.isprintable():
        raise UsageError(f"The token file {path} holds no token.", cure="Put one token in it, on one line.")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``. Names other than ``localhost`` are not looked up and count as no."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(slots=True)
class _Deadline:
    """When the exchange of this thread is given up, in monotonic seconds."""

    at_s: float

    def left(self) -> float:
        return self.at_s - time.monotonic()

    def after_upload(self, seconds: float) -> Callable[[str, Any], None]:
        """A trace of httpcore's: when the request is sent, so many seconds are left at most."""

        def on_event(name: str, _: Any) -> None:
            if name.endswith("send_request_body.complete"):
                self.at_s = min(self.at_s, time.monotonic() + seconds)

        return on_event


_current: ContextVar[_Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def _deadline_in(seconds: float) -> Iterator[_Deadline]:
    deadline = _Deadline(time.monotonic() + seconds)
    reset = _current.set(deadline)
    try:
        yield deadline
    finally:
        _current.reset(reset)


def _read(response: httpx.Response, max_bytes: int, deadline: _Deadline, sink: Sink | None) -> bytes:
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        if response.is_success:
            encoding = response.headers["content-encoding"][:40]
            raise IntegrityError(f"{response.url} sends its answer compressed ({encoding}), which was not asked for.")
        return b""
    limit = max_bytes if response.is_success else MAX_PROBLEM_BYTES
    declared = response.headers.get("content-length", "")
    if response.is_success and declared.isdecimal() and int(declared[:20]) > limit:
        raise IntegrityError(f"{response.url} announces {declared[:20]} bytes; at most {limit} are read.")
    content, count, began_s, last_s = bytearray(), 0, time.monotonic(), deadline.at_s
    take = sink(response) if sink is not None and response.is_success else content.extend
    deadline.at_s = min(last_s, began_s + GRACE_S)
    # Nothing is decoded here: a response with a Content-Encoding does not come this far.
    for chunk in response.iter_bytes():
        count += len(chunk)
        if count <= limit or not response.is_success:
            take(chunk)
        if count > limit:
            if response.is_success:
                raise IntegrityError(f"{response.url} sends more than {limit} bytes.")
            return bytes(content[:limit])
        deadline.at_s = min(last_s, began_s + GRACE_S + count / LEAST_BYTES_PER_S)
        if deadline.left() <= 0:
            raise httpx.ReadTimeout(f"{count} bytes in {time.monotonic() - began_s:.0f} s are too slow")
    return bytes(content)


def _without_encoding(headers: httpx.Headers) -> httpx.Headers:
    kept = [(name, value) for name, value in headers.multi_items() if name.lower() != "content-encoding"]
    return httpx.Headers(kept)


class _Transport(httpx.BaseTransport):
    """Connections to one server whose every step ends at the deadline of the exchange; httpx has no such transport."""

    def __init__(self, trust: ssl.SSLContext, proxy: httpx.Proxy | None, max_connections: int) -> None:
        options: dict[str, Any] = {
            "ssl_context": trust,
            "max_connections": max_connections,
            "keepalive_expiry": 5.0,
            "network_backend": _Backend(),
        }
        self._pool: httpcore.ConnectionPool
        if proxy is None:
            self._pool = httpcore.ConnectionPool(**options)
        else:
            self._pool = httpcore.HTTPProxy(str(proxy.url), proxy.raw_auth, proxy.headers.raw, **options)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        with _httpx_errors():
            response = self._pool.handle_request(
                httpcore.Request(
                    request.method,
                    target,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response), extensions=response.extensions
        )

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _httpx_errors():
            yield from self._response.iter_stream()

    def close(self) -> None:
        with _httpx_errors():
            self._response.close()


class _Backend(httpcore.NetworkBackend):
    """Opens TCP connections that end at the deadline of the exchange."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        limit_s = _limited(timeout, httpcore.ConnectTimeout)
        return _Stream(self._inner.connect_tcp(host, port, limit_s, local_address, socket_options))


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _limited(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _WRITE_BYTES):
            part = buffer[start : start + _WRITE_BYTES]
            self._inner.write(part, _limited(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        limit_s = _limited(timeout, httpcore.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, limit_s))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _limited(timeout: float | None, late: type[Exception]) -> float | None:
    """The time for one step on the network: ``timeout``, or what is left until the deadline, if that is less."""
    deadline = _current.get()
    if deadline is None:
        return timeout
    left = deadline.left()
    if left <= 0:
        raise late("the deadline has passed")
    return left if timeout is None else min(left, timeout)


@contextmanager
def _httpx_errors() -> Iterator[None]:
    """The errors of httpcore as those of httpx, which have the same names."""
    kinds = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError)
    try:
        yield
    except (*kinds, httpcore.UnsupportedProtocol) as error:
        kind: type[httpx.TransportError] = getattr(httpx, type(error).__name__)
        raise kind(str(error)) from error


def _proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    """The proxy of the environment. None for this machine: it would stand between this machine and itself."""
    if is_loopback(url.host) or urllib.request.proxy_bypass(url.host):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy:
        return None
    return httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")


def _checked(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{base_url!r} is no http or https URL.", cure="Give http://HOST:PORT.")
    return url


def _bearer(token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("The token is none: it has other characters than a token's.", cure="Give one token, bare.")
    return {"Authorization": f"Bearer {token}"}


def _trust(verify: Path | bool) -> ssl.SSLContext:
    if isinstance(verify, bool):
        return httpx.create_ssl_context(verify=verify)
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{verify} holds no certificate to trust: {error}.", cure="Name a PEM file.") from None

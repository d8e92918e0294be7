"""HTTP connections to servers of fedvit: URL check, TLS, bearer token, time limit, size limit."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path
from typing import Any

import httpx

from fedvit.errors import IntegrityError, UsageError


def open_http(
    base_url: str,
    *,
    timeout_s: float,
    token: str | None = None,
    verify: Path | bool = True,
    transport: httpx.BaseTransport | None = None,
    **options: Any,
) -> httpx.Client:
    """An HTTP client of one server; paths of requests are relative to ``base_url``.

    Args:
        base_url: ``http://HOST:PORT``.
        timeout_s: the longest silence on the line before a request is given up.
        token: a bearer token that every request carries.
        verify: a file of certificates to trust, PEM, instead of the machine's; False trusts any server.
        transport: replaces the network, for tests.
        options: further options of :class:`httpx.Client`.

    Raises:
        UsageError: ``base_url`` is no http(s) URL, ``token`` no token, or ``verify`` names no certificates.
    """
    return httpx.Client(
        base_url=base_url.rstrip("/"),
        timeout=timeout_s,
        verify=_trust(verify),
        headers=_bearer(token),
        transport=transport,
        # A proxy from the environment would stand between this machine and itself.
        trust_env=not is_loopback(_host_of(base_url)),
        **options,
    )


def read_limited(response: httpx.Response, max_bytes: int) -> bytes:
    """The body of a streamed response. Reading stops at the first byte too many: a hostile server may never end.

    Raises:
        IntegrityError: it has more than ``max_bytes``.
    """
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > max_bytes:
            raise IntegrityError(f"{response.url} sends more than {max_bytes} bytes.")
    return bytes(content)


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


def _host_of(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{base_url!r} is no http or https URL.", cure="Give http://HOST:PORT.")
    return url.host


def _bearer(token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("The token is none: it has other characters than a token's.", cure="Give one token, bare.")
    return {"Authorization": f"Bearer {token}"}


def _trust(verify: Path | bool) -> ssl.SSLContext | bool:
    if isinstance(verify, bool):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{verify} holds no certificate to trust: {error}.", cure="Name a PEM file.") from None

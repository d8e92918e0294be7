"""Checks of incoming requests that every HTTP server of fedvit makes: Host and Origin, and bodies of bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fedvit.api.transport import is_loopback
from fedvit.errors import BodyTimeoutError, BodyTooLargeError, CompressedBodyError

GRACE_S = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of a request body.

    Args:
        max_bytes: its longest length.
        deadline_s: seconds for all of it.
        least_bytes_per_s: what it must arrive at on average, after the first ``grace_s`` seconds.
    """

    max_bytes: int
    deadline_s: float
    least_bytes_per_s: float
    grace_s: float = GRACE_S

    def time_for(self, received: int) -> float:
        """Seconds after the beginning at which a body of which so much arrived is given up."""
        return min(self.deadline_s, self.grace_s + received / self.least_bytes_per_s)


def declared_length(headers: Mapping[str, str], max_bytes: int) -> int:
    """The length of the body that a request's headers announce; ``max_bytes`` where they leave it open.

    Raises:
        BodyTooLargeError: it is above ``max_bytes``.
        CompressedBodyError: the body is compressed.
    """
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise CompressedBodyError("Send the body without a Content-Encoding.")
    declared = headers.get("content-length", "")
    # More digits than any limit has.
    length = int(declared[:20]) if declared.isdecimal() else max_bytes if "transfer-encoding" in headers else 0
    if length > max_bytes:
        raise _too_large(max_bytes)
    return length


async def read_body(chunks: AsyncIterator[bytes], limits: BodyLimits) -> bytes:
    """The whole body; reading stops at the first byte too many.

    Raises:
        BodyTooLargeError: it has more than ``max_bytes``.
        BodyTimeoutError: it arrives too slowly.
    """
    content, began_s = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(began_s + limits.time_for(0)) as timer:
            async for chunk in chunks:
                content += chunk
                if len(content) > limits.max_bytes:
                    raise _too_large(limits.max_bytes)
                timer.reschedule(began_s + limits.time_for(len(content)))
    except TimeoutError:
        raise BodyTimeoutError(
            f"The body did not arrive in time: {len(content)} bytes within {limits.time_for(len(content)):g} s.",
            cure=f"Send it within {limits.deadline_s:g} s, at {limits.least_bytes_per_s:g} bytes a second at least.",
        ) from None
    return bytes(content)


def foreign_request(host: str, origin: str | None, scheme: str, own_host: str) -> str | None:
    """Why a request without a token may come from a web page of another origin; None where it cannot.

    A page may send requests to any address that its browser reaches, this machine included. A browser names the page in
    ``Origin``, and the address that it looked up in ``Host``.

    Args:
        host: the ``Host`` header.
        origin: the ``Origin`` header; None where there is none.
        scheme: "http" or "https", by which the request came.
        own_host: the address that the server listens on.
    """
    name = _host_name(f"//{host}")
    # A name with a dot may belong to another host and resolve to this one (DNS rebinding).
    if ("." in name or ":" in name) and not is_loopback(name) and name != own_host:
        return "The request was sent to another host's name"
    if origin is None:
        return None
    page = _origin_of(origin)
    # An origin that is none, like "null", is equal to no other.
    if page is None or page != _origin_of(f"{scheme}://{host}"):
        return "The request comes from a page of another origin"
    return None


def _origin_of(text: str) -> tuple[str, str, int] | None:
    """Scheme, host and port (RFC 6454); None where the text is no such origin."""
    try:
        url = urlsplit(text)
        port = url.port or _DEFAULT_PORTS[url.scheme]
    except (ValueError, KeyError):
        return None
    if not url.hostname or "@" in url.netloc or url.path or url.query or url.fragment:
        return None
    return url.scheme, url.hostname, port


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return "not.a.host"


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"A request body may have {max_bytes} bytes at most.")

"""Checks of incoming requests: announced lengths, bodies in time, and pages of other origins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedvit.api.inbound import BodyLimits, declared_length, foreign_request, read_body
from fedvit.errors import BodyTimeoutError, BodyTooLargeError, CompressedBodyError

LIMITS = BodyLimits(max_bytes=10, deadline_s=30, least_bytes_per_s=2, grace_s=5)


async def chunks(*parts: bytes, then: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if then is not None:
        await then.wait()


@pytest.mark.parametrize(("received", "seconds"), [(0, 5), (10, 10), (50, 30), (1000, 30)])
def test_a_body_has_its_grace_then_its_rate_and_a_deadline_in_all(received: int, seconds: float) -> None:
    assert LIMITS.time_for(received) == seconds


@pytest.mark.parametrize(
    ("headers", "length"),
    [({}, 0), ({"content-length": "7"}, 7), ({"transfer-encoding": "chunked"}, 10), ({"content-length": "x"}, 0)],
)
def test_a_length_is_read_off_the_headers(headers: dict[str, str], length: int) -> None:
    assert declared_length(headers, 10) == length


@pytest.mark.parametrize("declared", ["11", "9" * 5000])
def test_what_announces_too_much_or_is_compressed_is_refused(declared: str) -> None:
    with pytest.raises(BodyTooLargeError):
        declared_length({"content-length": declared}, 10)
    with pytest.raises(CompressedBodyError):
        declared_length({"content-encoding": "gzip"}, 10)


def test_a_body_is_read_whole_and_never_beyond_its_limit() -> None:
    assert asyncio.run(read_body(chunks(b"12345", b"67890"), LIMITS)) == b"1234567890"
    with pytest.raises(BodyTooLargeError):
        asyncio.run(read_body(chunks(b"12345", b"67890", b"1", then=asyncio.Event()), LIMITS))


@pytest.mark.parametrize("limits", [BodyLimits(10, 0.01, 1.0), BodyLimits(10, 30, 1e6, grace_s=0.01)])
def test_a_body_that_stops_is_given_up(limits: BodyLimits) -> None:
    with pytest.raises(BodyTimeoutError):
        asyncio.run(read_body(chunks(b"1", then=asyncio.Event()), limits))


@pytest.mark.parametrize(
    ("host", "origin", "scheme", "foreign"),
    [
        ("127.0.0.1:8000", None, "http", False),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", "http", False),
        ("LOCALHOST:8000", "http://localhost:8000", "http", False),
        ("fed.example", "https://fed.example:443", "https", False),
        ("[::1]:8000", "http://[::1]:8000", "http", False),
        ("other.example", None, "http", True),
        ("localhost:8000", "http://localhost:8001", "http", True),
        ("localhost:8000", "http://localhost", "http", True),
        ("localhost:8000", "https://localhost:8000", "http", True),
        ("localhost:8000", "http://127.0.0.1:8000", "http", True),
        ("localhost", "ftp://localhost", "http", True),
        ("localhost", "http://localhost/path", "http", True),
        ("localhost", "http://user@localhost", "http", True),
        ("localhost:99999999", "http://localhost:99999999", "http", True),
        ("", "", "http", True),
    ],
)
def test_a_page_must_have_the_origin_of_the_server(host: str, origin: str | None, scheme: str, foreign: bool) -> None:
    assert (foreign_request(host, origin, scheme, "fed.example") is not None) == foreign

"""Requests of the client: idempotency keys, repetitions, typed responses, errors."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from fedvit.api.problems import error_of
from fedvit.api.transport import exchange, transfer_s
from fedvit.errors import ControlApiError, ControlUnreachableError, IntegrityError, UsageError
from fedvit.ports import ClockPort

T = TypeVar("T")
PAGE = 500
# A little more than the server's own limit, so that its answer arrives.
TIMEOUT_S = 70.0
PAUSES_S = (0.2, 1.0, 2.0)
MAX_ANSWER_BYTES = 32 * 2**20
"""The longest response that is read where the caller expects no artifact."""
_OTHER_SERVER = "See that the URL is a control API's, and that both sides have the same version of fedvit."
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


@dataclass(frozen=True, slots=True)
class Caller:
    """Sends requests to one control API.

    After a lost connection a request is sent again if it cannot act twice: a GET, a PUT, or a change under an
    Idempotency-Key.

    Args:
        http: its connections; ``base_url`` is its URL as it was given, without a slash at the end.
        timeout_s: seconds for one call with its repetitions; bytes that it sends or downloads extend it.
        before_change: called with every changing request before it is sent; what it raises reaches the caller.
    """

    http: httpx.Client
    base_url: str
    timeout_s: float
    sleep: Callable[[float], None]
    clock: ClockPort
    before_change: Callable[[httpx.Request], None] | None

    def get(self, path: str, **query: Any) -> httpx.Response:
        """The answer to a reading; query parameters that are None are left out."""
        return self._exchange(self.http.build_request("GET", path, params=given(**query)))

    def download(self, path: str, max_bytes: int) -> bytes:
        """An artifact, unverified.

        Raises:
            ControlApiError: it is longer than ``max_bytes``.
        """
        return self._exchange(self.http.build_request("GET", path), max_bytes).content

    def read(self, kind: type[T], path: str, **query: Any) -> T:
        """A reading's answer as a ``kind``."""
        return self.parsed(kind, self.get(path, **query))

    def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        if_match: str | None = None,
        repeatable: bool = True,
    ) -> httpx.Response:
        """The answer to a change; without a ``key`` it gets one of its own, unless it shall not be ``repeatable``."""
        headers = given(**{"If-Match": if_match, "Idempotency-Key": key or uuid.uuid4().hex if repeatable else None})
        return self._change(self.http.build_request(method, path, json=body, headers=headers))

    def put(self, path: str, content: bytes) -> httpx.Response:
        """The answer to bytes that are put in their place; to repeat that does nothing."""
        headers = {"Content-Type": "application/octet-stream"}
        return self._change(self.http.build_request("PUT", path, content=content, headers=headers))

    def parsed(self, kind: type[T], response: httpx.Response) -> T:
        """The answer as a ``kind``.

        Raises:
            ControlApiError: it is none.
        """
        try:
            return cast(T, _adapter(cast(Any, kind)).validate_json(response.content))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(map(str, fault["loc"])) or "the body"
            raise ControlApiError(
                f"{response.url} answered with what this client does not understand ({place}: {fault['msg']}).",
                cure=_OTHER_SERVER,
                status=response.status_code,
            ) from None

    def _change(self, request: httpx.Request) -> httpx.Response:
        if self.before_change is not None:
            self.before_change(request)
        return self._exchange(request)

    def _exchange(self, request: httpx.Request, download_bytes: int = 0) -> httpx.Response:
        repeatable = request.method in ("GET", "PUT") or "Idempotency-Key" in request.headers
        max_bytes = download_bytes or MAX_ANSWER_BYTES
        # One for all attempts: a server that answers slowly and breaks off must not hold the caller for longer.
        ends_s = self.clock.monotonic() + self.timeout_s
        upload_s, download_s = transfer_s(_length(request)), transfer_s(download_bytes)
        for pause_s in (*PAUSES_S, None) if repeatable else (None,):
            try:
                left_s = ends_s - self.clock.monotonic()
                response = exchange(
                    self.http,
                    request,
                    max_bytes=max_bytes,
                    deadline_s=left_s,
                    upload_s=upload_s,
                    download_s=download_s,
                )
            except IntegrityError as error:
                raise ControlApiError(error.message, cure=_OTHER_SERVER) from None
            except _BROKEN as error:
                if pause_s is None or self.clock.monotonic() + pause_s >= ends_s:
                    raise self._unreachable(request, error) from None
            except httpx.HTTPError as error:
                raise self._unreachable(request, error) from None
            else:
                # 409 with Retry-After: the same request, sent before, is still being worked on.
                under_way = response.status_code == httpx.codes.CONFLICT and "Retry-After" in response.headers
                if pause_s is None or not under_way:
                    if response.is_success:
                        return response
                    raise error_of(response.status_code, response.text, response.reason_phrase)
            self.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, request: httpx.Request, error: httpx.HTTPError) -> ControlUnreachableError:
        return ControlUnreachableError(
            f"The control API at {self.base_url} does not answer: {str(error) or type(error).__name__}.",
            cure="See that it runs (`fedvit status`) and that the URL is right.",
            **given(idempotency_key=request.headers.get("Idempotency-Key")),
        )


def _length(request: httpx.Request) -> int:
    return int(request.headers.get("content-length", "0"))


class Group:
    """Some routes of one control API."""

    def __init__(self, caller: Caller) -> None:
        self._caller, self._read = caller, caller.read

    def _post(
        self, kind: type[T], path: str, body: Mapping[str, Any] | None = None, key: str | None = None, **more: Any
    ) -> T:
        """A change's answer as a ``kind``; ``more`` is that of :meth:`Caller.send`."""
        return self._caller.parsed(kind, self._caller.send(more.pop("method", "POST"), path, body, key=key, **more))


def pages(read: Callable[[int, int], Sequence[T]], page_size: int) -> Iterator[T]:
    """All items that ``read(limit, offset)`` returns page by page."""
    offset = 0
    while page := read(page_size, offset):
        yield from page
        if len(page) < page_size:
            return
        offset += len(page)


def given(**fields: Any) -> dict[str, Any]:
    """Those fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def segment(name: str) -> str:
    """A name as one segment of a path.

    Raises:
        UsageError: it would make the path another one.
    """
    if name in ("", ".", ".."):
        raise UsageError(f"{name!r} names nothing.", cure="Give the name as the control API shows it.")
    return quote(name, safe="")


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)

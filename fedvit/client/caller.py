"""Requests of the client: idempotency keys, repetitions, typed responses, errors."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from fedvit.api.problems import error_of
from fedvit.api.transport import open_http
from fedvit.errors import ControlApiError, ControlUnreachableError, UsageError
from fedvit.ports import ClockPort

T = TypeVar("T")
PAGE = 500
# A little more than the server's own limit, so that its answer arrives.
TIMEOUT_S = 70.0
PAUSES_S = (0.2, 1.0, 2.0)
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


class Caller:
    """Sends requests to one control API.

    After a lost connection a request is sent again if it cannot act twice: a GET, a PUT, or a change under an
    Idempotency-Key.

    Args:
        before_change: called with every changing request before it is sent; what it raises reaches the caller.

    Raises:
        UsageError: ``base_url`` is no http(s) URL, ``token`` no token, or ``verify`` names no certificates.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None,
        timeout_s: float,
        verify: Path | bool,
        transport: httpx.BaseTransport | None,
        sleep: Callable[[float], None],
        clock: ClockPort,
        before_change: Callable[[httpx.Request], None] | None,
    ) -> None:
        self.base_url, self.sleep, self.clock = base_url.rstrip("/"), sleep, clock
        self._before_change = before_change
        self._http = open_http(base_url, timeout_s=timeout_s, token=token, verify=verify, transport=transport)

    def close(self) -> None:
        """Give connections back."""
        self._http.close()

    def get(self, path: str, **query: Any) -> httpx.Response:
        """The answer to a reading; query parameters that are None are left out."""
        return self._exchange(self._http.build_request("GET", path, params=given(**query)))

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
        headers = {} if if_match is None else {"If-Match": if_match}
        if repeatable:
            headers["Idempotency-Key"] = key or uuid.uuid4().hex
        request = self._http.build_request(method, path, json=body, headers=headers)
        if self._before_change is not None:
            self._before_change(request)
        return self._exchange(request)

    def put(self, path: str, content: bytes) -> httpx.Response:
        """The answer to bytes that are put in their place; to repeat that does nothing."""
        headers = {"Content-Type": "application/octet-stream"}
        request = self._http.build_request("PUT", path, content=content, headers=headers)
        if self._before_change is not None:
            self._before_change(request)
        return self._exchange(request)

    def change(self, kind: type[T], method: str, path: str, body: Mapping[str, Any] | None = None, **more: Any) -> T:
        """A change's answer as a ``kind``; ``more`` is that of :meth:`send`."""
        return self.parsed(kind, self.send(method, path, body, **more))

    def parsed(self, kind: type[T], response: httpx.Response) -> T:
        """The answer as a ``kind``.

        Raises:
            ControlApiError: it is none.
        """
        try:
            adapter: TypeAdapter[T] = _adapter(cast(Any, kind))
            return adapter.validate_json(response.content)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(map(str, fault["loc"])) or "the body"
            raise ControlApiError(
                f"{response.url} answered with what this client does not understand ({place}: {fault['msg']}).",
                cure="See that the URL is a control API's, and that both sides have the same version of fedvit.",
                status=response.status_code,
            ) from None

    def _exchange(self, request: httpx.Request) -> httpx.Response:
        repeatable = request.method in ("GET", "PUT") or "Idempotency-Key" in request.headers
        for pause_s in (*PAUSES_S, None) if repeatable else (None,):
            try:
                response = self._http.send(request)
            except _BROKEN as error:
                if pause_s is None:
                    raise self._unreachable(request, error) from None
            except httpx.HTTPError as error:
                raise self._unreachable(request, error) from None
            else:
                if pause_s is None or not _is_under_way(response):
                    return _checked(response)
            self.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, request: httpx.Request, error: httpx.HTTPError) -> ControlUnreachableError:
        key = request.headers.get("Idempotency-Key")
        return ControlUnreachableError(
            f"The control API at {self.base_url} does not answer: {str(error) or type(error).__name__}.",
            cure="See that it runs (`fedvit status`) and that the URL is right.",
            **given(idempotency_key=key),
        )


class Group:
    """Some routes of one control API."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller


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


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise error_of(response.status_code, response.text, response.reason_phrase)


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _is_under_way(response: httpx.Response) -> bool:
    """Whether it says that the same request, sent before, is still being worked on."""
    return response.status_code == httpx.codes.CONFLICT and "Retry-After" in response.headers

"""The way of every request: token, repetitions, and errors that fedvit understands."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

import fedvit.errors
from fedvit.access.exposure import is_loopback
from fedvit.errors import ControlApiError, ControlUnreachableError, FedvitError, UsageError

T = TypeVar("T")
# A little more than the server's own limit, so that its answer arrives.
TIMEOUT_S = 70.0
PAUSES_S = (0.2, 1.0, 2.0)
_BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
# Members that are arguments of an error, or whose names would collide with them.
_NO_DETAILS = frozenset({"title", "detail", "cure", "message", "self"})


class Caller:
    """Sends requests to one control API.

    What the connection loses is sent again if that cannot act twice: a reading, or a change under an Idempotency-Key.

    Args:
        before_change: is shown every changing request before it is sent; what it raises, the caller gets.

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
        before_change: Callable[[httpx.Request], None] | None,
    ) -> None:
        self.base_url, self.sleep, self._before_change = base_url.rstrip("/"), sleep, before_change
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=timeout_s,
            verify=_trust(verify),
            headers=_bearer(token),
            transport=transport,
            # A proxy from the environment would stand between this machine and itself.
            trust_env=not is_loopback(_host_of(base_url)),
        )

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
    raise error_of(response)


def error_of(response: httpx.Response) -> FedvitError:
    """The error that an answer tells of, as the class that its problem ``type`` names."""
    try:
        told = dict(response.json())
    except (ValueError, TypeError):
        told = {}
    details = {name: value for name, value in told.items() if name not in _NO_DETAILS}
    details["status"] = response.status_code
    kind = _kinds().get(str(details.pop("type", "")).rpartition("/")[2])
    detail = str(told.get("detail") or response.text[:200] or response.reason_phrase)
    if kind is not None:
        return kind(detail, cure=told.get("cure"), **details)
    details["type"] = told.get("type", "about:blank")
    return ControlApiError(
        f"The control API answered {response.status_code}: {detail}", cure=told.get("cure"), **details
    )


@lru_cache(maxsize=1)
def _kinds() -> dict[str, type[FedvitError]]:
    found = [kind for kind in vars(fedvit.errors).values() if isinstance(kind, type) and issubclass(kind, FedvitError)]
    return {kind.code: kind for kind in found if kind is not FedvitError}


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _is_under_way(response: httpx.Response) -> bool:
    """Whether it says that the same request, sent before, is still being worked on."""
    return response.status_code == httpx.codes.CONFLICT and "Retry-After" in response.headers


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


def _host_of(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{base_url!r} is no http or https URL.", cure="Give http://HOST:PORT of a control API.")
    return url.host

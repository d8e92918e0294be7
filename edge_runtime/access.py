"""Access rules and error responses of an inference process, which runs without FastAPI.

A bearer token (RFC 6750) is required except on the loopback interface.
"""

from __future__ import annotations

import hmac
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedvit.api.inbound import foreign_request
from fedvit.api.problems import MEDIA_TYPE, problem, problem_document, problem_headers
from fedvit.api.transport import is_loopback, read_token
from fedvit.errors import FedvitError, ForbiddenError, UnauthorizedError, UsageError

RETRY_AFTER_S = 1
MIN_TOKEN_CHARACTERS = 16
# Probes have no token, and get nothing but the version.
_OPEN_PATHS = frozenset({"/health"})


def problem_of(error: FedvitError) -> JSONResponse:
    """The problem document of an error; a status of 503 says when to try again."""
    headers = problem_headers(error)
    if error.http_status == 503:
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return JSONResponse(problem_document(error), error.http_status, headers, MEDIA_TYPE)


async def on_fedvit_error(_: Request, error: Exception) -> JSONResponse:
    """The handler of :class:`FedvitError`."""
    assert isinstance(error, FedvitError)
    return problem_of(error)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """The handler of Starlette's own errors: no such path, no such method."""
    assert isinstance(error, HTTPException)
    body = problem(error.status_code, "http", error.detail, f"{request.method} {request.url.path}: {error.detail}.")
    return JSONResponse(body, error.status_code, error.headers, MEDIA_TYPE)


async def on_unexpected_error(_: Request, error: Exception) -> JSONResponse:
    """The handler of everything else. The log says what went wrong; the response does not."""
    return problem_of(FedvitError(f"The server failed ({type(error).__name__}); its log says more."))


class BearerToken:
    """ASGI middleware that demands ``Authorization: Bearer <token>``."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._is_good(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = UnauthorizedError("The request carries no valid token.", cure="Send Authorization: Bearer TOKEN.")
        response = problem_of(error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _is_good(self, headers: Headers) -> bool:
        return hmac.compare_digest(headers.get("authorization", "").encode(), self._wanted)


class LocalRequests:
    """ASGI middleware of a process without tokens: refuses web pages of other origins, and other hosts' names."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            fault = foreign_request(headers.get("host", ""), headers.get("origin"), scope["scheme"], self._host)
            if fault is not None:
                error = ForbiddenError(f"{fault}.", cure="Send a request to this process from a program.")
                await problem_of(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def access_rules(host: str, token_file: Path | None, source_token_file: Path | None = None) -> list[Middleware]:
    """The middleware for listening on ``host``, with the token that callers send.

    Args:
        source_token_file: the token that this process sends to its source; callers must not get to know it.

    Raises:
        UsageError: the address is not loopback and there is no token; or the token is too short, unreadable, or the one
            of ``source_token_file``.
    """
    if token_file is None:
        if not is_loopback(host):
            raise UsageError(
                f"Listening on {host} without a token would let anybody ask.",
                cure="Give --token-file, or listen on 127.0.0.1.",
            )
        return [Middleware(LocalRequests, host=host)]
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The token file {token_file} cannot be read: {error}.") from None
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise UsageError(
            f"The token in {token_file} has {len(token)} characters.",
            cure=f"Use at least {MIN_TOKEN_CHARACTERS}, from a random source.",
        )
    if source_token_file is not None and hmac.compare_digest(token.encode(), read_token(source_token_file).encode()):
        raise UsageError(
            f"{token_file} holds the token that is sent to the server: callers could act as this device.",
            cure="Put another random secret in it.",
        )
    return [Middleware(BearerToken, token=token)]

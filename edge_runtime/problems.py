"""Errors as RFC 9457 problem documents, for a process that carries no FastAPI."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedvit.errors import FedvitError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1


def problem_of(error: FedvitError) -> JSONResponse:
    """The problem document of an error; one that will pass says when to try again."""
    title = type(error).__name__.removesuffix("Error")
    body: dict[str, Any] = {"type": f"/problems/{error.code}", "title": title, "status": error.http_status}
    body |= {"detail": error.message, **error.details}
    if error.cure:
        body["cure"] = error.cure
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.http_status == 503 else None
    return JSONResponse(body, status_code=error.http_status, headers=headers, media_type=MEDIA_TYPE)


async def on_fedvit_error(_: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for :class:`FedvitError`."""
    assert isinstance(error, FedvitError)
    return problem_of(error)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for its own errors: no such path, no such method."""
    assert isinstance(error, HTTPException)
    body = {
        "type": "/problems/http",
        "title": error.detail,
        "status": error.status_code,
        "detail": f"{request.method} {request.url.path}: {error.detail}.",
    }
    return JSONResponse(body, status_code=error.status_code, headers=error.headers, media_type=MEDIA_TYPE)


async def on_surprise(_: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for everything else; what went wrong goes to the log, not to the caller."""
    return problem_of(FedvitError(f"The server failed ({type(error).__name__}); its log says more."))

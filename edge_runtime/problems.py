"""Starlette's handlers of errors in a process without FastAPI: problem documents of :mod:`fedvit.api.problems`."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedvit.api.problems import MEDIA_TYPE, problem, problem_document, problem_headers
from fedvit.errors import FedvitError

RETRY_AFTER_S = 1


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

"""Errors as RFC 9457 problem documents: the one mapping from :mod:`fedvit.errors` to HTTP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fedvit.errors import FedvitError, ForbiddenError, UnauthorizedError
from serve_apps.logs import redact, request_id

MEDIA_TYPE = "application/problem+json"
_LOG = logging.getLogger("fedvit.control")


class Problem(BaseModel):
    """A problem document (RFC 9457); ``cure`` says what would be right."""

    type: str
    title: str
    status: int
    detail: str
    cure: str | None = None
    request_id: str | None = None


# Made once: a hundred routes ask for it.
_SCHEMA = Problem.model_json_schema()
_MEANINGS = {
    400: "The body is not JSON, or a header is malformed.",
    401: "No good token.",
    403: "The token does not hold the scope.",
    404: "The named thing does not exist.",
    408: "The body did not arrive in time.",
    409: "The request contradicts the present state, the release gate or the privacy budget.",
    412: "The state has changed since it was read.",
    413: "The body is too large.",
    415: "The body is compressed.",
    422: "A field is missing, unknown or out of range.",
    429: "Too many requests.",
    502: "Stored content does not match its hash.",
    503: "A part of the system does not answer.",
    504: "No answer within the time limit; the request may still take effect.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that answers these statuses with a problem document."""
    content = {MEDIA_TYPE: {"schema": _SCHEMA}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


class ProblemError(Exception):
    """A fault of HTTP itself, which the library has no word for: a body too large, a precondition that failed.

    Args:
        status: the HTTP status.
        code: names the kind of problem; the end of its ``type``.
        title: the kind, in words.
        detail: one sentence: what was wrong here, and what would be right.
        more: further members of the problem document; JSON types only.
    """

    def __init__(self, status: int, code: str, title: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.code, self.title, self.detail, self.more = status, code, title, detail, more


def problem(
    status: int, code: str, title: str, detail: str, headers: Mapping[str, str] | None = None, **more: object
) -> JSONResponse:
    """A problem document (RFC 9457); ``type`` is stable and ends in the error's code."""
    body = {"type": f"/problems/{code}", "title": title, "status": status, "detail": redact(detail), **more}
    if request_id.get():
        body["request_id"] = request_id.get()
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def problem_of(error: Exception) -> JSONResponse:
    """The problem document of any error; one that nobody foresaw is logged and not shown."""
    match error:
        case FedvitError():
            title = type(error).__name__.removesuffix("Error")
            more = {"cure": error.cure, **error.details}
            return problem(error.http_status, error.code, title, error.message, _headers_of(error), **more)
        case RequestValidationError():
            return _invalid(error)
        case ProblemError():
            return problem(error.status, error.code, error.title, error.detail, **error.more)
        case HTTPException():
            return problem(error.status_code, "http", str(error.detail), str(error.detail), error.headers)
    _LOG.error("A request failed", exc_info=error)
    detail = "The request failed for a reason nobody foresaw; the log has it under this request_id."
    return problem(500, "internal-error", "Internal error", detail)


def install_problem_handlers(api: FastAPI) -> None:
    """Answer every foreseen error with a problem document."""
    for kind in (FedvitError, RequestValidationError, ProblemError, HTTPException):
        api.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    answer = problem_of(error)
    if answer.status_code == 405:
        answer.headers["Allow"] = ", ".join(sorted(_methods_at(request)))
    return answer


def _methods_at(request: Request) -> set[str]:
    """The methods of all routes of a path; the router names those of the first one only."""
    path = request.scope["route"].path
    at_path = (route for route in request.app.routes if getattr(route, "path", None) == path)
    return {method for route in at_path for method in getattr(route, "methods", None) or ()}


def _headers_of(error: FedvitError) -> dict[str, str]:
    """What RFC 6750 and RFC 9110 want beside the status."""
    headers = {}
    if "retry_after_s" in error.details:
        headers["Retry-After"] = str(error.details["retry_after_s"])
    if isinstance(error, UnauthorizedError):
        known = error.details.get("reason") == "missing"
        headers["WWW-Authenticate"] = 'Bearer realm="fedvit"' + ("" if known else ', error="invalid_token"')
    if isinstance(error, ForbiddenError) and "required" in error.details:
        scope = " ".join(error.details["required"])
        headers["WWW-Authenticate"] = f'Bearer realm="fedvit", error="insufficient_scope", scope="{scope}"'
    return headers


def _invalid(error: RequestValidationError) -> JSONResponse:
    faults = [{"field": ".".join(map(str, fault["loc"])), "message": fault["msg"]} for fault in error.errors()]
    detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
    return problem(422, "invalid-request", "Invalid request", detail, errors=faults)

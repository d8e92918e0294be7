"""FastAPI's handlers of errors: problem documents of :mod:`fedvit.api.problems`, and their OpenAPI schema."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fedvit.api.problems import MEDIA_TYPE, problem, problem_document, problem_headers
from fedvit.errors import FedvitError, InvalidRequestError
from serve_apps.logs import redact, request_id

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


def problem_of(error: Exception) -> JSONResponse:
    """The problem document of any error; an unforeseen one is logged and not shown."""
    if isinstance(error, HTTPException):
        detail = str(error.detail)
        return _response(problem(error.status_code, "http", detail, detail), dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    if not isinstance(error, FedvitError):
        _LOG.error("A request failed", exc_info=error)
        logged = f" under request_id {identifier}" if (identifier := request_id.get()) else ""
        error = FedvitError(
            f"The request failed for an unforeseen reason ({type(error).__name__}).",
            cure=f"`fedvit logs` shows it{logged}.",
        )
    return _response(problem_document(error), problem_headers(error))


def install_problem_handlers(api: FastAPI) -> None:
    """Answer every foreseen error with a problem document."""
    for kind in (FedvitError, RequestValidationError, HTTPException):
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


def _response(document: dict[str, Any], headers: dict[str, str]) -> JSONResponse:
    document["detail"] = redact(document["detail"])
    if request_id.get():
        document["request_id"] = request_id.get()
    return JSONResponse(document, document["status"], headers, MEDIA_TYPE)


def _invalid(error: RequestValidationError) -> InvalidRequestError:
    faults = [{"field": ".".join(map(str, fault["loc"])), "message": fault["msg"]} for fault in error.errors()]
    detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
    return InvalidRequestError(detail, errors=faults)

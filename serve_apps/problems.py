"""Errors as RFC 9457 problem documents: the one mapping from :mod:`fedvit.errors` to HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fedvit.errors import FedvitError

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """A problem document (RFC 9457); ``cure`` says what would be right."""

    type: str
    title: str
    status: int
    detail: str
    cure: str | None = None


_MEANINGS = {
    404: "The named thing does not exist.",
    409: "The request contradicts the present state, the release gate or the privacy budget.",
    412: "The state has changed since it was read.",
    422: "A field is missing, unknown or out of range.",
    502: "Stored content does not match its hash.",
    503: "A part of the system does not answer.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that answers these statuses with a problem document."""
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def problem(status: int, code: str, title: str, detail: str, **more: object) -> JSONResponse:
    """A problem document; ``type`` is a stable relative reference into docs/problems.md."""
    body = {"type": f"/problems/{code}", "title": title, "status": status, "detail": detail, **more}
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE)


def install_problem_handlers(api: FastAPI) -> None:
    """Answer every foreseen error with a problem document."""
    api.add_exception_handler(FedvitError, _fedvit_error)
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(HTTPException, _http_error)


async def _fedvit_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FedvitError)
    title = type(error).__name__.removesuffix("Error")
    return problem(error.http_status, error.code, title, error.message, cure=error.cure, **error.details)


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = [{"field": ".".join(map(str, fault["loc"])), "message": fault["msg"]} for fault in error.errors()]
    detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
    return problem(422, "invalid-request", "Invalid request", detail, errors=faults)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, "http", str(error.detail), str(error.detail))

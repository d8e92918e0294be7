"""Errors as RFC 9457 problem documents: the one mapping from :mod:`fedvit.errors` to HTTP."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fedvit.errors import FedvitError

MEDIA_TYPE = "application/problem+json"


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

"""Problem documents (RFC 9457) of errors, and errors of problem documents: the one mapping between the two."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Any

import fedvit.errors
from fedvit.errors import ControlApiError, FedvitError, ForbiddenError, HttpFaultError, UnauthorizedError
from fedvit.wire.untrusted import parse_json

MEDIA_TYPE = "application/problem+json"
# Members of a document that are arguments of an error, or whose names would collide with them.
_MAX_BYTES = 2**20
_NO_DETAILS = frozenset({"title", "detail", "cure", "message", "self"})


def problem_document(error: FedvitError) -> dict[str, Any]:
    """The problem document of an error; ``cure`` and the error's details are extension members."""
    cure = {} if error.cure is None else {"cure": error.cure}
    return problem(error.http_status, error.code, error.title, error.message) | cure | error.details


def problem(status: int, code: str, title: str, detail: str) -> dict[str, Any]:
    """A problem document; its ``type`` is stable and ends in ``code``."""
    return {"type": f"/problems/{code}", "title": title, "status": status, "detail": detail}


def problem_headers(error: FedvitError) -> dict[str, str]:
    """The headers that RFC 6750 and RFC 9110 ask for beside the status."""
    headers = {}
    if "retry_after_s" in error.details:
        headers["Retry-After"] = str(error.details["retry_after_s"])
    if isinstance(error, UnauthorizedError):
        missing = error.details.get("reason") == "missing"
        headers["WWW-Authenticate"] = 'Bearer realm="fedvit"' + ("" if missing else ', error="invalid_token"')
    if isinstance(error, ForbiddenError) and "required" in error.details:
        scope = " ".join(error.details["required"])
        headers["WWW-Authenticate"] = f'Bearer realm="fedvit", error="insufficient_scope", scope="{scope}"'
    return headers


def error_of(status: int, content: str, reason: str = "") -> FedvitError:
    """The error that a response describes: of the class that its ``type`` names, else a :class:`ControlApiError`.

    Args:
        status: the HTTP status.
        content: the body, a problem document or anything else.
        reason: the reason phrase, where the body is empty.
    """
    document: dict[str, Any] = {}
    with suppress(ValueError):
        value = parse_json(content.encode(errors="replace"), max_bytes=_MAX_BYTES)
        document = value if isinstance(value, dict) else {}
    details = {name: value for name, value in document.items() if name not in _NO_DETAILS} | {"status": status}
    kind = _kinds().get(str(details.pop("type", "")).rpartition("/")[2])
    detail = str(document.get("detail") or content[:200] or reason)
    if kind is not None:
        return kind(detail, cure=document.get("cure"), **details)
    details["type"] = document.get("type", "about:blank")
    return ControlApiError(f"The control API answered {status}: {detail}", cure=document.get("cure"), **details)


@lru_cache(maxsize=1)
def _kinds() -> dict[str, type[FedvitError]]:
    """The error classes by code; of several with one code the most general."""
    kinds: dict[str, type[FedvitError]] = {}
    for kind in vars(fedvit.errors).values():
        if isinstance(kind, type) and issubclass(kind, FedvitError) and not issubclass(kind, HttpFaultError):
            kinds.setdefault(kind.code, kind)
    del kinds[FedvitError.code]
    return kinds

"""Audit facts of a request: bounded, JSON, and without secrets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from fedvit.access.identity import Identity
from fedvit.store.records import AuditFacts
from serve_apps.control.http.access import AuditNote
from serve_apps.logs import redact

MAX_TEXT = 500
MAX_ITEMS = 50
MAX_DEPTH = 8
MAX_BYTES = 8_192
_SECRET_NAME = re.compile(r"secret|token|passw|authori[sz]ation|credential|private|api_?key", re.IGNORECASE)
_HIDDEN = "[redacted]"


def facts_of(
    request: Request, action: str, identity: Identity, source: str, body: Any, note: AuditNote, status: int
) -> AuditFacts:
    """One line of the trail for one mutating call that was answered with ``status``."""
    params = {"path": dict(request.path_params), "query": dict(request.query_params), "body": body}
    return AuditFacts(
        actor=identity.actor,
        scopes=tuple(sorted(identity.scopes)) if identity.authenticated else (),
        source=source,
        request_id=request.state.request_id,
        action=action,
        params=bounded({name: value for name, value in params.items() if value}),
        before=bounded(note.before),
        after=bounded(note.after),
        status=status,
    )


def bounded(value: Any) -> Any:
    """The value as JSON of at most :data:`MAX_BYTES`, with secrets blotted out and what is too long cut."""
    small = _bounded(value, MAX_DEPTH)
    size = len(json.dumps(small))
    return small if size <= MAX_BYTES else {"omitted": f"{size} bytes"}


def _bounded(value: Any, depth: int) -> Any:
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return _bounded_object(value, depth) if depth else "…"
        case list() | tuple() | set() | frozenset():
            return [_bounded(item, depth - 1) for item in list(value)[:MAX_ITEMS]] if depth else "…"
    # Lone surrogates are legal in JSON and in no database.
    text = redact(str(value)).encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def _bounded_object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    return {
        _bounded(str(name)[:MAX_TEXT], 1): _HIDDEN if _SECRET_NAME.search(str(name)) else _bounded(item, depth - 1)
        for name, item in list(value.items())[:MAX_ITEMS]
    }

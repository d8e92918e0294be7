"""Entity tags: nobody overwrites a configuration that he has not seen (RFC 9110, section 13)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fastapi import Request

from serve_apps.problems import ProblemError


def etag_of(value: Any) -> str:
    """The strong entity tag of a JSON value."""
    content = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'


def check_if_match(request: Request, value: Any) -> None:
    """Make sure that ``value``, as it stands, is what the caller saw; one who sends no ``If-Match`` does not ask.

    Raises:
        ProblemError: it changed meanwhile (412).
    """
    wanted = [tag.strip() for line in request.headers.getlist("if-match") for tag in line.split(",")]
    current = etag_of(value)
    if wanted and "*" not in wanted and current not in wanted:
        raise ProblemError(
            412,
            "precondition-failed",
            "Precondition failed",
            "This was changed meanwhile; read it again.",
            etag=current,
        )

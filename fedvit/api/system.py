"""Models of the system's health and of the audit trail."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from fedvit.api.base import View
from fedvit.api.training import ProgressView


class HealthView(View):
    """The system's parts, each ``ok`` or what ails it."""

    status: Literal["ok", "degraded"]
    parts: Mapping[str, str]
    training: ProgressView | None
    release: str | None


class AuditView(View):
    """One line of the audit trail."""

    sequence: int
    at: datetime
    actor: str
    scopes: tuple[str, ...]
    source: str
    request_id: str
    action: str
    params: Mapping[str, Any]
    before: Any
    after: Any
    status: int

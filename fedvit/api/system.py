"""Models of the system's health, of long operations and of the audit trail."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from fedvit.api.base import View
from fedvit.api.training import ProgressView
from fedvit.types import OperationStatus


class OperationView(View):
    """A long operation; ``progress`` runs from 0 to 1."""

    operation_id: str
    kind: str
    status: OperationStatus
    progress: float
    stage: str
    params: Mapping[str, Any]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    cancel_requested: bool


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

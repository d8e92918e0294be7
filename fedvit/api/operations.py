"""Models of long operations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fedvit.api.base import View
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

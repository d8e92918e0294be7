"""What the control API answers about incidents."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fedvit.client.views import View


class ReceivedView(View):
    """The incidents that a message concerned."""

    incidents: tuple[str, ...]


class IncidentSummary(View):
    """An incident in a list; ``firing`` of its ``alerts`` have not cleared."""

    incident_id: str
    alertname: str
    severity: str
    status: str
    summary: str
    opened_at: datetime
    resolved_at: datetime | None
    alerts: int
    firing: int


class TimelineEntry(View):
    """A line of a timeline; ``actor`` is None where nobody did it."""

    at: datetime
    kind: str
    actor: str | None
    text: str


class ProposalView(View):
    """A step of the runbook; ``automatic`` is allowed, not_allowed or never, ``outcome`` what became of that."""

    name: str
    command: str
    method: str | None
    path: str | None
    body: Mapping[str, Any] | None
    target: str | None
    automatic: str
    outcome: str | None
    detail: str | None


class IncidentDetail(IncidentSummary):
    """An incident with its timeline, and what the runbook says."""

    runbook: str
    proposals: tuple[ProposalView, ...]
    timeline: tuple[TimelineEntry, ...]

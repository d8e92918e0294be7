"""Models of the incident log: Alertmanager's messages, incidents, proposed steps, and notes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fedvit.api.base import RequestBody, View
from fedvit.api.choices import IncidentStatus, Section
from fedvit.types import Severity

# What Alertmanager sends at once is bounded by max_alerts on its side; more would not fit into a body.
MAX_ALERTS = 1000
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]")


def _written(given: Any) -> Any:
    """A number would be taken for seconds since 1970."""
    if not isinstance(given, str) or _DAY.match(given) is None:
        raise ValueError("is no moment in the form 2026-03-01T03:15:00Z")
    return given


def _counted(given: Any) -> Any:
    if isinstance(given, bool | str):
        raise ValueError("is no number")
    return given


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("lies outside the calendar") from None


Moment = Annotated[datetime, BeforeValidator(_written), AfterValidator(_in_utc)]


class AlertmanagerAlert(BaseModel):
    """One alert. While it fires, ``endsAt`` says nothing."""

    model_config = ConfigDict(extra="ignore")

    status: Literal["firing", "resolved"] = Field(examples=["firing"])
    labels: dict[str, str] = Field(
        examples=[{"alertname": "EdgeDeviceOffline", "severity": "P2", "instance": "127.0.0.1:8081"}]
    )
    annotations: dict[str, str] = Field(default_factory=dict, examples=[{"summary": "An edge device is offline."}])
    startsAt: Moment = Field(examples=["2026-03-01T03:15:00.123456789Z"])  # Alertmanager's spelling
    endsAt: Moment | None = Field(default=None, examples=["0001-01-01T00:00:00Z"])
    generatorURL: str = Field(default="", examples=["http://localhost:9090/graph?g0.expr=up"])
    fingerprint: str = Field(min_length=1, max_length=64, examples=["1a30ba71cca2921f"])


class AlertmanagerMessage(BaseModel):
    """A group of alerts, as Alertmanager posts it to a webhook (version 4).

    What else it says (receiver, group and common labels) is said of each alert, or is about Alertmanager itself.
    ``truncatedAlerts`` were left out of it.
    """

    # The format is Alertmanager's to extend. It repeats nothing that was answered with 4xx: refusing would lose alerts.
    model_config = ConfigDict(extra="ignore")

    version: Literal["4"]
    truncatedAlerts: Annotated[int, BeforeValidator(_counted)] = Field(default=0, ge=0)
    alerts: list[AlertmanagerAlert] = Field(max_length=MAX_ALERTS)


class ReceivedView(View):
    """The incidents that a message concerned."""

    incidents: tuple[str, ...]


class IncidentSummary(View):
    """An incident in a list; ``firing`` of its ``alerts`` have not cleared."""

    incident_id: str
    alertname: str
    severity: Severity
    status: IncidentStatus
    summary: str
    opened_at: datetime
    resolved_at: datetime | None
    alerts: int
    firing: int


class TimelineEntry(View):
    """A line of a timeline; ``actor`` is null where nobody did it."""

    at: datetime
    kind: str
    actor: str | None
    text: str


class RemediationOutcome(StrEnum):
    """What became of a remediation; one that stays ``begun`` was cut off in the middle, and nobody knows."""

    WITHHELD = "withheld"
    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


class ProposalView(View):
    """A step of the runbook. ``automatic``: may the system take it by itself (``allowed`` by ``remediation.allow``)?

    ``outcome`` and ``detail`` say what became of that; both are null while nothing was tried.
    """

    name: str
    command: str
    method: str | None
    path: str | None
    body: Mapping[str, Any] | None
    target: str | None
    automatic: Literal["allowed", "not_allowed", "never"]
    outcome: RemediationOutcome | None
    detail: str | None


class IncidentDetail(IncidentSummary):
    """An incident with its timeline, and what the runbook says; ``runbook`` is the section."""

    runbook: str
    proposals: tuple[ProposalView, ...]
    timeline: tuple[TimelineEntry, ...]


class NoteRequest(RequestBody):
    """What somebody knows: for a section of the report, or as a ``remark`` for the timeline."""

    section: Section = Field(default=Section.REMARK, examples=["root_cause"])
    text: str = Field(min_length=1, max_length=4000, examples=["A cable was cut."])

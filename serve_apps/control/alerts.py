"""What Alertmanager posts to a webhook, payload version 4.

The format is Alertmanager's to extend: what is unknown is passed over, and what is too long is cut. Refusing it would
lose the alert, for Alertmanager repeats nothing that was answered with 4xx.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedvit.store.store import Alert
from fedvit.types import Severity

# As many as fit into a body.
MAX_ALERTS = 10_000
MAX_LABELS = 64
MAX_TEXT = 2000
UNNAMED = "unnamed"


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("lies outside the calendar") from None


Moment = Annotated[datetime, AfterValidator(_in_utc)]
# Go says "0001-01-01T00:00:00Z" where there is no moment.
_NEVER = datetime(1, 1, 2, tzinfo=UTC)


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

    def to_alert(self, now: datetime) -> Alert:
        """The alert as the log keeps it; one that says it has ended, and not when, has ended ``now``."""
        labels, annotations = bounded(self.labels), bounded(self.annotations)
        ended = self.endsAt if self.endsAt is not None and self.endsAt > _NEVER else now
        return Alert(
            alertname=labels.get("alertname", UNNAMED)[:200],
            severity=severity_of(labels),
            fingerprint=self.fingerprint,
            starts_at=self.startsAt,
            ends_at=ended if self.status == "resolved" else None,
            labels=labels,
            annotations=annotations,
            generator_url=self.generatorURL[:MAX_TEXT],
        )


class AlertmanagerMessage(BaseModel):
    """A group of alerts, as Alertmanager posts it to a webhook (version 4)."""

    model_config = ConfigDict(extra="ignore")

    version: Literal["4"]
    groupKey: str = Field(default="", examples=['{}:{alertname="EdgeDeviceOffline"}'])
    truncatedAlerts: int = Field(default=0, ge=0)
    status: Literal["firing", "resolved"] = Field(examples=["firing"])
    receiver: str = Field(default="", examples=["fedvit"])
    groupLabels: dict[str, str] = Field(default_factory=dict, examples=[{"alertname": "EdgeDeviceOffline"}])
    commonLabels: dict[str, str] = Field(default_factory=dict, examples=[{"severity": "P2"}])
    commonAnnotations: dict[str, str] = Field(default_factory=dict, examples=[{}])
    externalURL: str = Field(default="", examples=["http://localhost:9093"])
    alerts: list[AlertmanagerAlert] = Field(max_length=MAX_ALERTS)


def severity_of(labels: Mapping[str, str]) -> Severity:
    """What the label ``severity`` says; what is not one of ours is the least."""
    told = labels.get("severity", "").upper()
    return Severity(told) if told in list(Severity) else Severity.P3


def bounded(texts: Mapping[str, str]) -> dict[str, str]:
    """The first :data:`MAX_LABELS` texts, each cut at :data:`MAX_TEXT` characters."""
    return {name[:200]: text[:MAX_TEXT] for name, text in list(texts.items())[:MAX_LABELS]}

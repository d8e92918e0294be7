"""What Alertmanager posts to a webhook, payload version 4.

The format is Alertmanager's to extend: what is unknown is passed over, and what is too long is cut. Refusing it would
lose the alert, for Alertmanager repeats nothing that was answered with 4xx.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fedvit.store.store import Alert
from fedvit.types import Severity

# What Alertmanager sends at once is bounded by max_alerts on its side; more would not fit into a body.
MAX_ALERTS = 1000
MAX_LABELS = 64
MAX_TEXT = 2000
UNNAMED = "unnamed"
WATCHDOG = "Watchdog"
"""Fires for ever, so that somebody notices when it does not: a sign of life, and no incident."""
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
    """A group of alerts, as Alertmanager posts it to a webhook (version 4).

    What else it says (receiver, group and common labels) is said of each alert, or is about Alertmanager itself.
    ``truncatedAlerts`` were left out of it.
    """

    model_config = ConfigDict(extra="ignore")

    version: Literal["4"]
    truncatedAlerts: Annotated[int, BeforeValidator(_counted)] = Field(default=0, ge=0)
    alerts: list[AlertmanagerAlert] = Field(max_length=MAX_ALERTS)

    def to_alerts(self, now: datetime) -> list[Alert]:
        """The alerts as the log keeps them, the watchdog's sign of life left out."""
        found = (alert.to_alert(now) for alert in self.alerts)
        return [alert for alert in found if alert.alertname != WATCHDOG]


def severity_of(labels: Mapping[str, str]) -> Severity:
    """What the label ``severity`` says; what is not one of ours is the least."""
    told = labels.get("severity", "").upper()
    return Severity(told) if told in list(Severity) else Severity.P3


def bounded(texts: Mapping[str, str]) -> dict[str, str]:
    """The first :data:`MAX_LABELS` texts, each cut at :data:`MAX_TEXT` characters."""
    return {name[:200]: text[:MAX_TEXT] for name, text in list(texts.items())[:MAX_LABELS]}

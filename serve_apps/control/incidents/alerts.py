"""Alertmanager's webhook messages (payload version 4) as alerts of the incident log.

What is unknown is passed over, and what is too long is cut: Alertmanager repeats nothing that was answered with 4xx.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from fedvit.api.incidents import AlertmanagerAlert, AlertmanagerMessage
from fedvit.store.records import FiredAlert
from fedvit.types import Severity

MAX_LABELS = 64
MAX_TEXT = 2000
UNNAMED = "unnamed"
WATCHDOG = "Watchdog"
"""An alert that always fires, so that its absence shows a broken pipeline; it is no incident."""
# Go says "0001-01-01T00:00:00Z" where there is no moment.
_NEVER = datetime(1, 1, 2, tzinfo=UTC)


def to_alerts(message: AlertmanagerMessage, now: datetime) -> list[FiredAlert]:
    """The alerts as the log keeps them, without the watchdog."""
    alerts = (_to_alert(alert, now) for alert in message.alerts)
    return [alert for alert in alerts if alert.alertname != WATCHDOG]


def _to_alert(alert: AlertmanagerAlert, now: datetime) -> FiredAlert:
    """One alert as the log keeps it; one that is resolved and has no end ended ``now``."""
    labels, annotations = bounded(alert.labels), bounded(alert.annotations)
    ended = alert.endsAt if alert.endsAt is not None and alert.endsAt > _NEVER else now
    return FiredAlert(
        alertname=labels.get("alertname", UNNAMED)[:200],
        severity=severity_of(labels),
        fingerprint=alert.fingerprint,
        starts_at=alert.startsAt,
        ends_at=ended if alert.status == "resolved" else None,
        labels=labels,
        annotations=annotations,
        generator_url=alert.generatorURL[:MAX_TEXT],
    )


def severity_of(labels: Mapping[str, str]) -> Severity:
    """The severity that the label ``severity`` names; the lowest for any other text."""
    name = labels.get("severity", "").upper()
    return Severity(name) if name in list(Severity) else Severity.P3


def bounded(texts: Mapping[str, str]) -> dict[str, str]:
    """The first :data:`MAX_LABELS` texts, cut at :data:`MAX_TEXT` characters; nothing in them steers a terminal."""
    return {_plain(name[:200]): _plain(text[:MAX_TEXT]) for name, text in list(texts.items())[:MAX_LABELS]}


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)

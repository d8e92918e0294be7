"""What Alertmanager would post, for alerts that fire and end when a test says so."""

from __future__ import annotations

from datetime import datetime
from typing import Any

WEBHOOK = "/api/incidents/alerts"
NEVER = "0001-01-01T00:00:00Z"


def alert(
    name: str = "EdgeDeviceOffline",
    *,
    starts_at: datetime,
    ends_at: datetime | None = None,
    severity: str = "P2",
    fingerprint: str = "1a30ba71cca2921f",
    **labels: str,
) -> dict[str, Any]:
    """One alert of a message; it fires as long as it has no end."""
    return {
        "status": "firing" if ends_at is None else "resolved",
        "labels": {"alertname": name, "severity": severity, **labels},
        "annotations": {"summary": f"{name}, in words.", "runbook_url": "docs/runbook.md"},
        "startsAt": starts_at.isoformat(),
        "endsAt": NEVER if ends_at is None else ends_at.isoformat(),
        "generatorURL": "http://localhost:9090/graph",
        "fingerprint": fingerprint,
    }


def message(*alerts: dict[str, Any]) -> dict[str, Any]:
    """A message of version 4."""
    return {
        "version": "4",
        "groupKey": "{}:{}",
        "truncatedAlerts": 0,
        "status": "firing" if any(one["status"] == "firing" for one in alerts) else "resolved",
        "receiver": "fedvit",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://localhost:9093",
        "alerts": list(alerts),
    }

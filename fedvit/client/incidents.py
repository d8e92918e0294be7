"""The incident log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedvit.client.group import Group
from fedvit.client.incident_views import ReceivedView


class Incidents(Group):
    """What went wrong, what was done about it, and what people know of it."""

    def receive(self, message: Mapping[str, Any]) -> ReceivedView:
        """Tell alerts as Alertmanager does (webhook, payload version 4); harmless when repeated."""
        return self._caller.change(ReceivedView, "POST", "/api/incidents/alerts", message)

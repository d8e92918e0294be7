"""The incident log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedvit.api.incidents import IncidentDetail, IncidentSummary, ReceivedView
from fedvit.client.caller import given, segment
from fedvit.client.group import PAGE, Group, pages


class Incidents(Group):
    """What went wrong, what was done about it, and what people know of it."""

    def receive(self, message: Mapping[str, Any]) -> ReceivedView:
        """Tell alerts as Alertmanager does (webhook, payload version 4); harmless when repeated."""
        return self._caller.change(ReceivedView, "POST", "/api/incidents/alerts", message)

    def list(self, incident_status: str | None = None, limit: int = 50, offset: int = 0) -> tuple[IncidentSummary, ...]:
        """Incidents, newest first; ``incident_status`` is ``open`` or ``resolved``, None filters nothing."""
        kind = tuple[IncidentSummary, ...]
        return self._caller.read(kind, "/api/incidents", status=incident_status, limit=limit, offset=offset)

    def iterate(self, incident_status: str | None = None, page_size: int = PAGE) -> Iterator[IncidentSummary]:
        """Every incident, newest first."""
        return pages(lambda limit, offset: self.list(incident_status, limit, offset), page_size)

    def get(self, incident_id: str) -> IncidentDetail:
        """One incident, with its timeline and what the runbook says to do."""
        return self._caller.read(IncidentDetail, f"/api/incidents/{segment(incident_id)}")

    def add_note(
        self, incident_id: str, text: str, *, section: str | None = None, idempotency_key: str | None = None
    ) -> IncidentDetail:
        """Write down what only people know.

        ``section``: ``remark`` (the timeline), ``root_cause``, ``business_impact``, ``resolution``, ``prevention`` or
        ``action_item``.
        """
        path = f"/api/incidents/{segment(incident_id)}/notes"
        return self._caller.change(IncidentDetail, "POST", path, given(section=section, text=text), key=idempotency_key)

    def report(self, incident_id: str) -> str:
        """The runbook's template in Markdown, filled with what is known."""
        return self._caller.get(f"/api/incidents/{segment(incident_id)}/report").text

"""Routes of the privacy budget, of privacy breaches, and of the incident log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from fedvit.api.emergency import BreachView, EmergencyView, StandDownView
from fedvit.api.incidents import IncidentDetail, IncidentSummary, ReceivedView
from fedvit.api.privacy import AwaitingApproval, BudgetView, PeriodView, SpendView
from fedvit.client.caller import PAGE, Group, given, pages, segment


class Privacy(Group):
    """What is spent and what is left."""

    def budget(self) -> BudgetView:
        """The budget, for the most exposed client."""
        return self._read(BudgetView, "/api/privacy/budget")

    def history(self, hours: float = 24, limit: int = 1000) -> tuple[SpendView, ...]:
        """The ledger's entries of the last hours, oldest first."""
        return self._read(tuple[SpendView, ...], "/api/privacy/history", hours=hours, limit=limit)

    def periods(self) -> tuple[PeriodView, ...]:
        """Every budget that was granted anew: what, why and by whom."""
        return self._read(tuple[PeriodView, ...], "/api/privacy/periods")

    def reset_budget(
        self, new_epsilon: float, justification: str, *, idempotency_key: str | None = None
    ) -> BudgetView | AwaitingApproval:
        """Begin a new period: the budget when it is in force, else the request that another admin has to approve."""
        body = {"new_epsilon": new_epsilon, "justification": justification}
        response = self._caller.send("POST", "/api/privacy/reset-budget", body, key=idempotency_key)
        if response.status_code == httpx.codes.ACCEPTED:
            return self._caller.parsed(AwaitingApproval, response)
        return self._caller.parsed(BudgetView, response)

    def approve_reset(self, request_id: str, *, idempotency_key: str | None = None) -> BudgetView:
        """Put a reset that another admin requested in force."""
        return self._post(BudgetView, f"/api/privacy/reset-budget/{segment(request_id)}/approve", key=idempotency_key)


class Emergency(Group):
    """Incidents."""

    def status(self) -> EmergencyView:
        """The incident in force, and the clients in quarantine."""
        return self._read(EmergencyView, "/api/emergency")

    def privacy_breach(
        self,
        incident_id: str,
        *,
        affected_clients: Sequence[str],
        breach_type: str,
        immediate_actions: Sequence[str],
        description: str | None = None,
        idempotency_key: str | None = None,
    ) -> BreachView:
        """Contain a breach and collect what an investigation needs; harmless when repeated.

        ``immediate_actions``: ``stop_training``, ``isolate_data``, ``rollback_model``, ``freeze_ledger`` or
        ``revoke_credentials``; the answer's ``policy`` says which happen unasked.
        """
        body = given(
            incident_id=incident_id,
            affected_clients=list(affected_clients),
            breach_type=breach_type,
            immediate_actions=list(immediate_actions),
            description=description,
        )
        return self._post(BreachView, "/api/emergency/privacy-breach", body, key=idempotency_key)

    def stand_down(self, incident_id: str, justification: str, *, idempotency_key: str | None = None) -> StandDownView:
        """End an incident: the ledger thaws; quarantined clients stay so until each is reinstated."""
        body = {"incident_id": incident_id, "justification": justification}
        return self._post(StandDownView, "/api/emergency/stand-down", body, key=idempotency_key)


class Incidents(Group):
    """What went wrong, what was done about it, and what people know of it."""

    def receive(self, message: Mapping[str, Any]) -> ReceivedView:
        """Tell alerts as Alertmanager does (webhook, payload version 4); harmless when repeated."""
        return self._post(ReceivedView, "/api/incidents/alerts", message)

    def list(self, incident_status: str | None = None, limit: int = 50, offset: int = 0) -> tuple[IncidentSummary, ...]:
        """Incidents, newest first; ``incident_status`` is ``open`` or ``resolved``, None filters nothing."""
        kind = tuple[IncidentSummary, ...]
        return self._read(kind, "/api/incidents", status=incident_status, limit=limit, offset=offset)

    def iterate(self, incident_status: str | None = None, page_size: int = PAGE) -> Iterator[IncidentSummary]:
        """Every incident, newest first."""
        return pages(lambda limit, offset: self.list(incident_status, limit, offset), page_size)

    def get(self, incident_id: str) -> IncidentDetail:
        """One incident, with its timeline and what the runbook says to do."""
        return self._read(IncidentDetail, f"/api/incidents/{segment(incident_id)}")

    def add_note(
        self, incident_id: str, text: str, *, section: str | None = None, idempotency_key: str | None = None
    ) -> IncidentDetail:
        """Write down what only people know.

        ``section``: ``remark`` (the timeline), ``root_cause``, ``business_impact``, ``resolution``, ``prevention`` or
        ``action_item``.
        """
        path = f"/api/incidents/{segment(incident_id)}/notes"
        return self._post(IncidentDetail, path, given(section=section, text=text), key=idempotency_key)

    def report(self, incident_id: str) -> str:
        """The runbook's template in Markdown, filled with what is known."""
        return self._caller.get(f"/api/incidents/{segment(incident_id)}/report").text

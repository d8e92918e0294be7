"""What is done in an emergency, and after it."""

from __future__ import annotations

from collections.abc import Sequence

from fedvit.api.emergency import BreachView, EmergencyView, StandDownView
from fedvit.client.caller import given
from fedvit.client.group import Group


class Emergency(Group):
    """Incidents."""

    def status(self) -> EmergencyView:
        """The incident in force, and the clients in quarantine."""
        return self._caller.read(EmergencyView, "/api/emergency")

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
        return self._caller.change(BreachView, "POST", "/api/emergency/privacy-breach", body, key=idempotency_key)

    def stand_down(self, incident_id: str, justification: str, *, idempotency_key: str | None = None) -> StandDownView:
        """End an incident: the ledger thaws; quarantined clients stay so until each is reinstated."""
        body = {"incident_id": incident_id, "justification": justification}
        return self._caller.change(StandDownView, "POST", "/api/emergency/stand-down", body, key=idempotency_key)

"""What is done in an emergency, and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedvit.client.caller import given
from fedvit.client.fleet_views import BreachView, StandDownView
from fedvit.client.group import Group

ImmediateAction = Literal["stop_training", "isolate_data", "rollback_model", "freeze_ledger", "revoke_credentials"]


class Emergency(Group):
    """Incidents."""

    def privacy_breach(
        self,
        incident_id: str,
        *,
        affected_clients: Sequence[str],
        breach_type: str,
        immediate_actions: Sequence[ImmediateAction],
        description: str | None = None,
        idempotency_key: str | None = None,
    ) -> BreachView:
        """Stop, quarantine, revoke, freeze, and collect what an investigation needs; harmless when repeated."""
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

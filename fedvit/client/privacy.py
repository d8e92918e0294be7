"""The privacy budget and its ledger."""

from __future__ import annotations

import httpx

from fedvit.api.privacy import AwaitingApproval, BudgetView, PeriodView, SpendView
from fedvit.client.caller import segment
from fedvit.client.group import Group


class Privacy(Group):
    """What is spent and what is left."""

    def budget(self) -> BudgetView:
        """The budget, for the most exposed client."""
        return self._caller.read(BudgetView, "/api/privacy/budget")

    def history(self, hours: float = 24, limit: int = 1000) -> tuple[SpendView, ...]:
        """The ledger's entries of the last hours, oldest first."""
        return self._caller.read(tuple[SpendView, ...], "/api/privacy/history", hours=hours, limit=limit)

    def periods(self) -> tuple[PeriodView, ...]:
        """Every budget that was granted anew: what, why and by whom."""
        return self._caller.read(tuple[PeriodView, ...], "/api/privacy/periods")

    def reset_budget(
        self, new_epsilon: float, justification: str, *, idempotency_key: str | None = None
    ) -> BudgetView | AwaitingApproval:
        """Begin a new period: the budget when it is in force, else the request that somebody else has to approve."""
        body = {"new_epsilon": new_epsilon, "justification": justification}
        response = self._caller.send("POST", "/api/privacy/reset-budget", body, key=idempotency_key)
        if response.status_code == httpx.codes.ACCEPTED:
            return self._caller.parsed(AwaitingApproval, response)
        return self._caller.parsed(BudgetView, response)

    def approve_reset(self, request_id: str, *, idempotency_key: str | None = None) -> BudgetView:
        """Put somebody else's reset in force."""
        path = f"/api/privacy/reset-budget/{segment(request_id)}/approve"
        return self._caller.change(BudgetView, "POST", path, key=idempotency_key)

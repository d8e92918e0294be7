"""Routes of the privacy budget: what is spent, what is left, and how a new one is granted."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse

from fedvit.access.identity import Scope
from fedvit.api.privacy import AwaitingApproval, BudgetView, PeriodView, ResetBudget, SpendView
from fedvit.ports import AccountantPort, LedgerEntry
from serve_apps.control.http.access import VIEWER, AuditNote, CurrentIdentity, Note, requires
from serve_apps.control.http.route import route
from serve_apps.control.services import Services

# Access to an open loopback port must not suffice to raise the privacy budget.
_ADMIN_BY_TOKEN = [requires(Scope.ADMIN, token_always=True)]


def add_privacy_routes(api: FastAPI, services: Services) -> None:
    """Add the routes of the budget and its ledger."""
    _add_readings(api, services)
    _add_reset(api, services)


def _add_readings(api: FastAPI, services: Services) -> None:
    @route(api, "GET /api/privacy/budget", "privacy", VIEWER)
    def budget() -> BudgetView:
        """What is spent and what is left, for the most exposed client, and how many rounds that is."""
        return BudgetView.of(services.accountant().budget(outlook=True))

    @route(api, "GET /api/privacy/history", "privacy", VIEWER)
    def history(
        hours: Annotated[float, Query(gt=0, le=24 * 366)] = 24, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
    ) -> list[SpendView]:
        """The ledger's entries of the last hours, oldest first."""
        since = services.clock.now() - timedelta(hours=hours)
        return [_spend_view(entry) for entry in services.accountant().history(since, limit)]

    @route(api, "GET /api/privacy/periods", "privacy", VIEWER)
    def periods() -> list[PeriodView]:
        """Every budget that was granted anew, oldest first; the first period is that of the settings and not here."""
        return [PeriodView.of(period) for period in services.store.budget.periods()]


def _add_reset(api: FastAPI, services: Services) -> None:
    store, require_second_approver = services.store, services.settings.privacy.require_second_approver

    @route(
        api,
        "POST /api/privacy/reset-budget",
        "privacy",
        _ADMIN_BY_TOKEN,
        responses={202: {"model": AwaitingApproval, "description": "Another admin has to approve it."}},
        response_model=BudgetView,
    )
    def reset_budget(request: ResetBudget, who: CurrentIdentity, note: Note) -> Any:
        """Begin a new period: from now on ``new_epsilon`` may be spent. What was spent stays on the ledger."""
        if not require_second_approver:
            return _reset(services.accountant(), note, request.new_epsilon, request.justification, who.actor, None)
        pending = store.budget.request(request.new_epsilon, request.justification, who.actor, services.clock.now())
        note.after = AwaitingApproval.of(pending).model_dump(mode="json")
        return JSONResponse(note.after, status_code=202)

    @route(api, "POST /api/privacy/reset-budget/{request_id}/approve", "privacy", _ADMIN_BY_TOKEN, 404)
    def approve(request_id: str, who: CurrentIdentity, note: Note) -> BudgetView:
        """Put a budget in force that another admin asked for within the last 24 hours."""
        pending = store.budget.approve(request_id, who.actor, services.clock.now())
        accountant = services.accountant()
        return _reset(accountant, note, pending.new_epsilon, pending.justification, pending.requested_by, who.actor)


def _reset(
    accountant: AccountantPort, note: AuditNote, epsilon: float, why: str, requester: str, approver: str | None
) -> BudgetView:
    note.before = BudgetView.of(accountant.budget()).model_dump(mode="json")
    view = BudgetView.of(accountant.reset_budget(epsilon, why, requester, approver))
    note.after = view.model_dump(mode="json")
    return view


def _spend_view(entry: LedgerEntry) -> SpendView:
    charge = entry.charge
    event = None if charge.event is None else json.loads(charge.event)
    return SpendView.of(charge, sequence=entry.sequence, at=entry.at, client_id=charge.unit_id, event=event)

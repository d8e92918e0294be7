"""Models of the privacy budget, its ledger and its resets."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fedvit.api.base import RequestBody, View
from fedvit.api.justification import LEAST_CHARACTERS, checked_justification


class FreezeView(View):
    """Why nothing may be charged to the privacy ledger."""

    incident_id: str
    reason: str
    at: datetime


class BudgetView(View):
    """The privacy budget of the present period; ``lifetime_epsilon`` composes everything ever charged.

    ``period_started_at`` is absent in the first period; while the ledger is ``frozen`` nothing remains to be spent.
    ``next_round_epsilon`` is what one round more would make of the most exposed client's, and ``rounds_left`` how many
    more the budget admits (of one above 50: at least); both are told with the budget alone, and where it is known what
    a round costs.
    """

    privacy_unit: str
    target_epsilon: float
    target_delta: float
    epsilon_spent: float
    epsilon_remaining: float
    epsilon_spent_rdp: float
    lifetime_epsilon: float
    rounds_charged: int
    clients_charged: int
    period: int
    period_started_at: datetime | None
    frozen: FreezeView | None
    next_round_epsilon: float | None = None
    rounds_left: int | None = None


class SpendView(View):
    """One line of the privacy ledger. The client ``*`` is everybody: a charge that each client bears.

    ``event`` is what was done where it was more than Poisson-sampled Gaussian steps; the numbers sum it up.
    """

    sequence: int
    at: datetime
    run_id: str
    round_index: int
    client_id: str
    noise_multiplier: float
    sampling_prob: float
    steps: int
    privacy_unit: str
    event: Mapping[str, Any] | None


class ResetBudget(RequestBody):
    """A new privacy budget, and why: at least 20 characters and 3 words."""

    new_epsilon: float = Field(gt=0, allow_inf_nan=False, strict=True, examples=[1.0])
    justification: Annotated[str, AfterValidator(checked_justification)] = Field(
        examples=["The privacy officer approved one more run for the winter data."],
        json_schema_extra={"minLength": LEAST_CHARACTERS},
    )


class AwaitingApproval(View):
    """A new budget that comes into force when another admin approves it."""

    status: Literal["awaiting_approval"] = "awaiting_approval"
    request_id: str
    new_epsilon: float
    justification: str
    requested_by: str
    expires_at: datetime


class PeriodView(View):
    """A budget that was granted anew; ``period`` is its number in the budget report."""

    sequence: int
    period: int
    at: datetime
    target_epsilon: float
    justification: str
    requested_by: str
    approved_by: str | None

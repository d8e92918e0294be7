"""What the control API answers: its health, training, operations, models, privacy and audit trail.

Fields that a newer server adds are ignored; those that an older one lacks have a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from fedvit.types import OperationStatus


class View(BaseModel):
    """A frozen part of an answer."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Revised(View):
    """Settings that may be changed while they run; ``etag`` is what ``if_match`` takes."""

    revision: int

    @property
    def etag(self) -> str:
        """Names this revision."""
        return f'"{self.revision}"'


class Condition(View):
    """One aspect of a thing: ``status`` is True, False or Unknown, ``reason`` a word, ``message`` a sentence."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_at: datetime | None


class ProgressView(View):
    """The training loop."""

    run_id: str | None
    status: str | None
    phase: str
    rounds_total: int
    rounds_done: int
    loss: float | None
    accuracy: float | None
    epsilon: float
    version: str | None
    message: str | None
    conditions: tuple[Condition, ...] = ()


class HealthView(View):
    """The system's parts, each ``ok`` or what ails it."""

    status: str
    parts: Mapping[str, str]
    training: ProgressView | None
    release: str | None


class TrainingConfigView(Revised):
    """What the next round goes by; ``wait_timeout`` in seconds."""

    min_clients: int
    wait_timeout: float


class AggregationModeView(Revised):
    """How updates are folded."""

    mode: str
    staleness_tolerance: int
    buffer_size: int | None


class OperationView(View):
    """A long operation; ``progress`` runs from 0 to 1."""

    operation_id: str
    kind: str
    status: OperationStatus
    progress: float
    stage: str
    params: Mapping[str, Any]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    cancel_requested: bool


class ModelInfo(View):
    """The model that is served now; ``size`` in bytes by variant."""

    name: str
    version: str
    variant: str
    size: Mapping[str, int]
    complexity: Mapping[str, Any]
    classes: tuple[str, ...]
    image_size: int


class ModelView(View):
    """A model version."""

    version: str
    run_id: str
    round_index: int
    created_at: datetime
    epsilon: float
    metrics: Mapping[str, float]
    lineage: Mapping[str, Any]
    released: bool
    artifacts: Mapping[str, str]
    derived_from: str | None
    refusal: str | None


class ReleaseView(View):
    """What replicas and vehicles are told to run."""

    version: str
    sequence: int
    variant: str
    variants: tuple[str, ...]
    at: datetime
    reason: str
    lineage: Mapping[str, Any]


class FreezeView(View):
    """Which incident froze the ledger, and when."""

    incident_id: str
    reason: str
    at: datetime


class BudgetView(View):
    """The privacy budget, for the most exposed client; ``period`` counts the resets, from 1."""

    privacy_unit: str
    target_epsilon: float
    target_delta: float
    epsilon_spent: float
    epsilon_remaining: float
    epsilon_spent_rdp: float
    lifetime_epsilon: float
    rounds_charged: int
    clients_charged: int
    period: int = 1
    period_started_at: datetime | None = None
    frozen: FreezeView | None = None
    next_round_epsilon: float | None = None
    rounds_left: int | None = None


class PendingResetView(View):
    """A reset of the budget that a second administrator has to approve."""

    status: str
    request_id: str
    new_epsilon: float
    justification: str
    requested_by: str
    expires_at: datetime


class PeriodView(View):
    """A budget that was granted anew: what, why and by whom."""

    sequence: int
    period: int
    at: datetime
    target_epsilon: float
    justification: str
    requested_by: str
    approved_by: str | None


class SpendView(View):
    """One line of the privacy ledger."""

    sequence: int
    at: datetime
    run_id: str
    round_index: int
    client_id: str
    noise_multiplier: float
    sampling_prob: float
    steps: int
    privacy_unit: str = "record"
    event: Mapping[str, Any] | None = None


class AuditView(View):
    """One line of the audit trail."""

    sequence: int
    at: datetime
    actor: str
    scopes: tuple[str, ...]
    source: str
    request_id: str
    action: str
    params: Mapping[str, Any]
    before: Any
    after: Any
    status: int

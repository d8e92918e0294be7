"""Models of training and aggregation: progress, restart, and settings that change while training runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from fedvit.api.base import RequestBody, View, etag_of
from fedvit.api.choices import AggregationMode, ClientSelection
from fedvit.api.clients import ConditionView


class FailureView(View):
    """The last error in a client's, a workload's or a rule's own code, with its traceback."""

    round_index: int
    client_id: str | None
    error: str
    traceback: str


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
    conditions: tuple[ConditionView, ...]
    failure: FailureView | None = None


class RestartRequest(RequestBody):
    """Which clients may be drawn in the new run; if left out, those that may be drawn now."""

    client_selection: ClientSelection | None = None


class TrainingConfigRequest(RequestBody):
    """What shall change; ``wait_timeout`` in seconds."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["min_clients"], "properties": {"min_clients": {"type": "integer"}}},
                {"required": ["wait_timeout"], "properties": {"wait_timeout": {"type": "number"}}},
            ],
            "examples": [{"min_clients": 5, "wait_timeout": 300}],
        }
    )
    min_clients: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    wait_timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> TrainingConfigRequest:
        if self.min_clients is None and self.wait_timeout is None:
            raise ValueError("give min_clients, wait_timeout or both")
        return self


class TrainingConfigView(View):
    """What the next round goes by; ``wait_timeout`` in seconds. ``revision`` is the ETag."""

    min_clients: int
    wait_timeout: float
    revision: int

    @property
    def etag(self) -> str:
        """The ETag of this revision, which ``If-Match`` takes."""
        return etag_of(self.revision)


class AggregationModeRequest(RequestBody):
    """What is left out stays as it is; null puts the default back."""

    mode: AggregationMode = Field(examples=["asynchronous"])
    staleness_tolerance: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        default=None, description="By how many versions an update may be late; 5 by default.", examples=[5]
    )
    buffer_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="With how many updates a round commits; half of those who take part by default."
    )


class AggregationModeView(View):
    """What a round goes by; ``revision`` is the ETag. ``buffer_size`` null is half of those who take part."""

    mode: AggregationMode
    staleness_tolerance: int
    buffer_size: int | None
    revision: int

    @property
    def etag(self) -> str:
        """The ETag of this revision, which ``If-Match`` takes."""
        return etag_of(self.revision)

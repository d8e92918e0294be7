"""Models of model versions and releases, and of what changes the served model."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from fedvit.api.base import RequestBody, View
from fedvit.api.choices import OptimizeStrategy, RetrainStrategy
from fedvit.types import Variant


class ModelView(View):
    """A model version as the API shows it."""

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


class ModelInfo(View):
    """The model that is served now; ``size`` in bytes and ``complexity`` are what the runbook reads."""

    name: str
    version: str
    variant: str
    size: Mapping[str, int]
    complexity: Mapping[str, Any]
    classes: tuple[str, ...]
    image_size: int


class ReleaseView(View):
    """What replicas and vehicles shall run. ``variant`` applies to all that are not pinned to another one."""

    version: str
    sequence: int
    variant: str
    variants: tuple[str, ...]
    at: datetime
    reason: str
    lineage: Mapping[str, Any]


class RollbackRequest(RequestBody):
    """Which version's content is wanted. ``force`` takes one that the release gate would refuse."""

    version: str = Field(min_length=1, max_length=64, examples=["v1.2.3"])
    force: bool = False
    reason: str | None = Field(default=None, max_length=1000)


class SwitchRequest(RequestBody):
    """The variant that the whole fleet shall run."""

    variant: Variant


class OptimizeRequest(RequestBody):
    """``target_latency``: milliseconds that 95 of 100 images may take."""

    strategy: OptimizeStrategy
    target_latency: Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)]


class RetrainRequest(RequestBody):
    """``full_retrain`` starts from the base weights, ``fine_tune`` from the current release's."""

    strategy: RetrainStrategy

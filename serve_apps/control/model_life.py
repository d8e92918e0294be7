"""What is done to the served model: roll back, switch, optimise, retrain."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from fedvit.config import Settings
from fedvit.registry.publisher import served_variant
from fedvit.store.store import Release, Store
from fedvit.types import Variant
from serve_apps.control.access import OPERATOR, CallKey, Note
from serve_apps.control.operations import OperationView, accepted, standing_of
from serve_apps.control.schemas import RequestBody
from serve_apps.control.services import Services
from serve_apps.problems import documented


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

    strategy: Literal["quantization", "lighter_variant"]
    target_latency: Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)]


class RetrainRequest(RequestBody):
    """``full_retrain`` starts from the base weights, ``fine_tune`` from the current release's."""

    strategy: Literal["full_retrain", "fine_tune"]


class ReleaseView(BaseModel):
    """What replicas and vehicles are told to run. ``variant`` is what everybody runs who is not pinned."""

    version: str
    sequence: int
    variant: str
    variants: list[str]
    at: datetime
    reason: str
    lineage: dict[str, Any]

    @classmethod
    def of(cls, release: Release, store: Store, settings: Settings) -> ReleaseView:
        """The view of a release."""
        return cls(
            version=release.version,
            sequence=release.sequence,
            variant=served_variant(release, settings),
            variants=sorted(release.artifacts),
            at=release.at,
            reason=release.reason,
            lineage=dict(store.version(release.version).lineage),
        )


def add_model_life_routes(api: FastAPI, services: Services) -> None:
    """Change what serves."""
    store, settings = services.store, services.settings

    def standing() -> dict[str, Any] | None:
        release = store.current_release()
        return None if release is None else _facts(release, settings)

    def current(version: str, note: Note) -> ReleaseView:
        release = store.release_of(version)
        assert release is not None
        note.after = _facts(release, settings)
        return ReleaseView.of(release, store, settings)

    @api.post("/api/model/rollback", tags=["model"], dependencies=OPERATOR, responses=documented(404, 502, 503))
    def rollback(request: RollbackRequest, note: Note) -> ReleaseView:
        """Make an older version's content current again, as a new and higher version."""
        note.before = standing()
        version = services.aggregator().rollback(request.version, force=request.force, reason=request.reason)
        return current(version, note)

    @api.post("/api/model/switch", tags=["model"], dependencies=OPERATOR, responses=documented(502, 503))
    def switch(request: SwitchRequest, note: Note) -> ReleaseView:
        """Move replicas and vehicles to another variant of the current version; harmless when repeated."""
        note.before = standing()
        return current(services.aggregator().switch_variant(request.variant), note)

    @api.post("/api/edge/optimize", tags=["edge"], status_code=202, dependencies=OPERATOR, responses=documented(503))
    def optimize(request: OptimizeRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """Measure faster variants and move the fleet to the most accurate one that meets the target."""
        note.before = standing()
        params = {"strategy": request.strategy, "target_latency_ms": request.target_latency}
        return accepted(services.aggregator().submit("optimize", params, call_key), response, note)

    @api.post("/api/model/retrain", tags=["model"], status_code=202, dependencies=OPERATOR, responses=documented(503))
    def retrain(request: RetrainRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """End the present run after its round and begin another; GET /api/training/status tells how that fares."""
        aggregator = services.aggregator()
        note.before = standing_of(aggregator.progress())
        return accepted(aggregator.submit("retrain", {"strategy": request.strategy}, call_key), response, note)


def _facts(release: Release, settings: Settings) -> dict[str, Any]:
    return {
        "version": release.version,
        "sequence": release.sequence,
        "variant": served_variant(release, settings),
    }

"""What is known of the data: how far clients can be relied on, and whether the world drifts away from the model."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel

from fedvit.monitoring import drift, quality
from fedvit.monitoring.metrics import predictions_by_class
from fedvit.store.store import Release, Store
from serve_apps.control.access import VIEWER
from serve_apps.control.clients import Limit, Offset
from serve_apps.control.presence import Presence
from serve_apps.control.services import Services


class ClientQualityView(BaseModel):
    """One client; ``score`` is null where nothing is known of it, ``reasons`` say what lowers it."""

    client_id: str
    score: float | None
    validated: bool
    reasons: list[str]
    rounds: int
    failures: int


class QualityView(BaseModel):
    """The active clients, those with the lowest scores first; a client below ``threshold`` is worth a look."""

    score: float | None
    threshold: float
    assessed: int
    unvalidated: list[str]
    clients: list[ClientQualityView]


class SignalView(BaseModel):
    """One signal; ``score`` is null while it cannot tell."""

    name: str
    value: float | None
    reference: float | None
    score: float | None
    reason: str


class DriftView(BaseModel):
    """The highest score of all signals counts."""

    drifting: bool
    score: float | None
    threshold: float
    reference_version: str | None
    signals: list[SignalView]


def add_data_health_routes(api: FastAPI, services: Services, presence: Presence) -> None:
    """Look at the data without looking at anybody's images."""
    store = services.store

    @api.get("/api/clients/data-quality", tags=["clients"], dependencies=VIEWER)
    def data_quality(limit: Limit = 100, offset: Offset = 0) -> QualityView:
        """How far clients can be relied on: their rounds, records, verdicts and silence; never their images."""
        found = quality.fleet_quality(presence.active_clients(), store.participation())
        return QualityView(
            score=found.score,
            threshold=quality.THRESHOLD,
            assessed=found.assessed,
            unvalidated=sorted(client.client_id for client in found.clients if not client.validated),
            clients=[_shown(client) for client in found.clients[offset : offset + limit]],
        )

    @api.get("/api/monitoring/data-drift", tags=["monitoring"], dependencies=VIEWER)
    def data_drift() -> DriftView:
        """Whether held-out loss or the mix of answers of the inference replicas has moved."""
        release = store.current_release()
        found = drift.Drift((drift.loss_signal(_losses(store)), _mix(services, release)))
        return DriftView(
            drifting=found.drifting,
            score=found.score,
            threshold=drift.THRESHOLD,
            reference_version=release.version if release else None,
            signals=[
                SignalView(name=s.name, value=s.value, reference=s.reference, score=s.score, reason=s.reason)
                for s in found.signals
            ],
        )


def _shown(client: quality.ClientQuality) -> ClientQualityView:
    return ClientQualityView(
        client_id=client.client_id,
        score=client.score,
        validated=client.validated,
        reasons=list(client.reasons),
        rounds=client.rounds,
        failures=client.failures,
    )


def _losses(store: Store) -> list[float]:
    run = store.latest_run()
    rounds = store.rounds(run.run_id) if run else []
    return [found.loss for found in rounds if found.committed and found.loss is not None]


def _mix(services: Services, release: Release | None) -> drift.Signal:
    if release is None:
        return drift.mix_signal({}, None)
    expected = services.store.version(release.version).lineage.get("held_out_answers")
    return drift.mix_signal(predictions_by_class(release.version, services.metrics_dir), expected)

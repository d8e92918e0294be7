"""What is known of the data: how far clients can be relied on, and whether the world drifts away from the model.

Nothing of it was computed on an image here: clients' noised histograms and updates are looked at, see docs/signals.md.
"""

from __future__ import annotations

from dataclasses import asdict

from fastapi import FastAPI
from pydantic import BaseModel

from fedvit.drift import quality, signals
from fedvit.drift.comparison import Shift
from fedvit.metrics.metrics import predictions_by_class
from fedvit.metrics.training import DataMetrics
from fedvit.rounds import data_health
from fedvit.store.store import Release
from serve_apps.control.access import VIEWER
from serve_apps.control.clients import Limit, Offset
from serve_apps.control.liveness import Liveness
from serve_apps.control.services import Services

# One a process, however many applications it makes.
_GAUGES = DataMetrics()


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


class FeatureView(BaseModel):
    """One histogram of the whole fleet against its reference: distances with the noise in them, js in bits, wasserstein
    in bins. ``statistic`` is chi-squared while nothing moves, and above ``threshold`` once in very many windows."""

    feature: str
    psi: float
    js: float
    ks: float
    wasserstein: float
    statistic: float
    threshold: float
    drifts: bool


class ClusterView(BaseModel):
    """Clients with alike label mixes that have moved together."""

    feature: str
    client_ids: list[str]
    psi: float


class DriftView(BaseModel):
    """The highest score of all signals counts.

    ``compared`` clients have sent a histogram before the release and another since; those of ``drifting_clients`` have
    moved, feature by feature, and so have clusters of clients as a whole.
    """

    drifting: bool
    score: float | None
    threshold: float
    reference_version: str | None
    signals: list[SignalView]
    compared: int
    features: list[FeatureView]
    drifting_clients: dict[str, list[str]]
    drifting_clusters: list[ClusterView]


def add_data_health_routes(api: FastAPI, services: Services, presence: Liveness) -> None:
    """Look at the data without looking at anybody's images."""
    store = services.store

    @api.get("/api/clients/data-quality", tags=["clients"], dependencies=VIEWER)
    def data_quality(limit: Limit = 100, offset: Offset = 0) -> QualityView:
        """How far clients can be relied on: rounds, records, silence, and what noised histograms and updates show."""
        against = data_health.doubts(store, data_health.histograms(store))
        found = quality.fleet_quality(presence.active_clients(), store.participation(), against)
        _GAUGES.publish(found.score, None)
        return QualityView(
            score=found.score,
            threshold=quality.THRESHOLD,
            assessed=found.assessed,
            unvalidated=sorted(client.client_id for client in found.clients if not client.validated),
            clients=[_shown(client) for client in found.clients[offset : offset + limit]],
        )

    @api.get("/api/monitoring/data-drift", tags=["monitoring"], dependencies=VIEWER)
    def data_drift() -> DriftView:
        """Whether held-out loss, the mix of answers of the inference replicas, or clients' histograms have moved."""
        release, told = store.current_release(), data_health.histograms(store)
        found, compared = data_health.drift(store, told, _mix(services, release)), told.comparison
        _GAUGES.publish(None, found.score)
        return DriftView(
            drifting=found.drifting,
            score=found.score,
            threshold=signals.THRESHOLD,
            reference_version=release.version if release else None,
            signals=[
                SignalView(name=s.name, value=s.value, reference=s.reference, score=s.score, reason=s.reason)
                for s in found.signals
            ],
            compared=len(compared.client_ids) if compared else 0,
            features=[_feature(shift) for shift in compared.fleet.values()] if compared else [],
            drifting_clients={c: list(f) for c, f in compared.drifting_clients.items()} if compared else {},
            drifting_clusters=[_cluster(shift) for shift in compared.drifting_clusters] if compared else [],
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


def _feature(shift: Shift) -> FeatureView:
    return FeatureView(
        feature=shift.feature,
        **asdict(shift.distance),
        statistic=shift.statistic,
        threshold=shift.threshold,
        drifts=shift.drifts,
    )


def _cluster(shift: Shift) -> ClusterView:
    return ClusterView(feature=shift.feature, client_ids=list(shift.client_ids), psi=shift.distance.psi)


def _mix(services: Services, release: Release | None) -> signals.Signal:
    if release is None:
        return signals.mix_signal({}, None)
    expected = services.store.version(release.version).lineage.get("held_out_answers")
    return signals.mix_signal(predictions_by_class(release.version, services.metrics_dir), expected)

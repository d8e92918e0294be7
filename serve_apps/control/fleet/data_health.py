"""Routes of data quality and data drift.

They read clients' noised histograms and updates, and no image; see docs/explanation/drift.md.
"""

from __future__ import annotations

from dataclasses import asdict

from fastapi import FastAPI

from fedvit.api.data_health import ClientQualityView, ClusterView, DriftView, FeatureView, QualityView, SignalView
from fedvit.drift import quality, signals
from fedvit.metrics.exposition import predictions_by_class
from fedvit.metrics.training import publish_data_scores
from fedvit.rounds import data_health
from fedvit.store.records import Release
from serve_apps.control.fleet.liveness import Liveness
from serve_apps.control.http.access import VIEWER
from serve_apps.control.http.route import Limit, RowOffset, route
from serve_apps.control.services import Services


def add_data_health_routes(api: FastAPI, services: Services, liveness: Liveness) -> None:
    """Add the routes of data quality and data drift."""
    store = services.store

    @route(api, "GET /api/clients/data-quality", "clients", VIEWER)
    def data_quality(limit: Limit = 100, offset: RowOffset = 0) -> QualityView:
        """How far clients can be relied on: rounds, records, silence, and what noised histograms and updates show."""
        against = data_health.doubts(store, data_health.histograms(store))
        fleet = quality.fleet_quality(liveness.active_clients(), store.rounds.participation(), against)
        publish_data_scores(fleet.score, None)
        return QualityView(
            score=fleet.score,
            threshold=quality.THRESHOLD,
            assessed=fleet.assessed,
            unvalidated=tuple(sorted(client.client_id for client in fleet.clients if not client.validated)),
            clients=tuple(ClientQualityView.of(client) for client in fleet.clients[offset : offset + limit]),
        )

    @route(api, "GET /api/monitoring/data-drift", "monitoring", VIEWER)
    def data_drift() -> DriftView:
        """Whether held-out loss, the mix of answers of the inference replicas, or clients' histograms have moved."""
        release, histograms = store.releases.current(), data_health.histograms(store)
        drift, compared = data_health.drift(store, histograms, _mix(services, release)), histograms.comparison
        publish_data_scores(None, drift.score)
        shifts = compared.fleet.values() if compared else ()
        drifting = compared.drifting_clients if compared else {}
        clusters = compared.drifting_clusters if compared else ()
        return DriftView(
            drifting=drift.drifting,
            score=drift.score,
            threshold=signals.THRESHOLD,
            reference_version=release.version if release else None,
            signals=tuple(SignalView.of(signal) for signal in drift.signals),
            compared=len(compared.client_ids) if compared else 0,
            features=tuple(FeatureView.of(shift, **asdict(shift.distance)) for shift in shifts),
            drifting_clients={client_id: tuple(features) for client_id, features in drifting.items()},
            drifting_clusters=tuple(ClusterView.of(shift, psi=shift.distance.psi) for shift in clusters),
        )


def _mix(services: Services, release: Release | None) -> signals.Signal:
    if release is None:
        return signals.mix_signal({}, None)
    expected = services.store.versions.get(release.version).lineage.get("held_out_answers")
    return signals.mix_signal(predictions_by_class(release.version, services.metrics_dir), expected)

"""The control REST API. Stateless: everything it knows is in the store and the actors, so replicas may be several."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import FastAPI, Query, Response
from safetensors import safe_open

from fedvit.cohort.conditions import progress_conditions
from fedvit.errors import NotFoundError
from fedvit.metrics.metrics import render
from fedvit.operations.mailbox import Mailbox
from fedvit.registry.publisher import artifacts_of, served_variant
from fedvit.store.store import Release, Store
from fedvit.types import TrainingProgress, Variant
from serve_apps.control.access import ADMIN, FOLLOWER, OPERATOR, VIEWER, Guard, Note, public
from serve_apps.control.aggregation_life import add_aggregation_routes
from serve_apps.control.clients import add_client_routes
from serve_apps.control.communication import add_communication_routes
from serve_apps.control.data_health import add_data_health_routes
from serve_apps.control.emergency import add_emergency_routes
from serve_apps.control.health_metrics import HealthMetrics
from serve_apps.control.heartbeats import Heartbeats, add_heartbeat_routes
from serve_apps.control.incidents import add_incident_routes
from serve_apps.control.links import link_answers
from serve_apps.control.liveness import Liveness
from serve_apps.control.model_life import add_model_life_routes
from serve_apps.control.operations import add_operation_routes, standing_of
from serve_apps.control.privacy import add_privacy_routes
from serve_apps.control.remote_clients import add_remote_client_routes
from serve_apps.control.route import Control, install_control
from serve_apps.control.schemas import (
    MAX_INTEGER,
    AuditView,
    ConditionView,
    HealthView,
    ModelInfo,
    ModelView,
    Offset,
    ProgressView,
)
from serve_apps.control.services import Services
from serve_apps.control.training_life import add_training_life_routes
from serve_apps.control.write_behind import flushing
from serve_apps.problems import documented, install_problem_handlers

__all__ = ["Services", "create_api"]


def create_api(services: Services, guard: Guard | None = None) -> FastAPI:
    """The FastAPI application over the given services.

    Raises:
        ConfigError: the OIDC key set cannot be read.
    """
    guard = guard or Guard(services.settings, services.store)
    heartbeats = Heartbeats(services.store, services.settings.fleet)
    presence = Liveness(services, heartbeats)
    mailbox = Mailbox(services.settings, services.store)
    api = FastAPI(
        title="fedvit control",
        version="0.1.0",
        description=__doc__ or "",
        lifespan=flushing(guard.tokens_used, heartbeats.seen),
        # Redirects name the host that the caller named, which may be anybody's.
        redirect_slashes=False,
    )
    install_problem_handlers(api)
    install_control(api, Control(guard, services.store))
    _add_system_routes(api, services, HealthMetrics(services, (guard.tokens_used, heartbeats.seen)))
    # Before the clients: its paths would be taken for one of them.
    add_data_health_routes(api, services, presence)
    add_client_routes(api, services, heartbeats, presence, mailbox)
    add_heartbeat_routes(api, services, heartbeats, mailbox)
    add_remote_client_routes(api, services, heartbeats)
    add_communication_routes(api, mailbox)
    _add_model_routes(api, services)
    add_privacy_routes(api, services)
    _add_training_routes(api, services)
    add_model_life_routes(api, services)
    add_training_life_routes(api, services)
    add_aggregation_routes(api, services)
    add_operation_routes(api, services)
    add_emergency_routes(api, services)
    add_incident_routes(api, services)
    _add_audit_routes(api, services)
    link_answers(api)
    return api


def _add_system_routes(api: FastAPI, services: Services, vitals: HealthMetrics) -> None:
    @api.get("/healthz", tags=["system"], dependencies=[public()])
    def healthz() -> dict[str, str]:
        """Whether this replica answers."""
        return {"status": "ok"}

    @api.get("/api/system/health", tags=["system"], dependencies=VIEWER)
    def health() -> HealthView:
        """Whether each part answers, where training stands, what is released."""
        parts = {
            "store": _ailment(services.store.latest_run),
            "aggregator": _ailment(lambda: services.aggregator().progress()),
            "accountant": _ailment(lambda: services.accountant().budget()),
        }
        release = services.store.current_release()
        shown = partial(progress_view, services)
        return HealthView(
            status="ok" if all(part == "ok" for part in parts.values()) else "degraded",
            parts=parts,
            training=shown(services.aggregator().progress()) if parts["aggregator"] == "ok" else None,
            release=release.version if release else None,
        )

    @api.get(
        "/metrics",
        tags=["system"],
        response_class=Response,
        dependencies=VIEWER,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def metrics() -> Response:
        """Prometheus exposition of every process of this node; the budget as it is now, also while nothing trains."""
        vitals.publish()
        body, content_type = render(services.metrics_dir)
        return Response(body, headers={"content-type": content_type})


def _ailment(check: Callable[[], object]) -> str:
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def _add_model_routes(api: FastAPI, services: Services) -> None:
    store, settings = services.store, services.settings

    @api.get("/api/model/info", tags=["model"], dependencies=VIEWER, responses=documented(404))
    def info() -> ModelInfo:
        """The served model: size in bytes by variant, complexity of the variant that the fleet runs, classes."""
        release = _current_release(store)
        variant = served_variant(release, settings)
        fleet = store.fleet()
        return ModelInfo(
            name=settings.model.name,
            version=release.version,
            variant=variant,
            size={variant: store.blobs.path(digest).stat().st_size for variant, digest in release.artifacts.items()},
            complexity={
                "trainable": settings.model.trainable,
                **_trainable(store, store.version(release.version).weights_digest),
                **_complexity(release, variant),
            },
            classes=list(fleet.classes) if fleet else [],
            image_size=settings.data.image_size,
        )

    @api.get("/api/model/versions", tags=["model"], dependencies=VIEWER)
    def versions(limit: Annotated[int, Query(ge=1, le=1000)] = 50, offset: Offset = 0) -> list[ModelView]:
        """Model versions, newest first."""
        return [ModelView.of(version) for version in store.versions(offset=offset, limit=limit)]

    @api.get("/api/model/current", tags=["model"], dependencies=VIEWER, responses=documented(404))
    def current() -> ModelView:
        """The version that replicas and vehicles are offered."""
        return ModelView.of(store.version(_current_release(store).version))

    @api.get(
        "/api/model/release",
        tags=["model"],
        response_class=Response,
        dependencies=FOLLOWER,
        responses=documented(404) | {200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
    )
    def release(variant: Variant | None = None) -> Response:
        """The signed manifest of the current release, byte for byte as it was signed.

        Without ``variant`` it is that of the variant that the fleet was last switched to.
        """
        found = _current_release(store)
        wanted = served_variant(found, settings) if variant is None else variant.value
        envelope = found.envelopes.get(wanted)
        if envelope is None:
            raise NotFoundError(f"The current release has no variant {wanted!r}.", cure="See release.variants.")
        return Response(envelope, media_type="application/json")

    @api.get(
        "/api/model/blobs/{digest}",
        tags=["model"],
        response_class=Response,
        dependencies=FOLLOWER,
        responses=documented(404, 502)
        | {200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}},
    )
    def blob(digest: str) -> Response:
        """An artifact of the current release by its SHA-256. Weights and other blobs are not handed out."""
        if digest not in _current_release(store).artifacts.values():
            raise NotFoundError(f"The current release has no artifact {digest!r}.", cure="Read its manifest again.")
        return Response(store.blobs.get(digest), media_type="application/octet-stream")


def _trainable(store: Store, weights_digest: str) -> dict[str, int]:
    path = store.blobs.path(weights_digest)
    with safe_open(path, framework="numpy") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118  # no mapping
    return {"trainable_bytes": path.stat().st_size, "trainable_parameters": sum(math.prod(shape) for shape in shapes)}


def _complexity(release: Release, variant: str) -> dict[str, int]:
    """What was measured when the variant was exported; nothing for releases from before that was done."""
    metrics = artifacts_of(release)[variant].metrics
    return {name: int(metrics[name]) for name in ("parameters", "blocks", "multiply_adds") if name in metrics}


def _current_release(store: Store) -> Release:
    release = store.current_release()
    if release is None:
        raise NotFoundError("No model version is released yet.", cure="Start training: POST /api/training/start.")
    return release


def _add_training_routes(api: FastAPI, services: Services) -> None:
    @api.get("/api/training/status", tags=["training"], dependencies=VIEWER, responses=documented(503))
    def status() -> ProgressView:
        """Where the training loop stands."""
        return progress_view(services, services.aggregator().progress())

    @api.post(
        "/api/training/start", tags=["training"], status_code=202, dependencies=OPERATOR, responses=documented(503)
    )
    def start(note: Note) -> ProgressView:
        """Begin or continue the run that the settings describe; harmless when it is under way."""
        aggregator = services.aggregator()
        note.before = standing_of(aggregator.progress())
        progress = aggregator.start_training()
        note.after = standing_of(progress)
        return progress_view(services, progress)

    @api.post(
        "/api/training/stop", tags=["training"], status_code=202, dependencies=OPERATOR, responses=documented(503)
    )
    def stop(note: Note) -> ProgressView:
        """End the loop after the round under way; a start continues it."""
        aggregator = services.aggregator()
        note.before = standing_of(aggregator.progress())
        progress = aggregator.stop_training()
        note.after = standing_of(progress)
        return progress_view(services, progress)


def progress_view(services: Services, progress: TrainingProgress) -> ProgressView:
    """Where the loop stands, and what holds of it. It is shown also when the accountant does not answer."""
    budget = None
    with contextlib.suppress(Exception):
        budget = services.accountant().budget()
    freeze, release = services.store.ledger_freeze(), services.store.current_release()
    conditions = progress_conditions(
        progress,
        budget,
        frozen=freeze.incident_id if freeze else None,
        release=(release.version, release.at) if release else None,
    )
    return ProgressView(
        **dataclasses.asdict(progress), conditions=[ConditionView(**dataclasses.asdict(found)) for found in conditions]
    )


def _add_audit_routes(api: FastAPI, services: Services) -> None:
    @api.get("/api/audit", tags=["audit"], dependencies=ADMIN)
    def audit(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[int | None, Query(ge=0, le=MAX_INTEGER)] = None,
    ) -> list[AuditView]:
        """Lines of the audit trail, oldest first: those behind sequence ``after``, else the last ones."""
        store = services.store
        entries = store.latest_audit(limit) if after is None else store.audit(after, limit)
        return [AuditView.of(entry) for entry in entries]

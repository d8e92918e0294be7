"""Routes of model versions and releases: what is served, and what changes it."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request, Response

from fedvit.api.model import (
    ModelInfo,
    ModelView,
    OptimizeRequest,
    ReleaseView,
    RetrainRequest,
    RollbackRequest,
    SwitchRequest,
)
from fedvit.api.system import OperationView
from fedvit.config import Settings
from fedvit.errors import NoReleaseError, NotFoundError
from fedvit.registry.publisher import artifacts_of, served_variant, why_no_release
from fedvit.store.records import Release
from fedvit.store.store import Store
from fedvit.types import Variant
from serve_apps.control.http.access import FOLLOWER, OPERATOR, VIEWER, CallKey, Note
from serve_apps.control.http.route import OCTETS, Limit, Offset, route
from serve_apps.control.services import Services
from serve_apps.control.training.operations import accepted, progress_facts


def add_model_routes(api: FastAPI, services: Services) -> None:
    """Add the routes of model versions and releases."""
    _add_versions(api, services)
    _add_artifacts(api, services)
    _add_changes(api, services)


def _add_versions(api: FastAPI, services: Services) -> None:
    store, settings = services.store, services.settings

    @route(api, "GET /api/model/info", "model", VIEWER, 404)
    def info() -> ModelInfo:
        """The served model: size in bytes by variant, complexity of the variant that the fleet runs, classes."""
        release = _current_release(store)
        variant = served_variant(release, settings)
        fleet = store.metadata.fleet()
        return ModelInfo(
            name=settings.model.name,
            version=release.version,
            variant=variant,
            size={variant: store.blobs.size(digest) for variant, digest in release.artifacts.items()},
            complexity={
                "trainable": settings.model.trainable,
                **_trainable(store, store.versions.get(release.version).weights_digest),
                **_complexity(release, variant),
            },
            classes=fleet.classes if fleet else (),
            image_size=settings.data.image_size,
        )

    @route(api, "GET /api/model/versions", "model", VIEWER)
    def versions(limit: Limit = 50, offset: Offset = 0) -> list[ModelView]:
        """Model versions, newest first."""
        return [ModelView.of(version) for version in store.versions.all(offset=offset, limit=limit)]

    @route(api, "GET /api/model/current", "model", VIEWER, 404)
    def current() -> ModelView:
        """The version that replicas and vehicles are offered."""
        return ModelView.of(store.versions.get(_current_release(store).version))


def _add_artifacts(api: FastAPI, services: Services) -> None:
    store, settings = services.store, services.settings

    @route(api, "GET /api/model/release", "model", FOLLOWER, 404, media_type="application/json")
    def release(variant: Variant | None = None) -> Response:
        """The signed manifest of the current release, byte for byte as it was signed.

        Without ``variant`` it is that of the variant that the fleet was last switched to.
        """
        current = _current_release(store)
        name = served_variant(current, settings) if variant is None else variant.value
        envelope = current.envelopes.get(name)
        if envelope is None:
            raise NotFoundError(f"The current release has no variant {name!r}.", cure="See release.variants.")
        return Response(envelope, media_type="application/json")

    @route(api, "GET /api/model/blobs/{digest}", "model", FOLLOWER, 404, 502, media_type=OCTETS)
    def blob(digest: str, request: Request) -> Response:
        """An artifact of the current release by its SHA-256. Weights and other blobs are not served.

        A download that broke off goes on with the header ``Range: bytes=N-`` (RFC 9110), which is answered with 206.
        """
        if digest not in _current_release(store).artifacts.values():
            raise NotFoundError(f"The current release has no artifact {digest!r}.", cure="Read its manifest again.")
        content = store.blobs.get(digest)
        start = _start_of(request.headers.get("range", ""))
        if not 0 < start < len(content):
            return Response(content, media_type=OCTETS)
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return Response(content[start:], 206, headers, media_type=OCTETS)


def _start_of(header: str) -> int:
    """The first byte that an open range asks for; 0 for all other forms, which a server may ignore."""
    match = re.fullmatch(r"bytes=([0-9]{1,19})-", header)
    return int(match.group(1)) if match else 0


def _trainable(store: Store, weights_digest: str) -> dict[str, int]:
    size = store.blobs.size(weights_digest)
    # A safetensors file: the length of the header in eight bytes, the header, and here nothing but float32.
    header_bytes = int.from_bytes(store.blobs.get_range(weights_digest, 0, 8), "little")
    return {"trainable_bytes": size, "trainable_parameters": (size - 8 - header_bytes) // 4}


def _complexity(release: Release, variant: str) -> dict[str, int]:
    """What was measured when the variant was exported; nothing for releases from before that was done."""
    metrics = artifacts_of(release)[variant].metrics
    return {name: int(metrics[name]) for name in ("parameters", "blocks", "multiply_adds") if name in metrics}


def _current_release(store: Store) -> Release:
    release = store.releases.current()
    if release is None:
        message, cure = why_no_release(store)
        raise NoReleaseError(message, cure=cure)
    return release


def _add_changes(api: FastAPI, services: Services) -> None:
    store, settings = services.store, services.settings

    def release_facts() -> dict[str, Any] | None:
        release = store.releases.current()
        return None if release is None else _facts(release, settings)

    def current(version: str, note: Note) -> ReleaseView:
        release = store.releases.of_version(version)
        assert release is not None
        note.after = _facts(release, settings)
        return ReleaseView.of(
            release,
            variant=served_variant(release, settings),
            variants=sorted(release.artifacts),
            lineage=store.versions.get(version).lineage,
        )

    @route(api, "POST /api/model/rollback", "model", OPERATOR, 404, 502, 503)
    def rollback(request: RollbackRequest, note: Note) -> ReleaseView:
        """Make an older version's content current again, as a new and higher version."""
        note.before = release_facts()
        version = services.aggregator().rollback(request.version, force=request.force, reason=request.reason)
        return current(version, note)

    @route(api, "POST /api/model/switch", "model", OPERATOR, 502, 503)
    def switch(request: SwitchRequest, note: Note) -> ReleaseView:
        """Move replicas and vehicles to another variant of the current version; harmless when repeated."""
        note.before = release_facts()
        return current(services.aggregator().switch_variant(request.variant), note)

    @route(api, "POST /api/edge/optimize", "edge", OPERATOR, 503, status_code=202)
    def optimize(request: OptimizeRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """Measure faster variants and move the fleet to the most accurate one that meets the target."""
        note.before = release_facts()
        params = {"strategy": request.strategy, "target_latency_ms": request.target_latency}
        return accepted(services.aggregator().submit("optimize", params, call_key), response, note)

    @route(api, "POST /api/model/retrain", "model", OPERATOR, 503, status_code=202)
    def retrain(request: RetrainRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """End the present run after its round and begin another; GET /api/training/status tells how that fares."""
        aggregator = services.aggregator()
        note.before = progress_facts(aggregator.progress())
        return accepted(aggregator.submit("retrain", {"strategy": request.strategy}, call_key), response, note)


def _facts(release: Release, settings: Settings) -> dict[str, Any]:
    variant = served_variant(release, settings)
    return {"version": release.version, "sequence": release.sequence, "variant": variant}

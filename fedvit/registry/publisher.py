"""Release publisher: gates, signs and publishes model versions for replicas and vehicles.

Every change, also a roll-back or a switch of variant, is a new release with a higher sequence number, because vehicles
refuse lower ones.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedvit.config import Settings
from fedvit.errors import ConflictError, ModelError, ReleaseRefusedError
from fedvit.ports import ExportedModel
from fedvit.store.records import Derivation, Release
from fedvit.store.store import Repositories, Store
from fedvit.types import FloatArray, ModelVersion, RunStatus, Variant
from fedvit.wire.manifest import ReleaseManifest, load_or_create_signing_key, public_key_text, sign_manifest
from fedvit.wire.tensors import decode_weights

Exports = Mapping[Variant, ExportedModel]
MAX_WEIGHTS_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class Artifact:
    """One variant of a release: its blob, and the metrics in its manifest."""

    digest: str
    size_bytes: int
    metrics: Mapping[str, float]


def artifacts_of(release: Release) -> dict[str, Artifact]:
    """The artifacts of a release of this server, as its manifests name them."""
    signed = {variant: json.loads(envelope)["signed"] for variant, envelope in release.envelopes.items()}
    return {v: Artifact(s["artifact_digest"], s["artifact_bytes"], s["metrics"]) for v, s in signed.items()}


def served_variant(release: Release | None, settings: Settings) -> str:
    """The variant that the fleet serves: the one it was last switched to, or else the configured one."""
    if release is not None and release.serve_variant is not None:
        return release.serve_variant
    return settings.release.serve_variant.value


def why_no_release(store: Repositories) -> tuple[str, str]:
    """Message and cure where nothing is released yet: training has to start, or it has to come to its first release."""
    run = store.runs.latest()
    if run is not None and run.status is RunStatus.RUNNING:
        return waiting_for_release(
            run.rounds_done, run.rounds_total
        ), "Ask again later; `fedvit status` shows progress."
    if run is None:
        return "No model version is released yet.", "Start training: `fedvit training start`."
    ended = f"{run.run_id} is {run.status.replace('_', ' ')} after {run.rounds_done} of {run.rounds_total} rounds"
    reason = f": {run.reason}" if run.reason else "."
    return f"No model version is released yet; {ended}{reason}", "See `fedvit model list` for versions and refusals."


def waiting_for_release(rounds_done: int, rounds_total: int) -> str:
    """What is said of a model that does not exist yet while training runs."""
    return f"Waiting for the first release, round {min(rounds_done + 1, rounds_total)} of {rounds_total}."


class Publisher:
    """Turns exported variants into signed releases. The signing key never leaves the state folder."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._key = load_or_create_signing_key(store.home / "keys")
        # The training loop and requests of operators publish from different threads.
        self._lock = threading.RLock()

    @property
    def trusted_key(self) -> str:
        """The public key with which replicas and vehicles verify releases, as one line of text."""
        return public_key_text(self._key.public_key())

    def variants(self) -> tuple[Variant, ...]:
        """The variants of a release: the configured ones, and the one that the fleet serves."""
        configured = self._settings.release.variants
        served = Variant(served_variant(self._store.releases.current(), self._settings))
        return configured if served in configured else (*configured, served)

    def accuracy_floor(self) -> float | None:
        """The least held-out accuracy of a release that may replace the current one; None without a limit."""
        current = self._store.releases.current()
        served = served_variant(current, self._settings)
        artifact = artifacts_of(current).get(served) if current else None
        accuracy = artifact.metrics.get("accuracy") if artifact else None
        return None if accuracy is None else accuracy - self._settings.release.max_accuracy_drop

    def release(self, version: ModelVersion, exports: Exports, reason: str) -> Release:
        """Store, sign and publish the variants of a version, in one transaction.

        Raises:
            ModelError: the standard variant does not predict what torch predicts.
            ReleaseRefusedError: on held-out images it is too much worse than the current release. Both are recorded
                with the version, and the current release keeps serving.
        """
        with self._lock:
            served = served_variant(self._store.releases.current(), self._settings)
            serve = Variant(self._first_offered({v.value: e for v, e in exports.items()}, served))
            try:
                self._check_agreement(version, exports)
                self._check_accuracy(version.version, exports[serve].accuracy)
            except (ModelError, ReleaseRefusedError) as error:
                self._store.versions.refuse(version.version, error.message)
                raise
            artifacts = self._stored(exports)
            with self._store.transaction() as transaction:
                return self._release(transaction, version, artifacts, reason, serve.value)

    def rollback(
        self, name: str, *, force: bool, reason: str | None, export: Callable[[ModelVersion], Exports]
    ) -> Release:
        """Publish an older version's content again, as a new version; harmless when repeated.

        Args:
            name: the version with that content.
            force: publish it even if it was never released, or is worse than the gate allows.
            export: called for a version that was never released.

        Raises:
            NotFoundError: no such version.
            ConflictError: nothing is released, or it is the current version.
            ReleaseRefusedError: it was never released, or is too much worse; ``force`` passes both.
            IntegrityError: a stored artifact no longer matches its hash.
        """
        with self._lock:
            target, current = self._store.versions.get(name), self.current()
            if current.version == name:
                raise ConflictError(f"{name} is what serves now.", cure="Name another version.")
            serving = self._store.versions.get(current.version)
            if serving.derived_from == name and serving.lineage.get("rollback_of") == name:
                # A repeated request.
                return current
            past = self._store.releases.of_version(name)
            if not force:
                self._check_target(target, past)
            if past is None:
                exports = export(target)
                self._check_agreement(target, exports)
            artifacts = artifacts_of(past) if past else self._stored(exports)
            for artifact in artifacts.values():
                self._store.blobs.get(artifact.digest)
            lineage = {"rollback_of": name, "replaces": current.version, "reason": reason, "forced": force}
            derivation = Derivation(name, lineage, target.metrics)
            serve = self._first_offered(
                artifacts, served_variant(current, self._settings), served_variant(past, self._settings)
            )
            why = f"roll-back to {name}" + (f": {reason}" if reason else "")
            return self._release_derived(derivation, artifacts, why, serve)

    def switch(self, variant: Variant) -> Release:
        """Let the fleet serve another variant of the current version; harmless when repeated.

        Raises:
            ConflictError: nothing is released, or the current version has no such variant.
            IntegrityError: the stored artifact no longer matches its hash.
        """
        with self._lock:
            current = self.current()
            if variant.value not in current.artifacts:
                raise ConflictError(
                    f"{current.version} has no variant {variant.value!r}.",
                    cure=f"It has {', '.join(sorted(current.artifacts))}; POST /api/edge/optimize makes others.",
                )
            if served_variant(current, self._settings) == variant.value:
                return current
            self._store.blobs.get(current.artifacts[variant.value])
            with self._store.transaction() as transaction:
                version, artifacts = transaction.versions.get(current.version), artifacts_of(current)
                reason = f"switch to {variant.value}"
                return self._release(transaction, version, artifacts, reason, variant.value, while_frozen=True)

    def adopt(
        self, origin: str, variant: Variant, export: ExportedModel, lineage: Mapping[str, object], reason: str
    ) -> Release:
        """Publish the current version with one more variant, as a new version, and let the fleet serve that variant.

        Raises:
            ConflictError: ``origin`` is no longer the current version.
            ReleaseRefusedError: on held-out images the variant is too much worse than what serves now.
        """
        with self._lock:
            current = self.current()
            if current.version != origin:
                raise ConflictError(
                    f"{current.version} was released while a variant of {origin} was made.", cure="Ask again."
                )
            self._check_accuracy(f"{variant.value} of {origin}", export.accuracy)
            artifacts = artifacts_of(current) | self._stored({variant: export})
            metrics = {**self._store.versions.get(origin).metrics, "accuracy": export.accuracy}
            derivation = Derivation(origin, lineage, metrics)
            return self._release_derived(derivation, artifacts, reason, variant.value)

    def current(self) -> Release:
        """The current release; raises ConflictError where nothing is released yet."""
        current = self._store.releases.current()
        if current is None:
            message, cure = why_no_release(self._store)
            raise ConflictError(message, cure=cure)
        return current

    def _first_offered(self, offered: Mapping[str, object], *preferred: str) -> str:
        """The first preferred variant that is offered, else any that is."""
        return next(variant for variant in (*preferred, *offered) if variant in offered)

    def _check_target(self, target: ModelVersion, past: Release | None) -> None:
        if past is None:
            refusal = f" The gate refused it: {target.refusal}" if target.refusal else ""
            raise ReleaseRefusedError(
                f"{target.version} was never released.{refusal}", cure='Name a released version, or say "force": true.'
            )
        artifact = artifacts_of(past)[self._first_offered(past.envelopes, served_variant(past, self._settings))]
        self._check_accuracy(target.version, artifact.metrics.get("accuracy"))

    def _check_accuracy(self, name: str, accuracy: float | None) -> None:
        floor = self.accuracy_floor()
        if floor is None or (accuracy is not None and accuracy >= floor):
            return
        raise ReleaseRefusedError(
            f"{name} has a held-out accuracy of {0.0 if accuracy is None else accuracy:.4f}; what serves now demands "
            f"at least {floor:.4f}.",
            cure="The current release keeps serving; release.max_accuracy_drop sets the floor.",
            accuracy=accuracy,
            floor=floor,
        )

    def _check_agreement(self, version: ModelVersion, exports: Exports) -> None:
        floor = self._settings.release.min_export_agreement
        export = exports.get(Variant.STANDARD)
        if export is not None and export.agreement < floor:
            raise ModelError(
                f"The ONNX export of {version.version} agrees with torch on {export.agreement:.2%} of the held-out "
                f"images; {floor:.2%} are needed.",
                cure="The previous release keeps serving; look at the exporter's log.",
            )

    def _stored(self, exports: Exports) -> dict[str, Artifact]:
        return {
            variant.value: Artifact(
                self._store.blobs.put(export.content),
                len(export.content),
                {**export.complexity, "accuracy": export.accuracy, "agreement": export.agreement},
            )
            for variant, export in exports.items()
        }

    def _release_derived(
        self, derivation: Derivation, artifacts: Mapping[str, Artifact], reason: str, serve_variant: str
    ) -> Release:
        with self._store.transaction() as transaction:
            version = transaction.versions.derive(derivation)
            return self._release(transaction, version, artifacts, reason, serve_variant, while_frozen=True)

    def _release(
        self,
        transaction: Repositories,
        version: ModelVersion,
        artifacts: Mapping[str, Artifact],
        reason: str,
        serve_variant: str,
        *,
        while_frozen: bool = False,
    ) -> Release:
        """Sign all artifacts under the next sequence number and release them."""
        sequence, fleet = transaction.releases.next_sequence(), transaction.metadata.fleet()
        classes = tuple(fleet.classes) if fleet else ()
        envelopes = {
            variant: sign_manifest(self._manifest(version, variant, artifact, classes, sequence), self._key)
            for variant, artifact in artifacts.items()
        }
        return transaction.releases.add(
            version.version,
            {variant: artifact.digest for variant, artifact in artifacts.items()},
            envelopes,
            reason,
            sequence=sequence,
            serve_variant=serve_variant,
            while_frozen=while_frozen,
        )

    def _manifest(
        self, version: ModelVersion, variant: str, artifact: Artifact, classes: tuple[str, ...], sequence: int
    ) -> ReleaseManifest:
        privacy = self._settings.privacy
        return ReleaseManifest(
            sequence=sequence,
            version=version.version,
            variant=variant,
            artifact_digest=artifact.digest,
            artifact_bytes=artifact.size_bytes,
            classes=classes,
            image_size=self._settings.data.image_size,
            run_id=version.run_id,
            round_index=version.round_index,
            data_digest=str(version.lineage.get("data_digest", "")),
            epsilon=version.epsilon,
            delta=privacy.target_delta,
            privacy_unit=privacy.privacy_unit,
            created_at=version.created_at.isoformat(),
            metrics=artifact.metrics,
        )


def stored_weights(
    store: Store, digest: str, expected: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, FloatArray]:
    """The weights blob ``digest``.

    Raises:
        NotFoundError, IntegrityError: the blob is missing or damaged.
        UpdateRejectedError: it does not have the names and shapes that are ``expected``.
    """
    return decode_weights(store.blobs.get(digest), expected=expected, max_bytes=MAX_WEIGHTS_BYTES)

"""The server's half of the registry: sign a version's artifacts and offer them to replicas and vehicles."""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedvit.config import Settings
from fedvit.errors import ModelError
from fedvit.ports import ExportedModel
from fedvit.store.store import Release, Store
from fedvit.types import ModelVersion, Variant
from fedvit.wire.manifest import ReleaseManifest, load_or_create_signing_key, public_key_text, sign_manifest


class Publisher:
    """Turns exported variants into signed releases. The signing key never leaves the state folder."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._key: Ed25519PrivateKey = load_or_create_signing_key(store.home / "keys")

    @property
    def trusted_key(self) -> str:
        """The public key that replicas and vehicles check releases against, as one line of text."""
        return public_key_text(self._key.public_key())

    def release(self, version: ModelVersion, exports: Mapping[Variant, ExportedModel], reason: str) -> Release:
        """Store, sign and offer the variants of a version, in one transaction.

        Raises:
            ModelError: the standard variant does not predict what torch predicts.
            ConflictError: somebody else released meanwhile; nothing was offered.
        """
        self._gate(version, exports)
        digests = {variant.value: self._store.blobs.put(export.content) for variant, export in exports.items()}
        sequence = self._store.next_release_sequence()
        envelopes = {
            variant.value: sign_manifest(self._manifest(version, variant, export, digests, sequence), self._key)
            for variant, export in exports.items()
        }
        return self._store.release(version.version, digests, envelopes, reason, sequence=sequence)

    def _gate(self, version: ModelVersion, exports: Mapping[Variant, ExportedModel]) -> None:
        floor = self._settings.release.min_agreement
        export = exports.get(Variant.STANDARD)
        if export is not None and export.agreement < floor:
            raise ModelError(
                f"The ONNX export of {version.version} agrees with torch on {export.agreement:.2%} of the held-out "
                f"images; {floor:.2%} are needed.",
                cure="The previous release keeps serving; look at the exporter's log.",
            )

    def _manifest(
        self,
        version: ModelVersion,
        variant: Variant,
        export: ExportedModel,
        digests: Mapping[str, str],
        sequence: int,
    ) -> ReleaseManifest:
        fleet = self._store.fleet()
        privacy = self._settings.privacy
        return ReleaseManifest(
            sequence=sequence,
            version=version.version,
            variant=variant.value,
            artifact_digest=digests[variant.value],
            artifact_bytes=len(export.content),
            classes=tuple(fleet.classes) if fleet else (),
            image_size=self._settings.data.image_size,
            run_id=version.run_id,
            round_index=version.round_index,
            data_digest=str(version.lineage.get("data_digest", "")),
            epsilon=version.epsilon,
            delta=privacy.target_delta,
            privacy_unit=privacy.privacy_unit,
            created_at=version.created_at.isoformat(),
            metrics={"accuracy": export.accuracy, "agreement": export.agreement},
        )

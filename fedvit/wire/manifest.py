"""Signed release manifests: signing, verification and field checks. See :mod:`fedvit.wire.signatures`."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedvit.atomic_write import create_atomically
from fedvit.errors import IntegrityError, StateError, UsageError
from fedvit.private_files import FILE_MODE, ensure_private, open_private_folder
from fedvit.wire.signatures import key_id as key_id
from fedvit.wire.signatures import sign_document, verify_document

SIGNING_KEY_FILE = "signing_key.pem"
MAX_ENVELOPE_BYTES = 256 * 2**10
MAX_ARTIFACT_BYTES = 2 * 2**30
_LARGEST_NUMBER = sys.float_info.max
_KIND = {"_type": "fedvit-release", "format": 1}
"""Part of every signed manifest, so that signatures of other content are not valid for one."""


@dataclass(frozen=True, slots=True)
class ReleaseManifest:
    """One variant of one released model version. ``sequence`` always grows, also for a rollback.

    ``epsilon`` is the budget spent at ``delta`` when the version was committed, for one ``privacy_unit``;
    ``artifact_digest`` is the SHA-256 (hex) of the ONNX file, ``artifact_bytes`` its length.
    """

    sequence: int
    version: str
    variant: str
    artifact_digest: str
    artifact_bytes: int
    classes: tuple[str, ...]
    image_size: int
    run_id: str
    round_index: int
    data_digest: str
    epsilon: float
    delta: float
    privacy_unit: str
    created_at: str
    metrics: Mapping[str, float]


def sign_manifest(manifest: ReleaseManifest, key: Ed25519PrivateKey) -> str:
    """The envelope of ``manifest``, signed with ``key``.

    Raises:
        IntegrityError: a field is out of range; vehicles would refuse it.
    """
    signed = {**_KIND, **dataclasses.asdict(manifest), "classes": list(manifest.classes)}
    signed["metrics"] = dict(manifest.metrics)
    _check_fields(signed)
    return sign_document(signed, key)


def verify_manifest(envelope: str, trusted: Sequence[Ed25519PublicKey]) -> ReleaseManifest:
    """The manifest in ``envelope``, if one of the ``trusted`` keys signed it.

    Raises:
        IntegrityError: malformed, signed by no trusted key, a bad signature, or a field unknown, missing or wrong.
    """
    signed = verify_document(envelope, trusted, "release", MAX_ENVELOPE_BYTES)
    _check_fields(signed)
    fields = {name: value for name, value in signed.items() if name not in _KIND}
    fields["classes"] = tuple(fields["classes"])
    for name in ("epsilon", "delta"):
        fields[name] = float(fields[name])
    fields["metrics"] = {name: float(value) for name, value in fields["metrics"].items()}
    return ReleaseManifest(**fields)


def _is_int(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    # Compared as it is: an integer of 400 digits is no float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _is_text(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _are_classes(value: Any) -> bool:
    good = isinstance(value, list) and 1 <= len(value) <= 10_000 and all(isinstance(name, str) for name in value)
    return good and len(set(value)) == len(value) and all(0 < len(name) <= 200 for name in value)


def _are_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and _is_number(x) for name, x in value.items())


_HEX_DIGEST = r"[0-9a-f]{64}"
_LINE = r"[ -~]{1,200}"
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "_type": (lambda value: value == _KIND["_type"], "'fedvit-release'"),
    "format": (lambda value: value == _KIND["format"] and not isinstance(value, bool), "1"),
    "sequence": (_is_int(1, 2**53), "a positive integer"),
    "version": (_is_text(_LINE), "a line of text"),
    "variant": (_is_text(_LINE), "a line of text"),
    "artifact_digest": (_is_text(_HEX_DIGEST), "64 hex digits"),
    "artifact_bytes": (_is_int(1, MAX_ARTIFACT_BYTES), f"an integer from 1 to {MAX_ARTIFACT_BYTES}"),
    "classes": (_are_classes, "different names, at least one"),
    "image_size": (_is_int(16, 1024), "an integer from 16 to 1024"),
    "run_id": (_is_text(_LINE), "a line of text"),
    "round_index": (_is_int(0, 2**53), "an integer, not negative"),
    "data_digest": (_is_text(r"[ -~]{0,200}"), "a line of text"),
    "epsilon": (lambda value: _is_number(value) and value >= 0, "a number, not negative"),
    "delta": (lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1"),
    "privacy_unit": (_is_text(_LINE), "a line of text"),
    "created_at": (_is_text(_LINE), "a line of text"),
    "metrics": (_are_metrics, "numbers by name"),
}


def _check_fields(signed: Mapping[str, Any]) -> None:
    if unknown := sorted(signed.keys() - _FIELDS.keys()):
        raise IntegrityError(f"The release manifest holds an unknown field {unknown[0]!r}.")
    for name, (is_good, allowed) in _FIELDS.items():
        if name not in signed:
            raise IntegrityError(f"The release manifest lacks the field {name!r}.")
        if not is_good(signed[name]):
            raise IntegrityError(f"In the release manifest, {name} is {signed[name]!r:.80}, not {allowed}.")


def load_or_create_signing_key(folder: Path) -> Ed25519PrivateKey:
    """The signing key in ``folder``, created at the first call, readable by its owner only.

    Raises:
        StateError: the folder cannot be written, or the file holds no Ed25519 key, or both are another user's.
    """
    path = folder / SIGNING_KEY_FILE
    try:
        open_private_folder(folder)
        if not path.exists():
            content = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            # Of two processes that begin together, both must end with the same key.
            create_atomically(path, content, mode=FILE_MODE)
        ensure_private([path])
        return _load(path)
    except OSError as error:
        raise StateError(f"The signing key {path} cannot be used: {error.strerror}.") from None


def _load(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(
            f"{path} holds no Ed25519 private key in PEM.", cure="Restore it from a backup; vehicles trust no other."
        )
    return key


def public_key_text(key: Ed25519PublicKey) -> str:
    """The 32 raw bytes of the key in base64, one line."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def parse_public_key(text: str) -> Ed25519PublicKey:
    """The inverse of :func:`public_key_text`; surrounding white space is ignored.

    Raises:
        UsageError: the text is not a key.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text.strip(), validate=True))
    except (ValueError, binascii.Error):
        raise UsageError(
            f"{text.strip()[:60]!r} is no Ed25519 public key.",
            cure="Give the one line of base64 in trusted_key.txt, which `fedvit model export` writes.",
        ) from None

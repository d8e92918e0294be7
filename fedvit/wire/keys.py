"""Ed25519 keys of releases (RFC 8032): the signing key in a file, trusted keys as lines of text."""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedvit.atomic_write import create_atomically
from fedvit.errors import StateError, UsageError

SIGNING_KEY_FILE = "signing_key.pem"


def load_or_create_signing_key(folder: Path) -> Ed25519PrivateKey:
    """The signing key in ``folder``, created at the first call, readable by its owner only.

    Raises:
        StateError: the folder cannot be written, or the file holds no Ed25519 key.
    """
    path = folder / SIGNING_KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _create(path)
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


def _create(path: Path) -> None:
    content = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # Of two processes that begin together, both must end with the same key.
    create_atomically(path, content, mode=0o600)


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


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()

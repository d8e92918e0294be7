"""Signed JSON documents.

An envelope is the JSON text ``{"signed": {...}, "signatures": [{"keyid": ..., "sig": ...}]}`` in the manner of TUF
(Samuel et al. 2010, "Survivable Key Compromise in Software Update Systems"): Ed25519 (RFC 8032) over the canonical
JSON of ``signed``, which is sorted, compact ASCII without NaN.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedvit.errors import IntegrityError


def sign_document(document: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """The envelope of ``document``, signed with ``key``.

    A field of the document has to name its kind, so that a signature is valid for no document of another kind.

    Raises:
        IntegrityError: it cannot be written as canonical JSON.
    """
    signature = base64.b64encode(key.sign(_canonical(document))).decode()
    return json.dumps({"signed": document, "signatures": [{"keyid": key_id(key.public_key()), "sig": signature}]})


def verify_document(
    envelope: str, trusted: Sequence[Ed25519PublicKey], subject: str, max_characters: int
) -> dict[str, Any]:
    """The document in ``envelope``, if one of the ``trusted`` keys signed it. Its fields are not checked.

    Args:
        subject: what is signed, for messages: "release", for example.

    Raises:
        IntegrityError: malformed, longer than ``max_characters``, signed by no trusted key, or a bad signature.
    """
    if len(envelope) > max_characters:
        raise IntegrityError(f"The {subject} envelope has {len(envelope)} characters; it may have {max_characters}.")
    try:
        content = json.loads(envelope)
    except (ValueError, RecursionError):
        raise IntegrityError(f"The {subject} envelope is not JSON.") from None
    if not isinstance(content, dict) or content.keys() != {"signed", "signatures"}:
        raise IntegrityError(f"The {subject} envelope does not hold exactly 'signed' and 'signatures'.")
    signed, signatures = content["signed"], content["signatures"]
    if not isinstance(signed, dict) or not isinstance(signatures, list):
        raise IntegrityError(f"In the {subject} envelope, 'signed' is no object or 'signatures' no list.")
    _check_signatures(signed, signatures, {key_id(key): key for key in trusted}, subject)
    return signed


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _canonical(document: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"The document cannot be written as JSON: {error}.") from None


def _check_signatures(
    signed: Mapping[str, Any], signatures: Sequence[Any], trusted: Mapping[str, Ed25519PublicKey], subject: str
) -> None:
    """One valid signature of one trusted key is enough; signatures of other keys are ignored."""
    content = _canonical(signed)
    named = [s for s in signatures if isinstance(s, dict) and isinstance(s.get("keyid"), str)]
    known = [s for s in named if s["keyid"] in trusted]
    if not known:
        signers = ", ".join(f"key {s['keyid'][:12]!r}" for s in named[:3]) or "no key"
        raise IntegrityError(
            f"The {subject} is signed by {signers}, which is not trusted here.",
            cure="Give the server's public key as the trusted key.",
        )
    if not any(_is_good(trusted[s["keyid"]], s.get("sig"), content) for s in known):
        raise IntegrityError(
            f"The {subject}'s signature does not match its content.", cure="It was altered: refuse it."
        )


def _is_good(key: Ed25519PublicKey, signature: Any, content: bytes) -> bool:
    try:
        key.verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, binascii.Error, TypeError, ValueError):
        return False
    return True

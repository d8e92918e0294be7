"""Secret keys for Poisson sampling, privacy noise and cohort selection.

The keys of virtual clients are derived from one root key in the state folder (mode 0600). A real vehicle generates its
own key and never sends it.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from pathlib import Path

from fedvit.atomic_write import create_atomically
from fedvit.errors import StateError
from fedvit.privacy.randomness import SECRET_BYTES


def load_or_create_root_secret(home: Path, create: Callable[[int], bytes] = secrets.token_bytes) -> bytes:
    """The root key of a state folder, created by the first call.

    Args:
        home: the state folder.
        create: returns that many random bytes; only a simulation replaces the system's secret ones.

    Raises:
        StateError: the key file has the wrong length.
    """
    path = home / "keys" / "root.key"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        # Of two processes that start together, one key wins for both.
        create_atomically(path, create(SECRET_BYTES), mode=0o600)
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise StateError(
            f"The key file {path} holds {len(secret)} bytes instead of {SECRET_BYTES}.",
            cure="Restore it from a backup; without it an interrupted round cannot be repeated exactly.",
        )
    return secret


def derive_secret(root: bytes, name: str) -> bytes:
    """An independent key for ``name`` (a client id, or a purpose such as ``cohort``)."""
    return hmac.digest(root, name.encode(), "sha256")

"""The secret keys behind Poisson coins, privacy noise and the cohort draw.

On one machine a single root key in the state folder (mode 0600) stands in for the vehicles' own keys: each virtual
client's key is derived from it. A real vehicle makes its own and never sends it.
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
    """The root key of a state folder; made at the first call, the same for ever after.

    Args:
        home: the state folder.
        create: so many bytes. Nothing is secret that is drawn with another one than the system's: of a simulation.

    Raises:
        StateError: the key file has the wrong length: somebody changed it.
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

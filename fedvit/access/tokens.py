"""Bearer tokens ``fvt_<token_id>_<secret>``: creation and verification.

The secret has 256 random bits and is shown once; the store keeps its SHA-256. A slow password hash is not needed for a
random secret of this length.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from fedvit.access.identity import Identity, Scope, parse_scopes
from fedvit.atomic_write import write_atomically
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import ConfigError, NotFoundError, UnauthorizedError
from fedvit.ports import ClockPort
from fedvit.store.records import Token
from fedvit.store.store import Store
from fedvit.types import CLIENT_ID

PREFIX = "fvt_"
_FORM = re.compile(r"fvt_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")
# One write a minute and token is enough to find unused tokens.
_TOUCH_EVERY = timedelta(minutes=1)
_NOBODY = hashlib.sha256(b"").hexdigest()
_OF_VEHICLES = frozenset({Scope.DEVICE, Scope.RELEASES})
_BINDING_CURE = "Create one token for each vehicle: fedvit token create NAME --scope device --client CLIENT_ID."


@dataclass(frozen=True, slots=True)
class NewToken:
    """A new token; ``text`` is what its holder sends, and is stored nowhere."""

    token: Token
    text: str

    def __repr__(self) -> str:
        # A secret in a log or a stack trace is a leaked one.
        return f"NewToken({self.token.token_id})"


def create_token(
    store: Store,
    name: str,
    scopes: Iterable[str],
    *,
    now: datetime,
    lifetime: timedelta | None = None,
    client_id: str | None = None,
) -> NewToken:
    """Create a token; without ``lifetime`` it is valid until it is revoked.

    Args:
        client_id: the only client that a device token may act for; it need not be registered yet.

    Raises:
        ConfigError: the name, a scope, the lifetime or the client id is not valid, a device token names no client, or a
            token that names one has other scopes than a vehicle's.
    """
    granted = parse_scopes(scopes)
    _check_binding(client_id, granted)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a token.", cure="Use 1 to 64 letters, digits, spaces and . _ @ -, a letter first."
        )
    if lifetime is not None and lifetime <= timedelta(0):
        raise ConfigError(f"A token cannot live for {lifetime}.", cure="Give a lifetime above zero.")
    token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    token = Token(
        token_id=token_id,
        name=name,
        secret_hash=_hash(secret),
        scopes=tuple(sorted(granted)),
        created_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        client_id=client_id,
    )
    store.tokens.add(token)
    return NewToken(token, f"{PREFIX}{token_id}_{secret}")


@contextmanager
def temporary_token(
    store: Store, name: str, scope: Scope, path: Path, clock: ClockPort = SYSTEM_CLOCK
) -> Iterator[None]:
    """A token in a file that only its owner can read, valid while the block runs; an earlier one is revoked."""
    for token in store.tokens.all():
        if token.name == name and token.revoked_at is None:
            store.tokens.revoke(token.token_id, clock.now())
    new = create_token(store, name, [scope], now=clock.now())
    write_atomically(path, new.text, mode=0o600)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        store.tokens.revoke(new.token.token_id, clock.now())


def verify_token(
    store: Store, text: str, now: datetime, *, used: Callable[[str, datetime], None] | None = None
) -> Identity:
    """The identity that this token proves.

    Args:
        used: called about once a minute with a token in use; by default its use is stored.

    Raises:
        UnauthorizedError: ``details["reason"]`` is malformed, invalid (unknown or wrong), expired, revoked, or unbound:
            a device token of an earlier version, which names no client.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise _refusal("malformed")
    token = _find(store, form[1])
    # Compared even when there is no such token, so that the time does not show which ids exist.
    good = hmac.compare_digest(_hash(form[2]), token.secret_hash if token else _NOBODY)
    if token is None or not good:
        raise _refusal("invalid")
    if token.revoked_at is not None:
        raise _refusal("revoked")
    if token.expires_at is not None and token.expires_at <= now:
        raise _refusal("expired")
    if Scope.DEVICE in token.scopes and token.client_id is None:
        message = f"The device token {token.token_id} names no client."
        raise UnauthorizedError(message, cure=_BINDING_CURE, reason="unbound")
    if token.last_used_at is None or token.last_used_at <= now - _TOUCH_EVERY:
        if used is None:
            store.tokens.set_last_used({token.token_id: now})
        else:
            used(token.token_id, now)
    return Identity(
        f"token:{token.token_id}:{token.name}",
        frozenset(map(Scope, token.scopes)),
        authenticated=True,
        client_id=token.client_id,
    )


def _check_binding(client_id: str | None, scopes: frozenset[Scope]) -> None:
    if client_id is None:
        if Scope.DEVICE in scopes:
            raise ConfigError("A token with the scope device has to name its client.", cure=_BINDING_CURE)
        return
    if not re.fullmatch(CLIENT_ID, client_id):
        raise ConfigError(
            f"{client_id!r} is no client id.", cure="Use 1 to 64 letters, digits and . _ -, a letter or digit first."
        )
    if not scopes <= _OF_VEHICLES:
        raise ConfigError(
            "Only a vehicle's token can be bound to a client.", cure="Give the scopes device and releases, no other."
        )


def _find(store: Store, token_id: str) -> Token | None:
    try:
        return store.tokens.get(token_id)
    except NotFoundError:
        return None


def _refusal(reason: str) -> UnauthorizedError:
    # "Revoked" and "expired" are only shown to callers that sent the right secret.
    why = f"is {reason}" if reason in ("revoked", "expired") else "is not valid"
    return UnauthorizedError(f"The bearer token {why}.", cure="Ask an admin for a new token.", reason=reason)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

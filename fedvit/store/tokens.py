"""Bearer tokens. Functions of an open session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from fedvit.errors import NotFoundError
from fedvit.store.records import Token
from fedvit.store.tables import TokenRow

_FIELDS = tuple(field.name for field in fields(Token))


def add_token(session: Session, token: Token) -> None:
    """Insert a token."""
    columns = {name: getattr(token, name) for name in _FIELDS}
    session.add(TokenRow(**(columns | {"scopes": list(token.scopes)})))


def token(session: Session, token_id: str) -> Token:
    """One token.

    Raises:
        NotFoundError: no such token.
    """
    return _to_token(_row(session, token_id))


def tokens(session: Session) -> list[Token]:
    """All tokens, oldest first."""
    return [_to_token(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.created_at))]


def revoke_token(session: Session, token_id: str, at: datetime) -> Token:
    """Set ``revoked_at``; the first revocation stands.

    Raises:
        NotFoundError: no such token.
    """
    row = _row(session, token_id)
    row.revoked_at = row.revoked_at or at
    return _to_token(row)


def touch_tokens(session: Session, used: Mapping[str, datetime]) -> None:
    """Set ``last_used_at``."""
    if used:
        session.execute(update(TokenRow), [{"token_id": name, "last_used_at": at} for name, at in used.items()])


def _row(session: Session, token_id: str) -> TokenRow:
    row = session.get(TokenRow, token_id)
    if row is None:
        raise NotFoundError(f"There is no token {token_id!r}.", cure="See `fedvit token list`.")
    return row


def _to_token(row: TokenRow) -> Token:
    return Token(**({name: getattr(row, name) for name in _FIELDS} | {"scopes": tuple(row.scopes)}))

"""Bearer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from fedvit.errors import NotFoundError
from fedvit.store.database import Repository
from fedvit.store.records import Token
from fedvit.store.tables import TokenRow, record_of


class Tokens(Repository):
    """The bearer tokens, revoked ones included; of their secrets only the hashes."""

    def add(self, token: Token) -> None:
        """Insert a token."""
        with self._write() as session:
            session.add(TokenRow(**{**asdict(token), "scopes": list(token.scopes)}))

    def get(self, token_id: str) -> Token:
        """One token.

        Raises:
            NotFoundError: no such token.
        """
        with self._read() as session:
            return _to_token(_token_row(session, token_id))

    def all(self) -> list[Token]:
        """All tokens, revoked ones included, oldest first."""
        with self._read() as session:
            return [_to_token(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.created_at))]

    def revoke(self, token_id: str, at: datetime) -> Token:
        """End a token; harmless when it is ended already, the first moment stands.

        Raises:
            NotFoundError: no such token.
        """
        with self._write() as session:
            row = _token_row(session, token_id)
            row.revoked_at = row.revoked_at or at
            return _to_token(row)

    def set_last_used(self, last_used: Mapping[str, datetime]) -> None:
        """Record when these tokens were used last."""
        rows = [{"token_id": token_id, "last_used_at": at} for token_id, at in last_used.items()]
        with self._write() as session:
            if rows:
                session.execute(update(TokenRow), rows)


def _token_row(session: Session, token_id: str) -> TokenRow:
    row = session.get(TokenRow, token_id)
    if row is None:
        raise NotFoundError(f"There is no token {token_id!r}.", cure="See `fedvit token list`.")
    return row


def _to_token(row: TokenRow) -> Token:
    return record_of(Token, row, scopes=tuple(row.scopes))

"""Bearer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import select, update

from fedvit.store.records import Token
from fedvit.store.repository import Repository, get_row, record_of
from fedvit.store.tables import TokenRow


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
        return self._get(Token, TokenRow, token_id)

    def all(self) -> list[Token]:
        """All tokens, revoked ones included, oldest first."""
        return self._records(Token, select(TokenRow).order_by(TokenRow.created_at))

    def revoke(self, token_id: str, at: datetime) -> Token:
        """End a token; harmless when it is ended already, the first moment stands.

        Raises:
            NotFoundError: no such token.
        """
        with self._write() as session:
            row = get_row(session, TokenRow, token_id)
            row.revoked_at = row.revoked_at or at
            return record_of(Token, row)

    def set_last_used(self, last_used: Mapping[str, datetime]) -> None:
        """Record when these tokens were used last."""
        rows = [{"token_id": token_id, "last_used_at": at} for token_id, at in last_used.items()]
        with self._write() as session:
            if rows:
                session.execute(update(TokenRow), rows)

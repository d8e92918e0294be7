"""Bearer tokens, the audit trail, and the answers to requests that name an idempotency key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, delete, select, update
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError
from fedvit.store.chain import AUDIT_CHAIN
from fedvit.store.records import AuditEntry, AuditFacts, RequestKey, StoredResponse, Token
from fedvit.store.repository import Repository, columns_of, get_row, record_of
from fedvit.store.tables import AuditRow, IdempotencyRow, TokenRow

RESPONSES_KEPT = timedelta(hours=24)
# A request without an answer is under way; after this long its process must have died.
UNDER_WAY = timedelta(minutes=10)


class Tokens(Repository):
    """The bearer tokens, revoked ones included; of their secrets only the hashes."""

    def add(self, token: Token) -> None:
        """Insert a token."""
        with self._write() as session:
            session.add(TokenRow(**columns_of(token)))

    def get(self, token_id: str) -> Token:
        """One token; raises NotFoundError where there is none."""
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


class Audit(Repository):
    """The audit trail: who asked for what, and what it changed."""

    def append(self, facts: AuditFacts) -> int:
        """Write one line; return its sequence.

        Raises:
            IntegrityError: the end of the trail is not where it was left.
        """
        line = columns_of(facts, before=facts.before, after=facts.after)
        with self._write() as session:
            return AUDIT_CHAIN.append(session, [line], self._now())

    def entries(self, after: int = 0, limit: int | None = None) -> list[AuditEntry]:
        """Lines behind sequence ``after``, oldest first."""
        query = AUDIT_CHAIN.lines.where(AuditRow.sequence > after).order_by(AuditRow.sequence).limit(limit)
        return self._entries(query)

    def latest(self, limit: int) -> list[AuditEntry]:
        """The last lines, oldest of them first."""
        query = AUDIT_CHAIN.lines.order_by(AuditRow.sequence.desc()).limit(limit)
        return self._entries(query)[::-1]

    def between(self, since: datetime, until: datetime, limit: int) -> list[AuditEntry]:
        """Lines from ``since`` to ``until``, both included, oldest first, at most ``limit``."""
        query = AUDIT_CHAIN.lines.where(AuditRow.at.between(since, until)).order_by(AuditRow.sequence).limit(limit)
        return self._entries(query)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The audit trail as it is stored, hashes included, oldest line first; read to the end, or closed."""
        with self._read() as session:
            yield from AUDIT_CHAIN.dump(session)

    def verify(self) -> int:
        """Recompute the hash chain; return the number of lines.

        Raises:
            IntegrityError: naming the first sequence that is not as it was written.
        """
        with self._read() as session:
            return AUDIT_CHAIN.verify(session)

    def _entries(self, query: Select[Any]) -> list[AuditEntry]:
        with self._read() as session:
            rows = session.execute(query)
            return [AuditEntry(row.sequence, row.at, record_of(AuditFacts, row)) for row in rows]


class Idempotency(Repository):
    """Requests that name an idempotency key, and the answers they got."""

    def begin(
        self, request: RequestKey, at: datetime, *, repeatable: bool = False, keep: int | None = None
    ) -> StoredResponse | None:
        """Claim an idempotency key (None), or give the answer that its request already got.

        A ``repeatable`` request does not wait for one that is under way, whose process may have died. No more than the
        newest ``keep`` answers of its actor are kept beside it, where that is given.

        Raises:
            ConflictError: the key was used for something else, or its request is still under way.
        """
        with self._write() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.at < at - RESPONSES_KEPT))
            row = session.get(IdempotencyRow, (request.actor, request.route, request.key))
            if row is not None and row.status is None and _may_repeat(row, request, at, repeatable):
                session.delete(row)
                session.flush()
                row = None
            if row is not None:
                return _answer(row, request)
            if keep is not None:
                _forget_oldest(session, request.actor, keep)
            session.add(IdempotencyRow(at=at, **columns_of(request)))
            return None

    def finish(self, request: RequestKey, answer: StoredResponse | None) -> None:
        """Keep the answer for repetitions; None forgets the request, so that it may be tried again."""
        with self._write() as session:
            row = session.get(IdempotencyRow, (request.actor, request.route, request.key))
            if row is None:
                return
            if answer is None:
                session.delete(row)
            else:
                row.status, row.body = answer.status, answer.body
                row.media_type, row.headers = answer.media_type, dict(answer.headers)


def _forget_oldest(session: Session, actor: str, keep: int) -> None:
    of_actor = IdempotencyRow.actor == actor
    newest_first = select(IdempotencyRow.at).where(of_actor).order_by(IdempotencyRow.at.desc())
    if (oldest := session.scalar(newest_first.offset(keep).limit(1))) is not None:
        session.execute(delete(IdempotencyRow).where(of_actor, IdempotencyRow.at <= oldest))


def _may_repeat(row: IdempotencyRow, request: RequestKey, at: datetime, repeatable: bool) -> bool:
    return row.at < at - UNDER_WAY or (repeatable and row.request_hash == request.request_hash)


def _answer(row: IdempotencyRow, request: RequestKey) -> StoredResponse:
    if row.request_hash != request.request_hash:
        cure = "Use a new key for a new request."
        raise ConflictError(f"The Idempotency-Key {request.key!r} was used for another request.", cure=cure)
    if row.status is None or row.body is None:
        raise ConflictError(
            f"The request with the Idempotency-Key {request.key!r} is still under way.",
            cure="Ask again in a moment, with the same key.",
            retry_after_s=1,
        )
    return StoredResponse(row.status, row.body, row.media_type, row.headers or {})

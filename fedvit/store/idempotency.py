"""Requests that name an idempotency key, and the answers they got."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError
from fedvit.store.records import RequestKey, StoredResponse
from fedvit.store.repository import Repository
from fedvit.store.tables import IdempotencyRow

KEPT = timedelta(hours=24)
# A request without an answer is under way; after this long its process must have died.
UNDER_WAY = timedelta(minutes=10)


class Idempotency(Repository):
    """Requests that name an idempotency key, and the answers they got."""

    def begin(self, request: RequestKey, at: datetime, *, repeatable: bool = False) -> StoredResponse | None:
        """Claim an idempotency key (None), or give the answer that its request already got.

        A ``repeatable`` request does not wait for one that is under way, whose process may have died.

        Raises:
            ConflictError: the key was used for something else, or its request is still under way.
        """
        with self._write() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.at < at - KEPT))
            row = _row(session, request)
            if row is not None and row.status is None and _may_repeat(row, request, at, repeatable):
                session.delete(row)
                session.flush()
                row = None
            if row is not None:
                return _answer(row, request)
            key = {"actor": request.actor, "route": request.route, "key": request.key}
            session.add(IdempotencyRow(**key, request_hash=request.request_hash, at=at))
            return None

    def finish(self, request: RequestKey, answer: StoredResponse | None) -> None:
        """Keep the answer for repetitions; None forgets the request, so that it may be tried again."""
        with self._write() as session:
            row = _row(session, request)
            if row is None:
                return
            if answer is None:
                session.delete(row)
            else:
                row.status, row.body = answer.status, answer.body
                row.media_type, row.headers = answer.media_type, dict(answer.headers)


def _may_repeat(row: IdempotencyRow, request: RequestKey, at: datetime, repeatable: bool) -> bool:
    return row.at < at - UNDER_WAY or (repeatable and row.request_hash == request.request_hash)


def _answer(row: IdempotencyRow, request: RequestKey) -> StoredResponse:
    if row.request_hash != request.request_hash:
        raise ConflictError(
            f"The Idempotency-Key {request.key!r} was used for another request.",
            cure="Use a new key for a new request.",
        )
    if row.status is None or row.body is None:
        raise ConflictError(
            f"The request with the Idempotency-Key {request.key!r} is still under way.",
            cure="Ask again in a moment, with the same key.",
            retry_after_s=1,
        )
    return StoredResponse(row.status, row.body, row.media_type, row.headers or {})


def _row(session: Session, request: RequestKey) -> IdempotencyRow | None:
    return session.get(IdempotencyRow, (request.actor, request.route, request.key))

"""The audit trail, on a hash chain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import Select

from fedvit.store.chain import AUDIT_CHAIN
from fedvit.store.records import AuditEntry, AuditFacts
from fedvit.store.repository import Repository, record_of
from fedvit.store.tables import AuditRow


class Audit(Repository):
    """The audit trail: who asked for what, and what it changed."""

    def append(self, facts: AuditFacts) -> int:
        """Write one line; return its sequence.

        Raises:
            IntegrityError: the end of the trail is not where it was left.
        """
        line = {field.name: getattr(facts, field.name) for field in fields(facts)}
        with self._write() as session:
            line |= {"scopes": list(facts.scopes), "params": dict(facts.params)}
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

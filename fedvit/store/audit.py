"""The audit trail, on a hash chain. Functions of an open session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session

from fedvit.store.chain import Chain
from fedvit.store.records import AuditEntry, AuditFacts
from fedvit.store.tables import AuditRow
from fedvit.types import utc_now

_FIELDS = tuple(field.name for field in fields(AuditFacts))


def append_audit(session: Session, facts: AuditFacts) -> int:
    """Write one line; return its sequence.

    Raises:
        IntegrityError: lines are missing at the end of the trail.
    """
    line = {name: getattr(facts, name) for name in _FIELDS}
    return CHAIN.append(session, [line | {"scopes": list(facts.scopes), "params": dict(facts.params)}], utc_now())


def audit(session: Session, after: int, limit: int | None) -> list[AuditEntry]:
    """Lines behind sequence ``after``, oldest first."""
    query = CHAIN.lines.where(AuditRow.sequence > after).order_by(AuditRow.sequence).limit(limit)
    return [AuditEntry(row.sequence, row.at, _to_facts(_columns(row))) for row in session.execute(query)]


def audit_between(session: Session, since: datetime, until: datetime, limit: int) -> list[AuditEntry]:
    """Lines from ``since`` to ``until``, both included, oldest first."""
    query = CHAIN.lines.where(AuditRow.at.between(since, until)).order_by(AuditRow.sequence).limit(limit)
    return [AuditEntry(row.sequence, row.at, _to_facts(_columns(row))) for row in session.execute(query)]


def latest_audit(session: Session, limit: int) -> list[AuditEntry]:
    """The last lines, oldest of them first."""
    query = CHAIN.lines.order_by(AuditRow.sequence.desc()).limit(limit)
    newest_first = [AuditEntry(row.sequence, row.at, _to_facts(_columns(row))) for row in session.execute(query)]
    return newest_first[::-1]


def _columns(row: Row[Any]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _FIELDS}


def _to_facts(columns: Mapping[str, Any]) -> AuditFacts:
    return AuditFacts(**(dict(columns) | {"scopes": tuple(columns["scopes"])}))


CHAIN = Chain("audit trail", "audit_head", AuditRow, _columns)

"""Append-only, hash-chained tables: privacy ledger, budget periods and audit trail.

``hash = sha256(prev_hash + canonical JSON of the line)``; the first ``prev_hash`` is 64 zeros. The number and
hash of the last line are stored beside the table, so that lines cut off its end are missed as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from typing import cast as typed

from sqlalchemy import Row, Select, Table, insert, select
from sqlalchemy.orm import Session

from fedvit.errors import IntegrityError
from fedvit.store.metadata import get_value, set_value
from fedvit.store.tables import AuditRow, BudgetPeriodRow, ChargeRow

_HASHED = object()
_LINK = frozenset({"sequence", "at", "prev_hash", "hash"})
_GENESIS: dict[str, Any] = {"sequence": 0, "hash": "0" * 64}


@dataclass(frozen=True, slots=True)
class Chain:
    """One chained table.

    Attributes:
        name: its name in messages.
        head_key: the key in ``meta`` of the last line's number and hash.
        table: its rows, which have ``sequence``, ``at``, ``prev_hash`` and ``hash``.
        unhashed: column -> value that a hash leaves out: for columns that are younger than the first lines.
    """

    name: str
    head_key: str
    table: type[ChargeRow] | type[AuditRow] | type[BudgetPeriodRow]
    unhashed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lines(self) -> Select[Any]:
        """A query for plain rows instead of mapped objects: a ledger has one line a client and round."""
        return select(*self.table.__table__.columns)

    def facts(self, row: Row[Any]) -> dict[str, Any]:
        """A row's own columns, as :meth:`append` was given them."""
        return {name: value for name, value in row._mapping.items() if name not in _LINK}

    def append(self, session: Session, lines: Sequence[Mapping[str, Any]], at: datetime) -> int:
        """Chain the lines (column -> value) to the end; return the last sequence.

        Raises:
            IntegrityError: lines are missing at the end of the table.
            ValueError: a number is not finite.
        """
        head, rows = self._checked_head(session), []
        sequence, prev_hash = int(head["sequence"]), head["hash"]
        for line in lines:
            sequence += 1
            link = _link(prev_hash, self._content(sequence, at, line))
            rows.append({"sequence": sequence, "at": at, **line, "prev_hash": prev_hash, "hash": link})
            prev_hash = link
        session.connection().execute(insert(typed(Table, self.table.__table__)), rows)
        set_value(session, self.head_key, {"sequence": sequence, "hash": prev_hash})
        return sequence

    def length(self, session: Session) -> int:
        """The last line's sequence.

        Raises:
            IntegrityError: lines are missing at the end of the table.
        """
        return int(self._checked_head(session)["sequence"])

    def hash_at(self, session: Session, sequence: int) -> str:
        """The hash of one line; for 0 the previous hash of the first line."""
        row = session.execute(self.lines.where(self.table.sequence == sequence)).one_or_none()
        return str(_GENESIS["hash"] if row is None else row.hash)

    def adopt(self, session: Session, other: Session) -> int:
        """Append the lines that another state's chain has behind this one's end, as they are; return how many.

        Both chains are verified, and the other one goes on from this one.
        """
        end = self._checked_head(session)["sequence"]
        query = self.lines.where(self.table.sequence > end).order_by(self.table.sequence)
        for rows in other.execute(query).mappings().partitions(1000):
            session.execute(insert(self.table), [dict(row) for row in rows])
        head = self._head(other)
        set_value(session, self.head_key, head)
        return int(head["sequence"]) - int(end)

    def verify(self, session: Session) -> int:
        """Recompute the whole chain; return its length.

        Raises:
            IntegrityError: naming the first line that was changed, removed or added behind the program's back.
        """
        sequence, prev_hash = 0, _GENESIS["hash"]
        query = self.lines.order_by(self.table.sequence).execution_options(yield_per=1000)
        for row in session.execute(query):
            sequence += 1
            link = _link(prev_hash, self._content(sequence, row.at, self.facts(row)))
            if row.sequence != sequence or row.prev_hash != prev_hash or row.hash != link:
                raise self._broken(sequence)
            prev_hash = row.hash
        head = self._head(session)
        if head != {"sequence": sequence, "hash": prev_hash}:
            raise self._broken(min(sequence, head["sequence"]) + 1)
        return sequence

    def dump(self, session: Session) -> Iterator[dict[str, Any]]:
        """Every line with its hashes, oldest first, as it is stored: also where the chain is broken."""
        query = self.lines.order_by(self.table.sequence).execution_options(yield_per=1000)
        for row in session.execute(query):
            yield {**row._mapping, "at": row.at.isoformat(timespec="microseconds")}

    def _head(self, session: Session) -> dict[str, Any]:
        head: dict[str, Any] = get_value(session, self.head_key) or _GENESIS
        return head

    def _checked_head(self, session: Session) -> dict[str, Any]:
        """The head on record, if the last line is the one it names; a chain is never continued over a gap."""
        head = self._head(session)
        last = session.execute(self.lines.order_by(self.table.sequence.desc()).limit(1)).one_or_none()
        end = _GENESIS if last is None else {"sequence": last.sequence, "hash": last.hash}
        if head != end:
            raise self._broken(min(end["sequence"], head["sequence"]) + 1)
        return head

    def _broken(self, sequence: int) -> IntegrityError:
        return IntegrityError(
            f"The {self.name} is broken at sequence {sequence}: a line was changed, removed or added.",
            cure="Restore the state folder from a backup.",
            sequence=sequence,
        )

    def _content(self, sequence: int, at: datetime, facts: Mapping[str, Any]) -> str:
        hashed = {name: value for name, value in facts.items() if self.unhashed.get(name, _HASHED) != value}
        line = {"sequence": sequence, "at": at.isoformat(timespec="microseconds"), **hashed}
        return json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _link(prev_hash: str, content: str) -> str:
    return hashlib.sha256((prev_hash + content).encode()).hexdigest()


# Ledger lines that are older than these two columns have a hash without them.
LEDGER_CHAIN = Chain("privacy ledger", "ledger_head", ChargeRow, {"privacy_unit": "record", "event": None})
BUDGET_CHAIN = Chain("list of budget periods", "budget_head", BudgetPeriodRow)
AUDIT_CHAIN = Chain("audit trail", "audit_head", AuditRow)

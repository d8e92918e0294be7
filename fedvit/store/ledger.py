"""The privacy ledger: append-only, each line chained to the one before. Functions of an open session.

``hash = sha256(prev_hash + canonical JSON of the line)``; the first ``prev_hash`` is 64 zeros. The last line's number
and hash are kept beside the ledger, so that lines cut off its end are missed as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import Row, insert, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, IntegrityError
from fedvit.ports import Charge, LedgerEntry
from fedvit.store.fleet import get_meta, set_meta
from fedvit.store.tables import ChargeRow
from fedvit.types import utc_now

HEAD_KEY = "ledger_head"
_GENESIS: dict[str, Any] = {"sequence": 0, "hash": "0" * 64}
_CURE = "Restore the state folder from a backup."
# Plain rows instead of mapped objects: a ledger has one line a client and round.
_LINES = select(*ChargeRow.__table__.columns)
_CHARGE_FIELDS = tuple(field.name for field in fields(Charge))
_ChargeKey = tuple[str, int, str, str]


def append_charges(session: Session, charges: Sequence[Charge], check: Callable[[Sequence[Charge]], None]) -> int:
    """Write the charges that are not there yet, once ``check`` admits them; return how many.

    ``check`` is not called when nothing is new: a retry costs nothing.

    Raises:
        ConflictError: a charge is there already with another noise, sampling probability or number of steps.
        IntegrityError: lines are missing at the end of the ledger.
    """
    new = _not_yet_written(session, [_normal(charge) for charge in charges])
    if not new:
        return 0
    check(new)
    head = _checked_head(session)
    rows = _chained(new, head["sequence"], head["hash"], utc_now())
    session.execute(insert(ChargeRow), rows)
    set_meta(session, HEAD_KEY, {"sequence": rows[-1]["sequence"], "hash": rows[-1]["hash"]})
    return len(rows)


def ledger(session: Session, since: datetime | None, limit: int | None, after: int) -> list[LedgerEntry]:
    """Entries behind sequence ``after`` and not older than ``since``, oldest first."""
    query = _LINES.where(ChargeRow.sequence > after).order_by(ChargeRow.sequence).limit(limit)
    if since is not None:
        query = query.where(ChargeRow.at >= since)
    return [LedgerEntry(sequence=row.sequence, at=row.at, charge=_to_charge(row)) for row in session.execute(query)]


def verify_ledger(session: Session) -> int:
    """Recompute the whole chain; return its length.

    Raises:
        IntegrityError: naming the first line that was changed, removed or added behind the program's back.
    """
    sequence, prev_hash = 0, _GENESIS["hash"]
    query = _LINES.order_by(ChargeRow.sequence).execution_options(yield_per=1000)
    for row in session.execute(query):
        sequence += 1
        content = _content(sequence, row.at, _to_charge(row))
        if row.sequence != sequence or row.prev_hash != prev_hash or row.hash != _link(prev_hash, content):
            raise _broken(sequence)
        prev_hash = row.hash
    head = _head(session)
    if head != {"sequence": sequence, "hash": prev_hash}:
        raise _broken(min(sequence, head["sequence"]) + 1)
    return sequence


def _not_yet_written(session: Session, charges: Sequence[Charge]) -> list[Charge]:
    known: dict[_ChargeKey, Charge] = {}
    for run_id, round_index in dict.fromkeys((charge.run_id, charge.round_index) for charge in charges):
        query = _LINES.where(ChargeRow.run_id == run_id, ChargeRow.round_index == round_index)
        known |= {_key(charge): charge for charge in map(_to_charge, session.execute(query))}
    new = []
    for charge in charges:
        if known.setdefault(_key(charge), charge) is charge:
            new.append(charge)
        elif known[_key(charge)] != charge:
            raise ConflictError(
                f"Release {charge.release_id} of unit {charge.unit_id!r} in round {charge.round_index} of "
                f"{charge.run_id} is on the ledger with another cost.",
                cure="A release that costs something else is another release and needs its own release_id.",
            )
    return new


def _chained(charges: Sequence[Charge], sequence: int, prev_hash: str, at: datetime) -> list[dict[str, Any]]:
    rows = []
    for charge in charges:
        sequence += 1
        link = _link(prev_hash, _content(sequence, at, charge))
        rows.append({"sequence": sequence, "at": at, **_facts(charge), "prev_hash": prev_hash, "hash": link})
        prev_hash = link
    return rows


def _content(sequence: int, at: datetime, charge: Charge) -> str:
    facts = {"sequence": sequence, "at": at.isoformat(timespec="microseconds"), **_facts(charge)}
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _link(prev_hash: str, content: str) -> str:
    return hashlib.sha256((prev_hash + content).encode()).hexdigest()


def _head(session: Session) -> dict[str, Any]:
    found: dict[str, Any] = get_meta(session, HEAD_KEY) or _GENESIS
    return found


def _checked_head(session: Session) -> dict[str, Any]:
    """The head on record, if the last line is the one it names; a chain is never continued over a gap."""
    head = _head(session)
    last = session.execute(_LINES.order_by(ChargeRow.sequence.desc()).limit(1)).one_or_none()
    found = _GENESIS if last is None else {"sequence": last.sequence, "hash": last.hash}
    if head != found:
        raise _broken(min(found["sequence"], head["sequence"]) + 1)
    return head


def _broken(sequence: int) -> IntegrityError:
    return IntegrityError(
        f"The privacy ledger is broken at sequence {sequence}: a line was changed, removed or added.",
        cure=_CURE,
        sequence=sequence,
    )


def _key(charge: Charge) -> _ChargeKey:
    return charge.run_id, charge.round_index, charge.unit_id, charge.release_id


def _normal(charge: Charge) -> Charge:
    """The types that the database gives back, or the hash over ``1`` would not match the one over ``1.0``."""
    return Charge(
        run_id=charge.run_id,
        round_index=int(charge.round_index),
        unit_id=charge.unit_id,
        release_id=charge.release_id,
        noise_multiplier=float(charge.noise_multiplier),
        sampling_prob=float(charge.sampling_prob),
        steps=int(charge.steps),
    )


def _facts(charge: Charge) -> dict[str, Any]:
    return {name: getattr(charge, name) for name in _CHARGE_FIELDS}


def _to_charge(line: Row[Any]) -> Charge:
    return Charge(**{name: getattr(line, name) for name in _CHARGE_FIELDS})

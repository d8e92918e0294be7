"""The privacy ledger: each charge once, on a hash chain. Functions of an open session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, LedgerFrozenError
from fedvit.ports import Charge, LedgerEntry
from fedvit.store.chain import Chain
from fedvit.store.fleet import get_meta, set_meta
from fedvit.store.tables import ChargeRow
from fedvit.types import LedgerFreeze, utc_now

FREEZE_KEY = "ledger_freeze"
COPY_KEY = "ledger_copy"
"""Set in every backup's database: what its original charged since is not known. Lifted apart from an incident's."""
RESTORE = "restore"
_CHARGE_FIELDS = tuple(field.name for field in fields(Charge))
# Lines from before there were these two have a hash without them.
_UNSAID = {"privacy_unit": "record", "event": None}
_ChargeKey = tuple[str, int, str, str]


def append_charges(session: Session, charges: Sequence[Charge], check: Callable[[Sequence[Charge]], None]) -> int:
    """Write the charges that are not there yet, once ``check`` admits them; return how many.

    ``check`` is not called when nothing is new: a retry costs nothing.

    Raises:
        LedgerFrozenError: an incident froze the ledger.
        ConflictError: a charge is there already with another noise, sampling probability, number of steps or event.
        IntegrityError: lines are missing at the end of the ledger.
    """
    new = _not_yet_written(session, [_normal(charge) for charge in charges])
    if not new:
        return 0
    check_not_frozen(session)
    check(new)
    CHAIN.append(session, [_facts(charge) for charge in new], utc_now())
    return len(new)


def is_charged(session: Session, run_id: str, round_index: int, unit_id: str, output_id: str) -> bool:
    """Whether the ledger has the charge of this very release."""
    key = (run_id, round_index, unit_id, output_id)
    columns = (ChargeRow.run_id, ChargeRow.round_index, ChargeRow.unit_id, ChargeRow.output_id)
    query = select(ChargeRow.sequence).where(*(column == value for column, value in zip(columns, key, strict=True)))
    return session.scalar(query.limit(1)) is not None


def freeze(session: Session, wish: LedgerFreeze) -> LedgerFreeze:
    """Freeze the ledger for one incident more; return the freeze in force, which is the first incident's."""
    freezes = _freezes(session)
    if wish.incident_id not in (freeze.incident_id for freeze in freezes):
        freezes.append(wish)
        _set_freezes(session, freezes)
    return freezes[0]


def frozen(session: Session) -> LedgerFreeze | None:
    """Why the ledger is frozen, or None."""
    return next(iter(_freezes(session)), None) or _copy_freeze(session)


def thaw(session: Session, incident_id: str) -> LedgerFreeze | None:
    """Lift one incident's freeze; return the one that is in force for another, if any.

    Raises:
        ConflictError: the ledger is frozen, and not by this incident.
    """
    freezes = _freezes(session)
    left = [freeze for freeze in freezes if freeze.incident_id != incident_id]
    if freezes and len(left) == len(freezes):
        raise ConflictError(
            f"The privacy ledger is not frozen by incident {incident_id!r}.",
            cure=f"It is frozen by {', '.join(repr(freeze.incident_id) for freeze in freezes)}.",
        )
    _set_freezes(session, left)
    return frozen(session)


def thaw_copy(session: Session) -> LedgerFreeze | None:
    """Lift the freeze of a state that came from a backup, and say what it was; harmless where there is none."""
    found = _copy_freeze(session)
    set_meta(session, COPY_KEY, None)
    return found


def mark_as_copy(session: Session, at: datetime) -> None:
    """Freeze the ledger of a state that was copied; the first copy's mark stays."""
    if _copy_freeze(session) is None:
        reason = "This state comes from a backup; what its original has charged since then is not known."
        set_meta(session, COPY_KEY, _freeze_to_json(LedgerFreeze(RESTORE, reason, "fedvit backup", at)))


def adopt_freezes(session: Session, other: Session) -> None:
    """Be frozen as another state's ledger is, and for no other reason."""
    for key in (FREEZE_KEY, COPY_KEY):
        set_meta(session, key, get_meta(other, key))


def _freezes(session: Session) -> list[LedgerFreeze]:
    return [_freeze_of(found) for found in get_meta(session, FREEZE_KEY) or []]


def _set_freezes(session: Session, freezes: Sequence[LedgerFreeze]) -> None:
    set_meta(session, FREEZE_KEY, [_freeze_to_json(freeze) for freeze in freezes])


def _copy_freeze(session: Session) -> LedgerFreeze | None:
    found = get_meta(session, COPY_KEY)
    return None if found is None else _freeze_of(found)


def _freeze_to_json(freeze: LedgerFreeze) -> dict[str, Any]:
    return {**asdict(freeze), "at": freeze.at.isoformat()}


def _freeze_of(found: Mapping[str, Any]) -> LedgerFreeze:
    return LedgerFreeze(**{**found, "at": datetime.fromisoformat(found["at"])})


def ledger(session: Session, since: datetime | None, limit: int | None, after: int) -> list[LedgerEntry]:
    """Entries behind sequence ``after`` and not older than ``since``, oldest first."""
    query = CHAIN.lines.where(ChargeRow.sequence > after).order_by(ChargeRow.sequence).limit(limit)
    if since is not None:
        query = query.where(ChargeRow.at >= since)
    return [LedgerEntry(sequence=row.sequence, at=row.at, charge=_to_charge(row)) for row in session.execute(query)]


def check_not_frozen(session: Session) -> None:
    """Make sure that charges may be written.

    Raises:
        LedgerFrozenError: an incident froze the ledger, or it came from a backup and nobody answered for it yet.
    """
    found = frozen(session)
    if found is None:
        return
    why = "it came from a backup" if found.incident_id == RESTORE else f"of incident {found.incident_id}"
    cure = "Resolve the incident: POST /api/emergency/stand-down."
    if found.incident_id == RESTORE:
        cure = "Answer for it with `fedvit privacy unfreeze`, or grant a new budget: POST /api/privacy/reset-budget."
    raise LedgerFrozenError(
        f"The privacy ledger is frozen since {found.at:%Y-%m-%d %H:%M} UTC because {why}: {found.reason}",
        cure=cure,
        incident_id=found.incident_id,
    )


def _not_yet_written(session: Session, charges: Sequence[Charge]) -> list[Charge]:
    known: dict[_ChargeKey, Charge] = {}
    for run_id, round_index in dict.fromkeys((charge.run_id, charge.round_index) for charge in charges):
        query = CHAIN.lines.where(ChargeRow.run_id == run_id, ChargeRow.round_index == round_index)
        known |= {_key(charge): charge for charge in map(_to_charge, session.execute(query))}
    new = []
    for charge in charges:
        if known.setdefault(_key(charge), charge) is charge:
            new.append(charge)
        elif known[_key(charge)] != charge:
            raise ConflictError(
                f"Release {charge.output_id} of unit {charge.unit_id!r} in round {charge.round_index} of "
                f"{charge.run_id} is on the ledger with another cost.",
                cure="A release that costs something else is another release and needs its own output_id.",
            )
    return new


def _key(charge: Charge) -> _ChargeKey:
    return charge.run_id, charge.round_index, charge.unit_id, charge.output_id


def _normal(charge: Charge) -> Charge:
    """The types that the database gives back, or the hash over ``1`` would not match the one over ``1.0``."""
    return Charge(
        run_id=charge.run_id,
        round_index=int(charge.round_index),
        unit_id=charge.unit_id,
        output_id=charge.output_id,
        noise_multiplier=float(charge.noise_multiplier),
        sampling_prob=float(charge.sampling_prob),
        steps=int(charge.steps),
        privacy_unit=charge.privacy_unit,
        event=charge.event,
    )


def _facts(charge: Charge) -> dict[str, Any]:
    return {name: getattr(charge, name) for name in _CHARGE_FIELDS}


def _to_charge(line: Row[Any]) -> Charge:
    return Charge(**{name: getattr(line, name) for name in _CHARGE_FIELDS})


CHAIN = Chain("privacy ledger", "ledger_head", ChargeRow, lambda line: _facts(_to_charge(line)), _UNSAID)

"""The privacy ledger: each charge once, on a hash chain; and the reasons for which it is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, LedgerFrozenError
from fedvit.ports import Charge, LedgerEntry
from fedvit.store.chain import BUDGET_CHAIN, LEDGER_CHAIN
from fedvit.store.metadata import COPY_KEY, FREEZE_KEY, get_value, set_value
from fedvit.store.repository import Repository, record_of
from fedvit.store.tables import ChargeRow
from fedvit.types import LedgerFreeze

RESTORE = "restore"
"""The incident of the freeze of a state that came from a backup."""
_CHARGE_FIELDS = tuple(field.name for field in fields(Charge))
_ChargeKey = tuple[str, int, str, str]


class Ledger(Repository):
    """The privacy ledger. While it is frozen, by an incident or after a restore, it refuses every charge."""

    def append(self, charges: Sequence[Charge]) -> int:
        """Write the charges that are not on the ledger yet, all or none; return how many were written.

        The budget is checked by the caller, in the same transaction.

        Raises:
            LedgerFrozenError: an incident froze the ledger, and a charge is new.
            ConflictError: an output is on the ledger already with another cost.
            IntegrityError: the end of the ledger is not where it was left.
        """
        with self._write() as session:
            new = _not_yet_written(session, charges)
            if new:
                _check_not_frozen(session)
                lines = [{name: getattr(charge, name) for name in _CHARGE_FIELDS} for charge in new]
                LEDGER_CHAIN.append(session, lines, self._now())
            return len(new)

    def not_yet_written(self, charges: Sequence[Charge]) -> list[Charge]:
        """Those of the charges that :meth:`append` would write, each once.

        Raises:
            ConflictError: an output is on the ledger already with another cost.
        """
        with self._read() as session:
            return _not_yet_written(session, charges)

    def is_charged(self, run_id: str, round_index: int, unit_id: str, output_id: str) -> bool:
        """Whether the ledger has the charge of this mechanism output."""
        key = {"run_id": run_id, "round_index": round_index, "unit_id": unit_id, "output_id": output_id}
        with self._read() as session:
            return session.scalar(select(ChargeRow.sequence).filter_by(**key).limit(1)) is not None

    def entries(self, since: datetime | None = None, limit: int | None = None, after: int = 0) -> list[LedgerEntry]:
        """Ledger entries with a sequence above ``after`` and not older than ``since``, oldest first."""
        query = LEDGER_CHAIN.lines.where(ChargeRow.sequence > after).order_by(ChargeRow.sequence).limit(limit)
        if since is not None:
            query = query.where(ChargeRow.at >= since)
        with self._read() as session:
            rows = session.execute(query)
            return [LedgerEntry(sequence=row.sequence, at=row.at, charge=record_of(Charge, row)) for row in rows]

    def lines(self) -> Iterator[dict[str, Any]]:
        """The ledger as it is stored, hashes included, oldest line first; read to the end, or closed."""
        with self._read() as session:
            yield from LEDGER_CHAIN.dump(session)

    def verify(self) -> int:
        """Recompute the hash chains of ledger and budget periods; return the number of ledger entries.

        Raises:
            IntegrityError: naming the first sequence that is not as it was written.
        """
        with self._read() as session:
            BUDGET_CHAIN.verify(session)
            return LEDGER_CHAIN.verify(session)

    def check_not_frozen(self) -> None:
        """Make sure that charges may be written.

        Raises:
            LedgerFrozenError: an incident froze the ledger, or it came from a backup and nobody answered for it yet.
        """
        with self._read() as session:
            _check_not_frozen(session)

    def current_freeze(self) -> LedgerFreeze | None:
        """Why the ledger is frozen, or None."""
        with self._read() as session:
            return _current_freeze(session)

    def freeze(self, freeze: LedgerFreeze) -> LedgerFreeze:
        """Let nothing be charged, and no trained version be released, until each incident that froze it is over.

        Returns the freeze in force, which is the first incident's.
        """
        with self._write() as session:
            freezes = _freezes(session)
            if freeze.incident_id not in (present.incident_id for present in freezes):
                freezes.append(freeze)
                _set_freezes(session, freezes)
            return freezes[0]

    def unfreeze(self, incident_id: str) -> LedgerFreeze | None:
        """Lift one incident's freeze; return the one that is in force for another. Harmless where there is none.

        Raises:
            ConflictError: the ledger is frozen, and not by this incident.
        """
        with self._write() as session:
            freezes = _freezes(session)
            left = [freeze for freeze in freezes if freeze.incident_id != incident_id]
            if freezes and len(left) == len(freezes):
                raise ConflictError(
                    f"The privacy ledger is not frozen by incident {incident_id!r}.",
                    cure=f"It is frozen by {', '.join(repr(freeze.incident_id) for freeze in freezes)}.",
                )
            _set_freezes(session, left)
            return _current_freeze(session)

    def freeze_as_copy(self, at: datetime) -> None:
        """Freeze the ledger of a state that was copied; the mark of the first copy stays."""
        with self._write() as session:
            if get_value(session, COPY_KEY) is None:
                reason = "This state comes from a backup; what its original has charged since then is not known."
                set_value(session, COPY_KEY, _freeze_to_json(LedgerFreeze(RESTORE, reason, "fedvit backup", at)))

    def unfreeze_copy(self) -> LedgerFreeze | None:
        """Lift the freeze of a state that came from a backup and return what it was; harmless where there is none."""
        with self._write() as session:
            value = get_value(session, COPY_KEY)
            set_value(session, COPY_KEY, None)
            return None if value is None else _to_freeze(value)


def _current_freeze(session: Session) -> LedgerFreeze | None:
    copied = get_value(session, COPY_KEY)
    freezes = [*_freezes(session), *([] if copied is None else [_to_freeze(copied)])]
    return freezes[0] if freezes else None


def _check_not_frozen(session: Session) -> None:
    freeze = _current_freeze(session)
    if freeze is None:
        return
    why = "it came from a backup" if freeze.incident_id == RESTORE else f"of incident {freeze.incident_id}"
    cure = "Resolve the incident: POST /api/emergency/stand-down."
    if freeze.incident_id == RESTORE:
        cure = "Answer for it with `fedvit privacy unfreeze`, or grant a new budget: POST /api/privacy/reset-budget."
    raise LedgerFrozenError(
        f"The privacy ledger is frozen since {freeze.at:%Y-%m-%d %H:%M} UTC because {why}: {freeze.reason}",
        cure=cure,
        incident_id=freeze.incident_id,
    )


def _freezes(session: Session) -> list[LedgerFreeze]:
    return [_to_freeze(value) for value in get_value(session, FREEZE_KEY) or []]


def _set_freezes(session: Session, freezes: Sequence[LedgerFreeze]) -> None:
    set_value(session, FREEZE_KEY, [_freeze_to_json(freeze) for freeze in freezes])


def _freeze_to_json(freeze: LedgerFreeze) -> dict[str, Any]:
    return {**asdict(freeze), "at": freeze.at.isoformat()}


def _to_freeze(value: Mapping[str, Any]) -> LedgerFreeze:
    return LedgerFreeze(**{**value, "at": datetime.fromisoformat(value["at"])})


def _not_yet_written(session: Session, charges: Sequence[Charge]) -> list[Charge]:
    charges = [_normal(charge) for charge in charges]
    known: dict[_ChargeKey, Charge] = {}
    for run_id, round_index in dict.fromkeys((charge.run_id, charge.round_index) for charge in charges):
        query = LEDGER_CHAIN.lines.where(ChargeRow.run_id == run_id, ChargeRow.round_index == round_index)
        known |= {_key(charge): charge for charge in (record_of(Charge, row) for row in session.execute(query))}
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
    types = (type(charge.round_index), type(charge.noise_multiplier), type(charge.sampling_prob), type(charge.steps))
    if types == (int, float, float, int):
        return charge
    noise_multiplier, sampling_prob = float(charge.noise_multiplier), float(charge.sampling_prob)
    charge = replace(charge, noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    return replace(charge, round_index=int(charge.round_index), steps=int(charge.steps))

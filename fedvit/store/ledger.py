"""The privacy ledger with the reasons for which it is frozen, and the privacy budgets, both on hash chains.

Each charge is written once. Nothing that was spent is ever deleted: a budget period only names the ledger line from
which on charges count against it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, ForbiddenError, LedgerFrozenError, NotFoundError
from fedvit.ports import Charge, LedgerEntry
from fedvit.store.chain import BUDGET_CHAIN, LEDGER_CHAIN
from fedvit.store.metadata import BUDGET_CALL_KEY, BUDGET_REQUESTS_KEY, COPY_KEY, FREEZE_KEY, get_value, set_value
from fedvit.store.records import BudgetPeriod, BudgetRequest
from fedvit.store.repository import Repository, record_of
from fedvit.store.tables import BudgetPeriodRow, ChargeRow
from fedvit.types import LedgerFreeze

RESTORE = "restore"
"""The incident of the freeze of a state that came from a backup."""
REQUEST_LIFETIME = timedelta(hours=24)
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
    return next(iter(_freezes(session)), None if copied is None else _to_freeze(copied))


def _check_not_frozen(session: Session) -> None:
    freeze = _current_freeze(session)
    if freeze is None:
        return
    why, cure = f"of incident {freeze.incident_id}", "Resolve the incident: POST /api/emergency/stand-down."
    if freeze.incident_id == RESTORE:
        why = "it came from a backup"
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


class Budget(Repository):
    """The budget periods, and the requests for a new one."""

    def grant(
        self,
        target_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetPeriod:
        """Begin a new budget period: only what is charged from now on counts against it. Nothing spent is forgotten.

        A call repeated under the same ``call_key`` begins none. The freeze of a restored state is lifted: what its
        original has charged belongs to the period before.

        Raises:
            IntegrityError: the end of the ledger, or of the list of periods, is not where it was left.
        """
        with self._sessions.transaction() as transaction, transaction.write() as session:
            last = Budget(transaction).current()
            if last is not None and call_key is not None and get_value(session, BUDGET_CALL_KEY) == call_key:
                return last
            line: dict[str, Any] = {
                "target_epsilon": float(target_epsilon),
                "justification": justification,
                "requested_by": requested_by,
                "approved_by": approved_by,
                "ledger_sequence": LEDGER_CHAIN.length(session),
            }
            at = self._now()
            sequence = BUDGET_CHAIN.append(session, [line], at)
            set_value(session, BUDGET_CALL_KEY, call_key)
            Ledger(transaction).unfreeze_copy()
            return BudgetPeriod(sequence=sequence, at=at, **line)

    def current(self) -> BudgetPeriod | None:
        """The period in force; None in the first one, which is that of the settings."""
        return self._first(BudgetPeriod, select(BudgetPeriodRow).order_by(BudgetPeriodRow.sequence.desc()))

    def periods(self) -> list[BudgetPeriod]:
        """All periods that were granted, oldest first."""
        return self._records(BudgetPeriod, select(BudgetPeriodRow).order_by(BudgetPeriodRow.sequence))

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every budget period with its hashes, oldest first, as it is stored."""
        with self._read() as session:
            yield from BUDGET_CHAIN.dump(session)

    def request(self, new_epsilon: float, justification: str, requested_by: str, at: datetime) -> BudgetRequest:
        """Keep a request for a second person to approve within 24 hours, under an id that nobody can guess."""
        request_id = self._sessions.new_id(16)
        request = BudgetRequest(request_id, new_epsilon, justification, requested_by, at + REQUEST_LIFETIME)
        with self._write() as session:
            _set_requests(session, [*_requests(session, at), request])
        return request

    def approve(self, request_id: str, approved_by: str, at: datetime) -> BudgetRequest:
        """Approve a request and take it off the list; it grants one budget at most.

        Raises:
            NotFoundError: no such request, or it has expired.
            ForbiddenError: the same person asked for it, be it with another token.
        """
        with self._write() as session:
            requests = {request.request_id: request for request in _requests(session, at)}
            request = requests.pop(request_id, None)
            if request is None:
                cure = "It was approved, or 24 hours have passed: ask again."
                raise NotFoundError("No such request waits for approval.", cure=cure)
            if person(request.requested_by) == person(approved_by):
                raise ForbiddenError("Who asked for a budget cannot approve it.", cure="Let another admin approve it.")
            _set_requests(session, list(requests.values()))
            return request

    def withdraw_requests(self) -> None:
        """Forget all requests: the original of a copied state may approve them, and each grants one budget."""
        with self._write() as session:
            _set_requests(session, [])


def person(actor: str) -> str:
    """The person behind an actor of the audit trail: the name that a token was made for, or an issuer's subject.

    Names are compared as people read them: case, width and spaces do not make another person. Two different names are
    two persons: the admin who makes tokens ensures that each bears its holder's name.
    """
    kind, _, rest = actor.partition(":")
    name = rest.partition(":")[2] if kind == "token" else actor
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _requests(session: Session, at: datetime) -> list[BudgetRequest]:
    values = get_value(session, BUDGET_REQUESTS_KEY) or []
    requests = [BudgetRequest(**{**v, "expires_at": datetime.fromisoformat(v["expires_at"])}) for v in values]
    return [request for request in requests if request.expires_at > at]


def _set_requests(session: Session, requests: list[BudgetRequest]) -> None:
    values = [{**asdict(request), "expires_at": request.expires_at.isoformat()} for request in requests]
    set_value(session, BUDGET_REQUESTS_KEY, values)

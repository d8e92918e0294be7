"""Privacy budgets granted anew, on a hash chain, and those that wait for a second person. Functions of an open session.

Nothing that was spent is ever deleted: a period only says from which ledger line on charges count against it.
"""

from __future__ import annotations

import secrets
import unicodedata
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session

from fedvit.errors import ForbiddenError, NotFoundError
from fedvit.store import ledger
from fedvit.store.chain import Chain
from fedvit.store.fleet import get_meta, set_meta
from fedvit.store.records import BudgetPeriod, BudgetRequest
from fedvit.store.tables import BudgetPeriodRow
from fedvit.types import utc_now

REQUESTS_KEY = "budget_requests"
CALL_KEY = "budget_last_call"
REQUEST_LIFETIME = timedelta(hours=24)
_FACTS = tuple(field.name for field in fields(BudgetPeriod) if field.name not in ("sequence", "at"))


def grant(
    session: Session,
    target_epsilon: float,
    justification: str,
    requested_by: str,
    approved_by: str | None,
    call_key: str | None,
) -> BudgetPeriod:
    """Begin a new period behind the ledger's last line; a repetition under the same ``call_key`` begins none.

    What a backup's original charged belongs to the period before, so the freeze of a restored state is lifted.

    Raises:
        IntegrityError: lines are missing at the end of the ledger or of the periods.
    """
    last = current(session)
    if last is not None and call_key is not None and get_meta(session, CALL_KEY) == call_key:
        return last
    line: dict[str, Any] = {
        "target_epsilon": float(target_epsilon),
        "justification": justification,
        "requested_by": requested_by,
        "approved_by": approved_by,
        "ledger_sequence": ledger.CHAIN.length(session),
    }
    at = utc_now()
    sequence = CHAIN.append(session, [line], at)
    set_meta(session, CALL_KEY, call_key)
    ledger.thaw_copy(session)
    return BudgetPeriod(sequence=sequence, at=at, **line)


def current(session: Session) -> BudgetPeriod | None:
    """The period in force; None in the first one, which is that of the settings."""
    row = session.execute(CHAIN.lines.order_by(BudgetPeriodRow.sequence.desc()).limit(1)).one_or_none()
    return None if row is None else _to_period(row)


def periods(session: Session) -> list[BudgetPeriod]:
    """All periods that were granted, oldest first."""
    return [_to_period(row) for row in session.execute(CHAIN.lines.order_by(BudgetPeriodRow.sequence))]


def ask(session: Session, new_epsilon: float, justification: str, requested_by: str, at: datetime) -> BudgetRequest:
    """Keep a request for a second person, for 24 hours, under an id that nobody guesses."""
    wish = BudgetRequest(secrets.token_hex(16), new_epsilon, justification, requested_by, at + REQUEST_LIFETIME)
    _keep(session, [*_waiting(session, at), wish])
    return wish


def take(session: Session, request_id: str, approved_by: str, at: datetime) -> BudgetRequest:
    """Approve a request and take it off the list: whatever becomes of it then, it grants one budget at most.

    Raises:
        NotFoundError: no such request, or it has expired.
        ForbiddenError: who approves is who asked, be it with another token.
    """
    waiting = {wish.request_id: wish for wish in _waiting(session, at)}
    wish = waiting.pop(request_id, None)
    if wish is None:
        raise NotFoundError(
            "No such request waits for approval.", cure="It was approved, or 24 hours have passed: ask again."
        )
    if person(wish.requested_by) == person(approved_by):
        raise ForbiddenError("Who asked for a budget cannot approve it.", cure="Let another admin approve it.")
    _keep(session, list(waiting.values()))
    return wish


def person(actor: str) -> str:
    """Who an actor of the audit trail is: a token's holder, by the name it was made for, or the subject of an issuer.

    Names are compared as people read them: case, width and spaces do not make another person. Two names are two
    persons: whoever makes tokens answers for it that each bears its holder's name.
    """
    kind, _, rest = actor.partition(":")
    name = rest.partition(":")[2] if kind == "token" else actor
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _waiting(session: Session, at: datetime) -> list[BudgetRequest]:
    found = get_meta(session, REQUESTS_KEY) or []
    wishes = [BudgetRequest(**{**wish, "expires_at": datetime.fromisoformat(wish["expires_at"])}) for wish in found]
    return [wish for wish in wishes if wish.expires_at > at]


def _keep(session: Session, wishes: list[BudgetRequest]) -> None:
    set_meta(session, REQUESTS_KEY, [{**asdict(w), "expires_at": w.expires_at.isoformat()} for w in wishes])


def _facts(row: Row[Any]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _FACTS}


def _to_period(row: Row[Any]) -> BudgetPeriod:
    return BudgetPeriod(sequence=row.sequence, at=row.at, **_facts(row))


CHAIN = Chain("list of budget periods", "budget_head", BudgetPeriodRow, _facts)

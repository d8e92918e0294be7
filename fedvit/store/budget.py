"""Privacy budgets that were granted, on a hash chain, and requests that wait for a second person.

Nothing that was spent is ever deleted: a period only names the ledger line from which on charges count against it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.errors import ForbiddenError, NotFoundError
from fedvit.store.chain import BUDGET_CHAIN, LEDGER_CHAIN
from fedvit.store.ledger import Ledger
from fedvit.store.metadata import BUDGET_CALL_KEY, BUDGET_REQUESTS_KEY, get_value, set_value
from fedvit.store.records import BudgetPeriod, BudgetRequest
from fedvit.store.repository import Repository
from fedvit.store.tables import BudgetPeriodRow

REQUEST_LIFETIME = timedelta(hours=24)


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
                raise NotFoundError(
                    "No such request waits for approval.", cure="It was approved, or 24 hours have passed: ask again."
                )
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

"""The privacy accountant as an actor: one process writes the ledger, everybody asks it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from fedvit.ports import Charge, LedgerEntry
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import settings_from_json
from fedvit.types import BudgetReport


class PrivacyAccountantActor:
    """A shell round :class:`fedvit.privacy.PrivacyAccountant`; a restart reads the ledger again."""

    def __init__(self, settings_json: str) -> None:
        self._accountant = PrivacyAccountant(settings=settings_from_json(settings_json))
        self._ahead = ThreadPoolExecutor(max_workers=1)

    def prepare(self) -> int:
        """Return the process id once the ledger is read."""
        return os.getpid()

    def charge(self, charges: Sequence[Charge]) -> None:
        """See :meth:`fedvit.privacy.PrivacyAccountant.write`; the budget is composed while clients train."""
        self._accountant.write(charges)
        self._ahead.submit(self._accountant.budget)

    def check(self, charges: Sequence[Charge]) -> None:
        """See :meth:`fedvit.privacy.PrivacyAccountant.check`."""
        self._accountant.check(charges)

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        """See :meth:`fedvit.privacy.PrivacyAccountant.within_budget`."""
        return self._accountant.within_budget(charges)

    def reset_budget(
        self, new_epsilon: float, justification: str, requested_by: str, approved_by: str | None, call_key: str
    ) -> BudgetReport:
        """See :meth:`fedvit.privacy.PrivacyAccountant.reset_budget`; an equal ``call_key`` grants once."""
        return self._accountant.reset_budget(new_epsilon, justification, requested_by, approved_by, call_key=call_key)

    def budget(self, outlook: bool = False) -> BudgetReport:
        """See :meth:`fedvit.privacy.PrivacyAccountant.budget`."""
        return self._accountant.budget(outlook=outlook)

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """See :meth:`fedvit.privacy.PrivacyAccountant.history`."""
        return self._accountant.history(since, limit)

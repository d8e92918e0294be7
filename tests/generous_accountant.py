"""An accountant for tests of other things: composing epsilon has its own tests and costs time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedvit.ports import Charge
from fedvit.store.store import Store
from fedvit.types import BudgetReport


class GenerousAccountant:
    """Writes charges and refuses none."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        self._store.ledger.append(charges)
        return self.budget()

    def check(self, charges: Sequence[Charge]) -> None:
        pass

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        return frozenset(charge.unit_id for charge in charges)

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        return BudgetReport("record", 8.0, 1e-5, 1.0, 1.0, 1.0, 1, 1)

    def history(self, since: object = None, limit: int = 1000) -> Sequence[Any]:
        return ()

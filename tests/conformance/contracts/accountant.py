"""The promises of the accountant port."""

from __future__ import annotations

import uuid
from datetime import timedelta

import pytest

from fedvit.errors import BudgetExhaustedError, LedgerFrozenError
from fedvit.ports import AccountantPort, Charge
from fedvit.store.store import Store
from fedvit.types import LedgerFreeze, utc_now

EVERYTHING = 1_000_000


class AccountantContract:
    """Needs the fixtures ``accountant`` and ``store``, its store. The ledger may hold earlier charges.

    Attributes:
        keeps_ledger: charges are written and shown by ``history``.
        enforces: charges over the budget are refused, and none is written while the ledger is frozen.
        privacy_unit: of the accountant's settings.
    """

    keeps_ledger = True
    enforces = True
    privacy_unit = "record"

    def small(self, unit_id: str = "vehicle-00") -> Charge:
        """A small charge of a new output."""
        return Charge("run-conformance", 1, unit_id, uuid.uuid4().hex * 2, 8.0, 0.1, 1, self.privacy_unit)

    def excess(self, unit_id: str = "vehicle-00") -> Charge:
        """A charge that exceeds a budget of 10, which an accountant finds out quickly."""
        return Charge("run-conformance", 1, unit_id, uuid.uuid4().hex * 2, 1.0, 1.0, 6, self.privacy_unit)

    def entries(self, accountant: AccountantPort) -> list[Charge]:
        return [entry.charge for entry in accountant.history(limit=EVERYTHING)]

    def test_charges_are_written_in_their_order(self, accountant: AccountantPort) -> None:
        charges = [self.small(), self.small("vehicle-01")]
        before = len(self.entries(accountant))
        accountant.charge(charges)
        assert self.entries(accountant)[before:] == (charges if self.keeps_ledger else [])

    def test_a_repeated_charge_is_written_once(self, accountant: AccountantPort) -> None:
        first, second = self.small(), self.small()
        before = len(self.entries(accountant))
        accountant.charge([first])
        accountant.charge([first, second])
        assert len(self.entries(accountant)) - before == (2 if self.keeps_ledger else 0)

    def test_history_can_be_limited_in_number_and_time(self, accountant: AccountantPort) -> None:
        accountant.charge([self.small(), self.small()])
        assert len(accountant.history(limit=1)) <= 1
        assert list(accountant.history(since=utc_now() + timedelta(days=1))) == []
        sequences = [entry.sequence for entry in accountant.history(limit=EVERYTHING)]
        assert sequences == sorted(set(sequences))

    def test_questions_write_nothing(self, accountant: AccountantPort) -> None:
        before = self.entries(accountant)
        accountant.check([self.small()])
        assert accountant.within_budget([self.small(), self.small("vehicle-01")]) == {"vehicle-00", "vehicle-01"}
        assert accountant.budget().epsilon_spent >= 0
        assert accountant.budget(outlook=True).epsilon_spent == accountant.budget().epsilon_spent
        assert self.entries(accountant) == before

    def test_charges_over_the_budget_are_refused_all_together(self, accountant: AccountantPort) -> None:
        if not self.enforces:
            accountant.charge([self.small(), self.excess("vehicle-01")])
            return
        before = self.entries(accountant)
        with pytest.raises(BudgetExhaustedError):
            accountant.check([self.small(), self.excess("vehicle-01")])
        with pytest.raises(BudgetExhaustedError):
            accountant.charge([self.small(), self.excess("vehicle-01")])
        assert accountant.within_budget([self.small(), self.excess("vehicle-01")]) == {"vehicle-00"}
        assert self.entries(accountant) == before

    def test_nothing_is_charged_while_the_ledger_is_frozen(self, accountant: AccountantPort, store: Store) -> None:
        if not self.enforces:
            return
        before = self.entries(accountant)
        store.ledger.freeze(LedgerFreeze("inc-conformance", "test", "nobody", utc_now()))
        try:
            for refused in (accountant.charge, accountant.check, accountant.within_budget):
                with pytest.raises(LedgerFrozenError):
                    refused([self.small()])
            assert accountant.budget().frozen is not None
        finally:
            store.ledger.unfreeze("inc-conformance")
        assert self.entries(accountant) == before
        accountant.charge([self.small()])

    def test_a_new_budget_begins_a_period_once_for_each_key(self, accountant: AccountantPort) -> None:
        accountant.charge([self.small()])
        before, key = accountant.budget(), uuid.uuid4().hex
        grant = (before.target_epsilon + 1, "a longer justification than twenty characters", "someone", "another")
        granted = accountant.reset_budget(*grant, call_key=key)
        again = accountant.reset_budget(*grant, call_key=key)
        assert (granted.period, granted.target_epsilon) == (before.period + 1, before.target_epsilon + 1)
        assert (again.period, again.target_epsilon) == (granted.period, granted.target_epsilon)
        assert granted.lifetime_epsilon == before.lifetime_epsilon

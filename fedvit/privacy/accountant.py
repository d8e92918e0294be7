"""The privacy accountant: one writer of one append-only ledger, and the only one that says what is left.

No amplification by the sampling of clients is claimed anywhere, only by each client's Poisson sampling of its records.
So asynchronous rounds change nothing here: a release is charged before its training starts, and whether it is folded at
once, late or never, it costs the same.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from fedvit.config import Settings, environment_settings
from fedvit.errors import BudgetExhaustedError
from fedvit.ports import Charge, LedgerEntry
from fedvit.privacy.accountants import Composition, PoissonGaussian, epsilon_pld, epsilon_rdp
from fedvit.store.store import BudgetPeriod, Store
from fedvit.types import BudgetReport


class PrivacyAccountant:
    """Charges releases to units and keeps every unit within the budget.

    A unit is one client's data set: its records are disjoint from every other's, so spends on different clients compose
    in parallel and the budget is spent by the most exposed client. All runs of a state folder draw on the same budget.
    A new budget begins a new period: earlier charges stay on the ledger and in ``lifetime_epsilon``, and count no more.

    Safe for threads.

    Args:
        store: where the ledger lies; by default the state folder of the settings.
        settings: by default those of the environment.
    """

    def __init__(self, store: Store | None = None, settings: Settings | None = None) -> None:
        self._settings = settings or environment_settings()
        self._store = store or Store.open(self._settings.home)
        self._lifetime = _Spends(after=0)
        # The first period is the whole ledger.
        self._period: BudgetPeriod | None = None
        self._spends = self._lifetime
        self._lock = threading.RLock()
        self._read_ledger()

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        """Write the charges, all or none, before anything is released; see :class:`fedvit.ports.AccountantPort`.

        Raises:
            BudgetExhaustedError: with them some unit would pass the period's budget; nothing was written.
            LedgerFrozenError: nothing may be charged at all.
        """
        with self._lock:
            self._store.append_charges(charges, self._check)
            return self.budget()

    def check(self, charges: Sequence[Charge]) -> None:
        """Whether the charges could be written now; see :class:`fedvit.ports.AccountantPort`.

        Raises:
            BudgetExhaustedError: with them some unit would pass the period's budget.
            LedgerFrozenError: nothing may be charged at all.
        """
        self._store.check_not_frozen()
        with self._lock:
            self._check(charges)

    def reset_budget(
        self,
        new_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetReport:
        """Begin a new period with its own budget; see :class:`fedvit.ports.AccountantPort`."""
        self._store.grant_budget(new_epsilon, justification, requested_by, approved_by, call_key=call_key)
        return self.budget()

    def budget(self) -> BudgetReport:
        """What the most exposed unit has spent in this period, by PLD and by RDP, and over its lifetime."""
        with self._lock:
            return self._report()

    def get_remaining_epsilon(self) -> float:
        """What may be spent now, never below zero."""
        return self.budget().epsilon_remaining

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """Ledger entries from ``since`` on, oldest first, at most ``limit``."""
        return self._store.ledger(since=since, limit=limit)

    def _report(self) -> BudgetReport:
        self._read_ledger()
        privacy, period, spends = self._settings.privacy, self._period, self._spends
        self._lifetime.read(self._store)
        return BudgetReport(
            privacy_unit=privacy.privacy_unit,
            target_epsilon=self._target_epsilon,
            target_delta=privacy.target_delta,
            epsilon_spent=_most_exposed(spends.units.values(), privacy.target_delta, epsilon_pld),
            epsilon_spent_rdp=_most_exposed(spends.units.values(), privacy.target_delta, epsilon_rdp),
            lifetime_epsilon=_most_exposed(self._lifetime.units.values(), privacy.target_delta, epsilon_pld),
            rounds_charged=len(spends.rounds),
            clients_charged=len(spends.units),
            period=period.period if period else 1,
            period_started_at=period.at if period else None,
            frozen=self._store.ledger_freeze(),
        )

    @property
    def _target_epsilon(self) -> float:
        return self._period.target_epsilon if self._period else self._settings.privacy.target_epsilon

    def _check(self, charges: Sequence[Charge]) -> None:
        delta = self._settings.privacy.target_delta
        # Another process may have charged, or granted a new budget; inside the writing transaction this is the truth.
        self._read_ledger()
        after = {c.unit_id: Counter(self._spends.units.get(c.unit_id, Counter())) for c in charges}
        for charge in charges:
            after[charge.unit_id][_mechanism(charge)] += charge.steps
        epsilon = _most_exposed(after.values(), delta, epsilon_pld)
        if epsilon > self._target_epsilon:
            raise BudgetExhaustedError(
                f"The round would raise epsilon to {epsilon:.4f}, above the budget of {self._target_epsilon} at "
                f"delta {delta:g}.",
                cure="Training rests; a larger budget needs the privacy officer's decision.",
                projected_epsilon=epsilon,
                target_epsilon=self._target_epsilon,
            )

    def _read_ledger(self) -> None:
        period = self._store.budget_period()
        if period is not None and period != self._period:
            self._period, self._spends = period, _Spends(after=period.ledger_sequence)
        self._spends.read(self._store)


class _Spends:
    """What each unit was charged behind one line of the ledger."""

    def __init__(self, after: int) -> None:
        self.units: dict[str, Counter[PoissonGaussian]] = {}
        self.rounds: set[tuple[str, int]] = set()
        self._last_sequence = after

    def read(self, store: Store) -> None:
        """Take in the lines that came since the last time."""
        for entry in store.ledger(after=self._last_sequence):
            charge = entry.charge
            self.units.setdefault(charge.unit_id, Counter())[_mechanism(charge)] += charge.steps
            self.rounds.add((charge.run_id, charge.round_index))
            self._last_sequence = entry.sequence


def _most_exposed(
    spends: Iterable[Counter[PoissonGaussian]], delta: float, epsilon: Callable[[Composition, float], float]
) -> float:
    # Clients that took part in the same rounds share one composition: epsilon is computed once for all of them.
    return max((epsilon(dict(items), delta) for items in {frozenset(c.items()) for c in spends}), default=0.0)


def _mechanism(charge: Charge) -> PoissonGaussian:
    return PoissonGaussian(charge.noise_multiplier, charge.sampling_prob)

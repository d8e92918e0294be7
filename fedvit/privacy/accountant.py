"""The privacy accountant: one writer of one append-only ledger, and the only one that says what is left.

No amplification by the sampling of clients is claimed anywhere, only by each client's Poisson sampling of its records.
So asynchronous rounds change nothing here: a release is charged before its training starts, and whether it is folded at
once, late or never, it costs the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from fedvit.config import Settings, load_settings
from fedvit.errors import BudgetExhaustedError
from fedvit.ports import Charge, LedgerEntry
from fedvit.privacy.accountants import Composition, PoissonGaussian, epsilon_pld, epsilon_rdp
from fedvit.store.store import Store
from fedvit.types import BudgetReport


class PrivacyAccountant:
    """Charges releases to units and keeps every unit within the budget.

    A unit is one client's data set: its records are disjoint from every other's, so spends on different clients compose
    in parallel and the budget is spent by the most exposed client. All runs of a state folder draw on the same budget.

    Args:
        store: where the ledger lies; by default the state folder of the settings.
        settings: by default those of the environment.
    """

    def __init__(self, store: Store | None = None, settings: Settings | None = None) -> None:
        self._settings = settings or load_settings()
        self._store = store or Store.open(self._settings.home)
        self._spent: dict[str, Counter[PoissonGaussian]] = {}
        self._rounds: set[tuple[str, int]] = set()
        self._last_sequence = 0
        self._read_ledger()

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        """Write the charges, all or none, before anything is released; see :class:`fedvit.ports.AccountantPort`.

        Raises:
            BudgetExhaustedError: with them some unit would pass ``target_epsilon``; nothing was written.
        """
        self._store.append_charges(charges, self._check)
        self._read_ledger()
        return self.budget()

    def check(self, charges: Sequence[Charge]) -> None:
        """Whether the charges could be written now; see :class:`fedvit.ports.AccountantPort`.

        Raises:
            BudgetExhaustedError: with them some unit would pass ``target_epsilon``.
        """
        self._check(charges)

    def budget(self) -> BudgetReport:
        """What the most exposed unit has spent, by PLD and by RDP."""
        privacy = self._settings.privacy
        compositions = self._distinct(self._spent.values())
        spent = max((epsilon_pld(c, privacy.target_delta) for c in compositions), default=0.0)
        return BudgetReport(
            privacy_unit=privacy.privacy_unit,
            target_epsilon=privacy.target_epsilon,
            target_delta=privacy.target_delta,
            epsilon_spent=spent,
            epsilon_spent_rdp=max((epsilon_rdp(c, privacy.target_delta) for c in compositions), default=0.0),
            lifetime_epsilon=spent,
            rounds_charged=len(self._rounds),
            clients_charged=len(self._spent),
        )

    def get_remaining_epsilon(self) -> float:
        """What is left of ``target_epsilon``, never below zero."""
        return self.budget().epsilon_remaining

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """Ledger entries from ``since`` on, oldest first, at most ``limit``."""
        return self._store.ledger(since=since, limit=limit)

    def _check(self, charges: Sequence[Charge]) -> None:
        privacy = self._settings.privacy
        # Another process may have written since; the check runs inside the writing transaction, so this is the truth.
        self._read_ledger()
        after = {c.unit_id: Counter(self._spent.get(c.unit_id, Counter())) for c in charges}
        for charge in charges:
            after[charge.unit_id][_mechanism(charge)] += charge.steps
        for composition in self._distinct(after.values()):
            epsilon = epsilon_pld(composition, privacy.target_delta)
            if epsilon > privacy.target_epsilon:
                raise BudgetExhaustedError(
                    f"The round would raise epsilon to {epsilon:.4f}, above the budget of {privacy.target_epsilon} at "
                    f"delta {privacy.target_delta:g}.",
                    cure="Training rests; a larger budget needs the privacy officer's decision.",
                    projected_epsilon=epsilon,
                    target_epsilon=privacy.target_epsilon,
                )

    def _read_ledger(self) -> None:
        for entry in self._store.ledger(after=self._last_sequence):
            charge = entry.charge
            self._spent.setdefault(charge.unit_id, Counter())[_mechanism(charge)] += charge.steps
            self._rounds.add((charge.run_id, charge.round_index))
            self._last_sequence = entry.sequence

    @staticmethod
    def _distinct(compositions: object) -> list[Composition]:
        """Clients that took part in the same rounds share one composition: epsilon is computed once for all of them."""
        return [dict(items) for items in {frozenset(c.items()) for c in compositions}]  # type: ignore[attr-defined]


def _mechanism(charge: Charge) -> PoissonGaussian:
    return PoissonGaussian(charge.noise_multiplier, charge.sampling_prob)

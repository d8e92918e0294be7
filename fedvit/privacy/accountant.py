"""Privacy accountant: the only writer of the append-only ledger, and the source of the remaining budget.

A mechanism output is charged before its computation starts, and costs the same whether it is aggregated at once, late
or never. Amplification is claimed only where a charge says so: by Poisson sampling of a client's records, or by a
Poisson sample of the clients. The latter is charged to the population: to every client, drawn or not.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TypeAlias

from fedvit.config import Settings
from fedvit.errors import BudgetExhaustedError, StateError
from fedvit.ports import POPULATION, Charge, LedgerEntry
from fedvit.privacy.epsilon import Composition, epsilon_pld, epsilon_rdp, rounds_left
from fedvit.privacy.events import Event
from fedvit.privacy.round_cost import round_event, spend_of
from fedvit.settings import environment_settings
from fedvit.store.records import BudgetPeriod
from fedvit.store.store import Repositories, Store
from fedvit.types import BudgetReport

Spent: TypeAlias = frozenset[tuple[Event, int]]
NOTHING: Spent = frozenset()
# Most spends that are compared with each other, to skip those that cannot have the largest epsilon.
_COMPARED = 200


class PrivacyAccountant:
    """Charges mechanism outputs to units within the budget; implements :class:`fedvit.ports.AccountantPort`.

    A unit is one client's data set. Clients' records are disjoint, so spends of different clients compose in parallel,
    and the spent epsilon is that of the most exposed client: its own charges and the population's together. All runs of
    a state folder share the budget. A new budget begins a new period: earlier charges stay on the ledger and in
    ``lifetime_epsilon``, and no longer count against the budget.

    Protection of a whole client implies that of its records, but not the reverse. So charges for clients count where
    records are the unit, and charges for records are an error where clients are the unit.

    Thread-safe.

    Args:
        store: holds the ledger; by default that of the state folder in the settings.
        settings: by default those of the environment.

    Raises:
        StateError: the ledger has a charge that this accountant cannot interpret; it is named.
    """

    def __init__(self, store: Store | None = None, settings: Settings | None = None) -> None:
        self._settings = settings or environment_settings()
        self._store = store or Store.open(self._settings.home)
        self._lifetime = _Spends(self._settings.privacy.privacy_unit, after=0)
        # The first period is the whole ledger.
        self._period: BudgetPeriod | None = None
        self._spends = self._lifetime
        self._lock = threading.RLock()
        self._reported: tuple[int, BudgetReport] | None = None
        self._read_ledger(self._store)

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        """Write all charges, or none, and report the budget."""
        self.write(charges)
        return self.budget()

    def write(self, charges: Sequence[Charge], admit: Callable[[Repositories], None] | None = None) -> None:
        """Like :meth:`charge`, without the budget report, which takes longer than writing.

        Args:
            admit: called first in the same transaction; what it writes is committed with the charges, and what it
                raises undoes both.
        """
        with self._lock, self._store.transaction() as transaction:
            if admit is not None:
                admit(transaction)
            new = transaction.ledger.not_yet_written(charges)
            if new:
                transaction.ledger.check_not_frozen()
                self._check(transaction, new)
                transaction.ledger.append(new)

    def check(self, charges: Sequence[Charge]) -> None:
        """Raise what :meth:`charge` would raise for these charges now, and write nothing."""
        self._store.ledger.check_not_frozen()
        with self._lock:
            self._check(self._store, charges)

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        """The units that could each be charged their own of these charges now."""
        self._store.ledger.check_not_frozen()
        with self._lock:
            self._read_ledger(self._store)
            fits: dict[Spent, bool] = {}
            units = set()
            for charge in charges:
                for spent in self._spends.after([charge]):
                    if spent not in fits:
                        fits[spent] = self._epsilon_if_above_target([spent]) is None
                    if fits[spent]:
                        units.add(charge.unit_id)
            return frozenset(units)

    def reset_budget(
        self,
        new_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetReport:
        """Begin a new period with its own budget."""
        self._store.budget.grant(new_epsilon, justification, requested_by, approved_by, call_key=call_key)
        return self.budget(outlook=True)

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        """Epsilon of the most exposed unit, in this period by PLD and by RDP, and over its lifetime."""
        with self._lock:
            # Read first: what is committed during the report is read again by the next one.
            counter = self._store.change_counter()
            if self._reported is None or self._reported[0] != counter:
                self._reported = counter, self._report()
            report = self._reported[1]
            return self._with_outlook(report) if outlook else report

    def get_remaining_epsilon(self) -> float:
        """Epsilon that may be spent now, at least 0."""
        with self._lock:
            self._read_ledger(self._store)
            spent = _most_exposed(self._spends.all(), self._settings.privacy.target_delta, epsilon_pld)
            return 0.0 if self._store.ledger.current_freeze() else max(0.0, self._target_epsilon - spent)

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """Ledger entries from ``since`` on, oldest first, at most ``limit``."""
        return self._store.ledger.entries(since=since, limit=limit)

    def _report(self) -> BudgetReport:
        self._read_ledger(self._store)
        privacy, period, spends = self._settings.privacy, self._period, self._spends
        self._lifetime.read(self._store)
        return BudgetReport(
            privacy_unit=privacy.privacy_unit,
            target_epsilon=self._target_epsilon,
            target_delta=privacy.target_delta,
            epsilon_spent=_most_exposed(spends.all(), privacy.target_delta, epsilon_pld),
            epsilon_spent_rdp=_most_exposed(spends.all(), privacy.target_delta, epsilon_rdp),
            lifetime_epsilon=_most_exposed(self._lifetime.all(), privacy.target_delta, epsilon_pld),
            rounds_charged=len(spends.rounds),
            clients_charged=max(len(spends.own), self._store.clients.population() if spends.population else 0),
            period=period.period if period else 1,
            period_started_at=period.at if period else None,
            frozen=self._store.ledger.current_freeze(),
        )

    def _with_outlook(self, report: BudgetReport) -> BudgetReport:
        run = self._store.runs.latest()
        noise_multiplier = self._settings.privacy.noise_multiplier or (run.noise_multiplier if run else None)
        if noise_multiplier is None:
            return report
        a_round, delta = round_event(self._settings, noise_multiplier), report.target_delta
        composed = (Counter(dict(spent)) for spent in self._spends.all())
        spent = max(composed, key=lambda composition: epsilon_pld(composition, delta), default=Counter())
        left = rounds_left(spent, a_round, target_epsilon=report.target_epsilon, target_delta=delta)
        return replace(
            report,
            next_round_epsilon=epsilon_pld(spent + Counter({a_round: 1}), delta),
            rounds_left=0 if report.frozen else left,
        )

    @property
    def _target_epsilon(self) -> float:
        return self._period.target_epsilon if self._period else self._settings.privacy.target_epsilon

    def _check(self, store: Repositories, charges: Sequence[Charge]) -> None:
        # Another process may have charged, or begun a new period; within the writing transaction this is current.
        self._read_ledger(store)
        epsilon = self._epsilon_if_above_target(self._spends.after(charges))
        if epsilon is not None:
            raise BudgetExhaustedError(
                f"The round would raise epsilon to {epsilon:.4f}, above the budget of {self._target_epsilon} at "
                f"delta {self._settings.privacy.target_delta:g}.",
                cure="Training rests; a larger budget needs the privacy officer's decision.",
                projected_epsilon=epsilon,
                target_epsilon=self._target_epsilon,
            )

    def _epsilon_if_above_target(self, spends: Collection[Spent]) -> float | None:
        """The largest epsilon of the spends if it is above the budget, else None."""
        return _epsilon_if_above(self._target_epsilon, spends, self._settings.privacy.target_delta)

    def _read_ledger(self, store: Repositories) -> None:
        period = store.budget.current()
        if period is not None and period != self._period:
            self._period = period
            self._spends = _Spends(self._settings.privacy.privacy_unit, after=period.ledger_sequence)
        self._spends.read(store)


def epsilon_spent_at(store: Store, settings: Settings, at: datetime) -> float:
    """Epsilon of the most exposed unit at a time, by PLD, in the budget period of that time.

    Raises:
        StateError: the ledger has a charge that cannot be interpreted.
    """
    started = [period.ledger_sequence for period in store.budget.periods() if period.at <= at]
    spends = _Spends(settings.privacy.privacy_unit, after=started[-1] if started else 0)
    spends.read(store, until=at)
    return _most_exposed(spends.all(), settings.privacy.target_delta, epsilon_pld)


def epsilon_above(limit: float, charges: Iterable[Charge], settings: Settings) -> float | None:
    """Epsilon of the most exposed unit by these charges alone if it is above ``limit``, else None.

    Raises:
        StateError: one of them cannot be interpreted.
    """
    spends = _Spends(settings.privacy.privacy_unit, after=0)
    for charge in charges:
        spends.take(charge)
    return _epsilon_if_above(limit, spends.all(), settings.privacy.target_delta)


def epsilon_of(charges: Iterable[Charge], settings: Settings) -> float:
    """Epsilon of the most exposed unit by these charges alone, by PLD.

    Raises:
        StateError: one of them cannot be interpreted.
    """
    spends = _Spends(settings.privacy.privacy_unit, after=0)
    for charge in charges:
        spends.take(charge)
    return _most_exposed(spends.all(), settings.privacy.target_delta, epsilon_pld)


class _Spends:
    """Charges after one entry of the ledger, to single units and to the whole population.

    Units of the same rounds share one composition, so that a large fleet costs one reference a unit.
    """

    def __init__(self, privacy_unit: str, after: int) -> None:
        self.own: dict[str, Spent] = {}
        self.population: Spent = NOTHING
        self.rounds: set[tuple[str, int]] = set()
        self._holders: Counter[Spent] = Counter()
        self._sums: dict[tuple[Spent, Event, int], Spent] = {}
        self._privacy_unit = privacy_unit
        self._last_sequence = after

    def read(self, store: Repositories, until: datetime | None = None) -> None:
        """Add the entries since the last call, up to ``until``."""
        for entry in store.ledger.entries(after=self._last_sequence):
            if until is not None and entry.at > until:
                return
            self.take(entry.charge)
            self._last_sequence = entry.sequence

    def all(self) -> set[Spent]:
        """Spends of all units, one without charges of its own included."""
        return {self.population, *(_together(self.population, own) for own in self._holders)}

    def after(self, charges: Sequence[Charge]) -> set[Spent]:
        """Spends of the charged units after these charges."""
        added: dict[str, Spent] = {}
        for charge in charges:
            added[charge.unit_id] = self._plus(added.get(charge.unit_id, NOTHING), *self._spend_of(charge))
        everybody = _together(self.population, added.get(POPULATION, NOTHING))
        pairs = {(self.own.get(unit_id, NOTHING), more) for unit_id, more in added.items() if unit_id != POPULATION}
        charged = {_together(everybody, own, more) for own, more in pairs}
        if POPULATION not in added:
            return charged
        return {everybody, *charged, *(_together(everybody, own) for own in self._holders)}

    def take(self, charge: Charge) -> None:
        """Add one charge."""
        self.rounds.add((charge.run_id, charge.round_index))
        spend = self._spend_of(charge)
        if charge.unit_id == POPULATION:
            self.population = self._plus(self.population, *spend)
            return
        before = self.own.get(charge.unit_id, NOTHING)
        self.own[charge.unit_id] = after = self._plus(before, *spend)
        self._holders[after] += 1
        if before:
            self._holders[before] -= 1
            if not self._holders[before]:
                del self._holders[before]

    def _plus(self, spent: Spent, event: Event, times: int) -> Spent:
        """``spent`` with one more event; equal sums are one object."""
        key = spent, event, times
        if key not in self._sums:
            self._sums[key] = _together(spent, frozenset({(event, times)}))
        return self._sums[key]

    def _spend_of(self, charge: Charge) -> tuple[Event, int]:
        if self._privacy_unit == "client" and charge.privacy_unit != "client":
            raise StateError(
                f"Round {charge.round_index} of {charge.run_id} was charged for single records; what the client "
                f"{charge.unit_id!r} as a whole lost by it has no bound.",
                cure="Train with privacy.privacy_unit 'record', or begin another state folder.",
            )
        return spend_of(charge)


def _together(*spends: Spent) -> Spent:
    whole: Counter[Event] = Counter()
    for spent in spends:
        for event, times in spent:
            whole[event] += times
    return frozenset(whole.items())


def _epsilon_if_above(limit: float, spends: Collection[Spent], delta: float) -> float | None:
    # RDP is never below PLD, and ten times as fast: what RDP admits, PLD admits.
    if _most_exposed(spends, delta, epsilon_rdp) <= limit:
        return None
    epsilon = _most_exposed(spends, delta, epsilon_pld)
    return epsilon if epsilon > limit else None


def _most_exposed(spends: Collection[Spent], delta: float, epsilon: Callable[[Composition, float], float]) -> float:
    """The largest epsilon of the spends; those that another contains event by event are skipped, being smaller."""
    composed = [dict(spent) for spent in spends]
    return max((epsilon(one, delta) for one in composed if not _contained(one, composed)), default=0.0)


def _contained(one: dict[Event, int], others: Sequence[dict[Event, int]]) -> bool:
    return len(others) <= _COMPARED and any(
        other is not one and one.keys() <= other.keys() and all(other[event] >= times for event, times in one.items())
        for other in others
    )

"""Rounds, updates and privacy budget that were lost in an incident, counted from the store.

A round that is still under way is not counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedvit.config import Settings
from fedvit.ports import Charge
from fedvit.privacy.accountant import epsilon_of
from fedvit.privacy.events import Gaussian
from fedvit.privacy.round_cost import spend_of
from fedvit.store.store import Store

RoundId = tuple[str, int]
"""A run's id and the index of a round in it."""


@dataclass(frozen=True, slots=True)
class LossBaseline:
    """The state to compare with: the last line of the ledger, and the committed rounds with their versions."""

    ledger_sequence: int
    committed: frozenset[tuple[str, int, str | None]]

    @classmethod
    def of(cls, store: Store) -> LossBaseline:
        """The present state of a store."""
        ledger = store.ledger.entries()
        return cls(ledger[-1].sequence if ledger else 0, _committed(store))


@dataclass(frozen=True, slots=True)
class Losses:
    """Rounds and updates since a baseline.

    Attributes:
        rounds_lost: committed rounds that are gone, and charged rounds that will never be committed.
        updates_lost: charged updates that count in no round.
        updates_doubled: updates that count more than once for one charge.
        uncharged: updates that count and are not in the ledger; must be 0.
        epsilon_difference: the spend in the ledger since the baseline minus the spend of what was released since, of
            the most exposed unit. Above 0, something was charged and not released; it must never be below 0.
    """

    rounds_committed: int
    rounds_lost: int
    updates: int
    updates_lost: int
    updates_doubled: int
    uncharged: int
    epsilon_difference: float


def count_losses(store: Store, settings: Settings, since: LossBaseline) -> Losses:
    """Count the losses since a baseline, after verifying the ledger.

    Raises:
        IntegrityError: the ledger is damaged.
    """
    store.ledger.verify()
    charges = [entry.charge for entry in store.ledger.entries(after=since.ledger_sequence)]
    for_rounds = [charge for charge in charges if not _is_for_histogram(charge)]
    # Read before the committed rounds: a round that is committed in between must be one or the other.
    unfinished = _unfinished(store)
    committed = _committed(store)
    known = {(run_id, index) for run_id, index, _ in committed}
    settled = [charge for charge in for_rounds if _round(charge) not in unfinished]
    counts = _answer_counts(store, {charge.run_id for charge in for_rounds})
    counted = [charge for charge in settled if counts.get((*_round(charge), charge.unit_id))]
    fresh = {(run_id, index) for run_id, index, _ in committed - since.committed}
    accepted = {key: count for key, count in counts.items() if key[:2] in fresh}
    paid = {(*_round(charge), charge.unit_id) for entry in store.ledger.entries() if (charge := entry.charge)}
    histograms = [charge for charge in charges if _is_for_histogram(charge)]
    return Losses(
        rounds_committed=len(committed - since.committed),
        rounds_lost=len(since.committed - committed) + len({_round(charge) for charge in settled} - known),
        updates=sum(accepted.values()),
        updates_lost=len(settled) - len(counted),
        updates_doubled=sum(count - 1 for count in accepted.values()),
        uncharged=len(accepted.keys() - paid),
        epsilon_difference=epsilon_of(settled + histograms, settings) - epsilon_of(counted + histograms, settings),
    )


def match(drawn: Sequence[int], answered: Sequence[tuple[int, bool]]) -> Counter[int]:
    """The number of a client's counted answers to each round that it was drawn for, by that round.

    Args:
        drawn: the rounds, in order: a client is drawn again only after it has answered or was given up.
        answered: the rounds that received an answer of the client, in order, and whether it counts.
    """
    origins: Counter[int] = Counter()
    for index, counts in answered:
        origin = max((first for first in drawn if first <= index), default=None)
        if origin is not None and counts:
            origins[origin] += 1
    return origins


def _answer_counts(store: Store, run_ids: Iterable[str]) -> Counter[tuple[str, int, str]]:
    totals: Counter[tuple[str, int, str]] = Counter()
    for run_id in run_ids:
        drawn: dict[str, list[int]] = defaultdict(list)
        answered: dict[str, list[tuple[int, bool]]] = defaultdict(list)
        for record in store.rounds.of_run(run_id):
            for client_id in record.cohort:
                drawn[client_id].append(record.round_index)
        for index, client_id, counts in store.rounds.answers(run_id):
            answered[client_id].append((index, counts))
        for client_id, rounds in answered.items():
            for origin, count in match(drawn[client_id], rounds).items():
                totals[run_id, origin, client_id] = count
    return totals


def _unfinished(store: Store) -> set[RoundId]:
    """The uncommitted rounds of runs that may be continued."""
    records = (record for run in store.runs.all() if run.status.resumable for record in store.rounds.of_run(run.run_id))
    return {(record.run_id, record.round_index) for record in records if not record.committed}


def _committed(store: Store) -> frozenset[tuple[str, int, str | None]]:
    records = (record for run in store.runs.all() for record in store.rounds.of_run(run.run_id))
    return frozenset((record.run_id, record.round_index, record.version) for record in records if record.committed)


def _is_for_histogram(charge: Charge) -> bool:
    """Whether a charge is for a client's private histogram, which belongs to no round."""
    return charge.privacy_unit == "record" and isinstance(spend_of(charge)[0], Gaussian)


def _round(charge: Charge) -> RoundId:
    return charge.run_id, charge.round_index

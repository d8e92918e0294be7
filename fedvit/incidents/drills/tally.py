"""What an incident cost: rounds, updates and privacy, counted from the state itself and not from what anybody says.

Only what is settled counts: a round under way goes on.
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

Place = tuple[str, int]
"""A run's id and the index of a round in it."""
Answer = tuple[int, str, bool]


@dataclass(frozen=True, slots=True)
class Mark:
    """Where the state stood: the last line of the ledger, and the rounds that were committed, with their versions."""

    ledger_sequence: int
    committed: frozenset[tuple[str, int, str | None]]


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of everything since a mark.

    Attributes:
        rounds_lost: they were committed and are gone, or clients were charged for them and they will never be.
        updates_lost: charged, and counted in no round.
        updates_doubled: taken a second time for one charge.
        uncharged: updates that count and are not on the ledger; one is too many.
        epsilon_difference: what the ledger says was spent since the mark, less what was released since, at the most
            exposed unit. Above 0, something was paid for and not had; it must never be below.
    """

    rounds_committed: int
    rounds_lost: int
    updates: int
    updates_lost: int
    updates_doubled: int
    uncharged: int
    epsilon_difference: float


def mark(store: Store) -> Mark:
    """Remember where the state stands."""
    ledger = store.ledger.entries()
    return Mark(ledger[-1].sequence if ledger else 0, _committed(store))


def tally(store: Store, settings: Settings, since: Mark) -> Tally:
    """Count what happened since; every hash chain is verified on the way.

    Raises:
        IntegrityError: the ledger is not whole.
    """
    store.ledger.verify()
    charges = [entry.charge for entry in store.ledger.entries(after=since.ledger_sequence)]
    asked = [charge for charge in charges if not _is_sketch(charge)]
    # Before the committed ones: a round that is committed in between must be one or the other.
    going_on = _going_on(store)
    committed = _committed(store)
    known = {(run_id, index) for run_id, index, _ in committed}
    settled = [charge for charge in asked if _place(charge) not in going_on]
    taken = _taken(store, {charge.run_id for charge in asked})
    counted = [charge for charge in settled if taken.get((*_place(charge), charge.unit_id))]
    fresh = {(run_id, index) for run_id, index, _ in committed - since.committed}
    accepted = {key: count for key, count in taken.items() if key[:2] in fresh}
    paid = {(*_place(charge), charge.unit_id) for entry in store.ledger.entries() if (charge := entry.charge)}
    histograms = [charge for charge in charges if _is_sketch(charge)]
    return Tally(
        rounds_committed=len(committed - since.committed),
        rounds_lost=len(since.committed - committed) + len({_place(charge) for charge in settled} - known),
        updates=sum(accepted.values()),
        updates_lost=len(settled) - len(counted),
        updates_doubled=sum(count - 1 for count in accepted.values()),
        uncharged=len(accepted.keys() - paid),
        epsilon_difference=epsilon_of(settled + histograms, settings) - epsilon_of(counted + histograms, settings),
    )


def match(drawn: Sequence[int], answered: Sequence[tuple[int, bool]]) -> Counter[int]:
    """How many answers that count a client gave to each round that it was drawn for, by that round.

    Args:
        drawn: the rounds, in order: it is drawn again only once it has answered, or was given up.
        answered: the rounds that took an answer of it, in order, and whether it counts.
    """
    found: Counter[int] = Counter()
    for index, counts in answered:
        origin = max((first for first in drawn if first <= index), default=None)
        if origin is not None and counts:
            found[origin] += 1
    return found


def _taken(store: Store, run_ids: Iterable[str]) -> Counter[tuple[str, int, str]]:
    found: Counter[tuple[str, int, str]] = Counter()
    for run_id in run_ids:
        drawn: dict[str, list[int]] = defaultdict(list)
        answered: dict[str, list[tuple[int, bool]]] = defaultdict(list)
        for record in store.rounds.of_run(run_id):
            for client_id in record.cohort:
                drawn[client_id].append(record.round_index)
        for index, client_id, counts in store.rounds.answers(run_id):
            answered[client_id].append((index, counts))
        for client_id, given in answered.items():
            for origin, count in match(drawn[client_id], given).items():
                found[run_id, origin, client_id] = count
    return found


def _going_on(store: Store) -> set[Place]:
    """The rounds that are not settled: not committed, in a run that may be continued."""
    records = (record for run in store.runs.all() if run.status.resumable for record in store.rounds.of_run(run.run_id))
    return {(record.run_id, record.round_index) for record in records if not record.committed}


def _committed(store: Store) -> frozenset[tuple[str, int, str | None]]:
    records = (record for run in store.runs.all() for record in store.rounds.of_run(run.run_id))
    return frozenset((record.run_id, record.round_index, record.version) for record in records if record.committed)


def _is_sketch(charge: Charge) -> bool:
    """Whether it is for a client's noised counts, which no round takes in."""
    return charge.privacy_unit == "record" and isinstance(spend_of(charge)[0], Gaussian)


def _place(charge: Charge) -> Place:
    return charge.run_id, charge.round_index

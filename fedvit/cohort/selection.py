"""Selection of a round's cohort by secret coins, from the eligible clients in the store.

A fleet of millions is never read as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedvit.config import CohortConfig
from fedvit.errors import BudgetExhaustedError
from fedvit.ports import AccountantPort, Charge
from fedvit.privacy.randomness import SecretStream
from fedvit.store.store import Store
from fedvit.types import Cohort

_LEAST_LOOKUP = 16


class ClientPool(Protocol):
    """The registered clients, each at a position; there may be very many, and few of them are ever looked up."""

    def size(self) -> int:
        """How many positions there are, from 0."""
        ...

    def eligible_at(self, positions: Sequence[int]) -> Mapping[int, str]:
        """Of the clients at these positions, those that may be drawn now, by position."""
        ...


class ListedPool:
    """A pool of listed clients, all of which may be drawn."""

    def __init__(self, client_ids: Sequence[str]) -> None:
        self._ids = sorted(client_ids)

    def size(self) -> int:
        return len(self._ids)

    def eligible_at(self, positions: Sequence[int]) -> Mapping[int, str]:
        return {position: self._ids[position] for position in positions}


class EligibleClients:
    """The clients that may be drawn for one round, read from the store a few at a time. Implements :class:`ClientPool`.

    A client is eligible if it is active and has data, has a participation left in the run, rested long enough since its
    last one, and has the budget for one more.

    Args:
        charges: what the participation of these clients costs; None where one charge stands for the whole population.
        heard_since: a remote client that was silent for longer is not eligible.
        identified: nor is one without an identity key, which secure aggregation needs.
    """

    def __init__(
        self,
        store: Store,
        accountant: AccountantPort,
        config: CohortConfig,
        run_id: str,
        round_index: int,
        *,
        charges: Callable[[Sequence[str]], Sequence[Charge]] | None,
        heard_since: datetime,
        identified: bool = False,
    ) -> None:
        self._store, self._accountant, self._config = store, accountant, config
        self._run_id, self._round_index = run_id, round_index
        self._charges, self._heard_since, self._identified = charges, heard_since, identified
        self._size = store.clients.population()
        self._ignore_budget = False
        self._eligible = self._not_capped = self._affordable = self._over_budget = 0

    def size(self) -> int:
        return self._size

    def eligible_at(self, positions: Sequence[int]) -> Mapping[int, str]:
        validated_only = self._config.client_selection == "validated_only"
        clients = self._store.clients.eligible_at(
            positions,
            validated_only=validated_only,
            heard_since=self._heard_since,
            identified=self._identified,
        )
        rested, not_capped = self._rested(list(clients.values()))
        within = rested
        if self._charges is not None and rested:
            within = self._accountant.within_budget(self._charges(list(rested)))
        self._eligible += len(clients)
        self._not_capped += not_capped
        self._affordable += len(within)
        self._over_budget += len(rested) - len(within)
        admitted = rested if self._ignore_budget else within
        return {position: client_id for position, client_id in clients.items() if client_id in admitted}

    def ignore_budget(self) -> EligibleClients:
        """From now on, budgets play no part."""
        self._ignore_budget = True
        return self

    def draw(self, secret: bytes, in_flight: Collection[str] = ()) -> Cohort:
        """The cohort. Where no budget admits the round, it is one that the charge will refuse with the reason.

        Raises:
            BudgetExhaustedError: no client may take part in this run any more.
        """
        cohort = self._draw(secret, in_flight)
        if self._eligible and not self._not_capped:
            most = self._config.max_participations or self._round_index
            raise BudgetExhaustedError(
                f"Each of {self._eligible} clients has taken part in {most} rounds of {self._run_id}; the cap is "
                f"{most}.",
                cure="Training rests; another run, with its own charges, may use them again.",
            )
        if cohort.client_ids or self._affordable or not self._over_budget:
            return cohort
        return self.ignore_budget()._draw(secret, in_flight)

    def _draw(self, secret: bytes, in_flight: Collection[str]) -> Cohort:
        run_id, round_index = self._run_id, self._round_index
        return draw_cohort(
            self._config, self, run_id=run_id, round_index=round_index, secret=secret, in_flight=in_flight
        )

    def _rested(self, client_ids: Sequence[str]) -> tuple[frozenset[str], int]:
        """The clients that rested since their last participation, and how many have a participation left."""
        cap, apart = self._config.max_participations, self._config.min_separation
        if cap is None and apart == 1:
            return frozenset(client_ids), len(client_ids)
        engagements = self._store.rounds.engagements(self._run_id, self._round_index, client_ids)
        # How often each took part, and in which round last.
        history = {client_id: engagements.get(client_id, (0, 0)) for client_id in client_ids}
        left = [client_id for client_id in client_ids if history[client_id][0] < (cap or self._round_index)]
        rested = (c for c in left if history[c][1] == 0 or self._round_index - history[c][1] >= apart)
        return frozenset(rested), len(left)


def draw_cohort(
    config: CohortConfig,
    pool: ClientPool | Sequence[str],
    *,
    run_id: str,
    round_index: int,
    secret: bytes,
    in_flight: Collection[str] = (),
) -> Cohort:
    """The cohort of one round; equal arguments give an equal cohort, so that a retry draws the same.

    ``uniform`` draws ``draw_size`` clients without replacement, or all where there are fewer. Clients in flight still
    work on an earlier round: they are not drawn, and each of them takes up a place. ``poisson`` tosses a coin for each
    client, independently of all others; there no client may be in flight. Of the pool, only those clients are looked up
    that may come into the cohort; a sequence is a pool of ids.

    Raises:
        ValueError: a client is in flight, and the cohort is to be a Poisson sample.
    """
    pool = ListedPool(pool) if isinstance(pool, Sequence) else pool
    stream = SecretStream(secret, "cohort", {"run_id": run_id, "round_index": round_index})
    if config.sampling_prob is not None:
        if in_flight:
            raise ValueError("clients in flight cannot be drawn, so the sample would not be a Poisson sample")
        # A coin for every position: the eligible ones among the heads are a Poisson sample of the eligible clients.
        heads = stream.coins(pool.size(), config.sampling_prob).nonzero()[0]
        return Cohort(round_index, tuple(sorted(_eligible(pool, heads, len(heads), ()))))
    wanted = None if config.selection == "all" else config.draw_size
    if wanted is None:
        everybody = _eligible(pool, np.arange(pool.size()), pool.size(), in_flight)
        return Cohort(round_index, tuple(sorted(everybody)))
    places = max(0, wanted - len(in_flight))
    order = stream.uniform(pool.size()).argsort(kind="stable")
    return Cohort(round_index, tuple(sorted(islice(_eligible(pool, order, places, in_flight), places))))


def _eligible(pool: ClientPool, order: npt.NDArray[np.int64], wanted: int, in_flight: Collection[str]) -> Iterator[str]:
    """Eligible clients in this order; looked up a few more at a time than are still wanted."""
    start, count = 0, 0
    while start < len(order) and count < wanted:
        # More and more at a time: where few clients are eligible, many have to be looked up.
        missing = wanted - count
        chunk = order[start : start + max(_LEAST_LOOKUP, start, missing + missing // 8)].tolist()
        start += len(chunk)
        eligible = pool.eligible_at(chunk)
        for client_id in (eligible[position] for position in chunk if position in eligible):
            if client_id not in in_flight:
                count += 1
                yield client_id

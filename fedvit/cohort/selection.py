"""Selection of a round's cohort by secret coins."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedvit.config import CohortConfig
from fedvit.privacy.randomness import SecretStream
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
        """How many clients are listed."""
        return len(self._ids)

    def eligible_at(self, positions: Sequence[int]) -> Mapping[int, str]:
        """All of them."""
        return {position: self._ids[position] for position in positions}


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

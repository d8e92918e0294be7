"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedvit.config import CohortConfig
from fedvit.privacy.randomness import SecretStream
from fedvit.types import Cohort

_LEAST_ASKED = 16


class EligiblePool(Protocol):
    """The registered clients, of whom there may be very many: each has a position, and few are ever looked at."""

    def size(self) -> int:
        """How many positions there are, from 0."""
        ...

    def admitted(self, positions: Sequence[int]) -> Mapping[int, str]:
        """Of the clients at these positions, those that may be drawn now, by position."""
        ...


class ListedPool:
    """A few clients, all of whom may be drawn."""

    def __init__(self, client_ids: Sequence[str]) -> None:
        self._ids = sorted(client_ids)

    def size(self) -> int:
        """How many they are."""
        return len(self._ids)

    def admitted(self, positions: Sequence[int]) -> Mapping[int, str]:
        """All of them."""
        return {position: self._ids[position] for position in positions}


def draw_cohort(
    config: CohortConfig,
    roll: EligiblePool | Sequence[str],
    *,
    run_id: str,
    round_index: int,
    secret: bytes,
    in_flight: Collection[str] = (),
) -> Cohort:
    """The cohort of one round, by secret coins; equal arguments give an equal cohort, so that a retry draws the same.

    Only clients that come into question are looked up on the roll; a sequence is a roll of ids.

    ``uniform`` draws ``places`` clients without replacement (all of them where there are fewer). Those in flight still
    work on an earlier round: they are not drawn, and each of them takes up one of the places. ``poisson`` tosses a coin
    for each client, whatever falls to the others; there nobody may be in flight.

    Raises:
        ValueError: somebody is in flight, and the cohort is to be a Poisson sample.
    """
    roll = ListedPool(roll) if isinstance(roll, Sequence) else roll
    stream = SecretStream(secret, "cohort", {"run_id": run_id, "round_index": round_index})
    if config.sampling_prob is not None:
        if in_flight:
            raise ValueError("a Poisson sample of whoever happens to be free is none")
        # A coin for every position, whoever may be drawn: those heads that may are a Poisson sample of those who may.
        heads = stream.coins(roll.size(), config.sampling_prob).nonzero()[0]
        return Cohort(round_index, tuple(sorted(_admitted(roll, heads, len(heads), ()))))
    wanted = None if config.selection == "all" else config.draw_size
    if wanted is None:
        everybody = _admitted(roll, np.arange(roll.size()), roll.size(), in_flight)
        return Cohort(round_index, tuple(sorted(everybody)))
    places = max(0, wanted - len(in_flight))
    drawn = _admitted(roll, stream.uniform(roll.size()).argsort(kind="stable"), places, in_flight)
    return Cohort(round_index, tuple(sorted(islice(drawn, places))))


def _admitted(
    roll: EligiblePool, order: npt.NDArray[np.int64], wanted: int, in_flight: Collection[str]
) -> Iterator[str]:
    """Those who may be drawn, in this order; looked up a few more at a time than are wanted still."""
    start, found = 0, 0
    while start < len(order) and found < wanted:
        # Ever more at a time: where hardly anybody may be drawn, many have to be asked.
        chunk = order[start : start + max(_LEAST_ASKED, start, wanted - found + (wanted - found) // 8)].tolist()
        start += len(chunk)
        admitted = roll.admitted(chunk)
        for client_id in (admitted[position] for position in chunk if position in admitted):
            if client_id not in in_flight:
                found += 1
                yield client_id

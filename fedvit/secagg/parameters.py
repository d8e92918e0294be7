"""Public parameters of one secure sum: who takes part, the graph of neighbours, the threshold, the ring.

A client shares its secrets with the neighbours of a k-regular graph instead of all participants (SecAgg+, Bell et al.
2020, eprint 2020/704). Degree and threshold follow from exact hypergeometric tails.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from fedvit.errors import ConfigError
from fedvit.types import CLIENT_ID, DIGEST
from fedvit.wire.untrusted import fields_of, integer, parse_json, text

MAX_PARTICIPANTS = 10_000
MAX_LENGTH = 2**28
MAX_BITS = 32
_MAX_BYTES = 1_000_000
# The server draws the session, and with it the graph: it may try 2^40 of them, and each fails with 2^-40 at most.
_SECURITY = 2.0**-80
# How often an honest round may fail although no more clients drop out than expected.
_CORRECTNESS = 2.0**-10
_FIELDS = ("session", "participants", "neighbours", "threshold", "min_survivors", "bits", "length")


@dataclass(frozen=True)
class Parameters:
    """What all participants of one secure sum agree on. Every signature and key of the sum binds its digest.

    Attributes:
        session: 64 hex digits, of one attempt of one round only.
        participants: client ids, sorted.
        neighbours: so many other clients hold shares of a client's secrets.
        threshold: so many of a client and its neighbours rebuild one of its secrets, and have to confirm a set of
            survivors.
        min_survivors: a sum of fewer vectors is not revealed.
        bits: the ring is that of the integers modulo ``2^bits``.
        length: of the vectors.
    """

    session: str
    participants: tuple[str, ...]
    neighbours: int
    threshold: int
    min_survivors: int
    bits: int
    length: int

    def __post_init__(self) -> None:
        count = len(self.participants)
        if not re.fullmatch(DIGEST, self.session):
            raise ValueError("the session is no 64 hex digits")
        if not 2 <= count <= MAX_PARTICIPANTS or list(self.participants) != sorted(set(self.participants)):
            raise ValueError(f"the participants are not 2 to {MAX_PARTICIPANTS} different clients in order")
        if not all(re.fullmatch(CLIENT_ID, client_id) for client_id in self.participants):
            raise ValueError("a participant has no client id")
        complete = self.neighbours == count - 1
        if not (complete or (2 <= self.neighbours < count - 1 and self.neighbours % 2 == 0)):
            raise ValueError(f"no graph of {count} clients has {self.neighbours} neighbours each")
        # Fewer than a majority could confirm two different survivor sets.
        if not (self.neighbours + 1) // 2 < self.threshold <= self.neighbours + 1:
            raise ValueError(f"a threshold of {self.threshold} is no majority of {self.neighbours + 1} clients")
        if not 2 <= self.min_survivors <= count:
            raise ValueError(f"min_survivors is {self.min_survivors}, and {count} clients take part")
        if not 2 <= self.bits <= MAX_BITS or not 1 <= self.length <= MAX_LENGTH:
            raise ValueError(f"vectors of {self.length} numbers of {self.bits} bits are not summed here")

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, content: str) -> Parameters:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: it is no such JSON, or a value is out of range.
        """
        facts = fields_of(parse_json(content.encode(), max_bytes=_MAX_BYTES), _FIELDS)
        if not isinstance(facts["participants"], list):
            raise ValueError("the participants are no list")
        numbers: dict[str, Any] = {name: integer(facts[name], 0, 2**31) for name in _FIELDS[2:]}
        names = tuple(text(name, 64) for name in facts["participants"])
        return cls(text(facts["session"], 64), names, **numbers)

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of all parameters."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def index(self) -> dict[str, int]:
        """Each participant's position, from 0."""
        return {client_id: position for position, client_id in enumerate(self.participants)}

    @cached_property
    def _ring(self) -> tuple[list[str], dict[str, int]]:
        """The participants in the order of a public permutation, and each one's place in it."""
        order = sorted(self.participants, key=lambda c: hashlib.sha256(f"{self.digest}/{c}".encode()).digest())
        return order, {client_id: place for place, client_id in enumerate(order)}

    def is_parted(self, survivors: Collection[str]) -> bool:
        """Whether the graph of these clients may fall apart: ``neighbours / 2`` places of the ring in a row lack them.

        Otherwise each survivor has the next one as a neighbour, so that no part of the sum can be unmasked alone. It is
        never parted where the graph is complete.
        """
        order, _ = self._ring
        if self.neighbours == len(order) - 1:
            return False
        kept = frozenset(survivors)
        places = [place for place, client_id in enumerate(order) if client_id in kept]
        if not places:
            return True
        following = [*places[1:], places[0] + len(order)]
        return any(b - a > self.neighbours // 2 for a, b in zip(places, following, strict=True))

    def neighbours_of(self, client_id: str) -> tuple[str, ...]:
        """The neighbours of a client, sorted: those at most ``neighbours / 2`` places away on a permuted ring.

        It is a Harary graph, as connected as a graph of this degree can be.
        """
        order, place_of = self._ring
        if self.neighbours == len(order) - 1:
            return tuple(c for c in self.participants if c != client_id)
        place, half = place_of[client_id], self.neighbours // 2
        offsets = (*range(-half, 0), *range(1, half + 1))
        return tuple(sorted(order[(place + offset) % len(order)] for offset in offsets))


def parameters_for(
    session: str,
    participants: Sequence[str],
    *,
    min_survivors: int,
    max_colluding: int,
    dropout_rate: float,
    bits: int,
    length: int,
) -> Parameters:
    """Parameters with the smallest degree that is secure and that tolerates the dropouts.

    With probability 2^-40 at most, for any of 2^40 graphs: as many neighbours of a client collude as could confirm two
    survivor sets or rebuild a secret, or removing colluding and dropped clients parts the graph. With probability 2^-10
    at most, a client keeps fewer neighbours than the threshold. Small cohorts use the complete graph.

    Args:
        session: see :class:`Parameters`.
        max_colluding: participants that may collude with the server.
        dropout_rate: share of the participants that may drop out.

    Raises:
        ConfigError: so many clients may collude or drop out that no threshold exists.
    """
    count = len(participants)
    if count < 2 or not 2 <= min_survivors <= count:
        raise ConfigError(
            f"A secure sum of {count} clients with secure_aggregation.min_survivors {min_survivors}.",
            cure="At least 2 clients have to take part, and min_survivors lies between 2 and their number.",
        )
    degree, threshold = _degree_and_threshold(
        count, max_colluding, min(int(dropout_rate * count), count - min_survivors)
    )
    return Parameters(session, tuple(sorted(participants)), degree, threshold, min_survivors, bits, length)


@lru_cache(maxsize=64)
def _degree_and_threshold(count: int, colluding: int, dropped: int) -> tuple[int, int]:
    for degree in (*range(4, count - 1, 2), count - 1):
        threshold = _threshold(count, degree, colluding)
        complete = degree == count - 1
        if threshold > degree + 1 or (not complete and _parted(count, degree, colluding + dropped) > _SECURITY):
            continue
        # A client that is left counts itself.
        stays = (
            count - 1 - dropped >= threshold - 1
            if complete
            else (count * _at_most(threshold - 2, count - 1, count - 1 - dropped, degree) <= _CORRECTNESS)
        )
        if stays:
            return degree, threshold
    raise ConfigError(
        f"Of {count} clients, {colluding} may collude and {dropped} may drop out: no threshold allows for both.",
        cure="Lower secure_aggregation.max_colluding or dropout_rate, or draw larger cohorts.",
    )


def _threshold(count: int, degree: int, colluding: int) -> int:
    """The smallest threshold at which two survivor sets cannot both be confirmed: ``2 t > degree + 1 + colluders``."""
    most = min(colluding, degree)
    if degree < count - 1:
        while most and count * (1 - _at_most(most - 1, count - 1, colluding, degree)) <= _SECURITY:
            most -= 1
    return (degree + 1 + most) // 2 + 1


def _parted(count: int, degree: int, removed: int) -> float:
    """Bound on the probability that the ring is cut: some ``degree / 2`` clients in a row are all removed."""
    half, probability = degree // 2, float(count)
    for step in range(half):
        probability *= max(0, removed - step) / (count - step)
    return probability


def _at_most(most: int, population: int, marked: int, drawn: int) -> float:
    """Probability of at most ``most`` marked ones among ``drawn`` of a population: the hypergeometric distribution."""
    from scipy.stats import hypergeom

    return float(hypergeom.cdf(most, population, marked, drawn))

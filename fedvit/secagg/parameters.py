"""Public parameters of one secure sum: who takes part, the graph of neighbours, the threshold, the ring.

A client shares its secrets with the neighbours of a k-regular graph instead of all participants (SecAgg+, Bell et al.
2020, eprint 2020/704). Degree and threshold follow from exact hypergeometric tails. That no part of a sum can be
unmasked alone is proved in docs/explanation/secure-aggregation.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
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
        threshold: so many of a client and its neighbours rebuild one of its secrets; so many of the confirmers have to
            confirm a set of survivors.
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
        # With a lower one the server could have two sets of survivors confirmed, or unmask a part of the sum alone.
        least = _least_threshold(count, self.neighbours, 0)
        if not least <= self.threshold <= self.neighbours + 1:
            raise ValueError(
                f"a threshold of {self.threshold} is not between {least} and {self.neighbours + 1}, with "
                f"{self.neighbours} neighbours"
            )
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
    def ring(self) -> tuple[str, ...]:
        """The participants in the order of a public permutation; the last one stands before the first."""
        order = sorted(self.participants, key=lambda c: hashlib.sha256(f"{self.digest}/{c}".encode()).digest())
        return tuple(order)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {client_id: place for place, client_id in enumerate(self.ring)}

    @cached_property
    def confirmers(self) -> tuple[str, ...]:
        """The clients that confirm the set of survivors for all, sorted: the first one on the ring and its neighbours.

        They are the same for everybody, so that no two sets are confirmed.
        """
        return tuple(sorted((self.ring[0], *self.neighbours_of(self.ring[0]))))

    def neighbours_of(self, client_id: str) -> tuple[str, ...]:
        """The neighbours of a client, sorted: those at most ``neighbours / 2`` places away on the ring.

        It is a Harary graph, as connected as a graph of this degree can be.
        """
        count = len(self.participants)
        if self.neighbours == count - 1:
            return tuple(c for c in self.participants if c != client_id)
        place, half = self._place[client_id], self.neighbours // 2
        offsets = (*range(-half, 0), *range(1, half + 1))
        return tuple(sorted(self.ring[(place + offset) % count] for offset in offsets))


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

    The threshold exceeds its least value by the most colluding clients that stand in ``neighbours / 2`` places of the
    ring in a row; with probability 2^-40 at most it is exceeded in any of 2^40 graphs. With probability 2^-10 at most,
    too few neighbours of a client are left to rebuild its secret. Small cohorts use the complete graph.

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
    from scipy.stats import hypergeom

    left = count - dropped
    for degree in (*range(4, count - 1, 2), count - 1):
        threshold = _least_threshold(count, degree, _most_in_a_row(count, degree, colluding))
        if degree == count - 1:
            rebuilt = left >= threshold
        else:
            # A client that is left holds a share of its own secret; one that dropped out does not.
            fails = left * float(hypergeom.cdf(threshold - 2, count - 1, left - 1, degree))
            fails += dropped * float(hypergeom.cdf(threshold - 1, count - 1, left, degree))
            rebuilt = fails <= _CORRECTNESS
        if rebuilt and threshold <= degree + 1:
            return degree, threshold
    raise ConfigError(
        f"Of {count} clients, {colluding} may collude and {dropped} may drop out: no threshold allows for both.",
        cure="Lower secure_aggregation.max_colluding or dropout_rate, or draw larger cohorts.",
    )


def _least_threshold(count: int, degree: int, colluding: int) -> int:
    """The smallest secure threshold.

    Args:
        colluding: number of colluding clients: of all in a complete graph, else of ``degree / 2`` in a row on the ring.
    """
    return (count + colluding) // 2 + 1 if degree == count - 1 else degree // 2 + 2 + colluding


def _most_in_a_row(count: int, degree: int, colluding: int) -> int:
    """How many of the colluding clients :func:`_least_threshold` has to count."""
    if degree == count - 1:
        return colluding
    from scipy.stats import hypergeom

    most = min(colluding, degree // 2)
    while most and count * hypergeom.sf(most - 1, count, colluding, degree // 2) <= _SECURITY:
        most -= 1
    return most

"""Update messages: the answers of clients to a training task, one frozen type for each form.

:data:`UpdateMessage` is what a fleet yields. Validation turns an :class:`EncodedUpdate` into a :class:`ClientUpdate`;
aggregation rules read :data:`WeightedUpdate` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from fedvit.types import ClientOutcome

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Sums: TypeAlias = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class ClientFailures:
    """Clients that contribute nothing to the round, each with its reason."""

    round_index: int
    outcomes: tuple[ClientOutcome, ...]

    @classmethod
    def of(cls, round_index: int, client_ids: Iterable[str], reason: str) -> ClientFailures:
        """These clients, all for one reason."""
        return cls(round_index, tuple(ClientOutcome(client_id, 0, reason) for client_id in client_ids))


@dataclass(frozen=True, slots=True)
class _OneClient:
    """The answer of one client."""

    round_index: int
    outcome: ClientOutcome

    @property
    def outcomes(self) -> tuple[ClientOutcome, ...]:
        """The client's outcome."""
        return (self.outcome,)


@dataclass(frozen=True, slots=True)
class ClientUpdate(_OneClient):
    """The decoded update of one client, float64 by parameter name, multiplied by its weight.

    ``weighted_sum[name] = total_weight * (local - base)``, as in a :class:`PartialSum` over this client alone. Where
    clients are the privacy unit, the update is clipped and its weight is 1; ``within_clip`` is 1 if clipping changed
    nothing.
    """

    weighted_sum: Sums
    total_weight: float
    within_clip: int = 0

    @property
    def addends(self) -> tuple[Sums, ...]:
        """The arrays that an aggregation adds up."""
        return (self.weighted_sum,)

    def total(self) -> Sums:
        """The update as one array a parameter."""
        return self.weighted_sum


@dataclass(frozen=True, slots=True)
class EncodedUpdate(_OneClient):
    """The answer of one client as bytes, see :mod:`fedvit.wire.updates`.

    ``outcome`` says which client was asked, and of how many examples; the bytes may contradict it.
    """

    content: bytes


@dataclass(frozen=True, slots=True)
class PartialSum:
    """The sum of several clients' weighted updates, with the outcomes of all of them, failed ones included.

    ``weighted_sum[name] + carried_sum[name] = sum over clients of weight * (local - base)``, float64. Large sums have
    their upper part in ``carried_sum``, so that they are exact (:mod:`fedvit.exact_sums`); it is empty for others.
    ``within_clip`` counts the clients whose updates were within the clipping norm before they were clipped.
    """

    round_index: int
    outcomes: tuple[ClientOutcome, ...]
    weighted_sum: Sums
    total_weight: float
    within_clip: int = 0
    carried_sum: Sums = field(default_factory=dict)

    @property
    def addends(self) -> tuple[Sums, ...]:
        """The arrays that an aggregation adds up."""
        return (self.weighted_sum, self.carried_sum) if self.carried_sum else (self.weighted_sum,)

    def total(self) -> Sums:
        """The sum as one array a parameter, rounded to float64 where something was carried."""
        if not self.carried_sum:
            return self.weighted_sum
        return {name: array + self.carried_sum[name] for name, array in self.weighted_sum.items()}


@dataclass(frozen=True, slots=True)
class RingSum:
    """The sum of clients' contributions as integers, with the outcomes of all of them; see :mod:`fedvit.secagg.noise`.

    ``vector`` is uint32, [padded]: the sum modulo ``2^bits``, masked where secure aggregation masks contributions.
    ``total_weight`` is the sum of the contributors' weights.
    """

    round_index: int
    outcomes: tuple[ClientOutcome, ...]
    vector: npt.NDArray[np.uint32]
    total_weight: float
    attempt: int = 0


ClientAnswer: TypeAlias = ClientFailures | ClientUpdate
"""What one client makes of a task, before it is encoded or added up."""
WeightedUpdate: TypeAlias = ClientUpdate | PartialSum
"""A message with arrays that an aggregation rule can add up."""
Summand: TypeAlias = WeightedUpdate | RingSum
"""A message that a round adds up."""
DecodedUpdate: TypeAlias = ClientFailures | Summand
SingleMessage: TypeAlias = DecodedUpdate | EncodedUpdate


@dataclass(frozen=True, slots=True)
class UpdateBundle:
    """Several answers in one message: single updates, where the rule needs them."""

    round_index: int
    parts: tuple[SingleMessage, ...]

    @property
    def outcomes(self) -> tuple[ClientOutcome, ...]:
        """The outcomes of all parts, by client."""
        return tuple(sorted((o for part in self.parts for o in part.outcomes), key=lambda o: o.client_id))


UpdateMessage: TypeAlias = SingleMessage | UpdateBundle

"""Limit on the influence of one client on the average of a round: ``training.validation.max_client_share``.

The limit follows, before the round, from the admitted numbers of examples of those that take part, so that every proxy
scales updates alike and partial sums stay exact. Where fewer clients answer than expected, the divisor of the average
has a lower bound instead: the round takes a smaller step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LEAST_SHARES = 2.0
"""No weight is limited to less than this many equal shares."""


@dataclass(frozen=True, slots=True)
class ShareLimit:
    """The limits on one client in a round.

    ``max_share`` is its largest share in the divisor of the average; 1 in a small cohort, where every client has a
    large share. ``max_weight`` is its largest weight; None where no client weighs more than its share anyway.
    """

    max_share: float = 1.0
    max_weight: int | None = None

    @classmethod
    def of(cls, max_share: float, num_examples: Sequence[int], updates: int) -> ShareLimit:
        """The limit of a round.

        Args:
            max_share: the setting.
            num_examples: of each client that takes part.
            updates: how many updates the round commits with, of clients that have average weights.
        """
        share = max(max_share, _LEAST_SHARES / max(updates, 1))
        if share >= 1 or not num_examples:
            return cls()
        of_all = share * updates / len(num_examples)
        weight = _largest_weight(sorted(num_examples, reverse=True), of_all)
        return cls(max_share if share == max_share else 1.0, weight)

    def weight_of(self, num_examples: int) -> int:
        """The weight of a client with so many examples."""
        return num_examples if self.max_weight is None else min(num_examples, self.max_weight)

    def least_divisor(self, weights: Iterable[float]) -> float:
        """The smallest divisor with which none of these weights exceeds the share."""
        return max(weights, default=0.0) / self.max_share


NO_LIMIT = ShareLimit()


def _largest_weight(descending: Sequence[int], share: float) -> int | None:
    """The weight L with ``L = share * sum(min(n, L))``, rounded down; None where no n exceeds its share.

    ``share`` is at least twice that of an average client, so that there is such an L.
    """
    rest = sum(descending)
    if descending[0] <= share * rest:
        return None
    for capped, size in enumerate(descending, start=1):
        rest -= size
        limit = share * rest / (1 - share * capped)
        following = descending[capped] if capped < len(descending) else 0
        if limit >= following:
            return max(1, math.floor(limit))
    return None

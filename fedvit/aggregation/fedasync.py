"""FedAsync (Xie et al. 2019, arXiv:1903.03934)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from fedvit.aggregation.rule import NO_FACTS, Fold, Options, RoundFacts, Rule, State, Updates, moved, too_few
from fedvit.types import Weights


class MixingOptions(Options):
    """``alpha`` is how much of a fresh client's model is mixed in."""

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6


class FedAsync(Rule):
    """``w <- (1 - a(s) alpha) w + a(s) alpha w_k``, one client's model after another, w_k being what it came to.

    a is ``training.staleness``. The paper's buffer holds one update (``buffer_size`` 1, mode asynchronous); of more,
    each is mixed in, in the order of the clients. ``training.server_learning_rate`` has no part in it.
    """

    name = "fedasync"
    options_type = MixingOptions
    options: MixingOptions
    needs = "single_updates"
    weighting = "uniform"
    instead = "Use fedavg."

    def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
        here = {name: array.astype(np.float64) for name, array in base.items()}
        mixed = [update for update in updates if update.total_weight > 0]
        if not mixed:
            raise too_few("A round of fedasync", 0, 1)
        for update in mixed:
            weight = facts.staleness_weight(facts.round_index - update.round_index)
            start = facts.start(update.round_index) if facts.start else base
            for name, sums in update.total().items():
                # The update is discounted already, where it began and where the model is now are not.
                discounted = sums / update.total_weight
                here[name] = here[name] + self.options.alpha * (discounted + weight * (start[name] - here[name]))
        return Fold(moved(base, {name: here[name] - base[name] for name in base}), {})

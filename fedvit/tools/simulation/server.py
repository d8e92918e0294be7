"""The server's side of a simulation: it looks at the model now and then, releases nothing, and may charge nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

from fedvit.config import Settings
from fedvit.errors import ConflictError
from fedvit.ports import Charge, ExportedModel, LedgerEntry, ModelBenchmark
from fedvit.types import BudgetReport, Evaluation, Variant, Weights
from fedvit.wire.histograms import HistogramSpec


class Evaluated(Protocol):
    """The part of a :class:`fedvit.ports.ServerModelPort` that a simulation uses."""

    def initial_weights(self) -> Weights:
        """See :class:`fedvit.ports.ServerModelPort`."""
        ...

    def frozen_weights(self) -> Weights:
        """See :class:`fedvit.ports.ServerModelPort`."""
        ...

    def evaluate(self, weights: Weights) -> Evaluation:
        """See :class:`fedvit.ports.ServerModelPort`."""
        ...


class SimulatedServer:
    """A model that is evaluated at most once in ``every_s`` virtual seconds. Implements ``ServerModelPort``."""

    exports = False

    def __init__(self, model: Evaluated, clock: Callable[[], float], every_s: float) -> None:
        self._model = model
        self._clock = clock
        self._every_s = every_s
        self._next_s = 0.0

    def initial_weights(self) -> Weights:
        """The trainable weights that a run starts from."""
        return self._model.initial_weights()

    def frozen_weights(self) -> Weights:
        """The weights that never travel."""
        return self._model.frozen_weights()

    def evaluate(self, weights: Weights) -> Evaluation | None:
        """The model on the held-out images; None where it was looked at a moment ago."""
        now_s = self._clock()
        if now_s < self._next_s:
            return None
        self._next_s = now_s + self._every_s
        return self._model.evaluate(weights)

    def histogram_spec(self) -> HistogramSpec | None:
        """None: simulated clients are not asked for histograms."""
        return None

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        """Never asked for, since nothing is released.

        Raises:
            ConflictError: always.
        """
        raise ConflictError("A simulation exports nothing.")

    def benchmark(self, content: bytes, limit: int | None = None) -> ModelBenchmark:
        """Never asked for, since nothing is released.

        Raises:
            ConflictError: always.
        """
        raise ConflictError("A simulation exports nothing.")


class NoPrivacy:
    """Charges nothing and says that nothing is protected: epsilon is infinite. Implements ``AccountantPort``."""

    def __init__(self, settings: Settings) -> None:
        self._privacy = settings.privacy

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        """Write nothing."""
        return self.budget()

    def check(self, charges: Sequence[Charge]) -> None:
        """Refuse nothing."""

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        """Everybody: there is no budget."""
        return frozenset(charge.unit_id for charge in charges)

    def reset_budget(
        self,
        new_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetReport:
        """There is no budget.

        Raises:
            ConflictError: always.
        """
        raise ConflictError("A simulation without privacy has no budget.")

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        """Everything is spent."""
        privacy, all_of_it = self._privacy, math.inf
        return BudgetReport(
            privacy.privacy_unit, all_of_it, privacy.target_delta, all_of_it, all_of_it, all_of_it, 0, 0
        )

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """Nothing was ever charged."""
        return ()

"""Server's side of a simulation: a model that is evaluated now and then, and an accountant that charges nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from fedvit.config import Settings
from fedvit.errors import ConflictError
from fedvit.ports import Charge, ExportedModel, LedgerEntry, ModelBenchmark, ServerModelPort
from fedvit.types import BudgetReport, Evaluation, Variant, Weights
from fedvit.wire.histograms import HistogramSpec


class SimulatedServer:
    """A model that is evaluated at most once in ``every_s`` virtual seconds. Implements ``ServerModelPort``.

    ``evaluate`` returns None in between, and calls ``on_evaluation`` with each result. A simulation releases nothing,
    so the other methods are not used.
    """

    exports = False

    def __init__(
        self,
        model: ServerModelPort,
        clock: Callable[[], float],
        every_s: float,
        on_evaluation: Callable[[Evaluation], None],
    ) -> None:
        self.initial_weights = model.initial_weights
        self.frozen_weights = model.frozen_weights
        self.head, self.head_basis = model.head, model.head_basis
        self._model, self._clock, self._every_s, self._on_evaluation = model, clock, every_s, on_evaluation
        self._next_s = 0.0

    def evaluate(self, weights: Weights) -> Evaluation | None:
        now_s = self._clock()
        if now_s < self._next_s:
            return None
        self._next_s = now_s + self._every_s
        evaluation = self._model.evaluate(weights)
        if evaluation is not None:
            self._on_evaluation(evaluation)
        return evaluation

    def histogram_spec(self) -> HistogramSpec | None:
        return None

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        raise ConflictError("A simulation exports nothing.")

    def benchmark(self, content: bytes, limit: int | None = None) -> ModelBenchmark:
        raise ConflictError("A simulation exports nothing.")


class NoPrivacy:
    """An accountant that charges nothing and reports an infinite epsilon. Implements ``AccountantPort``."""

    def __init__(self, settings: Settings) -> None:
        self._privacy = settings.privacy

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        return self.budget()

    def check(self, charges: Sequence[Charge]) -> None:
        pass

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        return frozenset(charge.unit_id for charge in charges)

    def reset_budget(self, *_: Any, **__: Any) -> BudgetReport:
        raise ConflictError("A simulation without privacy has no budget.")

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        unit, delta = self._privacy.privacy_unit, self._privacy.target_delta
        return BudgetReport(unit, math.inf, delta, math.inf, math.inf, math.inf, 0, 0)

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        return ()

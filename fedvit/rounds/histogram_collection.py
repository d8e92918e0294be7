"""Collection of data histograms from the clients of rounds: charges, requests and storage."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property

from fedvit.errors import BudgetExhaustedError, LedgerFrozenError, UpdateRejectedError
from fedvit.ports import Charge
from fedvit.privacy.events import Composed, Event, Gaussian, Repeated
from fedvit.privacy.round_cost import charge_of, histogram_is_due, round_event
from fedvit.rounds.context import RoundContext
from fedvit.rounds.data_health import reference_spec
from fedvit.types import Run, TrainTask, Weights
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, HistogramSpec, checked_counts

_LOG = logging.getLogger(__name__)
_ALIKE = 0.8
"""The least correlation of votes with those of the reference at which the reference is used again."""


class HistogramCollection:
    """Collects the histograms of a run; a round never waits for one."""

    def __init__(self, context: RoundContext) -> None:
        self._settings, self._store, self._accountant = context.settings, context.store, context.accountant
        self._fleet, self._model = context.fleet, context.model
        self._requested: dict[str, HistogramSpec] = {}

    def ask(self, task: TrainTask, run: Run, client_ids: Sequence[str], weights: Weights) -> tuple[str, ...]:
        """Charge and request histograms of the clients whose budget admits one beside the rest of the run; their ids.

        A repeated round requests them again: charges are not written twice, and clients repeat the same histograms.

        Args:
            task: of the round.
            weights: the weights that the round starts from.
        """
        round_index = task.round_index
        spec = self._wanted(weights) if histogram_is_due(self._settings, round_index) and client_ids else None
        if spec is None:
            return ()
        noise_multiplier, unit = self._settings.histograms.noise_multiplier, self._settings.privacy.privacy_unit
        request = HistogramRequest(run.run_id, round_index, noise_multiplier, unit, spec, task.context_digest)
        sizes = self._store.clients.num_examples(client_ids)
        try:
            with_the_rest = self._charges(request, sizes, self._with_the_rest(run, round_index))
            affordable = self._accountant.within_budget(with_the_rest)
            asked = {client_id: size for client_id, size in sizes.items() if client_id in affordable}
            self._accountant.charge(self._charges(request, asked, Gaussian(noise_multiplier)))
        except (BudgetExhaustedError, LedgerFrozenError):
            return ()
        if asked:
            self._fleet.request_histograms(request, sorted(asked))
        return tuple(sorted(asked))

    def gather(self) -> int:
        """Store the histograms that have arrived; the number of new ones."""
        by_spec: dict[str, list[ClientHistogram]] = {}
        for histogram in self._fleet.histograms():
            by_spec.setdefault(histogram.spec_digest, []).append(histogram)
        return sum(
            self._store.histograms.add([histogram for histogram in by_spec[digest] if _fits(histogram, spec)], spec)
            for digest, spec in self._requested.items()
            if digest in by_spec
        )

    def _wanted(self, weights: Weights) -> HistogramSpec | None:
        """What clients count now: the specification of the reference, which makes histograms comparable, as long as the
        model's errors are in the same classes."""
        if self._spec is None:
            return None
        evaluation, reference = self._model.evaluate(weights), reference_spec(self._store)
        spec = self._spec if evaluation is None else self._spec.with_risks(evaluation.confusion)
        if reference is not None and reference.basis == spec.basis and _alike(reference.risk_votes, spec.risk_votes):
            spec = reference
        self._requested[spec.digest] = spec
        return spec

    @cached_property
    def _spec(self) -> HistogramSpec | None:
        return self._model.histogram_spec()

    def _with_the_rest(self, run: Run, round_index: int) -> Event:
        """A histogram and all remaining rounds of the run."""
        histogram, left = Gaussian(self._settings.histograms.noise_multiplier), run.rounds_total - round_index
        if left < 1:
            return histogram
        return Composed((histogram, Repeated(round_event(self._settings, run.noise_multiplier), left)))

    def _charges(self, request: HistogramRequest, sizes: Mapping[str, int], event: Event) -> list[Charge]:
        return [
            charge_of(
                event,
                run_id=request.run_id,
                round_index=request.round_index,
                unit_id=client_id,
                output_id=request.output_id(client_id, size),
                unit=request.privacy_unit,
            )
            for client_id, size in sizes.items()
        ]


def _alike(some: Sequence[int], others: Sequence[int]) -> bool:
    if len(some) != len(others) or len(set(some)) < 2 or len(set(others)) < 2:
        return some == others
    return statistics.correlation(some, others) >= _ALIKE


def _fits(histogram: ClientHistogram, spec: HistogramSpec) -> bool:
    try:
        return histogram.spec_digest == spec.digest and checked_counts(spec, histogram.counts) == histogram.counts
    except UpdateRejectedError as error:
        _LOG.warning("The histogram of %s is not stored: %s", histogram.client_id, error)
        return False

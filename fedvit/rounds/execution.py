"""Round execution: drawing, charging, training, committing and releasing, one effect of the round machine each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from fedvit.aggregation.head import Head
from fedvit.aggregation.rule import RoundFacts
from fedvit.aggregation.staleness import staleness_weight
from fedvit.clients.tracebacks import location_in
from fedvit.errors import (
    BudgetExhaustedError,
    LedgerFrozenError,
    ReleaseRefusedError,
    SecureAggregationError,
)
from fedvit.metrics.training import RoundMetrics
from fedvit.registry.publisher import Publisher
from fedvit.rounds import machine
from fedvit.rounds.collect import Collector
from fedvit.rounds.context import RoundBase, RoundContext, train_task
from fedvit.rounds.data_health import DataHealthMonitor, count_invalid_updates
from fedvit.rounds.failures import Failure, record_failure
from fedvit.rounds.histogram_collection import HistogramCollection
from fedvit.rounds.lifecycle import RunLifecycle
from fedvit.rounds.protection import POPULATION_SIZE, Folded
from fedvit.rounds.secure_sums import RoundSums
from fedvit.rounds.steering import round_settings
from fedvit.rounds.update_admission import RoundUpdates
from fedvit.secagg.noise import Plan
from fedvit.store.records import RoundCommit
from fedvit.store.versions import RULE_STATE
from fedvit.types import ClientOutcome, Cohort, Evaluation, RoundRecord, Run, TrainTask, Weights
from fedvit.wire.tensors import encode_rule_state, encoded_pieces

QUARANTINED = "quarantined"
# One in the process, for all loops.
METRICS = RoundMetrics()


@dataclass(frozen=True, slots=True)
class _TrainedRound:
    """A round between training and commit."""

    folded: Folded
    updates: RoundUpdates
    started_s: float


@dataclass(slots=True)
class _OpenRun:
    """The run under way. ``base`` is what its next round starts from; for ``context_digest`` see its tasks."""

    run: Run
    base: RoundBase
    frozen_digest: str
    context_digest: str


class RoundExecution:
    """Performs the steps of rounds against a store, an accountant, a fleet and a model.

    Each step is idempotent: the recorded cohort is used again, charges that are written are not written again, and
    clients repeat their release bit for bit.

    Args:
        stopping: set when the loop is to end after the round under way.
        on_committed: called with the round, its version and evaluation, and the epsilon that is spent.

    Attributes:
        publisher: releases versions.
    """

    def __init__(
        self,
        context: RoundContext,
        lifecycle: RunLifecycle,
        stopping: threading.Event,
        on_health: Callable[[float | None, float | None], None],
        on_committed: Callable[[int, str, Evaluation | None, float], None],
    ) -> None:
        self._settings, self._store, self._accountant = context.settings, context.store, context.accountant
        self._model, self._protection, self._clock = context.model, context.protection, context.clock
        self._lifecycle, self._stopping, self._on_committed = lifecycle, stopping, on_committed
        self._collector, self._histograms = Collector(context), HistogramCollection(context)
        self._sums = RoundSums(context)
        self._data_health = DataHealthMonitor(context.store, on_health, context.clock)
        self.publisher = Publisher(context.store, context.settings)
        # Weights are written while they are evaluated.
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self._open: _OpenRun | None = None
        self._charged: tuple[TrainTask, Plan | None] | None = None
        self._trained: _TrainedRound | None = None

    @property
    def run(self) -> Run:
        """The run under way."""
        return self._current.run

    def enter(self, run: Run) -> None:
        """Continue this run; what is in flight for another one is given up."""
        if self._open is None or self._open.run.run_id != run.run_id:
            self._collector.give_up("another run began")
        frozen_digest, fleet = self._lifecycle.store_frozen_weights(), self._store.metadata.fleet()
        context_digest = self._settings.context_digest(fleet.classes if fleet else (), frozen_digest)
        self._open = _OpenRun(run, self._lifecycle.round_base(run), frozen_digest, context_digest)

    def perform(self, effect: machine.RoundEffect) -> machine.Event:
        """Do what the machine asks for; the event that follows."""
        match effect:
            case machine.DrawCohort(round_index):
                return self._draw(round_index)
            case machine.ChargeRound(cohort):
                return self._charge(cohort)
            case machine.TrainRound():
                return self._train(effect)
            case machine.CommitRound(round_index):
                return self._commit(round_index)
            case machine.ReleaseVersion(version):
                return self._release(version)

    # --- draw and charge ---------------------------------------------------------------------------------------------

    def _draw(self, round_index: int) -> machine.Event:
        # Not left to the charge alone: a round that was charged before it was interrupted is not charged again.
        self._store.ledger.check_not_frozen()
        sampled = self._protection.sampled
        if sampled:
            self._collector.give_up("a sampled round waits for nobody")
        if self._sums.secure:
            self._collector.give_up("a secure sum is of one attempt of one round")
        if self._protection.follows_fleet:
            self._current.run = self._lifecycle.with_present_facts(self.run)
        in_flight, quarantined = self._collector.in_flight(), set(self._store.clients.quarantined())
        min_clients = round_settings(self._store, self._settings).min_clients
        min_clients = max(min_clients, self._protection.rule.least_updates)
        cohorts = self._lifecycle.cohorts
        config = cohorts.config()
        try:
            # An attempt that was charged is made use of, even if no other one would be affordable.
            recorded = self._sums.recorded_cohort(self.run.run_id, round_index)
            cohort = recorded or cohorts.draw(self._task(round_index), config, in_flight)
        except BudgetExhaustedError as error:
            return machine.ChargeRefused(str(error))
        if sampled and (count := cohorts.count(config, min_clients)) < min_clients:
            return machine.Failed(f"{count} clients may be drawn; at least {min_clients} are needed.")
        record = self._store.rounds.open(self.run.run_id, round_index, cohort)
        # A retry gets the recorded cohort, but an incident since then keeps its clients out.
        cohort = Cohort(round_index, tuple(c for c in record.cohort if c not in quarantined))
        min_clients = max(min_clients, self._sums.least_clients(cohort))
        return machine.CohortDrawn(cohort, min_clients, len(in_flight.difference(cohort.client_ids)))

    def _charge(self, cohort: Cohort) -> machine.Event:
        task, plan = self._sums.task_of(self._task(cohort.round_index), cohort, self._current.base.weights)
        try:
            self._accountant.charge(self._protection.charges(task, cohort.client_ids, plan))
        except BudgetExhaustedError as error:
            return machine.ChargeRefused(str(error))
        self._charged = task, plan
        return machine.Charged()

    # --- train -------------------------------------------------------------------------------------------------------

    def _train(self, effect: machine.TrainRound) -> machine.Event:
        while True:
            try:
                return self._train_once(effect)
            except SecureAggregationError:
                if not self._sums.may_repeat(self._charged_task[0]):
                    raise
            # Another attempt has other outputs.
            charged = self._charge(effect.cohort)
            if isinstance(charged, machine.ChargeRefused):
                return machine.Failed(charged.reason)

    def _train_once(self, effect: machine.TrainRound) -> machine.Event:
        started_s = self._clock.monotonic()
        run, base, task = self.run, self._current.base, self._charged_task[0]
        METRICS.in_flight(len(self._collector.in_flight().union(effect.cohort.client_ids)))
        self._gather_histograms()
        self._histograms.ask(task, run, effect.cohort.client_ids, base.weights)
        head = self._head(task.round_index)
        updates = self._collected(effect, head)
        METRICS.in_flight(len(self._collector.in_flight()))
        limit = self._settings.training.validation.quarantine_after_rejections
        count_invalid_updates(self._store, task.run_id, task.round_index, updates.outcomes, limit, self._clock)
        self._gather_histograms()
        errors = self._errors(task.round_index, updates.outcomes)
        if self._protection.sampled and errors and not updates.accepted:
            return machine.Failed(f"All {len(errors)} clients that were drawn failed, the first with: {errors[0]}")
        if updates.accepted or self._protection.sampled:
            facts = self._facts(task.round_index, updates)
            folded = self._protection.fold(run, task, base, updates.updates(), facts)
            if head is not None:
                folded = replace(folded, weights=head.step(base.weights, folded.weights))
            self._trained = _TrainedRound(folded, updates, started_s)
        return machine.Trained(updates.accepted, len(errors), errors[0] if errors else None)

    def _collected(self, effect: machine.TrainRound, head: Head | None) -> RoundUpdates:
        base, (task, plan) = self._current.base, self._charged_task
        timeout_s = round_settings(self._store, self._settings).wait_timeout_s

        def collect(cohort: Cohort) -> RoundUpdates:
            asked = replace(effect, cohort=cohort)
            return self._collector.collect(asked, task, base.weights, base.sent, head, timeout_s=timeout_s, ring=plan)

        return self._sums.collected(task, plan, effect.cohort, collect)

    def _errors(self, round_index: int, outcomes: Sequence[ClientOutcome]) -> list[str]:
        """The errors of clients; the first traceback is recorded."""
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        failed = next((outcome for outcome in outcomes if outcome.traceback), None)
        if failed is not None and failed.traceback is not None:
            error, run_id = str(failed.error), self.run.run_id
            record_failure(self._store, Failure(run_id, round_index, failed.client_id, error, failed.traceback))
            errors.insert(0, f"{errors.pop(errors.index(error))} ({location_in(failed.traceback)})")
        return errors

    def _head(self, round_index: int) -> Head | None:
        """The head of the round; None where nothing about it is limited."""
        weights, settings, name = self._current.base.weights, self._settings, self._model.head
        directions = settings.head_directions(len(weights[name])) if name is not None else None
        return Head.of(
            name,
            weights,
            None if directions is None else self._model.head_basis(weights, directions),
            body_learning_rate=settings.body_learning_rate,
            max_gradient=settings.training.validation.max_head_gradient,
            initial=None if name is None else self._model.initial_weights()[name],
            rounds=round_index - 1,
        )

    def _gather_histograms(self) -> None:
        if self._histograms.gather():
            self._data_health.invalidate()

    def _facts(self, round_index: int, updates: RoundUpdates) -> RoundFacts:
        run, weights = self.run, self._current.base.weights

        def start(started: int) -> Weights:
            return weights if started == round_index else self._lifecycle.weights_before(run, started)

        return RoundFacts(
            round_index=round_index,
            population=int(run.config.get(POPULATION_SIZE, 1)),
            start=start,
            staleness_weight=lambda staleness: staleness_weight(staleness, self._settings.training.staleness),
            least_divisor=updates.least_divisor,
        )

    # --- commit and release ------------------------------------------------------------------------------------------

    def _commit(self, round_index: int) -> machine.Event:
        trained, run = self._trained, self.run
        if trained is None:
            raise machine.ImpossibleEventError("a round is committed that was not trained")
        record = self._store.rounds.get(run.run_id, round_index)
        weights, state, updates = trained.folded.weights, trained.folded.state, trained.updates
        storing = self._disk.submit(self._store.blobs.put_pieces, encoded_pieces(weights))
        evaluation = self._evaluated(round_index, weights)
        budget = self._accountant.budget()
        digest = storing.result()
        rule_state = {RULE_STATE: self._store.blobs.put(encode_rule_state(state))} if state else {}
        left_out = self._left_out(record, updates.outcomes)
        version = self._store.rounds.commit(
            run.run_id,
            round_index,
            RoundCommit(
                weights_digest=digest,
                frozen_digest=self._current.frozen_digest,
                # What the weights really cost their data, however often the budget was renewed.
                epsilon=budget.lifetime_epsilon,
                loss=evaluation.loss if evaluation else None,
                accuracy=evaluation.accuracy if evaluation else None,
                metrics={"loss": evaluation.loss, "accuracy": evaluation.accuracy} if evaluation else {},
                lineage={**self._lineage(round_index, updates, evaluation), **trained.folded.facts, **rule_state},
                outcomes=updates.outcomes + left_out,
                duration_s=self._clock.monotonic() - trained.started_s,
            ),
        )
        METRICS.committed(updates.outcomes, len(left_out), len(updates.unexpected))
        self._data_health.after_round(updates.outcomes)
        self._trained = None
        self._current.base = RoundBase.of(self._protection.rule, weights, digest, state)
        self._on_committed(round_index, version.version, evaluation, budget.epsilon_spent)
        return machine.Committed(version.version)

    def _left_out(self, record: RoundRecord, outcomes: Sequence[ClientOutcome]) -> tuple[ClientOutcome, ...]:
        """The outcomes of clients that were recorded for the round, came into quarantine, and were not asked again."""
        # One that still works on an earlier attempt may yet answer, late.
        silent = set(record.cohort).difference((o.client_id for o in outcomes), self._collector.in_flight())
        quarantined = silent.intersection(self._store.clients.quarantined())
        return tuple(ClientOutcome(client_id, 0, QUARANTINED) for client_id in sorted(quarantined))

    def _evaluated(self, round_index: int, weights: Weights) -> Evaluation | None:
        """The evaluation of the weights in the rounds in which one is due; what may be released always has one."""
        every, released = self._settings.training.evaluate_every_rounds, self._settings.release.every_rounds
        due = round_index % every == 0 or round_index % released == 0 or round_index >= self.run.rounds_total
        return self._model.evaluate(weights) if due or self._stopping.is_set() else None

    def _lineage(self, round_index: int, updates: RoundUpdates, evaluation: Evaluation | None) -> dict[str, object]:
        run = self.run
        return {
            "run_id": run.run_id,
            "round_index": round_index,
            "parent_weights_digest": self._current.base.digest,
            "base_version": (run.config.get("order") or {}).get("base_version"),
            "data_digest": run.data_digest,
            "config_digest": run.config_digest,
            **updates.lineage(),
            # What the mix of answers in service is compared with later; see fedvit.drift.signals.
            **({"held_out_answers": evaluation.answers()} if evaluation else {}),
        }

    def _release(self, version: str) -> machine.Event:
        if not self._model.exports:
            self._store.versions.refuse(version, "Its model has no export.")
            return machine.ReleaseRefused()
        weights = self._current.base.weights
        exports = {variant: self._model.export(weights, variant) for variant in self.publisher.variants()}
        record = self._store.versions.get(version)
        try:
            self.publisher.release(record, exports, f"round {record.round_index} of {record.run_id}")
        except (ReleaseRefusedError, LedgerFrozenError):
            # One that an incident holds back has no refusal on record: the first start after it releases it.
            return machine.ReleaseRefused()
        self._data_health.invalidate()
        return machine.Released()

    @property
    def _charged_task(self) -> tuple[TrainTask, Plan | None]:
        if self._charged is None:
            raise machine.ImpossibleEventError("a round is trained that was not charged")
        return self._charged

    @property
    def _current(self) -> _OpenRun:
        if self._open is None:
            raise machine.ImpossibleEventError("no run is open")
        return self._open

    def _task(self, round_index: int) -> TrainTask:
        run = self.run
        return train_task(
            self._settings,
            run.run_id,
            round_index,
            base_digest=self._current.base.sent_digest,
            data_digest=run.data_digest,
            noise_multiplier=run.noise_multiplier,
            l2_clip_norm=self._protection.l2_clip_norm(run.run_id, round_index),
            context_digest=self._current.context_digest,
        )

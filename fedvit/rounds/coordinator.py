"""Performs what the round machine decides, against a store, an accountant, a fleet and a model.

Knows no Ray: the aggregator actor hands it Ray-backed ports, tests hand it doubles. Whatever process dies, calling
:meth:`Coordinator.run` again continues after the last committed round: the recorded cohort is used again, charges that
are written are not written again, and clients repeat their release bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property

from fedvit.aggregation.registry import check_mode
from fedvit.aggregation.rule import RoundFacts, State
from fedvit.aggregation.staleness import staleness_weight
from fedvit.aggregation.state import decode_state, encode_state
from fedvit.config import CohortConfig, Settings
from fedvit.errors import (
    BudgetExhaustedError,
    ConfigError,
    ConflictError,
    FedvitError,
    LedgerFrozenError,
    ReleaseRefusedError,
)
from fedvit.metrics.training import RoundMetrics
from fedvit.ports import AccountantPort, FleetPort, ServerModelPort
from fedvit.privacy.round_cost import check_units, round_noise_multiplier
from fedvit.privacy.secrets import derive_secret, load_or_create_root_secret
from fedvit.registry.publisher import Publisher
from fedvit.registry.weights import stored_weights
from fedvit.rounds import machine
from fedvit.rounds.buffer import RoundBuffer
from fedvit.rounds.collect import Collector
from fedvit.rounds.data_health import DataWatch
from fedvit.rounds.eligible_clients import EligibleClients
from fedvit.rounds.histogram_collection import HistogramCollection
from fedvit.rounds.machine import LoopState, Phase, Plan
from fedvit.rounds.protection import POPULATION_SIZE, Folded, protection_for
from fedvit.rounds.remote import FROZEN_DIGEST
from fedvit.rounds.steering import (
    RunRequest,
    aggregation_settings,
    place_run_request,
    round_settings,
    run_identity,
    run_request,
)
from fedvit.rounds.update_admission import count_refusals
from fedvit.store.records import RoundCommit
from fedvit.store.store import Store
from fedvit.store.versions import RULE_STATE
from fedvit.types import (
    ClientOutcome,
    Cohort,
    Evaluation,
    RoundRecord,
    Run,
    RunStatus,
    TrainingProgress,
    TrainTask,
    Weights,
    utc_now,
)
from fedvit.wire.tensors import encode_weights, encoded_pieces, weights_digest

QUARANTINED = "quarantined"
# One a process, however many loops it has.
_METRICS = RoundMetrics()


@dataclass(frozen=True, slots=True)
class _RoundWork:
    """A round between training and commit."""

    folded: Folded
    buffer: RoundBuffer
    started_s: float


class Coordinator:
    """The training loop.

    Args:
        on_progress: told after every event, from the thread that runs the loop.
        clock: seconds since whenever, for deadlines and how long a round took; a simulation's is virtual.
        on_health: told the scores of the data's quality and drift, after rounds in which something of it was seen.

    Attributes:
        publisher: what it releases with.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        accountant: AccountantPort,
        fleet: FleetPort,
        model: ServerModelPort,
        on_progress: Callable[[TrainingProgress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        on_health: Callable[[float | None, float | None], None] = lambda quality, drift: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._accountant = accountant
        self._fleet = fleet
        self._protection = protection_for(settings, store)
        self._clock = clock
        self._collector = Collector(settings, store, fleet, self._protection, clock)
        self._model = model
        self._sketching = HistogramCollection(settings, store, accountant, fleet, model)
        self._data_watch = DataWatch(store, on_health)
        self.publisher = Publisher(store, settings)
        self._cohort_secret = derive_secret(load_or_create_root_secret(store.home), "cohort")
        self._on_progress = on_progress
        self._stop = threading.Event()
        # Weights are written while they are evaluated.
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self._progress = self._resting_progress()
        self._run: Run | None = None
        self._weights: Weights = {}
        self._base_digest = ""
        self._rule_state: State = {}
        self._handed: Weights = {}
        self._handed_digest = ""
        self._frozen_digest = ""
        self._work: _RoundWork | None = None

    def request_stop(self) -> None:
        """Ask the loop to end after the round under way; harmless when it rests."""
        self._stop.set()

    def progress(self) -> TrainingProgress:
        """Where the loop stands, as of the last event."""
        return self._progress

    def announce(self) -> TrainingProgress:
        """Say that :meth:`run` is about to be called, so that nobody takes the last run's end for this one's."""
        self._progress = replace(self._progress, phase=Phase.IDLE.value, status=RunStatus.RUNNING, message=None)
        return self._progress

    def check_fleet(self) -> None:
        """Whether the settings still promise something to a fleet of this size: vehicles may have joined.

        Raises:
            ConflictError: ``target_delta`` is larger than 1/n.
        """
        try:
            check_units(self._settings, *self._store.clients.count_units())
        except ConfigError as error:
            # Whoever asks for a run did not write the settings: it is the fleet, as it is now, that they do not fit.
            raise ConflictError(error.message, cure=error.cure) from error

    def check_new_run(self, order: RunRequest) -> None:
        """Whether a run as ordered could train at least one round.

        Raises:
            ConflictError: too few clients may take part, the rule does not go with asynchronous rounds, or the fleet is
                not of a size for what the settings promise; see :meth:`_open_run`.
            BudgetExhaustedError: some client's budget does not admit one round more.
            UpdateRejectedError: the version to start from was trained as another model.
        """
        config = self._cohort_config(order.client_selection or self._selection())
        count = self._count_eligible(config)
        needed = max(1, round_settings(self._store, self._settings).min_clients)
        if count < needed:
            raise ConflictError(
                f"{count} clients may take part ({config.client_selection}); at least {needed} are needed.",
                cure="Validate or register clients, or lower min_clients: POST /api/training/config.",
            )
        self._start_weights(order)
        check_mode(self._protection.rule, aggregation_settings(self._store).mode)
        self.check_fleet()
        try:
            self._protection.run_facts(count)
        except ConfigError as error:
            raise ConflictError(error.message, cure=error.cure) from error
        self._accountant.check(self._protection.charges(self._probe(), self._some(config, needed)))

    def _some(self, config: CohortConfig, needed: int) -> tuple[str, ...]:
        """So many clients whose budget admits a round; where they are too few, some that show why."""
        few = config.model_copy(update={"selection": "uniform", "size": needed, "sampling_prob": None})
        roll = self._roll(self._probe(), few)
        found = roll.draw(self._cohort_secret).client_ids
        return found if len(found) >= needed else roll.forgiving().draw(self._cohort_secret).client_ids

    def _count_eligible(self, config: CohortConfig, at_most: int | None = None) -> int:
        return self._store.clients.count_eligible(
            validated_only=config.client_selection == "validated_only",
            heard_since=self._heard_since(),
            at_most=at_most,
        )

    def _heard_since(self) -> datetime:
        """Remote clients that were silent for longer are not there."""
        return utc_now() - timedelta(seconds=self._settings.fleet.heartbeat_timeout_s)

    def _roll(self, task: TrainTask, config: CohortConfig) -> EligibleClients:
        return EligibleClients(self._store, self._protection, self._accountant, task, config, self._heard_since())

    def _probe(self) -> TrainTask:
        """A round of a run that does not exist yet; its charges are never written."""
        return self._task_of("next-run", 1, "", self._noise_multiplier, self._settings.privacy.l2_clip_norm)

    def begin(self, order: RunRequest) -> Run:
        """Put an order in force and open its run, while the loop rests; :meth:`run` then drives it. Repeatable."""
        self._start_weights(order)
        place_run_request(self._store, order)
        run = self._open_run()
        self._progress = self._resting_progress()
        return run

    def run(self) -> Run:
        """Begin or continue the run that the settings describe, and drive it until it rests.

        Raises:
            FedvitError: the run could not begin; once it has begun, faults end it with status FAILED and a reason.
        """
        self._stop.clear()
        run, before = self._open_run(), self._run
        if before is None or before.run_id != run.run_id:
            self._collector.give_up("another run began")
        self._run = run
        if run.status is not RunStatus.COMPLETED:
            self._store.runs.set_status(run.run_id, RunStatus.RUNNING)
        self._load_weights(run)
        training = self._settings.training
        release_every = self._settings.release.every_rounds
        plan = Plan(run.rounds_total, training.cohort.min_clients, release_every, self._protection.sampled)
        state = LoopState(plan)
        self._drive(state, machine.Started(run.rounds_done, self._unreleased_version(run)))
        return self._store.runs.get(run.run_id)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _drive(self, state: LoopState, first: machine.Event) -> None:
        state, effects = machine.step(state, first)
        queue = deque(effects)
        while queue:
            self._report(state)
            began_s = self._clock()
            event = self._perform_guarded(queue.popleft())
            _METRICS.phase_took(state.phase.value, self._clock() - began_s)
            if event is not None:
                if self._stop.is_set() and not state.stop_requested:
                    state, _ = machine.step(state, machine.StopRequested())
                state, effects = machine.step(state, event)
                queue.extend(effects)
        self._report(state)

    def _perform_guarded(self, effect: machine.Effect) -> machine.Event | None:
        try:
            return self._perform(effect)
        except FedvitError as error:
            return machine.Failed(str(error))
        except Exception as error:
            self._store.runs.set_status(self._current.run_id, RunStatus.FAILED, f"{type(error).__name__}: {error}")
            raise

    def _perform(self, effect: machine.Effect) -> machine.Event | None:
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
            case machine.Rest(status, reason):
                self._store.runs.set_status(self._current.run_id, status, reason)
                return None

    def _draw(self, round_index: int) -> machine.Event:
        # Not left to the charge alone: a round that was charged before it was interrupted is not charged again.
        self._store.ledger.check_not_frozen()
        run_id, config = self._current.run_id, self._cohort_config(self._selection())
        if self._protection.sampled:
            self._collector.give_up("a sampled round waits for nobody")
        in_flight, kept_out = self._collector.in_flight(), set(self._store.clients.quarantined())
        min_clients = round_settings(self._store, self._settings).min_clients
        min_clients = max(min_clients, self._protection.rule.least_updates)
        roll = self._roll(self._task(round_index), config)
        try:
            drawn = roll.draw(self._cohort_secret, in_flight)
        except BudgetExhaustedError as error:
            return machine.ChargeRefused(str(error))
        if self._protection.sampled and (count := self._count_eligible(config, min_clients)) < min_clients:
            return machine.Failed(f"{count} clients may be drawn; at least {min_clients} are needed.")
        record = self._store.rounds.open(run_id, round_index, drawn)
        # A retry gets the recorded cohort, but an incident since then keeps its clients out.
        cohort = Cohort(round_index, tuple(c for c in record.cohort if c not in kept_out))
        return machine.CohortDrawn(cohort, min_clients, len(in_flight.difference(cohort.client_ids)))

    def _selection(self) -> str | None:
        order = run_request(self._store)
        return order.client_selection if order else None

    def _cohort_config(self, selection: str | None) -> CohortConfig:
        config = self._settings.training.cohort
        return config if selection is None else config.model_copy(update={"client_selection": selection})

    def _charge(self, cohort: Cohort) -> machine.Event:
        try:
            self._accountant.charge(self._protection.charges(self._task(cohort.round_index), cohort.client_ids))
        except BudgetExhaustedError as error:
            return machine.ChargeRefused(str(error))
        return machine.Charged()

    def _train(self, order: machine.TrainRound) -> machine.Event:
        started_s, timeout_s = self._clock(), round_settings(self._store, self._settings).wait_timeout_s
        task = self._task(order.cohort.round_index)
        _METRICS.in_flight(len(self._collector.in_flight().union(order.cohort.client_ids)))
        self._gather_sketches()
        self._sketching.ask(self._current, task.round_index, order.cohort.client_ids, self._weights)
        buffer = self._collector.collect(order, task, self._weights, self._handed, timeout_s=timeout_s)
        _METRICS.in_flight(len(self._collector.in_flight()))
        quarantine_after_rejections = self._settings.training.validation.quarantine_after_rejections
        count_refusals(self._store, task.run_id, task.round_index, buffer.outcomes, quarantine_after_rejections)
        self._gather_sketches()
        errors = [o.error for o in buffer.outcomes if o.error is not None]
        if self._protection.sampled and errors and not buffer.accepted:
            return machine.Failed(f"All {len(errors)} clients that were drawn failed, the first with: {errors[0]}")
        if buffer.accepted or self._protection.sampled:
            folded = self._protection.fold(
                self._current, task, self._weights, buffer.updates(), self._rule_state, self._facts(task.round_index)
            )
            self._work = _RoundWork(folded, buffer, started_s)
        return machine.Trained(buffer.accepted, len(errors), errors[0] if errors else None)

    def _gather_sketches(self) -> None:
        if self._sketching.gather():
            self._data_watch.new_window()

    def _facts(self, round_index: int) -> RoundFacts:
        run = self._current
        return RoundFacts(
            round_index=round_index,
            population=int(run.config.get(POPULATION_SIZE, 1)),
            start=lambda started: self._weights if started == round_index else self._started_from(started),
            staleness_weight=lambda staleness: staleness_weight(staleness, self._settings.training.staleness),
        )

    def _started_from(self, round_index: int) -> Weights:
        """The weights that an earlier round of this run handed out."""
        if round_index == 1:
            return self._start_weights(run_request(self._store))
        version = self._store.rounds.get(self._current.run_id, round_index - 1).version
        return stored_weights(self._store, self._store.versions.get(str(version)).weights_digest)

    def _left_out(self, record: RoundRecord, told: Sequence[ClientOutcome]) -> tuple[ClientOutcome, ...]:
        """The outcomes of those who were recorded for the round, came into quarantine, and were not asked again."""
        # One that is still at it from an earlier attempt may yet answer, late.
        silent = set(record.cohort).difference((o.client_id for o in told), self._collector.in_flight())
        caught = silent.intersection(self._store.clients.quarantined())
        return tuple(ClientOutcome(client_id, 0, QUARANTINED) for client_id in sorted(caught))

    def _commit(self, round_index: int) -> machine.Event:
        work = self._work
        if work is None:
            raise machine.ImpossibleEventError("a round is committed that was not trained")
        record = self._store.rounds.get(self._current.run_id, round_index)
        weights = work.folded.weights
        storing = self._disk.submit(self._store.blobs.put_pieces, encoded_pieces(weights))
        evaluation = self._evaluated(round_index, weights)
        budget = self._accountant.budget()
        digest = storing.result()
        remembered = self._remembered(work.folded.state)
        left_out = self._left_out(record, work.buffer.outcomes)
        version = self._store.rounds.commit(
            self._current.run_id,
            round_index,
            RoundCommit(
                weights_digest=digest,
                frozen_digest=self._frozen_digest,
                # What the weights really cost their data, however often the budget was renewed.
                epsilon=budget.lifetime_epsilon,
                loss=evaluation.loss if evaluation else None,
                accuracy=evaluation.accuracy if evaluation else None,
                metrics={"loss": evaluation.loss, "accuracy": evaluation.accuracy} if evaluation else {},
                lineage={**self._lineage(round_index, work.buffer, evaluation), **work.folded.facts, **remembered},
                outcomes=work.buffer.outcomes + left_out,
                duration_s=self._clock() - work.started_s,
            ),
        )
        _METRICS.committed(work.buffer.outcomes, len(left_out), len(work.buffer.rejected_answers))
        self._data_watch.after_round(work.buffer.outcomes)
        self._work = None
        self._continue_from(weights, digest, work.folded.state)
        self._progress = replace(
            self._progress,
            rounds_done=round_index,
            loss=evaluation.loss if evaluation else self._progress.loss,
            accuracy=evaluation.accuracy if evaluation else self._progress.accuracy,
            epsilon=budget.epsilon_spent,
            version=version.version,
        )
        return machine.Committed(version.version)

    def _evaluated(self, round_index: int, weights: Weights) -> Evaluation | None:
        """How good the weights are, in the rounds in which that is asked; what may be released is always judged."""
        every, released = self._settings.training.evaluate_every_rounds, self._settings.release.every_rounds
        due = round_index % every == 0 or round_index % released == 0 or round_index >= self._current.rounds_total
        return self._model.evaluate(weights) if due or self._stop.is_set() else None

    def _remembered(self, state: State) -> dict[str, object]:
        return {RULE_STATE: self._store.blobs.put(encode_state(state))} if state else {}

    def _lineage(self, round_index: int, buffer: RoundBuffer, evaluation: Evaluation | None) -> dict[str, object]:
        return {
            "run_id": self._current.run_id,
            "round_index": round_index,
            "parent_weights_digest": self._base_digest,
            "base_version": (self._current.config.get("order") or {}).get("base_version"),
            "data_digest": self._current.data_digest,
            "config_digest": self._current.config_digest,
            **buffer.lineage(),
            # What the mix of answers in service is held against later; see fedvit.drift.signals.
            **({"held_out_answers": evaluation.answers()} if evaluation else {}),
        }

    def _release(self, version: str) -> machine.Event:
        if not self._model.exports:
            self._store.versions.refuse(version, "Its model has no export.")
            return machine.ReleaseRefused()
        exports = {variant: self._model.export(self._weights, variant) for variant in self.publisher.variants()}
        record = self._store.versions.get(version)
        try:
            self.publisher.release(record, exports, f"round {record.round_index} of {record.run_id}")
        except (ReleaseRefusedError, LedgerFrozenError):
            # One that an incident holds back has no refusal on record: the first start after it releases it.
            return machine.ReleaseRefused()
        self._data_watch.new_window()
        return machine.Released()

    # --- beginning and continuing ------------------------------------------------------------------------------------

    def _open_run(self) -> Run:
        """The unfinished run with these settings and orders, or a new one; one with others is superseded.

        Raises:
            ConfigError: the fleet is too small for ``target_delta``, for the rule, or for its cohorts to rest between
                rounds.
            ConflictError: nobody may take part, or rounds are asynchronous and the rule does not go with that.
        """
        order = run_request(self._store)
        identity, digest = run_identity(self._settings, order)
        latest = self._store.runs.latest()
        check_units(self._settings, *self._store.clients.count_units())
        check_mode(self._protection.rule, aggregation_settings(self._store).mode)
        if latest is not None and latest.config_digest == digest:
            return latest
        count = self._count_eligible(self._cohort_config(self._selection()))
        if not count:
            raise ConflictError(
                "No client may take part: none that is active, and is heard where it is remote, has data.",
                cure="Register or validate clients, or start the trainers of remote ones; then start again.",
            )
        facts = self._protection.run_facts(count)
        if latest is not None and latest.status.resumable:
            ordered = order is not None and latest.config.get("order") != identity.get("order")
            reason = order.reason if order and ordered else "The training settings changed."
            self._store.runs.set_status(latest.run_id, RunStatus.SUPERSEDED, reason)
        return self._store.runs.create(
            rounds_total=self._settings.training.rounds,
            noise_multiplier=self._noise_multiplier,
            config=identity | facts,
            config_digest=digest,
            data_digest=self._fleet_digest(),
        )

    @cached_property
    def _noise_multiplier(self) -> float:
        return round_noise_multiplier(self._settings)

    def _fleet_digest(self) -> str:
        fleet = self._store.metadata.fleet()
        return fleet.data_digest if fleet else ""

    def _load_weights(self, run: Run) -> None:
        """The weights after the last committed round, or the ones that a run starts from."""
        self._frozen_digest = self._store.blobs.put(encode_weights(self._model.frozen_weights()))
        self._store.metadata.set(FROZEN_DIGEST, self._frozen_digest)
        version = self._store.versions.latest(run.run_id)
        if version is None:
            weights = self._start_weights(run_request(self._store))
            self._continue_from(weights, self._store.blobs.put(encode_weights(weights)), {})
            return
        remembered = version.lineage.get(RULE_STATE)
        state = decode_state(self._store.blobs.get(remembered)) if remembered else {}
        self._continue_from(stored_weights(self._store, version.weights_digest), version.weights_digest, state)

    def _continue_from(self, weights: Weights, digest: str, state: State) -> None:
        """What the next round starts from. What clients are handed beside the weights is part of their release."""
        beside = self._protection.rule.broadcast(weights, state)
        self._weights, self._base_digest, self._rule_state = weights, digest, state
        self._handed = {**weights, **beside}
        self._handed_digest = weights_digest(self._handed) if beside else digest

    def _start_weights(self, order: RunRequest | None) -> Weights:
        """Raises UpdateRejectedError when the version to start from was trained as another model."""
        initial = self._model.initial_weights()
        if order is None or order.base_version is None:
            return initial
        shapes = {name: array.shape for name, array in initial.items()}
        return stored_weights(self._store, self._store.versions.get(order.base_version).weights_digest, shapes)

    def _unreleased_version(self, run: Run) -> str | None:
        version = self._store.versions.latest(run.run_id)
        if version is None or version.released or version.refusal is not None:
            return None
        return version.version

    # --- small things ------------------------------------------------------------------------------------------------

    @property
    def _current(self) -> Run:
        if self._run is None:
            raise machine.ImpossibleEventError("no run is open")
        return self._run

    def _task(self, round_index: int) -> TrainTask:
        run = self._current
        l2_clip_norm = self._protection.l2_clip_norm(run.run_id, round_index)
        return self._task_of(run.run_id, round_index, run.data_digest, run.noise_multiplier, l2_clip_norm)

    def _task_of(
        self, run_id: str, round_index: int, data_digest: str, noise_multiplier: float, l2_clip_norm: float
    ) -> TrainTask:
        training, privacy = self._settings.training, self._settings.privacy
        return TrainTask(
            run_id=run_id,
            round_index=round_index,
            base_digest=self._handed_digest,
            data_digest=data_digest,
            noise_multiplier=noise_multiplier,
            sampling_prob=privacy.sampling_prob,
            l2_clip_norm=l2_clip_norm,
            local_steps=training.local_steps,
            learning_rate=training.learning_rate,
            privacy_unit=privacy.privacy_unit,
        )

    def _report(self, state: LoopState) -> None:
        run = self._current
        ending = state.ending if state.phase is Phase.RESTING else None
        self._progress = replace(
            self._progress,
            run_id=run.run_id,
            rounds_total=run.rounds_total,
            phase=state.phase.value,
            status=ending.status if ending else RunStatus.RUNNING,
            message=ending.reason if ending else None,
        )
        self._on_progress(self._progress)

    def _resting_progress(self) -> TrainingProgress:
        """What the store remembers, for a loop that has not begun."""
        run = self._store.runs.latest()
        version = self._store.versions.latest(run.run_id) if run else None
        return TrainingProgress(
            run_id=run.run_id if run else None,
            status=run.status if run else None,
            phase=Phase.IDLE.value if run is None or run.status is RunStatus.RUNNING else Phase.RESTING.value,
            rounds_total=run.rounds_total if run else self._settings.training.rounds,
            rounds_done=run.rounds_done if run else 0,
            loss=version.metrics.get("loss") if version else None,
            accuracy=version.metrics.get("accuracy") if version else None,
            epsilon=self._accountant.budget().epsilon_spent,
            version=version.version if version else None,
            message=run.reason if run else None,
        )

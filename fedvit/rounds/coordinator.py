"""The training loop: performs the effects of the round machine against a store, an accountant, a fleet and a model.

It knows no Ray: the aggregator actor passes Ray-backed ports, tests pass doubles. Whatever process dies, calling
:meth:`Coordinator.run` again continues after the last committed round.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from fedvit.clients.tracebacks import traceback_of
from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import Settings
from fedvit.errors import FedvitError
from fedvit.ports import AccountantPort, ClockPort, FleetPort, ServerModelPort
from fedvit.rounds import machine
from fedvit.rounds.context import RoundContext
from fedvit.rounds.execution import METRICS, RoundExecution
from fedvit.rounds.failures import Failure, record_failure
from fedvit.rounds.lifecycle import RunLifecycle
from fedvit.rounds.machine import LoopState, Phase, RunPlan
from fedvit.rounds.protection import protection_for
from fedvit.rounds.steering import RunRequest
from fedvit.store.store import Store
from fedvit.types import Evaluation, Run, RunStatus, TrainingProgress


class ProgressReporter:
    """Keeps the latest progress and reports it after every event, from the thread that runs the loop."""

    latest: TrainingProgress

    def __init__(self, context: RoundContext, on_progress: Callable[[TrainingProgress], None]) -> None:
        self._context, self._on_progress = context, on_progress
        self.reset()

    def announce(self) -> TrainingProgress:
        self.latest = replace(self.latest, phase=Phase.IDLE.value, status=RunStatus.RUNNING, message=None)
        return self.latest

    def committed(self, round_index: int, version: str, evaluation: Evaluation | None, epsilon: float) -> None:
        """Note a committed round; where it was not evaluated, the last figures stay."""
        self.latest = replace(
            self.latest,
            rounds_done=round_index,
            loss=evaluation.loss if evaluation else self.latest.loss,
            accuracy=evaluation.accuracy if evaluation else self.latest.accuracy,
            epsilon=epsilon,
            version=version,
        )

    def report(self, run: Run, state: LoopState) -> None:
        ending = state.ending if state.phase is Phase.RESTING else None
        self.latest = replace(
            self.latest,
            run_id=run.run_id,
            rounds_total=run.rounds_total,
            phase=state.phase.value,
            status=ending.status if ending else RunStatus.RUNNING,
            message=ending.reason if ending else run.reason,
        )
        self._on_progress(self.latest)

    def reset(self) -> None:
        """Go back to the latest run as the store holds it, for a loop that has not begun."""
        run = self._context.store.runs.latest()
        version = self._context.store.versions.latest(run.run_id) if run else None
        self.latest = TrainingProgress(
            run_id=run.run_id if run else None,
            status=run.status if run else None,
            phase=Phase.IDLE.value if run is None or run.status is RunStatus.RUNNING else Phase.RESTING.value,
            rounds_total=run.rounds_total if run else self._context.settings.training.rounds,
            rounds_done=run.rounds_done if run else 0,
            loss=version.metrics.get("loss") if version else None,
            accuracy=version.metrics.get("accuracy") if version else None,
            epsilon=self._context.accountant.budget().epsilon_spent,
            version=version.version if version else None,
            message=run.reason if run else None,
        )


class Coordinator:
    """Runs training, one run after another.

    Args:
        on_progress: called after every event, from the thread that runs the loop.
        clock: a simulation's is virtual.
        on_health: called with the scores of the data's quality and drift, after rounds in which they were measured.
        simulated: see :class:`fedvit.rounds.context.RoundContext`.

    Raises:
        ConfigError: the settings ask for what a real or a simulated system does not do.

    Attributes:
        lifecycle: checks and opens runs.
        publisher: releases versions.
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
        clock: ClockPort = SYSTEM_CLOCK,
        on_health: Callable[[float | None, float | None], None] = lambda quality, drift: None,
        simulated: bool = False,
    ) -> None:
        protection = protection_for(settings, store)
        context = RoundContext(settings, store, accountant, fleet, model, clock, protection, simulated)
        self._context, self._store, self._stopping = context, store, threading.Event()
        self._progress = ProgressReporter(context, on_progress)
        self.lifecycle = RunLifecycle(context)
        self._execution = RoundExecution(context, self.lifecycle, self._stopping, on_health, self._progress.committed)
        self.publisher = self._execution.publisher

    def request_stop(self) -> None:
        """Ask the loop to end after the round under way; harmless when it rests."""
        self._stopping.set()

    def progress(self) -> TrainingProgress:
        """Where the loop stands, as of the last event."""
        return self._progress.latest

    def announce(self) -> TrainingProgress:
        """Show the loop as running, not as the last run ended; :meth:`run` is to follow."""
        return self._progress.announce()

    def show_stored(self) -> None:
        """Show the latest run as it is stored, for a loop that ended with a fault of the program."""
        self._progress.reset()

    def begin(self, request: RunRequest) -> Run:
        """Put a request in force and open its run, while the loop rests; :meth:`run` then drives it. Repeatable."""
        run = self.lifecycle.begin(request)
        self._progress.reset()
        return run

    def run(self) -> Run:
        """Begin or continue the run that the settings describe, and drive it until it rests.

        Raises:
            FedvitError: the run could not begin; once it has begun, faults end it with status FAILED and a reason.
        """
        self._stopping.clear()
        run = self.lifecycle.open_run()
        if run.status is not RunStatus.COMPLETED:
            # Why it began, or goes on, stays visible while it runs.
            reason = run.reason if run.status is RunStatus.RUNNING else None
            run = self._store.runs.set_status(run.run_id, RunStatus.RUNNING, reason)
        self._execution.enter(run)
        min_clients = self._context.settings.training.cohort.min_clients
        release_every, sampled = self._context.settings.release.every_rounds, self._context.protection.sampled
        plan = RunPlan(run.rounds_total, min_clients, release_every, sampled)
        started = machine.Started(run.rounds_done, self.lifecycle.unreleased_version(run))
        self._drive(LoopState(plan), started)
        return self._store.runs.get(run.run_id)

    def _drive(self, state: LoopState, first: machine.Event) -> None:
        state, effects = machine.step(state, first)
        queue = deque(effects)
        while queue:
            self._progress.report(self._execution.run, state)
            began_s = self._context.clock.monotonic()
            event = self._perform(queue.popleft())
            METRICS.phase_took(state.phase.value, self._context.clock.monotonic() - began_s)
            if event is not None:
                if self._stopping.is_set() and not state.stop_requested:
                    state, _ = machine.step(state, machine.StopRequested())
                state, effects = machine.step(state, event)
                queue.extend(effects)
        self._progress.report(self._execution.run, state)

    def _perform(self, effect: machine.Effect) -> machine.Event | None:
        run_id = self._execution.run.run_id
        try:
            if isinstance(effect, machine.EndRun):
                self._store.runs.set_status(run_id, effect.status, effect.reason)
                return None
            return self._execution.perform(effect)
        except FedvitError as error:
            return machine.Failed(str(error))
        except Exception as error:
            reason, done = f"{type(error).__name__}: {error}", self._store.runs.get(run_id).rounds_done
            record_failure(self._store, Failure(run_id, done + 1, None, reason, traceback_of(error)))
            self._store.runs.set_status(run_id, RunStatus.FAILED, reason)
            raise

"""The training loop: performs what the round machine decides, against a store, an accountant, a fleet and a model.

It knows no Ray: the aggregator actor passes Ray-backed ports, tests pass doubles. Whatever process dies, calling
:meth:`Coordinator.run` again continues after the last committed round.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import Settings
from fedvit.errors import FedvitError
from fedvit.ports import AccountantPort, ClockPort, FleetPort, ServerModelPort
from fedvit.rounds import machine
from fedvit.rounds.cohorts import CohortSelector
from fedvit.rounds.execution import METRICS, RoundExecution
from fedvit.rounds.lifecycle import RunLifecycle
from fedvit.rounds.machine import LoopState, RunPlan
from fedvit.rounds.progress import ProgressReporter
from fedvit.rounds.protection import protection_for
from fedvit.rounds.steering import RunRequest
from fedvit.store.store import Store
from fedvit.types import Run, RunStatus, TrainingProgress


class Coordinator:
    """Runs training, one run after another.

    Args:
        on_progress: called after every event, from the thread that runs the loop.
        clock: a simulation's is virtual.
        on_health: called with the scores of the data's quality and drift, after rounds in which they were measured.

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
    ) -> None:
        self._settings, self._store, self._clock = settings, store, clock
        self._protection = protection_for(settings, store)
        self._stopping = threading.Event()
        self._progress = ProgressReporter(settings, store, accountant, on_progress)
        cohorts = CohortSelector(settings, store, accountant, self._protection, clock)
        self.lifecycle = RunLifecycle(settings, store, accountant, model, self._protection, cohorts)
        self._execution = RoundExecution(
            settings,
            store,
            accountant,
            fleet,
            model,
            protection=self._protection,
            cohorts=cohorts,
            lifecycle=self.lifecycle,
            progress=self._progress,
            clock=clock,
            stopping=self._stopping,
            on_health=on_health,
        )
        self.publisher = self._execution.publisher

    def request_stop(self) -> None:
        """Ask the loop to end after the round under way; harmless when it rests."""
        self._stopping.set()

    def progress(self) -> TrainingProgress:
        """Where the loop stands, as of the last event."""
        return self._progress.latest

    def announce(self) -> TrainingProgress:
        """See :meth:`fedvit.rounds.progress.ProgressReporter.announce`; :meth:`run` is to follow."""
        return self._progress.announce()

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
            self._store.runs.set_status(run.run_id, RunStatus.RUNNING)
        self._execution.enter(run)
        plan = RunPlan(
            run.rounds_total,
            self._settings.training.cohort.min_clients,
            self._settings.release.every_rounds,
            self._protection.sampled,
        )
        started = machine.Started(run.rounds_done, self.lifecycle.unreleased_version(run))
        self._drive(LoopState(plan), started)
        return self._store.runs.get(run.run_id)

    def _drive(self, state: LoopState, first: machine.Event) -> None:
        state, effects = machine.step(state, first)
        queue = deque(effects)
        while queue:
            self._progress.report(self._execution.run, state)
            began_s = self._clock.monotonic()
            event = self._perform(queue.popleft())
            METRICS.phase_took(state.phase.value, self._clock.monotonic() - began_s)
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
            self._store.runs.set_status(run_id, RunStatus.FAILED, f"{type(error).__name__}: {error}")
            raise

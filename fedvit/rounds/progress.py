"""Progress of the training loop, as the API and progress bars show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedvit.config import Settings
from fedvit.ports import AccountantPort
from fedvit.rounds.machine import LoopState, Phase
from fedvit.store.store import Store
from fedvit.types import Evaluation, Run, RunStatus, TrainingProgress


class ProgressReporter:
    """Keeps the latest progress and reports it after every event.

    Args:
        on_progress: called from the thread that runs the loop.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        accountant: AccountantPort,
        on_progress: Callable[[TrainingProgress], None],
    ) -> None:
        self._settings, self._store, self._accountant = settings, store, accountant
        self._on_progress = on_progress
        self.latest = self.read()

    def announce(self) -> TrainingProgress:
        """Say that the loop is about to run, so that the end of the last run is not taken for the end of this one."""
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
        """Report where the loop stands."""
        ending = state.ending if state.phase is Phase.RESTING else None
        self.latest = replace(
            self.latest,
            run_id=run.run_id,
            rounds_total=run.rounds_total,
            phase=state.phase.value,
            status=ending.status if ending else RunStatus.RUNNING,
            message=ending.reason if ending else None,
        )
        self._on_progress(self.latest)

    def reset(self) -> None:
        """Go back to what the store holds."""
        self.latest = self.read()

    def read(self) -> TrainingProgress:
        """The progress of the latest run as the store holds it, for a loop that has not begun."""
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

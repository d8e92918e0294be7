"""A sweep on Ray Tune: trial functions that only wait, and worker actors, kept between trials, that do the work."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.callback import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from actors.handles import fetch
from fedvit.config import Settings
from fedvit.errors import FedvitError
from fedvit.settings import settings_from_json, settings_to_json
from fedvit.tools.sweep.halving import Halving, Score
from fedvit.tools.sweep.journal import Journal
from fedvit.tools.sweep.outcome import FAILED, TrialOutcome
from fedvit.tools.sweep.space import TrialPlan, plan_sweep, rungs_of
from fedvit.tools.sweep.trial import RUNNING, WarmTrials, stopped_early

WAITING_CPUS = 0.05
"""The share of a trial's CPUs that a waiting function books."""
SPARE = 1
"""Trial functions beyond the workers: one waits already when a worker is free, so that Tune's delay costs no time."""
_POLL_S = 0.02
# As text: Tune flattens nested values.
_OUTCOME = "outcome"


class TrialWorker:
    """Runs trials with the sweep's secret, one after another, on data and models that it keeps in memory."""

    def __init__(self, threads: int, secret: bytes) -> None:
        import torch

        torch.set_num_threads(threads)
        self._trials = WarmTrials(_open_world, secret)

    def begin(self, trial: Mapping[str, Any], rungs: Sequence[int]) -> bool:
        settings = settings_from_json(trial["settings"])
        return self._trials.begin(TrialPlan(trial["trial_id"], trial["parameters"], settings), rungs)

    def advance(self, trial_id: str) -> TrialOutcome:
        return self._trials.advance(trial_id)

    def abandon(self, trial_id: str) -> None:
        self._trials.abandon(trial_id)


def _open_world(plan: TrialPlan) -> Any:
    from fedvit.tools.simulation.world import ImageWorld

    world = ImageWorld(plan.settings)
    world.load()
    return world


def run_trials(
    settings: Settings, journal: Journal, workers: Sequence[Any], on_trial: Callable[[TrialOutcome], None]
) -> None:
    """Run the trials that the journal does not have as finished; each is written there before ``on_trial`` is called.

    A trial that was interrupted or failed begins again and, with the same secret, releases the same values once more.

    Raises:
        FedvitError: a trial could not be run for a reason outside the trial; the journal keeps the other trials.
    """
    plans = plan_sweep(settings)
    done = journal.finished(plans)
    known = {outcome.trial_id for outcome in done}
    left = [plan for plan in plans if plan.trial_id not in known]
    if not left:
        return
    halving = Halving(settings.sweep.reduction_factor, settings.sweep.margin)
    planned = {plan.trial_id: plan.epsilon for plan in plans}
    for outcome in done:
        for rung, (value, error) in outcome.rungs.items():
            halving.record(outcome.trial_id, int(rung), planned[outcome.trial_id], Score(value, error))
    scratch = journal.folder / "tune"
    # The remains of a sweep that was killed; the journal has all that is needed.
    shutil.rmtree(scratch, ignore_errors=True)
    recorder = _TrialRecorder(journal, planned, on_trial)
    try:
        _tuner(settings, left, workers, scratch, _HalvingScheduler(halving, planned), recorder).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if recorder.broken:
        raise FedvitError(
            f"{len(recorder.broken)} trials broke off, the first of them {recorder.broken[0]}.",
            cure="The same command runs them again; see the Ray logs if they break off again.",
        )


def _tuner(
    settings: Settings,
    plans: Sequence[TrialPlan],
    workers: Sequence[Any],
    scratch: Path,
    scheduler: _HalvingScheduler,
    recorder: _TrialRecorder,
) -> tune.Tuner:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    function = _trial_function(workers, rungs_of(settings))
    cpus = settings.sweep.cpus_per_trial * WAITING_CPUS
    return tune.Tuner(
        tune.with_resources(function, {"cpu": cpus}),
        param_space={"trial": tune.grid_search([_as_config(plan) for plan in plans])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=len(workers) + SPARE,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(scratch.resolve()),
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )


def _as_config(plan: TrialPlan) -> dict[str, Any]:
    settings = settings_to_json(plan.settings)
    return {"trial_id": plan.trial_id, "parameters": dict(plan.parameters), "settings": settings}


def _name(trial: Trial) -> str:
    return str(trial.config["trial"]["trial_id"])


def _trial_function(workers: Sequence[Any], rungs: Sequence[int]) -> Callable[[dict[str, Any]], None]:
    def fedvit_trial(config: dict[str, Any]) -> None:
        trial = config["trial"]
        worker = _free_worker(workers, trial, rungs)
        try:
            outcome = None
            while outcome is None or outcome.status == RUNNING:
                outcome = fetch(worker.advance.remote(trial["trial_id"]), timeout_s=None)
                # Tune ends this thread here when the scheduler stops the trial.
                tune.report({_OUTCOME: json.dumps(outcome.to_json()), "round_index": outcome.rounds})
        finally:
            worker.abandon.remote(trial["trial_id"])

    return fedvit_trial


def _free_worker(workers: Sequence[Any], trial: Mapping[str, Any], rungs: Sequence[int]) -> Any:
    """The first worker that accepts the trial; the others are running one."""
    for worker in itertools.cycle(workers):
        if fetch(worker.begin.remote(trial, rungs), timeout_s=None):
            return worker
        time.sleep(_POLL_S)
    raise AssertionError


def _outcome(result: Mapping[str, Any]) -> TrialOutcome:
    return TrialOutcome.from_json(json.loads(result[_OUTCOME]))


class _HalvingScheduler(FIFOScheduler):
    """:class:`fedvit.tools.sweep.halving.Halving` as a scheduler of Tune: it stops trials that are clearly behind."""

    def __init__(self, halving: Halving, planned: Mapping[str, float]) -> None:
        super().__init__()
        self._halving, self._planned = halving, planned

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        outcome = _outcome(result)
        if outcome.status != RUNNING:
            return str(TrialScheduler.CONTINUE)
        rung, trial_id = max(map(int, outcome.rungs)), outcome.trial_id
        score = Score(*outcome.rungs[str(rung)])
        good = self._halving.goes_on(trial_id, rung, self._planned[trial_id], score)
        return str(TrialScheduler.CONTINUE if good else TrialScheduler.STOP)


class _TrialRecorder(Callback):
    """Writes every trial that ends into the journal; runs in the driver, so that there is one writer."""

    def __init__(
        self, journal: Journal, planned: Mapping[str, float], on_trial: Callable[[TrialOutcome], None]
    ) -> None:
        self._journal, self._planned, self._on_trial = journal, planned, on_trial
        self.broken: list[str] = []
        """The trials whose worker or function failed, with the reason."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks to resume a sweep; here the journal serves that purpose.
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        outcome = _outcome(trial.last_result)
        if outcome.status == RUNNING:
            outcome = stopped_early(outcome)
        planned = self._planned[outcome.trial_id]
        outcome = replace(outcome, planned_epsilon=planned if math.isfinite(planned) else None)
        self._journal.write(outcome)
        self._on_trial(outcome)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Store a trial whose worker or function failed, such as one out of memory, as failed."""
        error = trial.get_pickled_error() or trial.get_error()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        self.broken.append(f"{_name(trial)} ({reason})")
        config = trial.config["trial"]
        seed = settings_from_json(config["settings"]).simulation.seed
        outcome = TrialOutcome(config["trial_id"], config["parameters"], seed, FAILED, f"its worker failed: {reason}")
        self._journal.write(outcome)
        self._on_trial(outcome)

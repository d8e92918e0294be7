"""Trial of a sweep: a simulated run that pauses at every rung until it is continued or abandoned."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

from fedvit.errors import FedvitError
from fedvit.privacy.randomness import derive_secret
from fedvit.tools.simulation.run import Point, Simulated, SimulationObserver, simulate
from fedvit.tools.simulation.world import World
from fedvit.tools.sweep.halving import Score, score_of
from fedvit.tools.sweep.outcome import FAILED, STOPPED_EARLY, TrialOutcome
from fedvit.tools.sweep.space import TrialPlan
from fedvit.types import Evaluation

_LOG = logging.getLogger(__name__)
RUNNING = "running"
ABANDONED_AFTER_S = 300.0


class _AbandonedError(Exception):
    """The trial is not to be continued."""


class SteppedTrial:
    """A trial in its own thread; call :meth:`advance` until the status is not ``running``.

    Args:
        plan: the trial.
        open_world: gives the data and the model, which several trials may share; called in the trial's thread, so that
            an error of it is the outcome of this trial.
        rungs: the rounds after which it pauses, ascending.
        since_s: ``time.monotonic()`` when its worker became free.
        warm: whether the world was loaded before.
        abandoned_after_s: a trial that is not continued at a rung for so long ends.
        root_secret: see :func:`fedvit.tools.simulation.run.simulate`.
    """

    def __init__(
        self,
        plan: TrialPlan,
        open_world: Callable[[], World],
        rungs: Sequence[int],
        *,
        since_s: float,
        warm: bool = True,
        abandoned_after_s: float = ABANDONED_AFTER_S,
        root_secret: bytes | None = None,
    ) -> None:
        self._plan, self._open_world, self._root_secret = plan, open_world, root_secret
        self._rungs, self._abandoned_after_s = list(rungs), abandoned_after_s
        self._since_s, self._warm = since_s, warm
        self._began_s: float | None = None
        self._num_test = 0
        self._points: list[Point] = []
        self._scores: dict[str, tuple[float, float]] = {}
        self._results: SimpleQueue[TrialOutcome] = SimpleQueue()
        self._continue = threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=plan.trial_id, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether its thread has ended."""
        return not self._thread.is_alive()

    def advance(self) -> TrialOutcome:
        """Continue to the next rung or to the end, and return the outcome so far.

        Any error of the run is an outcome with the status ``failed``; one that is no ``FedvitError`` is logged with its
        traceback.
        """
        self._continue.release()
        return self._results.get()

    def abandon(self) -> None:
        """End the trial without a further round."""
        self._abandoned = True
        self._continue.release()

    def _run(self) -> None:
        try:
            self._wait()
            observer = SimulationObserver(self._version_committed, self._training_begins, self._evaluated)
            plan, secret = self._plan, self._root_secret
            run = simulate(plan.settings, self._open_world(), plan.trial_id, observer, root_secret=secret)
            self._results.put(self._outcome(run.status.value, run.reason, run))
        except _AbandonedError:
            pass
        except FedvitError as error:
            self._results.put(self._outcome(FAILED, str(error)))
        except BaseException as error:  # code of a plugin may raise anything, SystemExit among it
            _LOG.exception("the trial %s failed", self._plan.trial_id)
            self._results.put(self._outcome(FAILED, f"{type(error).__name__}: {error}"))

    def _training_begins(self) -> None:
        self._began_s = self._began_s or time.monotonic()

    def _evaluated(self, evaluation: Evaluation) -> None:
        self._num_test = evaluation.num_examples

    def _version_committed(self, point: Point) -> None:
        self._points.append(point)
        if self._rungs and point.round_index >= self._rungs[0]:
            rung = self._rungs.pop(0)
            if (score := self._score()) is not None:
                self._scores[str(rung)] = (score.value, score.error)
                self._results.put(self._outcome(RUNNING))
                self._wait()

    def _wait(self) -> None:
        if not self._continue.acquire(timeout=self._abandoned_after_s) or self._abandoned:
            raise _AbandonedError

    def _score(self) -> Score | None:
        accuracies = [p.accuracy for p in self._points if p.accuracy is not None]
        return score_of(accuracies, self._num_test, self._plan.settings.sweep.window) if accuracies else None

    def _outcome(self, status: str, reason: str | None = None, run: Simulated | None = None) -> TrialOutcome:
        score, now_s, plan = self._score(), time.monotonic(), self._plan
        began_s = self._began_s or now_s
        last = self._points[-1] if self._points else None
        spent = run.epsilon if run is not None else math.inf
        return TrialOutcome(
            trial_id=plan.trial_id,
            parameters=plan.parameters,
            seed=plan.settings.simulation.seed,
            status=status,
            reason=reason,
            epsilon=spent if math.isfinite(spent) else None,
            score=None if score is None else score.value,
            standard_error=None if score is None else score.error,
            rounds=last.round_index if last else 0,
            hours=last.hours if last else 0.0,
            seconds=max(0.0, now_s - began_s),
            startup_s=began_s - self._since_s,
            warm=self._warm,
            rungs=dict(self._scores),
            curve=[(p.hours, p.round_index, p.accuracy) for p in self._points if p.accuracy is not None],
            outcomes=dict(run.outcomes) if run else {},
            staleness={str(late): count for late, count in sorted(run.staleness.items())} if run else {},
        )


def stopped_early(outcome: TrialOutcome) -> TrialOutcome:
    """The outcome of a trial that was stopped at a rung."""
    last = list(outcome.rungs)[-1]
    return replace(outcome, status=STOPPED_EARLY, reason=f"behind those as private after {last} rounds")


class WarmTrials:
    """The trials of one worker, one at a time; data and models are kept between trials.

    Args:
        open_world: opens the world of a trial that fits no kept one.
        secret: the secret of the sweep; each trial's key is derived from it, so that a trial can be repeated.
        most_worlds: how many worlds are kept; the least recently used one is dropped first.
    """

    def __init__(self, open_world: Callable[[TrialPlan], World], secret: bytes, most_worlds: int = 4) -> None:
        self._open_world, self._secret, self._most = open_world, secret, most_worlds
        self._worlds: dict[str, World] = {}
        self._free_since_s = time.monotonic()
        self._beginning = threading.Lock()
        self._trial: SteppedTrial | None = None
        self._trial_id = ""

    def begin(self, plan: TrialPlan, rungs: Sequence[int]) -> bool:
        """Begin a trial unless another one is under way; return whether it began. Thread-safe."""
        if not self._beginning.acquire(blocking=False):
            return False
        try:
            if self._trial is not None and not self._trial.over:
                return False
            secret, warm = derive_secret(self._secret, plan.trial_id), self._key(plan) in self._worlds
            self._trial = SteppedTrial(
                plan, partial(self._world, plan), rungs, since_s=self._free_since_s, warm=warm, root_secret=secret
            )
            self._trial_id = plan.trial_id
            return True
        finally:
            self._beginning.release()

    def advance(self, trial_id: str) -> TrialOutcome:
        assert self._trial is not None
        assert self._trial_id == trial_id
        outcome = self._trial.advance()
        self._free_since_s = time.monotonic()
        return outcome

    def abandon(self, trial_id: str) -> None:
        """See :meth:`SteppedTrial.abandon`; no effect on a trial that is over or on another trial."""
        if self._trial is not None and self._trial_id == trial_id:
            self._trial.abandon()

    def _key(self, plan: TrialPlan) -> str:
        return plan.settings.data.model_dump_json() + plan.settings.model.model_dump_json()

    def _world(self, plan: TrialPlan) -> World:
        key = self._key(plan)
        kept = self._worlds.pop(key, None)
        self._worlds[key] = kept or self._open_world(plan)
        while len(self._worlds) > self._most:
            del self._worlds[next(iter(self._worlds))]
        return self._worlds[key]

"""One trial at work: a simulated run that stops at every rung until somebody says that it is worth its next rounds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue

from fedvit.errors import FedvitError
from fedvit.privacy.secrets import derive_secret
from fedvit.tools.simulation.faults import Faults
from fedvit.tools.simulation.fleet import Learners
from fedvit.tools.simulation.run import Point, Simulated, simulate
from fedvit.tools.simulation.server import Evaluated
from fedvit.tools.simulation.world import World
from fedvit.tools.sweep.halving import Score, score_of
from fedvit.tools.sweep.outcome import STOPPED_EARLY, TrialOutcome
from fedvit.tools.sweep.space import TrialPlan
from fedvit.types import Client, Evaluation, TrainTask, Weights
from fedvit.updates import SingleMessage

RUNNING = "running"
PATIENCE_S = 300.0


class _AbandonedError(Exception):
    """Nobody wants more of this trial."""


@dataclass(frozen=True, slots=True)
class _Told:
    outcome: TrialOutcome | None = None
    error: BaseException | None = None


class SteppedTrial:
    """Runs in a thread of its own; whoever drives it calls :meth:`advance` until the status is another than running.

    Args:
        plan: what to run.
        world: the data and the model, as earlier trials have left them warm.
        rungs: after how many rounds it stops, ascending.
        since_s: ``time.monotonic()`` of when its worker was free.
        warm: whether the world was there already.
        patience_s: a trial that is left at a rung for so long ends.
        root_secret: see :func:`fedvit.tools.simulation.run.simulate`.
    """

    def __init__(
        self,
        plan: TrialPlan,
        world: World,
        rungs: Sequence[int],
        *,
        since_s: float,
        warm: bool = True,
        patience_s: float = PATIENCE_S,
        root_secret: bytes | None = None,
    ) -> None:
        self._plan = plan
        self._world = _Watched(world)
        self._rungs = list(rungs)
        self._since_s = since_s
        self._patience_s = patience_s
        self._warm = warm
        self._root_secret = root_secret
        self._points: list[Point] = []
        self._scores: dict[str, tuple[float, float]] = {}
        self._told: SimpleQueue[_Told] = SimpleQueue()
        self._go = threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=plan.trial_id, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether it does nothing any more."""
        return not self._thread.is_alive()

    def advance(self) -> TrialOutcome:
        """Go on to the next rung or to the end, and tell where it is; faults of the run are an outcome.

        Raises:
            Exception: what is no fault that fedvit understands.
        """
        self._go.release()
        told = self._told.get()
        if told.error is not None:
            raise told.error
        assert told.outcome is not None
        return told.outcome

    def abandon(self) -> None:
        """Do no further round."""
        self._abandoned = True
        self._go.release()

    def _run(self) -> None:
        try:
            self._wait()
            found = simulate(
                self._plan.settings, self._world, self._plan.trial_id, self._seen, root_secret=self._root_secret
            )
            self._told.put(_Told(self._outcome(found.status.value, found.reason, found)))
        except _AbandonedError:
            pass
        except FedvitError as error:
            self._told.put(_Told(self._outcome("failed", str(error))))
        except BaseException as error:
            self._told.put(_Told(error=error))

    def _seen(self, point: Point) -> None:
        self._points.append(point)
        if self._rungs and point.round_index >= self._rungs[0]:
            rung = self._rungs.pop(0)
            if (score := self._score()) is not None:
                self._scores[str(rung)] = (score.value, score.error)
                self._told.put(_Told(self._outcome(RUNNING)))
                self._wait()

    def _wait(self) -> None:
        if not self._go.acquire(timeout=self._patience_s) or self._abandoned:
            raise _AbandonedError

    def _score(self) -> Score | None:
        known = [p.accuracy for p in self._points if p.accuracy is not None]
        if not known:
            return None
        return score_of(known, self._world.num_test, self._plan.settings.sweep.window)

    def _outcome(self, status: str, reason: str | None = None, found: Simulated | None = None) -> TrialOutcome:
        score, now_s, plan = self._score(), time.monotonic(), self._plan
        began_s = self._world.began_s or now_s
        spent = found.epsilon if found is not None else math.inf
        return TrialOutcome(
            trial_id=plan.trial_id,
            parameters=plan.parameters,
            seed=plan.settings.simulation.seed,
            status=status,
            reason=reason,
            epsilon=spent if math.isfinite(spent) else None,
            score=None if score is None else score.value,
            standard_error=None if score is None else score.error,
            rounds=self._points[-1].round_index if self._points else 0,
            hours=self._points[-1].hours if self._points else 0.0,
            seconds=max(0.0, now_s - began_s),
            startup_s=began_s - self._since_s,
            warm=self._warm,
            rungs=dict(self._scores),
            curve=[(p.hours, p.round_index, p.accuracy) for p in self._points if p.accuracy is not None],
            outcomes=dict(found.outcomes) if found else {},
            staleness={str(late): count for late, count in sorted(found.staleness.items())} if found else {},
        )


def stopped_early(outcome: TrialOutcome) -> TrialOutcome:
    """What a trial came to that was not worth its further rounds."""
    last = list(outcome.rungs)[-1]
    return replace(outcome, status=STOPPED_EARLY, reason=f"behind those as private after {last} rounds")


class _Watched:
    """A world that remembers when its first client began to work, and on how many images its model was looked at."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.began_s: float | None = None
        self.num_test = 0

    @property
    def clients(self) -> list[Client]:
        return self._world.clients

    @property
    def server(self) -> Evaluated:
        return _WatchedServer(self, self._world.server)

    def learners(self, settings: object, faults: Faults) -> Learners:
        return _WatchedLearners(self, self._world.learners(settings, faults))  # type: ignore[arg-type]


class _WatchedServer:
    def __init__(self, watched: _Watched, server: Evaluated) -> None:
        self._watched = watched
        self._server = server
        self.initial_weights = server.initial_weights
        self.frozen_weights = server.frozen_weights

    def evaluate(self, weights: Weights) -> Evaluation:
        found = self._server.evaluate(weights)
        self._watched.num_test = found.num_examples
        return found


class _WatchedLearners:
    def __init__(self, watched: _Watched, learners: Learners) -> None:
        self._watched = watched
        self._learners = learners

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> SingleMessage:
        self._watched.began_s = self._watched.began_s or time.monotonic()
        return self._learners.answer(task, weights, client_id)


WorldOf = Callable[[TrialPlan], World]


class WarmTrials:
    """What one worker keeps between trials: data and models, and when it was last free.

    Args:
        open_world: makes a world for settings that no kept one fits.
        secret: of the sweep; every trial has a key of its own from it, and repeats itself.
        most_worlds: so many are kept; the one that was used least lately goes first.
    """

    def __init__(self, open_world: WorldOf, secret: bytes, most_worlds: int = 4) -> None:
        self._secret = secret
        self._open_world = open_world
        self._most = most_worlds
        self._worlds: dict[str, World] = {}
        self._free_since_s = time.monotonic()
        self._beginning = threading.Lock()
        self._trial: SteppedTrial | None = None
        self._trial_id = ""

    def begin(self, plan: TrialPlan, rungs: Sequence[int]) -> bool:
        """Begin a trial, unless another one is under way. Safe for threads."""
        if not self._beginning.acquire(blocking=False):
            return False
        with self._beginning_ends():
            if self._trial is not None and not self._trial.over:
                return False
            world, warm = self._world(plan)
            secret = derive_secret(self._secret, plan.trial_id)
            self._trial = SteppedTrial(plan, world, rungs, since_s=self._free_since_s, warm=warm, root_secret=secret)
            self._trial_id = plan.trial_id
            return True

    @contextmanager
    def _beginning_ends(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._beginning.release()

    def advance(self, trial_id: str) -> TrialOutcome:
        """See :meth:`SteppedTrial.advance`."""
        assert self._trial is not None
        assert self._trial_id == trial_id
        outcome = self._trial.advance()
        self._free_since_s = time.monotonic()
        return outcome

    def abandon(self, trial_id: str) -> None:
        """See :meth:`SteppedTrial.abandon`; harmless where it is over, or where another one began."""
        if self._trial is not None and self._trial_id == trial_id:
            self._trial.abandon()

    def _world(self, plan: TrialPlan) -> tuple[World, bool]:
        settings = plan.settings
        key = settings.data.model_dump_json() + settings.model.model_dump_json()
        found = self._worlds.pop(key, None)
        self._worlds[key] = found or self._open_world(plan)
        while len(self._worlds) > self._most:
            del self._worlds[next(iter(self._worlds))]
        return self._worlds[key], found is not None

"""Sessions in which the contributions of a round become one sum, where noise is distributed over the clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedvit.config import Settings
from fedvit.errors import ConfigError, NotFoundError, SecureAggregationError
from fedvit.metrics.training import SecureAggregationMetrics
from fedvit.rounds.attempts import Attempts
from fedvit.rounds.context import RoundContext
from fedvit.rounds.secure import MaskedSums
from fedvit.rounds.update_admission import RoundUpdates
from fedvit.secagg.noise import Plan
from fedvit.store.store import Store
from fedvit.types import Cohort, TrainTask, Weights
from fedvit.updates import DecodedUpdate, RingSum

# One in the process, for all loops.
METRICS = SecureAggregationMetrics()


class SumSession(Protocol):
    """One attempt of a round. Its ``cohort`` is sent the task."""

    @property
    def cohort(self) -> Cohort:
        """The clients that take part, with what each needs to mask its contribution."""

    def reveal(self, updates: RoundUpdates) -> RoundUpdates:
        """The updates with one :class:`RingSum` that has no masks, and with the outcomes of all clients.

        Raises:
            SecureAggregationError: too few clients contributed; nothing is revealed.
        """

    def end(self) -> None:
        """The session is over, however it ended."""


class SecureSums(Protocol):
    """Begins the sessions of rounds."""

    def attempt(self, run_id: str, round_index: int) -> int:
        """How many sessions of the round have begun: the number of the next attempt, from 0."""

    def begin(self, task: TrainTask, cohort: Cohort, plan: Plan, min_survivors: int) -> SumSession:
        """Begin the session of this attempt, which is durably used up from then on.

        Raises:
            SecureAggregationError: too few clients take part.
        """

    def may_repeat(self, task: TrainTask) -> bool:
        """Whether a round whose attempt failed is to be tried again at once."""


@dataclass(frozen=True, slots=True)
class _UnmaskedSession:
    """A session without masks: the aggregator sees every contribution, as integers with its share of the noise."""

    cohort: Cohort
    plan: Plan
    min_survivors: int

    def reveal(self, updates: RoundUpdates) -> RoundUpdates:
        sums = [answer for answer in updates.answers if isinstance(answer, RingSum)]
        others: list[DecodedUpdate] = [answer for answer in updates.answers if not isinstance(answer, RingSum)]
        if updates.accepted < self.min_survivors:
            raise too_few(updates.round_index, updates.accepted, self.min_survivors)
        vector = np.zeros(self.plan.padded, np.uint32)
        for message in sums:
            vector += message.vector
        outcomes = tuple(outcome for message in sums for outcome in message.outcomes)
        weight = sum(message.total_weight for message in sums)
        whole = RingSum(
            updates.round_index, outcomes, vector & np.uint32(2**self.plan.bits - 1), weight, sums[0].attempt
        )
        return replace(updates, answers=(*others, whole))

    def end(self) -> None:
        pass


class UnmaskedSums:
    """Sums without masks, for simulations; implements :class:`SecureSums`."""

    def __init__(self, store: Store) -> None:
        self._attempts = Attempts(store)

    def attempt(self, run_id: str, round_index: int) -> int:
        return self._attempts.number(run_id, round_index)

    def begin(self, task: TrainTask, cohort: Cohort, plan: Plan, min_survivors: int) -> SumSession:
        self._attempts.begin(task)
        return _UnmaskedSession(cohort, plan, min_survivors)

    def may_repeat(self, task: TrainTask) -> bool:
        return False


def too_few(round_index: int, survivors: int, min_survivors: int) -> SecureAggregationError:
    """The error of a session with too few contributions."""
    return SecureAggregationError(
        f"Round {round_index} has {survivors} contributions, and a sum of fewer than {min_survivors} is not revealed.",
        cure="Draw larger cohorts, or lower secure_aggregation.min_survivors.",
    )


def check_masks(settings: Settings, *, simulated: bool = False) -> None:
    """Check that masks are left out in simulations, and only there.

    Raises:
        ConfigError: they are, elsewhere; or they are not.
    """
    if settings.privacy.noise_place != "distributed":
        return
    if simulated and settings.secure_aggregation.masks:
        raise ConfigError(
            "A simulation leaves the masks of secure aggregation out; secure_aggregation.masks is true.",
            cure="Set secure_aggregation.masks to false: quantisation and noise stay.",
        )
    if not simulated and not settings.secure_aggregation.masks:
        raise ConfigError(
            "secure_aggregation.masks false shows the aggregator every contribution, whose noise does not protect it.",
            cure="Leave it at true; only `fedvit simulate` and `fedvit sweep` leave the masks out.",
        )


class RoundSums:
    """The sums of a run's rounds, secure ones and others.

    Attributes:
        secure: whether noise is distributed over the clients.

    Raises:
        ConfigError: see :func:`check_masks`.
    """

    def __init__(self, context: RoundContext) -> None:
        self._settings, self._store, self._protection = context.settings, context.store, context.protection
        check_masks(context.settings, simulated=context.simulated)
        self.secure = context.settings.privacy.noise_place == "distributed"
        self._sums: SecureSums | None = None
        if self.secure:
            masks = context.settings.secure_aggregation.masks
            self._sums = MaskedSums(context) if masks else UnmaskedSums(context.store)

    def recorded_cohort(self, run_id: str, round_index: int) -> Cohort | None:
        """The cohort of a round whose sum is secure, if an earlier attempt has recorded one."""
        if not self.secure:
            return None
        try:
            client_ids = self._store.rounds.get(run_id, round_index).cohort
        except NotFoundError:
            return None
        return Cohort(round_index, client_ids) if client_ids else None

    def least_clients(self, cohort: Cohort) -> int:
        """Fewest clients of the cohort whose sum is revealed."""
        return self._settings.secure_aggregation.survivors(len(cohort.client_ids)) if self.secure else 0

    def task_of(self, task: TrainTask, cohort: Cohort, weights: Weights) -> tuple[TrainTask, Plan | None]:
        """The task of the cohort's next attempt, and where noise is distributed the plan of its contributions.

        Raises:
            ConfigError, SecureAggregationError: see :func:`fedvit.secagg.task_plan.plan_of`.
        """
        if self._sums is None:
            return task, None
        sizes = self._store.clients.num_examples(cohort.client_ids)
        task = replace(
            task,
            attempt=self._sums.attempt(task.run_id, task.round_index),
            participants=len(cohort.client_ids),
            sum_weight=float(sum(sizes.values())),
        )
        return task, self._protection.plan(task, weights)

    def collected(
        self, task: TrainTask, plan: Plan | None, cohort: Cohort, collect: Callable[[Cohort], RoundUpdates]
    ) -> RoundUpdates:
        """The updates of this attempt; where noise is distributed, one sum of those who contributed.

        Args:
            collect: sends the task to a cohort and collects its updates.

        Raises:
            SecureAggregationError: too few clients take part or contribute.
        """
        if self._sums is None or plan is None:
            return collect(cohort)
        survivors, least = 0, self.least_clients(cohort)
        METRICS.began(participants=task.participants, min_survivors=least, ring_bits=plan.bits)
        try:
            session = self._sums.begin(task, cohort, plan, least)
            try:
                updates = session.reveal(collect(session.cohort))
            finally:
                session.end()
            survivors = updates.accepted
        finally:
            METRICS.ended(survivors)
        return updates

    def may_repeat(self, task: TrainTask) -> bool:
        """Whether a round whose attempt failed is to be tried again at once."""
        return self._sums is not None and self._sums.may_repeat(task)

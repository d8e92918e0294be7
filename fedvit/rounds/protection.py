"""Privacy protection of a round: its charges, its checks, and how updates are folded.

The privacy unit says what is charged and by what a sum is divided. The place of the noise (``privacy.noise_at``) says
whether the aggregator adds noise to the sum, or the updates bring it along.
"""

from __future__ import annotations

import hmac
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import Fold, MeanRule, RoundFacts, State, checked_fold
from fedvit.config import Settings
from fedvit.errors import ConfigError
from fedvit.exact_sums import Sums
from fedvit.ports import POPULATION, Charge
from fedvit.privacy import mechanism
from fedvit.privacy.adaptive_clip import next_norm, noised_share, sum_noise_multiplier
from fedvit.privacy.correlated import BandedNoise, Vector
from fedvit.privacy.randomness import SecretStream, derive_secret, load_or_create_root_secret, output_id
from fedvit.privacy.round_cost import charge_of, round_event
from fedvit.rounds.context import RoundBase
from fedvit.secagg.noise import Plan, decode, event_of
from fedvit.secagg.task_plan import plan_of, unflat
from fedvit.store.store import Store
from fedvit.types import FloatArray, Run, TrainTask, Weights
from fedvit.updates import RingSum, Summand

FACTS = "client_level"
"""Lineage key of what the mechanism did, for the rounds after it."""
EXPECTED_COHORT = "expected_cohort"
"""Key in a run's configuration of the constant that its sums are divided by."""
POPULATION_SIZE = "population"
"""Key in a run's configuration of how many clients could be drawn when it began."""


@dataclass(frozen=True, slots=True)
class Folded:
    """The next weights, facts for the version's lineage, and the rule's next state."""

    weights: dict[str, FloatArray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    state: State = field(default_factory=dict)


class Protection(ABC):
    """How a privacy unit is protected in a round; ``rule`` folds the updates."""

    sampled = False
    """Whether the cohort is a secret sample: then a round without clients is committed with noise alone."""
    follows_fleet = False
    """Whether :meth:`run_facts` are to be those of the clients that may take part in the present round."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store, self.rule = settings, store, rule_for(settings)
        self._place = settings.privacy.noise_place
        self._server = ServerNoise(settings, store) if self._place == "server" else None

    @abstractmethod
    def run_facts(self, eligible: int) -> dict[str, Any]:
        """Facts that a run with so many eligible clients is recorded with.

        Raises:
            ConfigError: the clients are too few for the rule, or for cohorts to rest between rounds.
        """

    def l2_clip_norm(self, run_id: str, round_index: int) -> float:
        """The clipping norm of the round."""
        return self._settings.privacy.l2_clip_norm

    def plan(self, task: TrainTask, weights: Weights) -> Plan | None:
        """The plan of the round's integer contributions, where noise is distributed.

        Raises:
            ConfigError, SecureAggregationError: see :func:`fedvit.secagg.task_plan.plan_of`.
        """
        return plan_of(task, self._settings, mechanism.size_of(weights)) if self._place == "distributed" else None

    def charges(self, task: TrainTask, client_ids: Sequence[str], plan: Plan | None = None) -> list[Charge]:
        """The charges of the round if these clients take part.

        Args:
            plan: of the round, where noise is distributed; without it, the charges are estimates for the draw.
        """
        event = round_event(self._settings, task.noise_multiplier)
        if plan is not None:
            event = event_of(plan, self._settings.privacy.sampling_prob if task.privacy_unit == "record" else 1.0)
        return [
            charge_of(
                event,
                run_id=task.run_id,
                round_index=task.round_index,
                unit_id=unit_id,
                output_id=output_id(task, unit_id, size),
                unit=task.privacy_unit,
            )
            for unit_id, size in self._charged_units(client_ids)
        ]

    def fault_of(self, update: Summand, run_id: str) -> str | None:
        """Why an update must not be folded, as the end of a sentence about it; or None."""
        return None

    def fold(self, run: Run, task: TrainTask, base: RoundBase, updates: Sequence[Summand], facts: RoundFacts) -> Folded:
        """The weights after the round: the rule's step along the noised mean, if it does not take noised updates.

        Args:
            updates: in the order of summation, each discounted for its staleness.

        Raises:
            UpdateRejectedError: too few updates for the rule.
            AggregationError: the rule returned what no round can start from.
        """
        mean, mechanism_facts = self._noised_mean(run, task, base, updates, self._divisor(run, updates, facts))
        # Post-processing of the noised mean costs no privacy.
        fold = checked_fold(self.rule, base.weights, self._step(base.weights, mean, base.rule_state, facts))
        return Folded(fold.weights, mechanism_facts, fold.state)

    @abstractmethod
    def _charged_units(self, client_ids: Sequence[str]) -> Iterable[tuple[str, int]]:
        """The units that are charged, each with its size."""

    @abstractmethod
    def _divisor(self, run: Run, updates: Sequence[Summand], facts: RoundFacts) -> float:
        """The public divisor of the round's sum."""

    def _noised_mean(
        self, run: Run, task: TrainTask, base: RoundBase, updates: Sequence[Summand], divisor: float
    ) -> tuple[Sums, Mapping[str, Any]]:
        """The mean update with its noise, and facts for the version's lineage."""
        if (plan := self.plan(task, base.weights)) is not None:
            return self._decoded_mean(plan, base, updates, divisor), {}
        norm = task.l2_clip_norm
        addends = [update for update in updates if not isinstance(update, RingSum)]
        clipped_to = ((update, self.l2_clip_norm(run.run_id, update.round_index)) for update in addends)
        sums = mechanism.total(base.weights, clipped_to, norm)
        size = mechanism.size_of(sums)
        if self._server is None:
            return mechanism.noised_mean(sums, np.zeros(size), divisor=divisor), {}
        within = sum(update.within_clip for update in addends)
        accepted = sum(outcome.error is None for update in addends for outcome in update.outcomes)
        key = self._server.key(task, [mechanism.digest(sums), within, accepted])
        noise = self._sum_noise_multiplier(run) * mechanism.sensitivity(task) * self._server.noise(run, task, size, key)
        mean = mechanism.noised_mean(sums, noise, divisor=divisor)
        return mean, self._mechanism_facts(run, task, key, within, accepted)

    def _decoded_mean(self, plan: Plan, base: RoundBase, updates: Sequence[Summand], divisor: float) -> Sums:
        total = np.zeros(plan.padded, np.uint32)
        for update in updates:
            assert isinstance(update, RingSum), "validation takes nothing else where noise is distributed"
            total += update.vector
        vector = decode(plan, total & np.uint32(2**plan.bits - 1))
        return unflat(vector / divisor, base.weights)

    def _sum_noise_multiplier(self, run: Run) -> float:
        return run.noise_multiplier

    def _mechanism_facts(self, run: Run, task: TrainTask, key: str, within: int, accepted: int) -> Mapping[str, Any]:
        return {FACTS: {"noise_key": key, "l2_clip_norm": task.l2_clip_norm}}

    def _step(self, base: Weights, mean: Sums, state: State, facts: RoundFacts) -> Fold:
        assert isinstance(self.rule, MeanRule)
        return self.rule.step(base, mean, state, facts)

    def _check_takes_means(self) -> None:
        if not isinstance(self.rule, MeanRule):
            raise ConfigError(
                f"training.aggregation {self.rule.name!r} cannot fold a noised mean.", cure=self.rule.instead
            )

    def _cohort_size(self, wanted: int | None, eligible: int) -> int:
        everybody = wanted is None or self._settings.training.cohort.selection == "all"
        return eligible if wanted is None or everybody else min(wanted, eligible)


def protection_for(settings: Settings, store: Store) -> Protection:
    """The protection that the settings ask for.

    Raises:
        ConfigError: see :func:`fedvit.aggregation.registry.rule_for`.
    """
    return (RecordLevel if settings.privacy.privacy_unit == "record" else ClientLevel)(settings, store)


class RecordLevel(Protection):
    """Records are protected, and each client is charged by itself. A sum is divided by the sum of its weights."""

    def __init__(self, settings: Settings, store: Store) -> None:
        super().__init__(settings, store)
        if self._place != "client":
            self._check_takes_means()

    def run_facts(self, eligible: int) -> dict[str, Any]:
        size = self._cohort_size(self._settings.training.cohort.size, eligible)
        if size < self.rule.least_updates:
            raise ConfigError(
                f"{self.rule.what()} needs {self.rule.least_updates} updates a round; cohorts have {size} clients.",
                cure="Raise training.cohort.size, register more clients, or lower num_byzantine.",
            )
        return {POPULATION_SIZE: eligible}

    def fold(self, run: Run, task: TrainTask, base: RoundBase, updates: Sequence[Summand], facts: RoundFacts) -> Folded:
        if self._place != "client":
            return super().fold(run, task, base, updates, facts)
        noised = [update for update in updates if not isinstance(update, RingSum)]
        fold = checked_fold(self.rule, base.weights, self.rule.fold(base.weights, noised, base.rule_state, facts))
        return Folded(fold.weights, state=fold.state)

    def _charged_units(self, client_ids: Sequence[str]) -> Iterable[tuple[str, int]]:
        sizes = self._store.clients.num_examples(client_ids)
        return ((client_id, sizes[client_id]) for client_id in client_ids)

    def _divisor(self, run: Run, updates: Sequence[Summand], facts: RoundFacts) -> float:
        """The weights follow from numbers of examples, which are public."""
        return max(sum(update.total_weight for update in updates), facts.least_divisor)


class ClientLevel(Protection):
    """Whole clients are protected; see :mod:`fedvit.privacy.mechanism`. A sum is divided by a constant."""

    follows_fleet = True

    def __init__(self, settings: Settings, store: Store) -> None:
        super().__init__(settings, store)
        self._clip = settings.privacy.adaptive_clip
        self._check_takes_means()
        self.sampled = settings.training.cohort.selection == "poisson"

    def run_facts(self, eligible: int) -> dict[str, Any]:
        """The constant divisor: the expected size of a cohort."""
        cohort = self._settings.training.cohort
        if cohort.sampling_prob is not None:
            return {EXPECTED_COHORT: cohort.sampling_prob * eligible}
        size = self._cohort_size(cohort.size, eligible)
        drawn = size if cohort.draw_size is None else self._cohort_size(cohort.draw_size, eligible)
        if drawn * cohort.min_separation > eligible:
            raise ConfigError(
                f"Cohorts of {drawn} with min_separation {cohort.min_separation} need {drawn * cohort.min_separation} "
                f"clients; there are {eligible}.",
                cure="Lower training.cohort.size, over_selection or min_separation.",
            )
        return {EXPECTED_COHORT: float(size)}

    def l2_clip_norm(self, run_id: str, round_index: int) -> float:
        """The clipping norm of a whole update: as set, or as adapted by earlier rounds."""
        if self._clip is None or self._server is None:
            return self._settings.privacy.l2_clip_norm
        earlier = self._server.facts(run_id)[: round_index - 1]
        return float(earlier[-1]["next_l2_clip_norm"]) if earlier else self._settings.privacy.l2_clip_norm

    def fault_of(self, update: Summand, run_id: str) -> str | None:
        """A norm above what that number of clipped updates allows, with the noise that they have."""
        if isinstance(update, RingSum):
            return None
        own_noise = self._noise_multiplier_of(run_id) if self._place == "client" else 0.0
        return mechanism.fault_of(update, self.l2_clip_norm(run_id, update.round_index), own_noise)

    def _charged_units(self, client_ids: Sequence[str]) -> Iterable[tuple[str, int]]:
        """The population where the cohort is a secret sample, otherwise each client."""
        return ((unit_id, 1) for unit_id in ([POPULATION] if self.sampled else client_ids))

    def _divisor(self, run: Run, updates: Sequence[Summand], facts: RoundFacts) -> float:
        return float(run.config[EXPECTED_COHORT])

    def _noise_multiplier_of(self, run_id: str) -> float:
        return self._store.runs.get(run_id).noise_multiplier

    def _sum_noise_multiplier(self, run: Run) -> float:
        return sum_noise_multiplier(self._clip, run.noise_multiplier) if self._clip else run.noise_multiplier

    def _mechanism_facts(self, run: Run, task: TrainTask, key: str, within: int, accepted: int) -> Mapping[str, Any]:
        own = {"noise_key": key, "l2_clip_norm": task.l2_clip_norm}
        return {FACTS: {**own, **self._next_norm(run, task, key, within, accepted)}}

    def _next_norm(self, run: Run, task: TrainTask, key: str, within: int, contributors: int) -> dict[str, float]:
        if self._clip is None or self._server is None:
            return {}
        noise = float(self._server.stream("count", run.run_id, task.round_index, key).normal(1)[0])
        share = noised_share(self._clip, within, contributors, noise, float(run.config[EXPECTED_COHORT]))
        return {"noised_share": share, "next_l2_clip_norm": next_norm(self._clip, task.l2_clip_norm, share)}


class ServerNoise:
    """Noise that the aggregator adds to a round's sum.

    It is derived from the output's identity and from the sum that it protects: a repeated round repeats it, and a round
    with another sum draws other noise. What later rounds need is in the version's lineage, as a keyed hash, because a
    plain hash of the sum would confirm a guess.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._bands, self._store = settings.privacy.bands, store
        self._secret = derive_secret(load_or_create_root_secret(store.home), "client-level-noise")
        self._history: tuple[str, list[Mapping[str, Any]]] = ("", [])
        self._banded: tuple[str, BandedNoise] | None = None

    def key(self, task: TrainTask, protected: list[Any]) -> str:
        """A keyed hash of the output's identity and of what is protected, JSON types."""
        text = json.dumps([output_id(task, POPULATION, 1), *protected])
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()

    def noise(self, run: Run, task: TrainTask, size: int, key: str) -> Vector:
        """Noise of standard deviation 1 a coordinate, correlated between rounds where the settings say so."""

        def draw(round_index: int, noise_key: str) -> Vector:
            return mechanism.fresh_noise(self.stream("sum", run.run_id, round_index, noise_key), size)

        if self._bands is None:
            return draw(task.round_index, key)
        if self._banded is None or self._banded[0] != run.run_id:
            self._banded = run.run_id, BandedNoise(self._bands, draw)
        earlier = [str(facts["noise_key"]) for facts in self.facts(run.run_id)[: task.round_index - 1]]
        return self._banded[1].at([*earlier, key])

    def stream(self, purpose: str, run_id: str, round_index: int, key: str) -> SecretStream:
        """The secret stream of a purpose, for the key of one output."""
        return SecretStream(self._secret, purpose, {"run_id": run_id, "round_index": round_index, "key": key})

    def facts(self, run_id: str) -> list[Mapping[str, Any]]:
        """What the mechanism did in each committed round of the run, from the first on."""
        known = self._history[1] if self._history[0] == run_id else []
        committed = [record for record in self._store.rounds.of_run(run_id) if record.version is not None]
        for record in committed[len(known) :]:
            known.append(self._store.versions.get(str(record.version)).lineage[FACTS])
        self._history = run_id, known
        return known

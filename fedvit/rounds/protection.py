"""Privacy protection of a round, by the privacy unit: its charges, its checks, and how updates are folded.

Single records are protected by each client, and the aggregator averages noised updates. Whole clients are protected
here: the aggregator adds up clipped updates, adds noise once, and divides by a constant.
"""

from __future__ import annotations

import hmac
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import MeanRule, RoundFacts, State, Updates, checked_fold
from fedvit.config import Settings
from fedvit.errors import ConfigError
from fedvit.ports import POPULATION, Charge
from fedvit.privacy import mechanism
from fedvit.privacy.adaptive_clip import next_norm, noised_share, sum_noise_multiplier
from fedvit.privacy.correlated import BandedNoise, Vector
from fedvit.privacy.randomness import SecretStream, derive_secret, load_or_create_root_secret, output_id
from fedvit.privacy.round_cost import charge_of, round_event
from fedvit.rounds.context import RoundBase
from fedvit.store.store import Store
from fedvit.types import FloatArray, Run, TrainTask
from fedvit.updates import WeightedUpdate

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

    @abstractmethod
    def run_facts(self, eligible: int) -> dict[str, Any]:
        """Facts that a run with so many eligible clients is recorded with.

        Raises:
            ConfigError: the clients are too few for the rule, or for cohorts to rest between rounds.
        """

    def l2_clip_norm(self, run_id: str, round_index: int) -> float:
        """The clipping norm of the round."""
        return self._settings.privacy.l2_clip_norm

    def charges(self, task: TrainTask, client_ids: Sequence[str]) -> list[Charge]:
        """The charges of the round if these clients take part."""
        event = round_event(self._settings, task.noise_multiplier)
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

    def fault_of(self, update: WeightedUpdate, run_id: str) -> str | None:
        """Why an update must not be folded, as the end of a sentence about it; or None."""
        return None

    @abstractmethod
    def fold(self, run: Run, task: TrainTask, base: RoundBase, updates: Updates, facts: RoundFacts) -> Folded:
        """The weights after the round.

        Args:
            updates: in the order of summation, each discounted for its staleness.

        Raises:
            UpdateRejectedError: too few updates for the rule.
            AggregationError: the rule returned what no round can start from.
        """

    @abstractmethod
    def _charged_units(self, client_ids: Sequence[str]) -> Iterable[tuple[str, int]]:
        """The units that are charged, each with its size."""

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
    """Each client protects its records and is charged by itself. Noised updates have no bound."""

    def run_facts(self, eligible: int) -> dict[str, Any]:
        size = self._cohort_size(self._settings.training.cohort.size, eligible)
        if size < self.rule.least_updates:
            raise ConfigError(
                f"{self.rule.what()} needs {self.rule.least_updates} updates a round; cohorts have {size} clients.",
                cure="Raise training.cohort.size, register more clients, or lower num_byzantine.",
            )
        return {POPULATION_SIZE: eligible}

    def fold(self, run: Run, task: TrainTask, base: RoundBase, updates: Updates, facts: RoundFacts) -> Folded:
        fold = checked_fold(self.rule, base.weights, self.rule.fold(base.weights, updates, base.rule_state, facts))
        return Folded(fold.weights, state=fold.state)

    def _charged_units(self, client_ids: Sequence[str]) -> Iterable[tuple[str, int]]:
        sizes = self._store.clients.num_examples(client_ids)
        return ((client_id, sizes[client_id]) for client_id in client_ids)


class ClientLevel(Protection):
    """The aggregator protects whole clients; see :mod:`fedvit.privacy.mechanism`.

    The noise is derived from the output's identity and from the sum that it protects: a repeated round repeats it, and
    a round with another sum draws other noise. What later rounds need is in the version's lineage, as a keyed hash,
    because a plain hash of the sum would confirm a guess.
    """

    follows_fleet = True

    def __init__(self, settings: Settings, store: Store) -> None:
        super().__init__(settings, store)
        self._secret = derive_secret(load_or_create_root_secret(store.home), "client-level-noise")
        self._clip = settings.privacy.adaptive_clip
        if not isinstance(self.rule, MeanRule):
            raise ConfigError(
                f"training.aggregation {self.rule.name!r} cannot fold a noised mean.", cure=self.rule.instead
            )
        self._step = self.rule.step
        self._history: tuple[str, list[Mapping[str, Any]]] = ("", [])
        self._banded: tuple[str, BandedNoise] | None = None
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
        if self._clip is None:
            return self._settings.privacy.l2_clip_norm
        earlier = self._facts(run_id)[: round_index - 1]
        return float(earlier[-1]["next_l2_clip_norm"]) if earlier else self._settings.privacy.l2_clip_norm

    def _charged_units(self, client_ids: Sequence[str]) -> Iterable[tuple[str, int]]:
        """The population where the cohort is a secret sample, otherwise each client."""
        return ((unit_id, 1) for unit_id in ([POPULATION] if self.sampled else client_ids))

    def fault_of(self, update: WeightedUpdate, run_id: str) -> str | None:
        """A norm above what that number of clipped updates allows."""
        return mechanism.fault_of(update, self.l2_clip_norm(run_id, update.round_index))

    def fold(self, run: Run, task: TrainTask, base: RoundBase, updates: Updates, facts: RoundFacts) -> Folded:
        """The rule's step along ``(sum of clipped updates + noise) / expected cohort``."""
        norm = task.l2_clip_norm
        clipped_to = ((update, self.l2_clip_norm(run.run_id, update.round_index)) for update in updates)
        sums = mechanism.total(base.weights, clipped_to, norm)
        within = sum(update.within_clip for update in updates)
        accepted = sum(outcome.error is None for update in updates for outcome in update.outcomes)
        key = self._key(task, [mechanism.digest(sums), within, accepted])
        noise = self._sum_noise_multiplier(run) * norm * self._noise(run, task, mechanism.size_of(sums), key)
        mean = mechanism.noised_mean(sums, noise, divisor=float(run.config[EXPECTED_COHORT]))
        # Post-processing of the noised mean costs no privacy.
        fold = checked_fold(self.rule, base.weights, self._step(base.weights, mean, base.rule_state, facts))
        mechanism_facts = {"noise_key": key, "l2_clip_norm": norm, **self._next_norm(run, task, key, within, accepted)}
        return Folded(fold.weights, {FACTS: mechanism_facts}, fold.state)

    def _sum_noise_multiplier(self, run: Run) -> float:
        return sum_noise_multiplier(self._clip, run.noise_multiplier) if self._clip else run.noise_multiplier

    def _next_norm(self, run: Run, task: TrainTask, key: str, within: int, contributors: int) -> dict[str, float]:
        if self._clip is None:
            return {}
        noise = float(self._stream("count", run.run_id, task.round_index, key).normal(1)[0])
        share = noised_share(self._clip, within, contributors, noise, float(run.config[EXPECTED_COHORT]))
        return {"noised_share": share, "next_l2_clip_norm": next_norm(self._clip, task.l2_clip_norm, share)}

    def _noise(self, run: Run, task: TrainTask, size: int, key: str) -> Vector:
        """Noise of standard deviation 1 a coordinate, correlated between rounds where the settings say so."""

        def draw(round_index: int, noise_key: str) -> Vector:
            return mechanism.fresh_noise(self._stream("sum", run.run_id, round_index, noise_key), size)

        bands = self._settings.privacy.bands
        if bands is None:
            return draw(task.round_index, key)
        if self._banded is None or self._banded[0] != run.run_id:
            self._banded = run.run_id, BandedNoise(bands, draw)
        earlier = [str(facts["noise_key"]) for facts in self._facts(run.run_id)[: task.round_index - 1]]
        return self._banded[1].at([*earlier, key])

    def _stream(self, purpose: str, run_id: str, round_index: int, key: str) -> SecretStream:
        return SecretStream(self._secret, purpose, {"run_id": run_id, "round_index": round_index, "key": key})

    def _key(self, task: TrainTask, protected: list[Any]) -> str:
        text = json.dumps([output_id(task, POPULATION, 1), *protected])
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()

    def _facts(self, run_id: str) -> list[Mapping[str, Any]]:
        """What the mechanism did in each committed round of the run, from the first on."""
        known = self._history[1] if self._history[0] == run_id else []
        committed = [record for record in self._store.rounds.of_run(run_id) if record.version is not None]
        for record in committed[len(known) :]:
            known.append(self._store.versions.get(str(record.version)).lineage[FACTS])
        self._history = run_id, known
        return known

"""Search space of a sweep: the trials that its settings describe. Pure: equal settings give equal trials and names."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedvit.config import LEAST_NOISE_MULTIPLIER, RangeConfig, Settings, SweepConfig
from fedvit.errors import ConfigError, PlacementError
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.round_cost import run_spend
from fedvit.settings import changed_settings

LOCAL_EPOCHS = "local_epochs"
PARAMETERS = {
    "noise_multiplier": "privacy.noise_multiplier",
    "l2_clip_norm": "privacy.l2_clip_norm",
    "sampling_prob": "privacy.sampling_prob",
    "staleness_tolerance": "simulation.staleness_tolerance",
    "buffer_size": "simulation.buffer_size",
    "mode": "simulation.mode",
    "staleness_exponent": "training.staleness.exponent",
    "local_steps": "training.local_steps",
    "learning_rate": "training.learning_rate",
    "server_learning_rate": "training.server_learning_rate",
    "aggregation": "training.aggregation",
    "rounds": "training.rounds",
    "trainable": "model.trainable",
    "adapter_rank": "model.adapter_rank",
    "alpha": "data.partition.alpha",
}
"""Short names of frequent parameters; other settings of :data:`SECTIONS` are named ``section.key``."""
SECTIONS = ("model", "training", "privacy", "simulation", "data.partition")
MOST_TRIALS = 10_000

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class TrialPlan:
    """One trial: a whole simulated run.

    Attributes:
        trial_id: its position in the plan and a digest of its settings.
        parameters: the varied settings by their names in the sweep; equal for all seeds.
        settings: the settings of the run.
    """

    trial_id: str
    parameters: Parameters
    settings: Settings

    @cached_property
    def epsilon(self) -> float:
        """The maximum spend of the whole run for one unit, by PLD; infinite without privacy."""
        if not self.settings.simulation.private:
            return math.inf
        return epsilon_pld(run_spend(self.settings), self.settings.privacy.target_delta)


def plan_sweep(settings: Settings) -> list[TrialPlan]:
    """The trials in the order in which they begin, equal ones once.

    Raises:
        ConfigError: nothing is varied; a parameter is unknown or a value out of range; two parameters set the same
            setting; ranges without a number of trials.
    """
    sweep = settings.sweep
    _check(settings)
    combinations = list(_sampled(sweep) if sweep.trials is not None else _grid(sweep))
    plans = [_plan(settings, one, seed) for one in combinations for seed in range(sweep.seeds)]
    _check_count(len(plans))
    distinct: dict[str, TrialPlan] = {}
    for plan in plans:
        distinct.setdefault(_sha256(_trial_settings(plan.settings)), plan)
    return [replace(plan, trial_id=f"{i:03d}-{digest[:8]}") for i, (digest, plan) in enumerate(distinct.items())]


def rungs_of(settings: Settings) -> tuple[int, ...]:
    """The rounds after which trials are compared; empty without early stopping.

    Raises:
        ConfigError: the first rung lies beyond the last round.
    """
    sweep, rounds = settings.sweep, settings.training.rounds
    if sweep.first_rung is None:
        return ()
    if sweep.first_rung >= rounds:
        raise ConfigError(
            f"sweep.first_rung is {sweep.first_rung}, and a trial has {rounds} rounds.",
            cure=f"Choose one below {rounds}, or leave it out to run every trial to its end.",
        )
    rungs = [sweep.first_rung]
    while (rung := rungs[-1] * sweep.reduction_factor) < rounds:
        rungs.append(rung)
    return tuple(rungs)


def check_room(settings: Settings, cpus: float) -> None:
    """Check that the CPUs suffice for the concurrent trials.

    Raises:
        PlacementError: they do not.
    """
    count, each = settings.sweep.concurrent_trials, settings.sweep.cpus_per_trial
    if count * each > cpus + 1e-9:
        raise PlacementError(
            f"There is no room for {count} trials at a time: each asks for {each:g} CPU, and {cpus:g} are free.",
            cure=f"Lower sweep.concurrent_trials to {max(1, int(cpus / each))}, or sweep.cpus_per_trial, or add nodes.",
        )


def _check(settings: Settings) -> None:
    sweep = settings.sweep
    if not sweep.parameters:
        raise ConfigError(
            "There is nothing to try out: sweep.parameters is empty.",
            cure="Name some, for instance --set 'sweep.parameters={noise_multiplier: [1.0, 1.5, 2.0]}'.",
        )
    for name, values in sweep.parameters.items():
        if not isinstance(values, RangeConfig) and not values:
            raise ConfigError(f"sweep.parameters.{name} has no values.", cure="Give it a list, or leave it out.")
    paths = [_path(name) for name in sweep.parameters]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ConfigError(f"sweep.parameters sets {twice[0]} twice.", cure="Name it once.")
    _check_noise(settings)
    ranges = [name for name, values in sweep.parameters.items() if isinstance(values, RangeConfig)]
    if ranges and sweep.trials is None:
        raise ConfigError(
            f"sweep.parameters.{ranges[0]} is a range, of which not every value can be tried.",
            cure="Say how many configurations to draw with sweep.trials, or give a list.",
        )


def _path(name: str) -> str:
    """The path of the setting that a parameter names.

    Raises:
        ConfigError: the parameter is unknown.
    """
    if name == LOCAL_EPOCHS:
        return PARAMETERS["local_steps"]
    path = PARAMETERS.get(name, name)
    if path.startswith(tuple(f"{section}." for section in SECTIONS)):
        return path
    known = [*PARAMETERS, LOCAL_EPOCHS]
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        f"sweep.parameters.{name} is no parameter." + (f" Did you mean '{near[0]}'?" if near else ""),
        cure=f"Known are {', '.join(sorted(known))}, and section.key of {', '.join(SECTIONS)}.",
    )


def _check_noise(settings: Settings) -> None:
    key = PARAMETERS["noise_multiplier"]
    values = next((v for name, v in settings.sweep.parameters.items() if _path(name) == key), None)
    if values is None:
        return
    if not settings.simulation.private:
        raise ConfigError(
            "noise_multiplier is varied, but simulation.private is false and nobody draws any noise.",
            cure="Leave one of the two out.",
        )
    numbers = [values.low] if isinstance(values, RangeConfig) else values
    low = [v for v in numbers if isinstance(v, int | float) and v < LEAST_NOISE_MULTIPLIER]
    if low:
        raise ConfigError(
            f"A noise_multiplier of {low[0]:g} stays within no budget, and so not within privacy.target_epsilon "
            f"{settings.privacy.target_epsilon:g}.",
            cure=f"Use {LEAST_NOISE_MULTIPLIER:g} or more; for trials without noise leave it out and set "
            "simulation.private to false.",
        )


def _grid(sweep: SweepConfig) -> Iterator[Parameters]:
    """Every combination of the lists; the last parameter varies fastest."""
    lists = [values for values in sweep.parameters.values() if not isinstance(values, RangeConfig)]
    _check_count(math.prod(map(len, lists)) * sweep.seeds)
    for values in itertools.product(*lists):
        yield dict(zip(sweep.parameters, values, strict=True))


def _sampled(sweep: SweepConfig) -> Iterator[Parameters]:
    generator = np.random.default_rng(sweep.seed)
    for _ in range(sweep.trials or 0):
        yield {name: _draw(values, generator) for name, values in sweep.parameters.items()}


def _draw(values: Sequence[Any] | RangeConfig, generator: np.random.Generator) -> Any:
    if not isinstance(values, RangeConfig):
        return values[int(generator.integers(len(values)))]
    low, high, whole = values.low, values.high, isinstance(values.low, int) and isinstance(values.high, int)
    if not values.log:
        return int(generator.integers(int(low), int(high) + 1)) if whole else float(generator.uniform(low, high))
    value = math.exp(generator.uniform(math.log(low), math.log(high)))
    return round(value) if whole else value


def _check_count(count: int) -> None:
    if count > MOST_TRIALS:
        raise ConfigError(
            f"That makes {count:,} trials; at most {MOST_TRIALS:,} are planned.",
            cure="Shorten the lists, or draw some with sweep.trials.",
        )


def _plan(settings: Settings, parameters: Parameters, seed: int) -> TrialPlan:
    changes = {_path(name): value for name, value in parameters.items()}
    changes["simulation.seed"] = changes.get("simulation.seed", settings.simulation.seed) + seed
    if LOCAL_EPOCHS in parameters:
        prob = changes.get(PARAMETERS["sampling_prob"], settings.privacy.sampling_prob)
        changes[PARAMETERS["local_steps"]] = _steps(parameters[LOCAL_EPOCHS], prob)
    return TrialPlan("", parameters, changed_settings(settings, changes))


def _steps(epochs: Any, sampling_prob: float) -> int:
    """Poisson steps in which every record takes part ``epochs`` times on average; at least one."""
    if not isinstance(epochs, int | float) or epochs <= 0:
        raise ConfigError(f"local_epochs is {epochs!r}.", cure="It must be a number above 0.")
    return max(1, round(epochs / sampling_prob))


def sweep_digest(settings: Settings) -> str:
    """SHA-256, hex, of all settings that determine a sweep's trials and their early stopping."""
    sweep = settings.sweep.model_dump(mode="json", exclude={"concurrent_trials", "cpus_per_trial"})
    return _sha256({"sweep": sweep, "settings": _trial_settings(settings)})


def _trial_settings(settings: Settings) -> dict[str, Any]:
    tree = settings.model_dump(mode="json", include={"data", "model", "training", "privacy", "simulation"})
    # A relative and an absolute path of the same folder give the same digest.
    tree["data"]["path"] = None if settings.data.path is None else str(settings.data.path.absolute())
    return tree


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

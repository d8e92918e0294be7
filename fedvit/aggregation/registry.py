"""Registry of aggregation rules: those shipped here, and those of other packages under an entry point group."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import ValidationError

from fedvit.aggregation.adaptive import FedAdagrad, FedAdam, FedYogi
from fedvit.aggregation.bulyan import Bulyan
from fedvit.aggregation.ditto import Ditto
from fedvit.aggregation.fedasync import FedAsync
from fedvit.aggregation.fedavg import FedAvg
from fedvit.aggregation.fedavgm import FedAvgM
from fedvit.aggregation.fedbuff import FedBuff
from fedvit.aggregation.fedprox import FedProx
from fedvit.aggregation.geometric_median import GeometricMedian
from fedvit.aggregation.krum import Krum, MultiKrum
from fedvit.aggregation.median import Median
from fedvit.aggregation.norm_bound import NormBound
from fedvit.aggregation.rule import Rule
from fedvit.aggregation.scaffold import Scaffold
from fedvit.aggregation.trimmed_mean import TrimmedMean
from fedvit.config import Settings, TrainingConfig
from fedvit.errors import ConfigError, ConflictError

GROUP = "fedvit.aggregation"
# Of one number in float64: of the answer, of the update, and of the rule's matrix.
_BYTES_OF_A_SINGLE = 3 * 8
_AVERAGING = (FedAvg, FedAvgM, FedProx, FedAdam, FedYogi, FedAdagrad, Scaffold, FedBuff, FedAsync, Ditto)
_ROBUST = (Median, TrimmedMean, Krum, MultiKrum, Bulyan, GeometricMedian, NormBound)
SHIPPED: dict[str, type[Rule]] = {rule.name: rule for rule in (*_AVERAGING, *_ROBUST)}


def rule_names() -> list[str]:
    """All that ``training.aggregation`` may be, the shipped ones first."""
    offered = {point.name for point in entry_points(group=GROUP)}
    return [*SHIPPED, *sorted(offered - SHIPPED.keys())]


def rule_for(settings: Settings) -> Rule:
    """The rule that the settings name, with its options, if it goes with the rest of them.

    Raises:
        ConfigError: there is no such rule, an option is unknown or out of range, or the rule does not go with the
            privacy unit or with the place of the noise.
    """
    rule, privacy = create_rule(settings.training), settings.privacy
    if rule.client_level is not None and (privacy.privacy_unit == "client" or privacy.noise_place != "client"):
        by_unit = privacy.privacy_unit == "client"
        other = "privacy.privacy_unit 'client'" if by_unit else f"privacy.noise_at {privacy.noise_place!r}"
        raise ConfigError(
            f"training.aggregation {rule.name!r} does not go with {other}: {rule.client_level}.", cure=rule.instead
        )
    return rule


def check_mode(rule: Rule, mode: Literal["synchronous", "asynchronous"], settings: Settings) -> None:
    """Whether rounds may be of this mode.

    Raises:
        ConflictError: updates that begin at different versions would meet, and the rule cannot compare them, or secure
            aggregation cannot add them up.
    """
    if mode == "asynchronous" and settings.privacy.noise_place == "distributed":
        raise ConflictError(
            "privacy.noise_at 'distributed' does not go with asynchronous rounds: a secure sum is of one round.",
            cure="Keep synchronous rounds.",
        )
    if mode == "asynchronous" and rule.needs_one_base:
        raise ConflictError(
            f"training.aggregation {rule.name!r} does not go with asynchronous rounds: its updates must all start from "
            "the same version.",
            cure="Keep synchronous rounds, or use fedbuff, fedasync, fedavg or norm_bound.",
        )


def check_memory(rule: Rule, updates: int, parameters: int, memory_bytes: int) -> None:
    """Whether a round's updates fit into memory, where the rule needs each of them by itself.

    Raises:
        ConfigError: they do not.
    """
    needed = updates * parameters * _BYTES_OF_A_SINGLE
    if rule.needs == "single_updates" and needed > memory_bytes:
        raise ConfigError(
            f"training.aggregation {rule.name!r} needs every update by itself: {updates} updates of {parameters} "
            f"parameters take {needed / 2**30:.1f} GiB, and this machine has {memory_bytes / 2**30:.1f} GiB.",
            cure="Lower training.cohort.size, train fewer parameters, or use a rule that takes partial sums (fedavg).",
        )


def create_rule(training: TrainingConfig) -> Rule:
    """The rule ``training.aggregation`` with ``training.aggregation_options``.

    Raises:
        ConfigError: there is no such rule, it cannot be loaded, or an option is unknown or out of range.
    """
    kind = _find(training.aggregation)
    try:
        return kind(kind.options_type.model_validate(training.aggregation_options), training)
    except ValidationError as error:
        raise _explained(kind, error) from None


def _find(name: str) -> type[Rule]:
    if name in SHIPPED:
        return SHIPPED[name]
    offered = [point for point in entry_points(group=GROUP) if point.name == name]
    if not offered:
        names = rule_names()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        fault = f"'training.aggregation': there is no rule {name!r}."
        raise ConfigError(fault, cure=f"{hint}One of: {', '.join(names)}.")
    try:
        rule: Any = offered[0].load()
    except (Exception, SystemExit) as error:  # importing the package of somebody else may raise anything
        raise ConfigError(
            f"The aggregation rule {name!r} ({offered[0].value}) cannot be loaded: {type(error).__name__}: {error}.",
            cure="Mend or remove the package that offers it, or name another training.aggregation.",
        ) from error
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise ConfigError(
            f"The entry point {offered[0].value!r} in the group {GROUP} is no aggregation rule.",
            cure="Name a class that extends fedvit.aggregation.rule.Rule.",
        )
    return rule


def _explained(kind: type[Rule], error: ValidationError) -> ConfigError:
    fault = error.errors(include_url=False)[0]
    key = ".".join(["training", "aggregation_options", *(str(part) for part in fault["loc"])])
    if fault["type"] == "extra_forbidden":
        allowed = ", ".join(kind.options_type.model_fields) or "none"
        return ConfigError(f"'{key}' is no option of {kind.name}.", cure=f"Its options: {allowed}.")
    message = fault["msg"].removeprefix("Value error, ")
    return ConfigError(f"'{key}': {message[0].lower()}{message[1:]} (found {fault.get('input')!r}).")

"""Privacy events: what was done to a unit's data, as frozen values for accounting.

An event is written to the ledger as canonical JSON and read back to an equal value. A kind that this program does not
know is refused by name, never skipped. Noise multipliers are standard deviations over the sensitivity to adding or
removing one unit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedvit.errors import ConfigError, StateError


@dataclass(frozen=True, slots=True, order=True)
class Gaussian:
    """The Gaussian mechanism without sampling."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)


@dataclass(frozen=True, slots=True, order=True)
class PoissonGaussian:
    """The Gaussian mechanism on a Poisson sample."""

    noise_multiplier: float
    sampling_prob: float

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_sampling(self.sampling_prob)


@dataclass(frozen=True, slots=True, order=True)
class SampledTogether:
    """Several Gaussian mechanisms on the same Poisson sample; several :class:`PoissonGaussian` have one sample each."""

    sampling_prob: float
    events: tuple[Gaussian, ...]

    def __post_init__(self) -> None:
        _check_sampling(self.sampling_prob)
        _check_some(self.events)


@dataclass(frozen=True, slots=True, order=True)
class BandedGaussian:
    """One participation in a matrix mechanism whose strategy has ``bands`` bands and columns of norm at most 1.

    With ``min_separation`` at least ``bands``, participations of a unit affect disjoint rows of the strategy, and
    compose exactly like independent Gaussian mechanisms (Choquette-Choo et al. 2023, arXiv:2306.08153; see
    :mod:`fedvit.privacy.correlated`).
    """

    noise_multiplier: float
    bands: int
    min_separation: int

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        if not 1 <= self.bands <= self.min_separation:
            raise ConfigError(
                f"A strategy of {self.bands} bands with participations {self.min_separation} rounds apart.",
                cure="min_separation must be at least the number of bands, and that at least 1.",
            )


GAUSSIAN_ROUNDING = 4.0
"""Variance of a discrete Gaussian that stands for the rounding of a continuous one; see :mod:`fedvit.secagg.noise`."""


@dataclass(frozen=True, slots=True, order=True)
class DistributedGaussian:
    """A sum to which each client adds a share of the noise: a discrete Gaussian, or one on a Poisson sample of records.

    ``honest`` clients surely contribute, each with noise of standard deviation ``client_deviation``; ``sensitivity`` is
    that of the rounded sum, in L2. It costs what one Gaussian of ``noise_multiplier`` costs (Kairouz et al. 2021,
    arXiv:2102.06387; the reason is in :mod:`fedvit.secagg.noise`).
    """

    client_deviation: float
    honest: int
    sensitivity: int
    sampling_prob: float = 1.0

    def __post_init__(self) -> None:
        if self.sensitivity < 1 or not 3 <= self.client_deviation < math.inf:
            raise ConfigError(
                f"Noise of deviation {self.client_deviation} for a sensitivity of {self.sensitivity}.",
                cure="Each client's noise has a deviation of at least 3, and the sensitivity is at least 1.",
            )
        if self.honest < 1:
            raise ConfigError(f"A sum of {self.honest} honest clients.", cure="At least one adds noise.")
        _check_noise(self.noise_multiplier)
        _check_sampling(self.sampling_prob)

    @property
    def noise_multiplier(self) -> float:
        """Of the sum."""
        return math.sqrt(self.honest * self.client_deviation**2 - GAUSSIAN_ROUNDING) / self.sensitivity


@dataclass(frozen=True, slots=True)
class Composed:
    """Events one after another on the same unit's data; each may depend on earlier outputs."""

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        _check_some(self.events)


@dataclass(frozen=True, slots=True)
class Repeated:
    """One event ``count`` times, each with fresh randomness."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"An event is repeated {self.count} times.", cure="At least once.")


Event = Gaussian | PoissonGaussian | SampledTogether | BandedGaussian | DistributedGaussian | Composed | Repeated
Simple = Gaussian | PoissonGaussian
"""Kinds of event to which all others reduce."""
Composition = Mapping[Event, int] | Mapping[Simple, int] | Mapping[PoissonGaussian, int]
"""How many times each event was applied to the same unit's data."""


def simplified(events: Composition) -> dict[Simple, int]:
    """The same composition in simple events.

    All events without sampling become one Gaussian, because ``1 / z^2`` adds up exactly; likewise all on one sample.

    Raises:
        ConfigError: an event is of an unknown kind, which is named.
    """
    sampled: dict[Simple, int] = {}
    precision = 0.0
    for event, count in events.items():
        for simple, times in _unfolded(event, count):
            if isinstance(simple, PoissonGaussian) and simple.sampling_prob < 1:
                sampled[simple] = sampled.get(simple, 0) + times
            else:
                precision += times / simple.noise_multiplier**2
    return sampled if precision == 0 else {**sampled, Gaussian(precision**-0.5): 1}


def joint_noise_multiplier(noise_multipliers: Iterable[float]) -> float:
    """Noise multiplier of the one Gaussian mechanism with the joint cost of these: ``(sum z^-2)^-1/2``."""
    return float(sum(z**-2 for z in noise_multipliers) ** -0.5)


def _unfolded(event: Event, count: int) -> Iterable[tuple[Simple, int]]:
    match event:
        case Gaussian() | PoissonGaussian():
            return [(event, count)]
        case SampledTogether(sampling_prob, parts):
            joint = joint_noise_multiplier(part.noise_multiplier for part in parts)
            return [(PoissonGaussian(joint, sampling_prob), count)]
        case BandedGaussian(noise_multiplier):
            return [(Gaussian(noise_multiplier), count)]
        case DistributedGaussian():
            return [(PoissonGaussian(event.noise_multiplier, event.sampling_prob), count)]
        case Composed(parts):
            return [pair for part in parts for pair in _unfolded(part, count)]
        case Repeated(inner, times):
            return _unfolded(inner, count * times)
    raise ConfigError(
        f"The accountant does not know the event {type(event).__name__}.", cure="Use one of fedvit.privacy.events."
    )


def event_to_json(event: Event) -> str:
    """Canonical JSON: equal events give equal text."""
    return json.dumps(_facts(event), sort_keys=True, separators=(",", ":"), allow_nan=False)


def event_from_json(text: str) -> Event:
    """The inverse of :func:`event_to_json`.

    Raises:
        StateError: it is no event, or of an unknown kind, which is named.
        ConfigError: a number is out of range.
    """
    try:
        return _event_of(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"{text[:200]!r} is no privacy event: {error}.", cure="Restore a backup.") from None


def _facts(event: Event) -> dict[str, Any]:
    match event:
        case Gaussian(z):
            return {"kind": "gaussian", "noise_multiplier": z}
        case PoissonGaussian(z, q):
            return {"kind": "poisson_gaussian", "noise_multiplier": z, "sampling_prob": q}
        case SampledTogether(q, parts):
            return {"kind": "sampled_together", "sampling_prob": q, "events": [_facts(part) for part in parts]}
        case BandedGaussian(z, bands, separation):
            return {"kind": "banded_gaussian", "noise_multiplier": z, "bands": bands, "min_separation": separation}
        case DistributedGaussian(deviation, honest, sensitivity, q):
            facts = {"client_deviation": deviation, "honest": honest, "sensitivity": sensitivity, "sampling_prob": q}
            return {"kind": "distributed_gaussian", **facts}
        case Composed(parts):
            return {"kind": "composed", "events": [_facts(part) for part in parts]}
        case Repeated(inner, count):
            return {"kind": "repeated", "event": _facts(inner), "count": count}


def _event_of(facts: Any) -> Event:
    match facts:
        case {"kind": "gaussian", "noise_multiplier": z, **rest} if not rest:
            return Gaussian(float(z))
        case {"kind": "poisson_gaussian", "noise_multiplier": z, "sampling_prob": q, **rest} if not rest:
            return PoissonGaussian(float(z), float(q))
        case {"kind": "sampled_together", "sampling_prob": q, "events": parts, **rest} if not rest:
            return SampledTogether(float(q), tuple(_gaussian_of(part) for part in parts))
        case {"kind": "banded_gaussian", "noise_multiplier": z, "bands": b, "min_separation": s, **rest} if not rest:
            return BandedGaussian(float(z), int(b), int(s))
        case {
            "kind": "distributed_gaussian",
            "client_deviation": deviation,
            "honest": honest,
            "sensitivity": sensitivity,
            "sampling_prob": q,
            **rest,
        } if not rest:
            return DistributedGaussian(float(deviation), int(honest), int(sensitivity), float(q))
        case {"kind": "composed", "events": parts, **rest} if not rest:
            return Composed(tuple(_event_of(part) for part in parts))
        case {"kind": "repeated", "event": inner, "count": count, **rest} if not rest:
            return Repeated(_event_of(inner), int(count))
    raise StateError(
        f"The accountant does not know the privacy event {_name(facts)}.", cure="The fedvit that wrote it knows it."
    )


def _gaussian_of(facts: Any) -> Gaussian:
    event = _event_of(facts)
    if not isinstance(event, Gaussian):
        raise StateError(f"The accountant does not know {_name(facts)} on a sample shared with others.")
    return event


def _name(facts: Any) -> str:
    return f"{facts.get('kind')!r} with {sorted(facts)}" if isinstance(facts, dict) else repr(facts)[:100]


def _check_noise(noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ConfigError(f"noise_multiplier is {noise_multiplier}.", cure="With a privacy budget it must be above 0.")


def _check_sampling(sampling_prob: float) -> None:
    if not 0 < sampling_prob <= 1:
        raise ConfigError(f"sampling_prob is {sampling_prob}.", cure="It must lie in (0, 1].")


def _check_some(events: tuple[object, ...]) -> None:
    if not events:
        raise ConfigError("A composition of no events.", cure="Name at least one.")

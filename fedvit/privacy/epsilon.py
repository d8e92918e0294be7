"""Epsilon of a composition of events, and calibration of noise to an epsilon, by PLD, checked by RDP.

Both use dp-accounting. PLD: privacy loss distributions (Doroshenko et al. 2022, arXiv:2207.04380), tight up to a
pessimistic discretisation; for a single Gaussian its exact curve (Balle and Wang 2018, arXiv:1805.06530). RDP: Renyi
divergence (Mironov 2017, arXiv:1702.07476; Poisson sampling: Mironov et al. 2019, arXiv:1908.10530), an upper bound
for the same mechanisms. The neighbouring relation is adding or removing one unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any

from fedvit.config import LEAST_NOISE_MULTIPLIER
from fedvit.errors import ConfigError
from fedvit.privacy.events import Composition, Event, Gaussian, PoissonGaussian, Simple, simplified

__all__ = ["Composition", "PoissonGaussian", "calibrate_noise_multiplier", "epsilon_pld", "epsilon_rdp", "rounds_left"]

MOST_NOISE_MULTIPLIER = 1000.0
_FINE, _COARSE = 1e-4, 1e-3
_TOLERANCE = 1e-12
MOST_ROUNDS = 100_000
"""Largest answer of :func:`rounds_left`."""
# PLD takes half a minute for such a budget, which promises nothing, so RDP is enough.
_LARGE_EPSILON = 50.0


def epsilon_pld(composition: Composition, delta: float) -> float:
    """Epsilon at ``delta`` of the composition, by privacy loss distributions.

    Raises:
        ConfigError: an event is unknown (it is named), delta is not in (0, 1), or no finite epsilon exists.
    """
    return _epsilon_pld(_key(composition), check_delta(delta), _FINE)


def epsilon_rdp(composition: Composition, delta: float) -> float:
    """Like :func:`epsilon_pld`, by Renyi differential privacy; never below it."""
    return _epsilon_rdp(_key(composition), check_delta(delta))


def _epsilon_roughly(composition: Composition, delta: float) -> float:
    """Like :func:`epsilon_pld`, ten times as fast and up to a thousandth above it, for searches."""
    return _epsilon_pld(_key(composition), check_delta(delta), _COARSE)


def check_epsilon(epsilon: float) -> float:
    """``epsilon`` if it can be a budget; ConfigError unless it is finite and above 0."""
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon is {epsilon}.", cure="It must be finite and above 0.")
    return epsilon


def check_delta(delta: float, units: int | None = None) -> float:
    """``delta`` if it is valid, and with ``units`` if it protects each of so many units.

    A delta above ``1 / units`` admits the publication of one unit's data.

    Raises:
        ConfigError: it is not in (0, 1), or larger than ``1 / units``.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta}.", cure="It must lie in (0, 1).")
    if units is not None and delta * units > 1:
        raise ConfigError(
            f"target_delta {delta:g} is larger than 1/n with n = {units} units: it admits that one is published.",
            cure=f"Set privacy.target_delta far below 1/{units}.",
        )
    return delta


def _key(composition: Composition) -> frozenset[tuple[Simple, int]]:
    # Unary plus drops events that are counted 0 times.
    return frozenset(simplified(+Counter(composition)).items())


@lru_cache(maxsize=4096)
def _epsilon_pld(composition: frozenset[tuple[Simple, int]], delta: float, interval: float) -> float:
    if not composition:
        return 0.0
    (event, _), *others = composition
    if isinstance(event, Gaussian) and not others:
        return _finite(_epsilon_gaussian(event.noise_multiplier, delta), composition, delta)
    losses = [_loss(event, interval).self_compose(count) for event, count in sorted(composition, key=repr)]
    whole = reduce(lambda one, other: one.compose(other), losses)
    return _finite(float(whole.get_epsilon_for_delta(delta)), composition, delta)


def _epsilon_gaussian(noise_multiplier: float, delta: float) -> float:
    """Exact epsilon in a tenth of PLD's time; every round of a client-level run asks for another Gaussian."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    # The search may stop this far below the root.
    return float(get_epsilon_gaussian(noise_multiplier, delta, tol=_TOLERANCE)) + _TOLERANCE


# Only a few, of some megabytes each.
@lru_cache(maxsize=8)
def _loss(event: Simple, interval: float) -> Any:
    """Privacy loss distribution of one event, equal to that of dp-accounting's PLDAccountant."""
    # Imported here, because it takes half a second.
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=event.sampling_prob if isinstance(event, PoissonGaussian) else 1.0,
    )


@lru_cache(maxsize=4096)
def _epsilon_rdp(composition: frozenset[tuple[Simple, int]], delta: float) -> float:
    if not composition:
        return 0.0
    from dp_accounting.rdp import compute_epsilon

    # Composed like dp-accounting's RdpAccountant: the divergences add up.
    curves = [(_rdp(event), count) for event, count in sorted(composition, key=repr)]
    whole = sum(count * rdp for (_, rdp), count in curves)
    return _finite(float(compute_epsilon(curves[0][0][0], whole, delta)[0]), composition, delta)


@lru_cache(maxsize=256)
def _rdp(event: Simple) -> tuple[Any, Any]:
    """Orders, and the Renyi divergence of one event at each; takes a tenth of a second."""
    accountant = rdp_accountant(dp_event_of(event))
    return accountant.orders, accountant.rdp


def rdp_accountant(event: Any) -> Any:
    """dp-accounting's RdpAccountant of one of its own events."""
    from absl import logging as absl_logging
    from dp_accounting.rdp import RdpAccountant

    # RdpAccountant logs every order that it leaves out; the bound holds without them.
    absl_logging.set_verbosity(absl_logging.ERROR)
    return RdpAccountant().compose(event)


def dp_event_of(event: Simple) -> Any:
    """The event in dp-accounting's types."""
    from dp_accounting import dp_event

    gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
    return gaussian if isinstance(event, Gaussian) else dp_event.PoissonSampledDpEvent(event.sampling_prob, gaussian)


def _finite(epsilon: float, composition: frozenset[tuple[Simple, int]], delta: float) -> float:
    if not math.isfinite(epsilon):
        raise ConfigError(
            f"No finite epsilon exists for {dict(composition)} at delta {delta}.", cure="Raise the noise multiplier."
        )
    return epsilon


def calibrate_noise_multiplier(
    *, target_epsilon: float, target_delta: float, sampling_prob: float, steps: int, besides: Composition | None = None
) -> float:
    """The smallest noise multiplier, to three decimals, that keeps ``steps`` steps and ``besides`` within the target.

    It is at least :data:`LEAST_NOISE_MULTIPLIER`.

    Raises:
        ConfigError: not even :data:`MOST_NOISE_MULTIPLIER` is enough, or the target is out of range.
    """
    from scipy.optimize import brentq

    check_epsilon(target_epsilon)

    def whole(noise_multiplier: float) -> Counter[Event]:
        together: Counter[Event] = Counter(dict(besides or {}))
        together[PoissonGaussian(noise_multiplier, sampling_prob)] += steps
        return together

    def excess(noise_multiplier: float) -> float:
        return _epsilon_roughly(whole(noise_multiplier), target_delta) - target_epsilon

    def enough(noise_multiplier: float) -> bool:
        return epsilon_pld(whole(noise_multiplier), target_delta) <= target_epsilon

    if excess(MOST_NOISE_MULTIPLIER) > 0:
        raise ConfigError(
            f"target_epsilon {target_epsilon} cannot be met with {steps} steps at sampling_prob {sampling_prob}.",
            cure="Allow a larger epsilon or fewer rounds.",
        )
    # An estimate by the central limit theorem: with far less noise the accountants are slow.
    guess = sampling_prob * math.sqrt(-2 * steps * math.log(target_delta)) / target_epsilon
    low, high = _bracket(excess, min(MOST_NOISE_MULTIPLIER, max(1.0, guess)))
    if low is None:
        return LEAST_NOISE_MULTIPLIER
    # On a grid, so that the result does not depend on where the search stopped.
    thousandths = math.ceil(1000 * brentq(excess, low, high, xtol=1e-4))
    while not enough(thousandths / 1000):
        thousandths += 1
    while enough((thousandths - 1) / 1000):
        thousandths -= 1
    return float(thousandths / 1000)


def _bracket(excess: Callable[[float], float], guess: float) -> tuple[float | None, float]:
    """An interval where ``excess`` changes its sign, around a guess; no lower end if the least noise is enough."""
    low, high = guess / 2, guess
    while excess(high) > 0:
        low, high = high, min(2 * high, MOST_NOISE_MULTIPLIER)
    while excess(low) <= 0:
        if low <= LEAST_NOISE_MULTIPLIER:
            return None, low
        low, high = max(LEAST_NOISE_MULTIPLIER, low / 2), low
    return low, high


def rounds_left(
    spent: Composition, a_round: Event, *, target_epsilon: float, target_delta: float, most: int = MOST_ROUNDS
) -> int:
    """How often ``a_round`` fits into the budget after ``spent``, at most ``most``.

    A fast approximation from below narrows the search. For a budget above 50, RDP gives a lower bound instead.
    """
    check_epsilon(target_epsilon)

    def fits(rounds: int, epsilon: Callable[[Composition, float], float]) -> bool:
        whole: Counter[Event] = Counter(dict(spent))
        whole[a_round] += rounds
        return epsilon(whole, target_delta) <= target_epsilon

    if target_epsilon > _LARGE_EPSILON:
        return _most_that_fits(lambda rounds: fits(rounds, epsilon_rdp), 0, most)
    surely = _most_that_fits(lambda rounds: fits(rounds, _epsilon_roughly), 0, most)
    return _most_that_fits(lambda rounds: fits(rounds, epsilon_pld), surely, most)


def _most_that_fits(fits: Callable[[int], bool], known: int, most: int) -> int:
    """The largest number in ``[known, most]`` that fits, by galloping and bisection; ``known`` fits."""
    low, stride = known, 1
    while low < most and fits(min(low + stride, most)):
        low, stride = min(low + stride, most), 2 * stride
    high = min(low + stride, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

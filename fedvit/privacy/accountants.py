"""From a multiset of mechanisms to epsilon: PLD decides, RDP checks.

Both sit on dp-accounting. PLD: privacy loss distributions (Doroshenko et al. 2022, arXiv:2207.04380), tight up to a
pessimistic discretisation. RDP: Renyi divergence (Mironov 2017, arXiv:1702.07476; Poisson sampling: Mironov et al.
2019, arXiv:1908.10530), always an upper bound on the same mechanisms. The neighbouring relation is add-or-remove one
unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from scipy.optimize import brentq

from fedvit.errors import ConfigError

LEAST_NOISE_MULTIPLIER = 0.3
"""Less noise than this protects nothing worth the name, and the accountants have no reliable answer for it."""
MOST_NOISE_MULTIPLIER = 1000.0


@dataclass(frozen=True, slots=True, order=True)
class PoissonGaussian:
    """One step of the Gaussian mechanism on a Poisson sample: noise ``noise_multiplier`` times the sensitivity."""

    noise_multiplier: float
    sampling_prob: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}.", cure="With a privacy budget it must be above 0."
            )
        if not 0 < self.sampling_prob <= 1:
            raise ConfigError(f"sampling_prob is {self.sampling_prob}.", cure="It must lie in (0, 1].")


Composition = Mapping[PoissonGaussian, int]
"""How many times each mechanism was applied to the same unit's data."""


def epsilon_pld(composition: Composition, delta: float) -> float:
    """Epsilon at ``delta`` of the composition, by privacy loss distributions."""
    return _epsilon(frozenset(Counter(composition).items()), delta, "pld")


def epsilon_rdp(composition: Composition, delta: float) -> float:
    """Epsilon at ``delta`` of the composition, by Renyi differential privacy; never below :func:`epsilon_pld`."""
    return _epsilon(frozenset(Counter(composition).items()), delta, "rdp")


@lru_cache(maxsize=4096)
def _epsilon(composition: frozenset[tuple[PoissonGaussian, int]], delta: float, method: str) -> float:
    if not composition:
        return 0.0
    # Imported here: half a second that a command line without privacy questions need not pay.
    from absl import logging as absl_logging
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    # RDP says for every order that it leaves out why it does; the bound holds without them.
    absl_logging.set_verbosity(absl_logging.ERROR)
    accountant = PLDAccountant() if method == "pld" else RdpAccountant()
    for mechanism, count in sorted(composition):
        event = dp_event.PoissonSampledDpEvent(
            mechanism.sampling_prob, dp_event.GaussianDpEvent(mechanism.noise_multiplier)
        )
        accountant.compose(event, count)
    epsilon = float(accountant.get_epsilon(delta))
    if not math.isfinite(epsilon):
        raise ConfigError(
            f"No finite epsilon exists for {dict(composition)} at delta {delta}.", cure="Raise the noise multiplier."
        )
    return epsilon


def calibrate_noise_multiplier(
    *, target_epsilon: float, target_delta: float, sampling_prob: float, steps: int
) -> float:
    """The smallest noise multiplier, to three decimals, with which ``steps`` steps stay within the target.

    Never below :data:`LEAST_NOISE_MULTIPLIER`, however large the target.

    Raises:
        ConfigError: not even :data:`MOST_NOISE_MULTIPLIER` is enough.
    """

    def excess(noise_multiplier: float) -> float:
        composition = {PoissonGaussian(noise_multiplier, sampling_prob): steps}
        return epsilon_pld(composition, target_delta) - target_epsilon

    # Outwards from 1: the accountant is slow where there is little noise.
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > MOST_NOISE_MULTIPLIER:
            raise ConfigError(
                f"target_epsilon {target_epsilon} cannot be met with {steps} steps at sampling_prob {sampling_prob}.",
                cure="Allow a larger epsilon or fewer rounds.",
            )
    low = high / 2
    while excess(low) <= 0:
        if low <= LEAST_NOISE_MULTIPLIER:
            return LEAST_NOISE_MULTIPLIER
        low, high = max(LEAST_NOISE_MULTIPLIER, low / 2), low
    # Rounded up to the grid, so that the answer does not hang on where the search stopped.
    thousandths = math.floor(1000 * brentq(excess, low, high, xtol=1e-4))
    return next(n / 1000 for n in range(thousandths, thousandths + 3) if excess(n / 1000) <= 0)

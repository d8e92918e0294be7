"""Distributed noise: each client rounds its contribution to integers and adds a share of the noise of the sum.

The distributed discrete Gaussian mechanism (Kairouz et al. 2021, arXiv:2102.06387). A contribution is rotated, scaled
by ``scale``, rounded at random, and gets noise of the discrete Gaussian with variance ``client_deviation^2``. The sum
over the clients has the privacy of one Gaussian mechanism:

1. **Rounding.** A coordinate is ``floor(a + u)`` with a secret uniform ``u`` that does not depend on the data. Two
   neighbouring sums differ by D (in L2, scaled). With the same ``u``, the rounded ones differ by integers whose squared
   norm has a mean of at most ``D^2 + d / 4``; by Hoeffding's inequality it is at most
   ``D^2 + d / 4 + sqrt(ln(1 / beta) / 2) (2 D + sqrt(d))`` except with probability beta = 2^-64. Privacy loss is
   jointly convex, so a bound for each ``u`` is one for the mechanism. Where a whole contribution is protected, rounding
   is repeated until its norm is within this bound, so that the bound always holds.
2. **Sum.** The sum of m discrete Gaussians of deviation 3 or more is one of variance ``m client_deviation^2``, up to a
   factor of 1 +- 1e-37 in every probability (Kairouz et al. 2021, Theorem 1).
3. **Gaussian.** Add a continuous Gaussian of variance V - 4 to an integer, and round at random with a discrete Gaussian
   of variance 4 around the result: this is the discrete Gaussian of variance V, up to a factor of 1 +- 1e-33 (Poisson
   summation). It is post-processing of a Gaussian mechanism, so it is at least as private.

The noise multiplier is thus ``sqrt(m client_deviation^2 - 4) / sensitivity``, with the m honest clients that surely
contribute; the error terms, 2^-64 included, are far below what the accountant resolves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedvit.errors import ConfigError, UpdateRejectedError
from fedvit.privacy.events import GAUSSIAN_ROUNDING, DistributedGaussian
from fedvit.privacy.randomness import SecretStream
from fedvit.secagg.discrete_gaussian import LARGEST_DEVIATION, discrete_gaussian
from fedvit.secagg.rotation import Vector, rotate, rotate_back

Ring = npt.NDArray[np.uint32]
# Share of the noise's variance by which rounding may raise it.
_ROUNDING_COST = 0.01
_LOG_BETA = 64 * math.log(2)
_WRAPS = 1e-9
_LEAST_DEVIATION = 3.0
_SMALLEST_BLOCK, _LARGEST_BLOCK = 2**6, 2**24
_MOST_TRIES = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """How the contributions to one sum become integers. Every value is public, and equal for all participants.

    Attributes:
        length: of a contribution.
        padded: length of the ring vector, a multiple of ``block``.
        block: the rotation is over blocks of so many coordinates.
        scale: ring units per unit of a contribution.
        bits: the ring is that of the integers modulo ``2^bits``; a wrap has a probability below 1e-9.
        client_deviation: standard deviation of one client's noise, in ring units.
        sensitivity: in ring units, L2; of the rounded sum to one protected unit.
        honest: so many honest clients surely contribute.
        bounded: whether the protected unit is the whole contribution, so that its norm is checked after rounding.
        rotation: seed of the rotation's signs.
    """

    length: int
    padded: int
    block: int
    scale: float
    bits: int
    client_deviation: float
    sensitivity: float
    honest: int
    bounded: bool
    rotation: bytes


def plan_for(
    *,
    length: int,
    sensitivity: float,
    total_norm: float,
    participants: int,
    honest: int,
    noise_multiplier: float,
    max_bits: int,
    rotation: bytes,
    bounded: bool,
) -> Plan:
    """The plan with the fewest bytes on the wire; equal arguments give an equal plan on every machine.

    Args:
        length: of a contribution.
        sensitivity: L2, of the sum to one protected unit.
        total_norm: bound on the L2 norm of the sum of all contributions.
        participants: most clients that may contribute.
        honest: fewest honest clients whose contributions are in a revealed sum.
        noise_multiplier: of the sum.
        max_bits: the widest ring.
        rotation: public seed.
        bounded: see :class:`Plan`.

    Raises:
        ConfigError: no ring is wide enough; the width needed is named.
    """
    if not (length >= 1 and 1 <= honest <= participants and 0 < sensitivity <= total_norm and noise_multiplier > 0):
        raise ValueError("a plan without contributions, honest clients, or noise")
    plans = []
    block = _SMALLEST_BLOCK
    while block <= _LARGEST_BLOCK and (block < 2 * length or block == _SMALLEST_BLOCK):
        padded = -(-length // block) * block
        scale, rounded = _scale(padded, sensitivity, honest, noise_multiplier)
        deviation = _four_digits(math.sqrt(((noise_multiplier * rounded) ** 2 + GAUSSIAN_ROUNDING) / honest))
        # Of the rotated sum (random signs) and of the noise, each coordinate is sub-Gaussian.
        spread = math.sqrt(2 * math.log(4 * padded / _WRAPS))
        signal = scale * total_norm * min(1.0, spread / math.sqrt(block))
        largest = signal + deviation * math.sqrt(participants) * spread + participants
        bits = math.ceil(math.log2(largest + 1)) + 1
        plans.append(Plan(length, padded, block, scale, bits, deviation, rounded, honest, bounded, rotation))
        block *= 2
    best = min(plans, key=lambda plan: (plan.bits > max_bits, plan.bits * plan.padded, plan.block))
    if best.bits > max_bits:
        least = min(plan.bits for plan in plans)
        raise ConfigError(
            f"A sum of {participants} contributions with this noise needs a ring of {least} bits; "
            f"secure_aggregation.bits allows {max_bits}.",
            cure="Raise secure_aggregation.bits, draw smaller cohorts, or lower the noise multiplier.",
            bits=least,
        )
    if best.client_deviation > LARGEST_DEVIATION:
        raise ConfigError(
            f"The noise of one client has a standard deviation of {best.client_deviation:g} ring units.",
            cure=f"At most {LARGEST_DEVIATION:g} are sampled: raise min_survivors, or lower the noise multiplier.",
        )
    return best


def encode(plan: Plan, contribution: Vector, stream: SecretStream) -> Ring:
    """One client's contribution as integers with its share of the noise, modulo ``2^bits``.

    Args:
        contribution: [length].
        stream: secret, of this client and this output only.

    Returns:
        [padded], below ``2^bits``.

    Raises:
        UpdateRejectedError: the contribution is not finite, or larger than the plan's sensitivity allows.
    """
    rotated = rotate(contribution, plan.rotation, plan.block, plan.padded)
    rotated *= plan.scale
    if not (math.isfinite(norm := float(rotated @ rotated)) and norm < 2.0**100):
        raise UpdateRejectedError("A contribution to a secure sum is not finite.", cure="Lower the learning rate.")
    noised = _rounded(plan, rotated, stream)
    noised += discrete_gaussian(plan.client_deviation).sample(stream, plan.padded)
    # Two's complement: the lower bits of a negative integer are those of its residue.
    return np.asarray(noised.astype(np.uint32) & np.uint32(2**plan.bits - 1), np.uint32)


def decode(plan: Plan, total: Ring) -> Vector:
    """The sum of contributions, noise included, of the sum of their integers modulo ``2^bits``: [length]."""
    half = 2 ** (plan.bits - 1)
    values = ((total.astype(np.int64) + half) & (2**plan.bits - 1)) - half
    return rotate_back(values / plan.scale, plan.rotation, plan.block, plan.length)


def event_of(plan: Plan, sampling_prob: float = 1.0) -> DistributedGaussian:
    """The privacy event of a sum under this plan."""
    return DistributedGaussian(plan.client_deviation, plan.honest, plan.sensitivity, sampling_prob)


def _rounded(plan: Plan, rotated: Vector, stream: SecretStream) -> npt.NDArray[np.int64]:
    for _ in range(_MOST_TRIES):
        rounded = np.floor(rotated + stream.uniform(plan.padded))
        if not plan.bounded or float(rounded @ rounded) <= plan.sensitivity**2:
            return rounded.astype(np.int64)
    raise UpdateRejectedError(
        "A contribution to a secure sum is larger than the clipping norm that its noise is made for."
    )


def _scale(padded: int, sensitivity: float, honest: int, noise_multiplier: float) -> tuple[float, float]:
    """The scale, and the sensitivity after rounding, in ring units.

    The scale is the smallest at which rounding costs little, and at which a client's noise is wide enough to be smooth.
    """
    root, tail = math.sqrt(padded), math.sqrt(_LOG_BETA / 2)
    # (d / 4 + tail (2 D + sqrt(d))) = cost * D^2, solved for D.
    quarter = padded / 4 + tail * root
    before = (tail + math.sqrt(tail**2 + _ROUNDING_COST * quarter)) / _ROUNDING_COST
    before = max(before, _LEAST_DEVIATION * math.sqrt(honest) / noise_multiplier)
    after = math.sqrt(before**2 + quarter + 2 * tail * before)
    return before / sensitivity, after


def _four_digits(deviation: float) -> float:
    """Rounded up to four significant digits, so that equal tables serve many rounds."""
    step = 10.0 ** (math.floor(math.log10(deviation)) - 3)
    return math.ceil(deviation / step * (1 - 1e-12)) * step

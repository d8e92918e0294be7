"""Distributed discrete Gaussian mechanism: real vectors to noised integers whose sum is taken modulo ``2^bits``.

Kairouz, Liu and Steinke 2021 (arXiv:2102.06387). Each client rotates its contribution, multiplies it by ``scale``,
rounds it with random coins, and adds discrete Gaussian noise. The server learns the sum modulo ``2^bits`` and nothing
else. Neighbours differ in one unit's data; which clients take part is public, and a client without data adds noise
only.

**Sensitivity.** Contributions at L2 distance C lie at distance D = scale * C after scaling. With the same coins, the
rounded vectors differ in coordinate j by the integer part k of the difference a, or by k + 1 with the probability of
its fraction. The squared distance has a mean of at most ``D^2 + d/4``, and its terms have ranges of at most
``2|a| + 1``, so by Hoeffding it exceeds ``D^2 + d/4 + sqrt(ln(1/b)/2) (2 D + sqrt(d))`` with probability at most
``b = 2^-64`` (the paper's Theorem 1 bounds the norm by the same expression). The coins do not depend on data, so by
joint convexity this is the sensitivity, and b is added to delta. Where the whole contribution is within C, its rounding
is repeated until the norm itself keeps the bound (``bounded``); a client without data rounds 0 to 0.

**Noise.** The sum of ``honest`` discrete Gaussians of deviation t >= 3 has, up to a factor ``1 +- 10^-37`` in each
coordinate, the probabilities of one discrete Gaussian of variance S = honest * t^2 (the paper's tau). That one
is, up to a factor ``1 +- 10^-33``, a Gaussian of variance S - 4 followed by randomised rounding with a discrete
Gaussian of variance 4 around its value: the convolution of both densities is a Gaussian of variance S, and by Poisson
summation the normalisation of the rounding depends on the value by a factor ``1 +- 2 exp(-8 pi^2)`` only. Rounding and
wrapping see no data. So the sum is as private as the Gaussian mechanism with the noise multiplier
``sqrt(S - 4) / Delta``, also on Poisson samples. All errors together stay below 10^-17 in epsilon and delta; the
accountant's tolerance is 10^-12.

**Ring.** A coordinate of the sum is sub-Gaussian over signs, coins and noise, which are independent. Their variances
add up: ``(scale * total_norm)^2 / d``, 1/4 and t^2 for each participant. The width makes the probability that any
coordinate wraps less than 2^-30.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np
import numpy.typing as npt

from fedvit.errors import ConfigError, UpdateRejectedError
from fedvit.privacy.events import GAUSSIAN_ROUNDING, DistributedGaussian
from fedvit.privacy.mechanism import ROUNDING
from fedvit.privacy.randomness import SecretStream
from fedvit.secagg.discrete_gaussian import LARGEST_DEVIATION, discrete_gaussian
from fedvit.secagg.rotation import padded_length, rotate, rotate_back

Vector = npt.NDArray[np.float64]
RingVector = npt.NDArray[np.uint32]

MOST_BITS = 32
# Natural logarithm of 2 as a literal: logarithms may differ in the last bit between machines, and plans must not.
_LN2 = 0.6931471805599453
_COIN_BITS = 32
_BETA_BITS = 64
"""The sensitivity holds except with probability 2^-64."""
_WRAP_BITS = 30
"""The whole sum wraps with probability below 2^-30."""
_LOSSES = (1.005, 1.02)
"""Delta^2 / D^2, tried in turn: how much variance rounding may cost. The second needs a ring narrower by one bit."""
_DIGITS = 4
"""Significant digits of deviations: rounds of similar cohorts share tables, for at most 0.2% more variance."""
_LEAST_DEVIATION = 3.0
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Plan:
    """Quantisation and noise of one sum: public, and bit-equal on every machine.

    Attributes:
        length: number of values d.
        padded: length of the ring vector.
        scale: integer units per unit of a contribution.
        bits: width of the ring.
        client_deviation: of one client's integer noise.
        sensitivity: Delta, the L2 distance in integer units by which one unit of privacy moves the sum.
        honest: fewest clients whose noise is in the sum and secret.
        largest_norm: bound on the L2 norm of one contribution.
        bounded: one whole contribution is within the sensitivity, so that its rounding is conditional.
        rotation: public seed of the signs.
    """

    length: int
    padded: int
    scale: float
    bits: int
    client_deviation: float
    sensitivity: int
    honest: int
    largest_norm: float
    bounded: bool
    rotation: bytes

    def variance(self, survivors: int) -> float:
        """Variance of the noise in each value of a decoded sum of so many contributions, without rounding."""
        return survivors * (self.client_deviation / self.scale) ** 2


def plan_for(
    *,
    length: int,
    sensitivity: float,
    largest_norm: float,
    total_norm: float,
    participants: int,
    honest: int,
    noise_multiplier: float,
    max_bits: int,
    rotation: bytes,
) -> Plan:
    """Scale, noise and ring for one sum; equal arguments give equal plans.

    Args:
        length: number of values of a contribution.
        sensitivity: C, the L2 distance by which one unit of privacy moves the sum.
        largest_norm: bound on the L2 norm of one contribution.
        total_norm: bound on the L2 norm of the sum of any contributions.
        participants: clients that may be in the sum.
        honest: fewest of them whose noise is in the sum and secret.
        noise_multiplier: standard deviation of the noise that they add together, over C.
        max_bits: largest width of the ring.
        rotation: public seed of the rotation, fresh for each sum.

    Raises:
        ConfigError: an argument is out of range, or the ring would be wider than ``max_bits``.
    """
    _check(length, participants, honest, sensitivity, largest_norm, total_norm, noise_multiplier)
    padded, bits, deviation, cause = padded_length(length), 0, 0.0, ""
    for loss in _LOSSES:
        distance = _distance(padded, loss, honest, noise_multiplier)
        # What float arithmetic may add to the distance of two encoded vectors.
        scale = (distance - 2**-21 * math.sqrt(padded)) / (sensitivity + 2**-38 * largest_norm)
        delta = _integer_sensitivity(padded, distance)
        deviation = _deviation(noise_multiplier * delta, honest)
        signal, noise = (scale * total_norm) ** 2 / padded, participants * (deviation**2 + 0.25)
        bits = _ring_bits(padded, signal + noise)
        if bits <= min(max_bits, MOST_BITS) and deviation <= LARGEST_DEVIATION:
            bounded = largest_norm <= sensitivity
            return Plan(length, padded, scale, bits, deviation, delta, honest, largest_norm, bounded, rotation)
        cause = (
            f"its norm, up to {total_norm / sensitivity:.6g} times its sensitivity"
            if signal > noise
            else f"the noise multiplier {noise_multiplier:g} of {participants} clients of whom {honest} suffice"
        )
    if bits > min(max_bits, MOST_BITS):
        raise ConfigError(
            f"The sum of {participants} contributions of {length} values needs a ring of {bits} bits, more than "
            f"secure_aggregation.bits = {max_bits}.",
            cure=f"Raise secure_aggregation.bits (at most {MOST_BITS}), or lower what takes most of the ring: {cause}.",
            bits=bits,
        )
    raise ConfigError(
        f"Each client would add noise of deviation {deviation:g} in integer units, more than {LARGEST_DEVIATION:g}.",
        cure="Lower the noise multiplier, or raise secure_aggregation.min_survivors.",
    )


def event_of(plan: Plan, sampling_prob: float = 1.0) -> DistributedGaussian:
    """Privacy event of one sum, for a unit that is in it with ``sampling_prob``."""
    return DistributedGaussian(plan.client_deviation, plan.honest, plan.sensitivity, sampling_prob)


def encode(plan: Plan, contribution: Vector, stream: SecretStream) -> RingVector:
    """One client's noised integers [padded], modulo ``2^bits``.

    Args:
        plan: of the sum.
        contribution: float64 [length], of norm at most ``plan.largest_norm``.
        stream: secret, used for nothing else; gives the coins of rounding and the noise.

    Raises:
        UpdateRejectedError: the contribution has another length or a larger norm.
    """
    norm = float(np.linalg.norm(contribution))
    if contribution.shape != (plan.length,) or not norm <= plan.largest_norm * (1 + ROUNDING):
        raise UpdateRejectedError(
            f"A contribution of shape {contribution.shape} and norm {norm:.6g}.",
            cure=f"This secure sum takes {plan.length} values of norm {plan.largest_norm:.6g} at most.",
        )
    # Clipped vectors exceed the bound by rounding errors only, and the guarantee does not.
    factor = plan.scale * min(1.0, plan.largest_norm / norm) if norm > 0 else plan.scale
    rotated = rotate(np.asarray(contribution, dtype=np.float64), plan.rotation, factor)
    rounded = np.empty_like(rotated)
    while _round(rotated, rounded, stream) > plan.sensitivity**2 and plan.bounded:
        pass
    vector, noise = np.empty(plan.padded, dtype=np.uint32), discrete_gaussian(plan.client_deviation)
    for start in range(0, plan.padded, _PIECE):
        piece = rounded[start : start + _PIECE].astype(np.int64)
        piece += noise.sample(stream, len(piece))
        piece &= (1 << plan.bits) - 1
        vector[start : start + _PIECE] = piece
    return vector


def decode(plan: Plan, total: RingVector) -> Vector:
    """The noised sum, float64 [length], of contributions whose vectors add up to ``total`` [padded], mod ``2^bits``."""
    modulus = 1 << plan.bits
    centred = total.astype(np.float64)
    centred[total >= modulus // 2] -= modulus
    return rotate_back(centred, plan.rotation, plan.length, 1 / plan.scale)


def _check(length: int, participants: int, honest: int, *bounds: float) -> None:
    if not all(math.isfinite(bound) and bound > 0 for bound in bounds):
        raise ConfigError(
            f"Norms and noise multiplier of a secure sum are {bounds}.", cure="They must be finite and above 0."
        )
    if not 1 <= honest <= participants or length < 1:
        raise ConfigError(
            f"A secure sum of {length} values with {honest} honest survivors of {participants} participants.",
            cure="At least one value, and at least one of the participants must survive and be honest.",
        )


def _round(values: Vector, rounded: Vector, stream: SecretStream) -> float:
    """Write ``floor(values + coin)`` into ``rounded``; return its squared norm."""
    squares = 0.0
    for start in range(0, values.size, _PIECE):
        piece = rounded[start : start + _PIECE]
        coins = stream.words(-(-len(piece) // 2)).view("<u4")[: len(piece)]
        np.multiply(coins, 2.0**-_COIN_BITS, out=piece)
        piece += values[start : start + _PIECE]
        np.floor(piece, out=piece)
        squares += float(piece @ piece)
    return squares


def _hoeffding(padded: int) -> float:
    """Factor of ``2 D + sqrt(d)``: ``sqrt(ln(1/b) / 2)``, and the means' error by coins of 32 bits."""
    return math.sqrt(_BETA_BITS * _LN2 / 2) + 2.0 ** (1 - _COIN_BITS) * math.sqrt(padded)


def _integer_sensitivity(padded: int, distance: float) -> int:
    """Delta: bound on the distance after rounding of vectors at ``distance`` before it."""
    root = math.sqrt(padded)
    return math.ceil(math.sqrt(distance**2 + padded / 4 + _hoeffding(padded) * (2 * distance + root)))


def _distance(padded: int, loss: float, honest: int, noise_multiplier: float) -> float:
    """D, the smallest distance after scaling whose Delta^2 is at most ``loss * D^2``, with noise enough per client."""
    root, factor, share = math.sqrt(padded), _hoeffding(padded), loss - 1
    distance = (factor + math.sqrt(factor**2 + share * (padded / 4 + factor * root))) / share
    return max(distance, _LEAST_DEVIATION * math.sqrt(honest) / noise_multiplier)


def _deviation(total: float, honest: int) -> float:
    """Deviation of one client's noise, so that ``honest`` of them give ``sqrt(honest * deviation^2 - 4) >= total``."""
    exact = math.sqrt((total**2 + GAUSSIAN_ROUNDING) / honest) * (1 + 1e-12)
    return float(Context(prec=_DIGITS, rounding=ROUND_CEILING).create_decimal_from_float(exact))


def _ring_bits(padded: int, variance: float) -> int:
    """Smallest width with ``2 d exp(-h^2 / (2 variance)) <= 2^-30`` for ``h = 2^(bits - 1)``."""
    half_squared = 2 * variance * _LN2 * (_WRAP_BITS + 1 + padded.bit_length())
    return next(bits for bits in range(2, 1025) if 4.0 ** (bits - 1) >= half_squared)

"""Gaussian mechanism on whole client updates: clip each update, sum, add noise once, divide by a constant.

McMahan et al. 2018 (arXiv:1710.06963). All arithmetic on named arrays is in float64 and in the order of the names, so
that equal updates give equal bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fedvit.errors import UpdateRejectedError
from fedvit.exact_sums import Arrays, ExactSums, Sums, blocks, squared_norm
from fedvit.privacy.randomness import SecretStream
from fedvit.types import TrainTask, Weights
from fedvit.updates import WeightedUpdate

Vector = npt.NDArray[np.float64]

_NOISE_SPREAD = 6.0
"""Standard deviations beyond which the length of a Gaussian vector does not lie, except with probability 2e-8."""
ROUNDING = 1e-6
"""Relative error that float arithmetic may add to a norm."""


def l2_norm(update: Arrays) -> float:
    """L2 norm over all arrays together, zero-dimensional ones included; NaN and infinity propagate."""
    return math.sqrt(sum(squared_norm(a) for a in update.values()))


def clip_factor(norm: float, l2_clip_norm: float) -> tuple[float, bool]:
    """``min(1, l2_clip_norm / norm)``, and whether an update of this norm is within the bound, as a zero update is.

    Raises:
        UpdateRejectedError: the update has no finite norm.
    """
    if not math.isfinite(norm):
        raise UpdateRejectedError(
            f"The update has the norm {norm}.", cure="Lower the learning rate; nothing of it was added up."
        )
    within = norm <= l2_clip_norm
    return 1.0 if within else l2_clip_norm / norm, within


def clip_update(update: Arrays, l2_clip_norm: float) -> tuple[Sums, bool]:
    """The update times its :func:`clip_factor`, float64, and whether it was already within the bound."""
    scale, within = clip_factor(l2_norm(update), l2_clip_norm)
    return {name: np.asarray(scale * array.astype(np.float64)) for name, array in update.items()}, within


def sensitivity(task: TrainTask) -> float:
    """L2 sensitivity of a round's sum of weighted updates to one unit, where these have no noise yet.

    A client's clipped update has weight 1. A record changes a client's sum of clipped gradients by ``l2_clip_norm`` at
    most; one step turns it into ``learning_rate / (sampling_prob * n)`` of that, and the weight is n at most.
    """
    if task.privacy_unit == "client":
        return task.l2_clip_norm
    return task.learning_rate * task.l2_clip_norm / task.sampling_prob


def fault_of(update: WeightedUpdate, l2_clip_norm: float, noise_multiplier: float = 0.0) -> str | None:
    """Why a partial sum cannot be the sum of its contributors' clipped updates, or None.

    ``contributors * l2_clip_norm`` bounds its norm, and each contributor has a weight of 1.

    Args:
        noise_multiplier: of the noise that each contributor has added; its length is added to the bound.
    """
    contributors = sum(outcome.error is None for outcome in update.outcomes)
    norm, allowed = l2_norm(update.total()), contributors * l2_clip_norm
    if noise_multiplier:
        length = math.sqrt(size_of(update.total())) + _NOISE_SPREAD
        allowed += noise_multiplier * l2_clip_norm * math.sqrt(contributors) * length
    if not norm <= allowed * (1 + ROUNDING):
        return f"its partial sum has the norm {norm:.6g}, and {contributors} clipped updates allow {allowed:.6g}"
    if update.total_weight != contributors:
        return f"its weight is {update.total_weight:g}, and {contributors} clients have a weight of 1 each"
    if not 0 <= update.within_clip <= contributors:
        return f"{update.within_clip} of its {contributors} clients were within the bound"
    return None


def total(base: Weights, updates: Iterable[tuple[WeightedUpdate, float]], l2_clip_norm: float) -> Sums:
    """Sum of all updates, by the names of ``base``; updates clipped to a larger norm are scaled down to this one.

    Args:
        updates: each with the norm to which its clients' updates were clipped.
    """
    sums = ExactSums({name: array.shape for name, array in base.items()})
    for update, clipped_to in updates:
        for addend in update.addends:
            sums.add(addend, min(1.0, l2_clip_norm / clipped_to))
    return sums.totals()


def digest(sums: Arrays) -> str:
    """SHA-256, hex, of names, shapes and bits."""
    sha256 = hashlib.sha256()
    for name in sorted(sums):
        array = np.ascontiguousarray(sums[name], dtype="<f8")
        sha256.update(f"{name}{array.shape}".encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def fresh_noise(stream: SecretStream, size: int) -> Vector:
    """``size`` independent standard normals of a secret stream."""
    return stream.normal(size)


def size_of(arrays: Arrays) -> int:
    """Number of values in all arrays."""
    return sum(array.size for array in arrays.values())


def noised_mean(sums: Sums, noise: Vector, *, divisor: float) -> Sums:
    """``(sums + noise) / divisor``, float64, in the memory of ``sums``.

    Args:
        sums: sums of the clipped updates, by name; they are overwritten.
        noise: [size], scaled; assigned to the arrays in the order of their names.
        divisor: a public number; with clients as the privacy unit, never the size of a cohort, which is private.

    Raises:
        ValueError: the noise has another size than the sums, or the divisor is not above 0.
    """
    if noise.shape != (size_of(sums),) or not divisor > 0:
        raise ValueError(f"noise of shape {noise.shape} and divisor {divisor} for {size_of(sums)} numbers")
    means, start = {}, 0
    for name in sorted(sums):
        flat = sums[name].reshape(-1)
        part = noise[start : start + flat.size]
        start += flat.size
        for at in blocks(flat.size):
            flat[at] += part[at]
            flat[at] /= divisor
        means[name] = flat.reshape(sums[name].shape)
    return {name: means[name] for name in sums}

"""The linear head in a round: which directions it learns in, and how far one client may move it.

Per round, privacy noise in the head grows with the number of directions, while what is learned lies in a few of them: a
step of cross entropy is a sum of ``(p - y) x^T`` over inputs x. The inputs of the server's own held-out images show
which directions natural inputs have. Following Zhou, Wu and Banerjee 2021 (arXiv:2007.03813), the aggregated step is
projected onto their principal directions. This is post-processing of noised updates and costs no privacy. It also
removes what an attacker could hide in the other directions, which natural images hardly have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedvit.aggregation.rule import moved
from fedvit.aggregation.update_bounds import MechanismBounds, UpdateBound, as_matrix, spectral_norm
from fedvit.types import FloatArray, Weights
from fedvit.updates import ClientUpdate

_TIMES_THE_PACE = 2.0
_DEVIATIONS = 2.0
"""Of the noise, which a single number of an update keeps. Of a small signal, erf(2 / sqrt(2)) = 95% remain."""
_INPUTS_PER_DIRECTION = 4
"""Fewer inputs say little about their directions."""


@dataclass(frozen=True, slots=True)
class Head:
    """A linear head and the limits on its steps.

    ``weight`` [classes, width] and ``bias`` [classes] are names of parameters. ``basis`` [directions, width] has
    orthonormal rows; None stands for all directions. ``body_learning_rate`` is the factor on the step of everything
    else. ``max_gradient`` is the largest mean gradient of one client, over the clipping norm, that moves the head.
    ``pace`` is the spectral norm of what all rounds so far moved the weight, over their number, and ``fastest`` the
    largest magnitude in it, in the coordinates of the basis; both are None before the first round.
    """

    weight: str
    bias: str | None = None
    basis: FloatArray | None = None
    body_learning_rate: float = 1.0
    max_gradient: float = 1.0
    pace: float | None = None
    fastest: float | None = None

    @classmethod
    def of(
        cls,
        weight: str | None,
        base: Weights,
        basis: FloatArray | None,
        *,
        body_learning_rate: float = 1.0,
        max_gradient: float = 1.0,
        initial: FloatArray | None = None,
        rounds: int = 0,
    ) -> Head | None:
        """The head of a model with these weights; None where no head is known, and nothing is limited.

        Args:
            weight: the name of the head's weight.
            initial: that weight before the first round.
            rounds: how many rounds led from there to ``base``.
        """
        if weight is None:
            return None
        bias = weight.removesuffix("weight") + "bias"
        pace = fastest = None
        if initial is not None and rounds:
            step = as_matrix(base[weight].astype(np.float64) - initial) / rounds
            pace, fastest = spectral_norm(step), float(np.abs(step if basis is None else step @ basis.T).max())
        return cls(weight, bias if bias in base else None, basis, body_learning_rate, max_gradient, pace, fastest)

    def largest(self, bound: UpdateBound, shape: tuple[int, ...]) -> float:
        """The largest singular value that an update keeps in a head of this shape."""
        signal = self.max_gradient * bound.signal
        if self.pace is not None:
            signal = min(signal, _TIMES_THE_PACE * self.pace)
        return max(bound.deviation * sum(math.sqrt(n) for n in shape), signal)

    def largest_number(self, bound: UpdateBound) -> float:
        """The largest magnitude that a single number of an update keeps, in the coordinates of the basis."""
        signal = self.max_gradient * bound.signal if self.fastest is None else self.fastest
        return max(_DEVIATIONS * bound.deviation, signal)

    def step(self, base: Weights, weights: Weights) -> dict[str, FloatArray]:
        """Weights that have gone the whole way from ``base`` in the head's directions, and a part of it elsewhere."""
        if self.basis is None and self.body_learning_rate == 1:
            return dict(weights)
        steps = {name: array.astype(np.float64) - base[name] for name, array in weights.items()}
        if self.basis is not None:
            steps[self.weight] = steps[self.weight] @ self.basis.T @ self.basis
        for name in steps.keys() - {self.weight, self.bias}:
            steps[name] *= self.body_learning_rate
        return moved(base, steps)

    def clipped(self, bounds: MechanismBounds, update: ClientUpdate) -> ClientUpdate:
        """The update with smaller singular values and smaller numbers in the head, weight and bias together.

        A singular value keeps what noise explains on average, ``deviation * (sqrt(r) + sqrt(c))``. Where little noise
        is ordered, it keeps as much as ``max_gradient`` allows, or twice the pace of the fleet. Afterwards each number,
        in the coordinates of the basis, keeps two deviations of the noise, or what the fleet's fastest number moves a
        round. Without that, all of a singular value could lie in the bias of one class, and in its weight along the
        mean input, and raise that class on every image. An honest update loses little.

        Args:
            bounds: on updates to the round's task.
        """
        bound, own = bounds.of(update.outcome.num_examples), bounds.without_shift(update)
        matrix = own[self.weight].astype(np.float64, copy=False)
        if self.basis is not None:
            matrix = matrix @ self.basis.T
        if self.bias is not None:
            matrix = np.column_stack([matrix, own[self.bias]])
        limit, most = self.largest(bound, matrix.shape), self.largest_number(bound)
        if np.abs(matrix).max() <= most and spectral_norm(matrix) <= limit:
            return update
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        excess = matrix - np.clip((left * np.minimum(values, limit)) @ right, -most, most)
        kept = dict(update.weighted_sum)
        if self.bias is not None:
            kept[self.bias] = kept[self.bias] - update.total_weight * excess[:, -1]
            excess = excess[:, :-1]
        in_full = excess if self.basis is None else excess @ self.basis
        kept[self.weight] = kept[self.weight] - update.total_weight * in_full
        return replace(update, weighted_sum=kept)


def principal_directions(inputs: npt.NDArray[np.floating], count: int) -> FloatArray | None:
    """The leading principal directions of inputs [N, width], [count, width], orthonormal, float32.

    None where they would be all directions, or where the inputs are too few to show so many.
    """
    if count >= inputs.shape[1] or len(inputs) < _INPUTS_PER_DIRECTION * count:
        return None
    wide = inputs.astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide)
    return np.ascontiguousarray(vectors[:, : -count - 1 : -1].T, dtype=np.float32)

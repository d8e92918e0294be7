"""Bounds on one client's update that follow from the ordered DP-SGD alone, whatever the client's records are.

An update is ``s + z``. The signal ``s`` is the sum of the drawn records' clipped gradients, multiplied by the learning
rate over the expected batch size. The noise ``z`` is Gaussian with a known deviation in each coordinate. So:

- *Length.* The number of drawn records is binomial, which bounds ``||s||``; the length of ``z`` concentrates around
  ``deviation * sqrt(size)``.
- *Shape.* The spectral norm of a Gaussian matrix [r, c] is at most ``deviation * (sqrt(r) + sqrt(c) + t)``, except with
  probability ``exp(-t^2 / 2)`` (Davidson and Szarek 2001). What exceeds this in the matrices of an update must come
  from ``s``: the root of the sum of its squares is at most ``||s||``. An attacker may make an update as long as noise,
  but not point it at one direction of a layer.

An honest update violates the bounds of one round with a probability of at most :data:`TAIL`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from fedvit.exact_sums import Arrays
from fedvit.privacy.mechanism import l2_norm
from fedvit.types import TrainTask, Weights
from fedvit.updates import ClientUpdate

TAIL = 1e-6
FLOAT32_SLACK = 1e-3
"""Relative allowance for float32 weights and random rounding to 8 or 16 bits, which add far less than this."""
_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class CorrectionEffect:
    """How a rule's gradient corrections change an update.

    ``signal`` and ``noise`` are factors on the bounds of ``||s||`` and on the deviation of ``z``; ``shift`` is the part
    of every client's update that is known to everybody, by parameter name.
    """

    signal: float = 1.0
    noise: float = 1.0
    shift: Weights = field(default_factory=dict)


NO_EFFECT = CorrectionEffect()


@dataclass(frozen=True)
class UpdateBound:
    """The bounds on an update of one client.

    Args:
        signal: largest ``||s||``.
        deviation: standard deviation of each coordinate of ``z``.
        size: number of coordinates.
        spread: standard deviations (t) that the length and the spectral norms of Gaussians stay within.
    """

    signal: float
    deviation: float
    size: int
    spread: float

    @cached_property
    def norm(self) -> float:
        """Largest L2 norm of ``s + z``: ``<s, z>`` is one Gaussian, whose deviation is ``||s|| * deviation``."""
        length = self.deviation * (math.sqrt(self.size) + self.spread)
        cross = 2 * self.signal * self.deviation * self.spread
        return (1 + FLOAT32_SLACK) * math.sqrt(self.signal**2 + cross + length**2)

    def excess(self, update: Arrays) -> float:
        """Least norm of ``s`` that explains the spectral norms of an update, by name; at most ``signal`` if honest."""
        return math.sqrt(sum(self._excess_of(array) ** 2 for array in update.values() if array.size))

    def edge(self, rows: int, columns: int) -> float:
        """Largest spectral norm of the noise in a matrix of this shape; a vector's is its length."""
        return (
            (1 + FLOAT32_SLACK) * self.deviation * (sum(math.sqrt(n) for n in (rows, columns) if n > 1) + self.spread)
        )

    def _excess_of(self, array: npt.NDArray[np.floating]) -> float:
        matrix = as_matrix(array)
        return max(0.0, spectral_norm(matrix) - self.edge(*matrix.shape))


class MechanismBounds:
    """The bounds on the updates to a task, by the client's number of examples.

    Args:
        task: with records as the privacy unit.
        shapes: of the trainable parameters, by name.
        effect: of the rule's corrections.
    """

    def __init__(
        self, task: TrainTask, shapes: Mapping[str, tuple[int, ...]], effect: CorrectionEffect = NO_EFFECT
    ) -> None:
        self.task, self._effect = task, effect
        self._size = sum(math.prod(shape) for shape in shapes.values())
        # Three events beside those of the matrices: the drawn records, the length of z, and <s, z>.
        self._log_tail = math.log((len(shapes) + 3) / TAIL)
        self.of = cache(self._of)

    def _of(self, num_examples: int) -> UpdateBound:
        """The bounds for a client of so many examples."""
        task = self.task
        most = most_drawn(task.local_steps * num_examples, task.sampling_prob, self._log_tail)
        rate = task.learning_rate * task.l2_clip_norm / (task.sampling_prob * num_examples)
        deviation = self._effect.noise * step_deviation(task, num_examples)
        spread = math.sqrt(2 * self._log_tail)
        return UpdateBound((1 + FLOAT32_SLACK) * self._effect.signal * rate * most, deviation, self._size, spread)

    def without_shift(self, update: ClientUpdate) -> Arrays:
        """The update itself, not multiplied by its weight, without the part that is known to everybody."""
        shift, weight = self._effect.shift, update.total_weight
        return {n: a / weight - shift[n] if n in shift else a / weight for n, a in update.weighted_sum.items()}

    def relative_norm(self, update: ClientUpdate, weighted_norm: float | None = None) -> float:
        """An update's norm over the largest that is possible.

        Args:
            weighted_norm: of the update multiplied by its weight, if known.
        """
        if self._effect.shift:
            norm = l2_norm(self.without_shift(update))
        else:
            norm = (l2_norm(update.weighted_sum) if weighted_norm is None else weighted_norm) / update.total_weight
        return norm / self.of(update.outcome.num_examples).norm


def step_deviation(task: TrainTask, num_examples: int) -> float:
    """Standard deviation of the noise in each number of an update."""
    batch = task.sampling_prob * num_examples
    return task.learning_rate * task.noise_multiplier * task.l2_clip_norm * math.sqrt(task.local_steps) / batch


def most_drawn(trials: int, prob: float, log_tail: float) -> float:
    """Bound on a binomial number of successes that holds except with probability ``exp(-log_tail)`` (Chernoff)."""
    low, high = trials * prob, float(trials)
    if trials * _divergence(1.0, prob) <= log_tail:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if trials * _divergence(middle / trials, prob) < log_tail:
            low = middle
        else:
            high = middle
    return high


def as_matrix(array: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """An array as a float64 matrix: its first dimension above 1 against all others."""
    rows = next((n for n in array.shape if n > 1), 1)
    return array.astype(np.float64, copy=False).reshape(rows, -1)


def spectral_norm(matrix: npt.NDArray[np.float64]) -> float:
    """The largest singular value."""
    if min(matrix.shape) == 1:
        return float(np.linalg.norm(matrix))
    smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # The Gram matrix halves the digits, which are enough, and is much faster than a singular value decomposition.
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(smaller @ smaller.T)[-1])))


def _divergence(share: float, prob: float) -> float:
    """Kullback-Leibler divergence of a coin of ``share`` from one of ``prob``, for ``share >= prob``."""
    divergence = share * math.log(share / prob)
    return divergence + (1 - share) * math.log((1 - share) / (1 - prob)) if share < 1 else divergence

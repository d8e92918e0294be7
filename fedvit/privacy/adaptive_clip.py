"""A clipping norm that follows a quantile of the updates' norms (Andrew et al. 2021, arXiv:1905.03871)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedvit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdaptiveClip:
    """``C <- C * exp(-learning_rate * (b - target_quantile))``, with b the noised share of updates within C.

    Every client adds one bit minus 1/2, so adding or removing a client moves the sum by exactly 1/2. Noise of
    ``count_noise_multiplier / 2`` makes the count a Gaussian mechanism with its own charge.

    Attributes:
        target_quantile: share of updates that should not be clipped.
        learning_rate: eta; with 0.2 the norm changes by a factor of at most 1.22 a round.
        count_noise_multiplier: standard deviation of the count's noise over its sensitivity.
    """

    target_quantile: float
    learning_rate: float
    count_noise_multiplier: float

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """Noise multiplier of the sum, ``(z^-2 - count^-2)^-1/2``, so that sum and count together cost z.

        Raises:
            ConfigError: the count alone costs as much.
        """
        left = noise_multiplier**-2 - self.count_noise_multiplier**-2
        if left <= 0:
            raise ConfigError(
                f"Counting with a noise multiplier of {self.count_noise_multiplier:g} spends all that one of "
                f"{noise_multiplier:.4g} admits.",
                cure="Raise privacy.adaptive_clip.count_noise_multiplier.",
            )
        return float(left**-0.5)

    def share(self, within: int, contributors: int, noise: float, expected: float) -> float:
        """Noised share of updates within the norm, in [0, 1].

        Args:
            within: number of updates within the norm.
            contributors: number of updates.
            noise: a standard normal.
            expected: expected number of contributors, a constant of the run.
        """
        noised = within - contributors / 2 + self.count_noise_multiplier / 2 * noise
        return min(1.0, max(0.0, 0.5 + noised / expected))

    def next_norm(self, l2_clip_norm: float, share: float) -> float:
        """Clipping norm of the next round."""
        return l2_clip_norm * math.exp(-self.learning_rate * (share - self.target_quantile))

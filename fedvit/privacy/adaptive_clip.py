"""A clipping norm that follows a quantile of the updates' norms (Andrew et al. 2021, arXiv:1905.03871)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedvit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdaptiveClip:
    """``C <- C * exp(-learning_rate * (b - target_quantile))``, b being the noised share of updates within C.

    Every client adds one bit, shifted by a half: adding or removing a client moves the sum of bits by 1/2, whatever the
    bit is. So noise of ``count_noise_multiplier / 2`` makes counting a Gaussian mechanism of its own, with a charge of
    its own.

    Attributes:
        target_quantile: the share of updates that shall not be clipped.
        learning_rate: eta; with 0.2 the norm moves by a factor of 1.22 a round at most.
        count_noise_multiplier: standard deviation of the noise over the sensitivity.
    """

    target_quantile: float
    learning_rate: float
    count_noise_multiplier: float

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """The noise multiplier of the updates' sum, so that sum and count together cost ``noise_multiplier``.

        ``(z^-2 - count^-2)^-1/2``, a little above z.

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
        """The noised share of updates within the norm, in [0, 1].

        Args:
            within: how many of them were.
            contributors: how many updates there are.
            noise: a standard normal.
            expected: a constant of the run: the expected number of contributors.
        """
        noised = within - contributors / 2 + self.count_noise_multiplier / 2 * noise
        return min(1.0, max(0.0, 0.5 + noised / expected))

    def next_norm(self, l2_clip_norm: float, share: float) -> float:
        """The norm that the next round clips to."""
        return l2_clip_norm * math.exp(-self.learning_rate * (share - self.target_quantile))

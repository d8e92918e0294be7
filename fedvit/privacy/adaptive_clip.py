"""Clipping norm that follows a quantile of the updates' norms (Andrew et al. 2021, arXiv:1905.03871).

``C <- C * exp(-learning_rate * (b - target_quantile))``, with b the noised share of updates within C. Every client adds
one bit minus 1/2, so adding or removing a client moves the sum by exactly 1/2. Noise of ``count_noise_multiplier / 2``
makes the count a Gaussian mechanism with its own charge.
"""

from __future__ import annotations

import math

from fedvit.config.privacy import AdaptiveClipConfig
from fedvit.errors import ConfigError


def sum_noise_multiplier(config: AdaptiveClipConfig, noise_multiplier: float) -> float:
    """Noise multiplier of the sum, ``(z^-2 - count^-2)^-1/2``, so that sum and count together cost z.

    Raises:
        ConfigError: the count alone costs as much.
    """
    left = noise_multiplier**-2 - config.count_noise_multiplier**-2
    if left <= 0:
        raise ConfigError(
            f"Counting with a noise multiplier of {config.count_noise_multiplier:g} spends all that one of "
            f"{noise_multiplier:.4g} admits.",
            cure="Raise privacy.adaptive_clip.count_noise_multiplier.",
        )
    return float(left**-0.5)


def noised_share(config: AdaptiveClipConfig, within: int, contributors: int, noise: float, expected: float) -> float:
    """Noised share of updates within the norm, in [0, 1].

    Args:
        within: number of updates within the norm, of so many ``contributors``.
        noise: a standard normal.
        expected: expected number of contributors, a constant of the run.
    """
    noised = within - contributors / 2 + config.count_noise_multiplier / 2 * noise
    return min(1.0, max(0.0, 0.5 + noised / expected))


def next_norm(config: AdaptiveClipConfig, l2_clip_norm: float, share: float) -> float:
    """Clipping norm of the next round; with a learning rate of 0.2 it changes by a factor of at most 1.22."""
    return l2_clip_norm * math.exp(-config.learning_rate * (share - config.target_quantile))

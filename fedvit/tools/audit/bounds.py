"""Lower bounds on epsilon from released values, each correct with probability ``1 - alpha``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_HIGHEST, _TOLERANCE = 100.0, 1e-6


@dataclass(frozen=True, slots=True)
class Errors:
    """How often a test for a canary was wrong: ``false_alarms`` of ``without`` releases, ``misses`` of ``with_it``."""

    false_alarms: int
    without: int
    misses: int
    with_it: int

    def upper(self, alpha: float) -> tuple[float, float]:
        """Upper bounds of both rates, jointly correct with probability ``1 - alpha`` (Clopper and Pearson 1934)."""
        return (
            clopper_pearson_upper(self.false_alarms, self.without, alpha / 2),
            clopper_pearson_upper(self.misses, self.with_it, alpha / 2),
        )


def clopper_pearson_upper(hits: int, trials: int, alpha: float) -> float:
    """The largest probability under which so few ``hits`` in ``trials`` happen with ``alpha``: one-sided and exact.

    Raises:
        ValueError: the numbers count nothing.
    """
    from scipy.stats import beta

    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} of {trials} is no count")
    return 1.0 if hits == trials else float(beta.ppf(1 - alpha, hits + 1, trials - hits))


def epsilon_without_assumptions(errors: Errors, delta: float, alpha: float) -> float:
    """For any (epsilon, delta)-DP mechanism: a test's power is at most ``e^epsilon * size + delta``, either way round.

    Kairouz et al. 2015 (arXiv:1311.0776). Weak at a small delta: rare errors need many releases to be seen.
    """
    false_alarms, misses = errors.upper(alpha)
    powers = [(1 - misses - delta, false_alarms), (1 - false_alarms - delta, misses)]
    return max([0.0, *(math.log(power / size) for power, size in powers if power > size > 0)])


def mu_of(errors: Errors, alpha: float) -> float:
    """For Gaussian mechanisms: ``mu`` of mu-GDP (Dong et al. 2019, arXiv:1905.02383) is at least this.

    As Nasr et al. 2023 (arXiv:2302.07956) audit: one point of the trade-off curve determines all of it.
    """
    from scipy.stats import norm

    false_alarms, misses = errors.upper(alpha)
    return max(0.0, float(norm.isf(false_alarms) - norm.ppf(misses)))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP at ``delta``: the root of ``Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) = delta``.

    Balle and Wang 2018 (arXiv:1805.06530).
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(epsilon: float) -> float:
        second = epsilon + norm.logcdf(-mu / 2 - epsilon / mu)
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(second) - delta)

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, mu * (mu + 2 * math.sqrt(-2 * math.log(delta)) + 10)))


def best_threshold(without: npt.NDArray[np.float64], with_it: npt.NDArray[np.float64]) -> float:
    """The threshold with the fewest errors on these scores; to be applied to other scores only."""
    candidates = np.quantile(np.concatenate([without, with_it]), np.linspace(0.02, 0.98, 97))
    wrong = [np.mean(without > t) + np.mean(with_it <= t) for t in candidates]
    return float(candidates[int(np.argmin(wrong))])


def errors_at(threshold: float, without: npt.NDArray[np.float64], with_it: npt.NDArray[np.float64]) -> Errors:
    """The errors of the test that assigns scores above ``threshold`` to the canary."""
    alarms, misses = int(np.sum(without > threshold)), int(np.sum(with_it <= threshold))
    return Errors(alarms, len(without), misses, len(with_it))


# --- one run ---------------------------------------------------------------------------------------------------------


def one_run_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The maximum probability of so many ``correct`` of ``guesses`` if the run is (epsilon, delta)-DP.

    Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846), Theorem 5.2. ``canaries`` independent fair coins say which took
    part; with ``q = 1 / (1 + e^-epsilon)`` and W ~ Binomial(guesses, q) it is
    ``P[W >= correct] + 2 * canaries * delta * max_i P[correct > W >= correct - i] / i``.

    Raises:
        ValueError: the numbers do not fit each other.
    """
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} correct of {guesses} guesses about {canaries} canaries")
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, q))
    if correct == 0 or delta == 0:
        return min(1.0, beta)
    near_misses = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, q))
    steepest = float(np.max(near_misses / np.arange(1, correct + 1)))
    return min(1.0, beta + 2 * canaries * delta * steepest)


def one_run_epsilon(*, canaries: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    """The smallest epsilon that ``correct`` guesses do not refute at ``alpha``: a lower bound on the true one."""

    def refuted(epsilon: float) -> bool:
        p = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return p < alpha

    low, high = 0.0, _HIGHEST
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low

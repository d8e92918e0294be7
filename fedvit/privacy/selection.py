"""Privacy cost of selecting the best of several trials on private data.

The best trial of a sweep reveals more than that trial alone. Publishing all k trials costs as much as k runs. Selecting
the best of a *random* number of trials costs far less if that number stays secret (Papernot and Steinke 2022,
arXiv:2110.03620). For a truncated negative binomial number, dp-accounting computes the bound on Renyi divergence. A
fixed number of trials has no such bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from fedvit.errors import ConfigError
from fedvit.privacy.epsilon import Composition, check_delta, dp_event_of, epsilon_pld, epsilon_rdp, rdp_accountant
from fedvit.privacy.events import simplified
from fedvit.privacy.randomness import SecretStream

MOST_TRIALS = 1_000_000


@dataclass(frozen=True, slots=True)
class SelectionCost:
    """Epsilons at one delta.

    Attributes:
        one_trial: of a trial without selection, by PLD.
        one_trial_rdp: the same by RDP, to compare with ``select_best``.
        select_best: of the best of a random number of trials with the mean ``mean_trials``, by RDP.
        all_trials: of ``ceil(mean_trials)`` published trials, by PLD.
    """

    mean_trials: float
    shape: float
    delta: float
    one_trial: float
    one_trial_rdp: float
    select_best: float
    all_trials: float


def selection_cost(trial: Composition, *, mean_trials: float, delta: float, shape: float = 1.0) -> SelectionCost:
    """Cost of training a random number of trials and publishing the best.

    Args:
        trial: composition of one trial on one unit's data.
        mean_trials: mean number of trials, above 1.
        delta: see :func:`fedvit.privacy.epsilon.epsilon_pld`.
        shape: of the truncated negative binomial: 0 is logarithmic, 1 geometric.

    Raises:
        ConfigError: a number is out of range.
    """
    _check(mean_trials, shape)
    return SelectionCost(
        mean_trials=mean_trials,
        shape=shape,
        delta=check_delta(delta),
        one_trial=epsilon_pld(trial, delta),
        one_trial_rdp=epsilon_rdp(trial, delta),
        select_best=_select_best(trial, mean_trials, delta, shape),
        all_trials=epsilon_pld(
            {event: count * math.ceil(mean_trials) for event, count in simplified(trial).items()}, delta
        ),
    )


def _select_best(trial: Composition, mean_trials: float, delta: float, shape: float) -> float:
    from dp_accounting import dp_event

    events = [dp_event.SelfComposedDpEvent(dp_event_of(event), n) for event, n in simplified(trial).items()]
    selected = dp_event.RepeatAndSelectDpEvent(dp_event.ComposedDpEvent(events), mean_trials, shape)
    return float(rdp_accountant(selected).get_epsilon(delta))


def draw_number_of_trials(stream: SecretStream, *, mean_trials: float, shape: float = 1.0) -> int:
    """Secret number of trials with which :func:`selection_cost` holds for a sweep."""
    _check(mean_trials, shape)
    cumulated, number, uniform = 0.0, 0, float(stream.uniform(1)[0])
    for probability in number_of_trials(mean_trials, shape):
        cumulated, number = cumulated + float(probability), number + 1
        if uniform <= cumulated:
            break
    return number


def number_of_trials(mean_trials: float, shape: float) -> npt.NDArray[np.float64]:
    """Probabilities of 1, 2, ... trials: truncated negative binomial (Definition 1), up to a negligible tail."""
    gamma = _gamma(mean_trials, shape)
    most = min(MOST_TRIALS, math.ceil(60 / -math.log1p(-gamma)) + 1)
    k = np.arange(1, most, dtype=np.float64)
    # P(k + 1) / P(k) = (1 - gamma) * (k + shape) / (k + 1).
    weights = np.concatenate([[1.0], np.cumprod((1 - gamma) * (k + shape) / (k + 1))])
    return np.asarray(weights / weights.sum())


def _gamma(mean_trials: float, shape: float) -> float:
    def mean(gamma: float) -> float:
        if shape == 0:
            return (1 / gamma - 1) / math.log(1 / gamma)
        return float(shape * (1 - gamma) / (gamma * (1 - gamma**shape)))

    return float(brentq(lambda gamma: mean(gamma) - mean_trials, 1e-9, 1 - 1e-9))


def _check(mean_trials: float, shape: float) -> None:
    if not 1 < mean_trials <= MOST_TRIALS:
        raise ConfigError(f"mean_trials is {mean_trials}.", cure=f"It must lie above 1 and at most at {MOST_TRIALS}.")
    if not (math.isfinite(shape) and shape >= 0):
        raise ConfigError(f"shape is {shape}.", cure="0 is the logarithmic distribution, 1 the geometric.")

"""Privacy cost of a sweep over private data, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedvit.config import Settings
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event
from fedvit.privacy.round_cost import run_spend
from fedvit.privacy.selection import selection_cost
from fedvit.tools.sweep.space import TrialPlan


@dataclass(frozen=True, slots=True)
class SweepCost:
    """Epsilons at one delta, for one unit that takes part in every round of every trial.

    Attributes:
        chosen: of the chosen configuration's run alone, without the selection; None if none was chosen.
        with_sweep: of all trials of this sweep, whose results are shown, and of that run after them.
        best_of_random: of the best of a secret random number of such runs, with the same mean number. This sweep shows
            all of its trials, so that this cost does not apply to it. None with a single trial.
    """

    delta: float
    trials: int
    chosen: float | None
    with_sweep: float
    best_of_random: float | None = None


def sweep_cost(plans: Sequence[TrialPlan], chosen: Settings | None) -> SweepCost | None:
    """The cost of a sweep, or None without privacy.

    A trial that was stopped early counts in full, because the time of its end depended on the data.

    Raises:
        ConfigError: see :func:`fedvit.privacy.epsilon.epsilon_pld`.
    """
    if not all(plan.settings.simulation.private for plan in plans):
        return None
    delta, everything = plans[0].settings.privacy.target_delta, Counter[Event]()
    for plan in plans:
        everything.update(run_spend(plan.settings))
    if chosen is None:
        return SweepCost(delta, len(plans), None, epsilon_pld(everything, delta))
    own = run_spend(chosen)
    everything.update(own)
    random = selection_cost(own, mean_trials=len(plans), delta=delta).select_best if len(plans) > 1 else None
    return SweepCost(delta, len(plans), epsilon_pld(own, delta), epsilon_pld(everything, delta), random)


def cost_sentences(cost: SweepCost | None, unit: str) -> list[str]:
    """The cost in sentences for the report."""
    if cost is None:
        return ["Trials were not private, so their results may reveal anything about the data."]
    if cost.chosen is None:
        total = f"All {cost.trials} trials, which this report shows, spend at most ε = {cost.with_sweep:.3f} together"
        return [f"{total} at δ = {cost.delta:g} on one {unit}."]
    sentences = [
        f"The chosen run alone spends at most ε = {cost.chosen:.3f} at δ = {cost.delta:g} on one {unit}. That it was "
        f"chosen on the same data is not in this number, and no ledger of a real run knows of the sweep.",
        f"All {cost.trials} trials, which this report shows, and the chosen run after them spend at most "
        f"ε = {cost.with_sweep:.3f} together. That is what holds for the data that the sweep was run on; a trial that "
        "was stopped early counts as a whole one.",
    ]
    if cost.best_of_random is not None:
        sentences.append(
            f"The best of a random number of such runs, {cost.trials} on average, would spend "
            f"ε = {cost.best_of_random:.3f} (Papernot and Steinke 2022), if the number is secret and nobody sees the "
            "others: see fedvit privacy selection-cost. A grid that is shown has no such discount."
        )
    sentences.append("On public or synthetic data a sweep costs nothing; only the chosen run is charged then.")
    return sentences

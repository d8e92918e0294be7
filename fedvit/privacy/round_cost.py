"""What one round costs a unit under given settings, as an event; and the noise that makes a run fit its budget."""

from __future__ import annotations

from fedvit.config import PrivacyConfig, Settings
from fedvit.ports import Charge
from fedvit.privacy.adaptive_clip import AdaptiveClip
from fedvit.privacy.epsilon import calibrate_noise_multiplier, check_delta
from fedvit.privacy.events import (
    BandedGaussian,
    Composed,
    Event,
    Gaussian,
    PoissonGaussian,
    Repeated,
    SampledTogether,
    event_from_json,
    event_to_json,
)


def round_event(settings: Settings, noise_multiplier: float) -> Event:
    """What one round does to the data of a client that may take part in it.

    Args:
        settings: say unit, sampling and mechanism.
        noise_multiplier: of the whole round: what sum and count have together, where norms are counted.

    Raises:
        ConfigError: see :meth:`fedvit.privacy.adaptive_clip.AdaptiveClip.sum_noise_multiplier`.
    """
    privacy, cohort = settings.privacy, settings.training.cohort
    if privacy.privacy_unit == "record":
        step = PoissonGaussian(noise_multiplier, privacy.sampling_prob)
        return step if settings.training.local_steps == 1 else Repeated(step, settings.training.local_steps)
    if privacy.bands is not None:
        return BandedGaussian(noise_multiplier, privacy.bands, cohort.min_separation)
    clip = adaptive_clip(privacy)
    if clip is None:
        if cohort.sampling_prob is None:
            return Gaussian(noise_multiplier)
        return PoissonGaussian(noise_multiplier, cohort.sampling_prob)
    parts = Gaussian(clip.sum_noise_multiplier(noise_multiplier)), Gaussian(clip.count_noise_multiplier)
    return Composed(parts) if cohort.sampling_prob is None else SampledTogether(cohort.sampling_prob, parts)


def adaptive_clip(privacy: PrivacyConfig) -> AdaptiveClip | None:
    """The clipping norm's rule, where it has one."""
    config = privacy.adaptive_clip
    if config is None:
        return None
    return AdaptiveClip(config.target_quantile, config.learning_rate, config.count_noise_multiplier)


def round_noise_multiplier(settings: Settings) -> float:
    """The noise multiplier of a round: as set, or the smallest with which a whole run stays within the budget.

    Raises:
        ConfigError: none does.
    """
    privacy, training = settings.privacy, settings.training
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    sampling_prob, steps = privacy.sampling_prob, training.local_steps
    if privacy.privacy_unit == "client":
        sampling_prob = training.cohort.sampling_prob or 1.0
        steps = 1
    return calibrate_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        target_delta=privacy.target_delta,
        sampling_prob=sampling_prob,
        steps=_rounds_of_one(settings) * steps,
        besides=histogram_spend(settings),
    )


def histogram_spend(settings: Settings) -> dict[Event, int]:
    """What the histograms of a whole run do at most to the data of one unit; see :mod:`fedvit.wire.histograms`."""
    every = settings.histograms.every_rounds
    if every is None or settings.workload.clients_class is not None or settings.training.cohort.selection == "poisson":
        return {}
    return {
        Gaussian(settings.histograms.noise_multiplier): min(
            -(-settings.training.rounds // every), _rounds_of_one(settings)
        )
    }


def histogram_is_due(settings: Settings, round_index: int) -> bool:
    """Whether a round asks for histograms. It does not of a secret sample: who answers would tell who was drawn."""
    every = settings.histograms.every_rounds
    return every is not None and bool(histogram_spend(settings)) and (round_index - 1) % every == 0


def run_spend(settings: Settings) -> dict[Event, int]:
    """What a whole run does at most to the data of one unit.

    Raises:
        ConfigError: see :func:`round_noise_multiplier` and :func:`round_event`.
    """
    rounds = {round_event(settings, round_noise_multiplier(settings)): _rounds_of_one(settings)}
    return rounds | histogram_spend(settings)


def _rounds_of_one(settings: Settings) -> int:
    """In how many rounds of a run one client may be charged."""
    rounds, cap = settings.training.rounds, settings.training.cohort.max_participations
    return rounds if cap is None else min(rounds, cap)


def check_units(settings: Settings, clients: int, num_examples: int) -> None:
    """Whether delta promises anything to each unit of this fleet: its records, or its clients.

    Raises:
        ConfigError: ``target_delta`` is larger than 1/n; n is named.
    """
    units = num_examples if settings.privacy.privacy_unit == "record" else clients
    if units:
        check_delta(settings.privacy.target_delta, units)


def charge_of(event: Event, *, run_id: str, round_index: int, unit_id: str, output_id: str, unit: str) -> Charge:
    """A line of the ledger that says ``event`` of a unit, with what history shows of it."""
    step = event.event if isinstance(event, Repeated) else event
    steps = event.count if isinstance(event, Repeated) else 1
    plain = unit == "record" and isinstance(step, PoissonGaussian)
    return Charge(
        run_id=run_id,
        round_index=round_index,
        unit_id=unit_id,
        output_id=output_id,
        noise_multiplier=_noise_multiplier(step),
        sampling_prob=step.sampling_prob if isinstance(step, PoissonGaussian | SampledTogether) else 1.0,
        steps=steps,
        privacy_unit=unit,
        # As it was always written, where nothing more is to be said.
        event=None if plain else event_to_json(event),
    )


def spend_of(charge: Charge) -> tuple[Event, int]:
    """What a line of the ledger says was done, and how often.

    Raises:
        StateError: its event is of no known kind; its name is given.
    """
    if charge.event is None:
        return PoissonGaussian(charge.noise_multiplier, charge.sampling_prob), charge.steps
    return event_from_json(charge.event), 1


def _noise_multiplier(event: Event) -> float:
    """Of the whole event: what one Gaussian mechanism that costs as much would have."""
    match event:
        case Composed(parts) | SampledTogether(_, parts):
            return float(sum(_noise_multiplier(part) ** -2 for part in parts) ** -0.5)
        case Repeated(inner, count):
            return float(_noise_multiplier(inner) / count**0.5)
    return event.noise_multiplier

"""Privacy cost of a round under given settings, as an event, and the noise that keeps a run within its budget."""

from __future__ import annotations

from fedvit.config import Settings
from fedvit.ports import Charge
from fedvit.privacy.adaptive_clip import sum_noise_multiplier
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
    joint_noise_multiplier,
)


def round_event(settings: Settings, noise_multiplier: float) -> Event:
    """Event of one round for a client that may take part in it.

    Args:
        settings: determine unit, sampling and mechanism.
        noise_multiplier: of the whole round; with adaptive clipping, of sum and count together.

    Raises:
        ConfigError: see :func:`fedvit.privacy.adaptive_clip.sum_noise_multiplier`.
    """
    privacy, cohort = settings.privacy, settings.training.cohort
    if privacy.privacy_unit == "record":
        step = PoissonGaussian(noise_multiplier, privacy.sampling_prob)
        return step if settings.training.local_steps == 1 else Repeated(step, settings.training.local_steps)
    if privacy.bands is not None:
        return BandedGaussian(noise_multiplier, privacy.bands, cohort.min_separation)
    if (clip := privacy.adaptive_clip) is None:
        if cohort.sampling_prob is None:
            return Gaussian(noise_multiplier)
        return PoissonGaussian(noise_multiplier, cohort.sampling_prob)
    parts = Gaussian(sum_noise_multiplier(clip, noise_multiplier)), Gaussian(clip.count_noise_multiplier)
    return Composed(parts) if cohort.sampling_prob is None else SampledTogether(cohort.sampling_prob, parts)


def round_noise_multiplier(settings: Settings) -> float:
    """Noise multiplier of a round: as set, or the smallest that keeps a whole run within the budget.

    Raises:
        ConfigError: none is large enough.
    """
    privacy, training = settings.privacy, settings.training
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    sampling_prob, steps = privacy.sampling_prob, training.local_steps
    if privacy.privacy_unit == "client":
        sampling_prob, steps = training.cohort.sampling_prob or 1.0, 1
    return calibrate_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        target_delta=privacy.target_delta,
        sampling_prob=sampling_prob,
        steps=_rounds_of_one(settings) * steps,
        besides=histogram_spend(settings),
    )


def histogram_spend(settings: Settings) -> dict[Event, int]:
    """Most that the histograms of a whole run cost one unit; see :mod:`fedvit.wire.histograms`."""
    every = settings.histograms.every_rounds
    if every is None or settings.workload.clients_class is not None or settings.training.cohort.selection == "poisson":
        return {}
    times = min(-(-settings.training.rounds // every), _rounds_of_one(settings))
    return {Gaussian(settings.histograms.noise_multiplier): times}


def histogram_is_due(settings: Settings, round_index: int) -> bool:
    """Whether a round collects histograms. A Poisson cohort sends none: its answers would reveal the secret sample."""
    every = settings.histograms.every_rounds
    return every is not None and bool(histogram_spend(settings)) and (round_index - 1) % every == 0


def run_spend(settings: Settings) -> dict[Event, int]:
    """Most that a whole run costs one unit; see :func:`round_noise_multiplier` and :func:`round_event`."""
    rounds = {round_event(settings, round_noise_multiplier(settings)): _rounds_of_one(settings)}
    return rounds | histogram_spend(settings)


def _rounds_of_one(settings: Settings) -> int:
    """Most rounds of a run in which one client is charged."""
    return min(settings.training.rounds, settings.training.cohort.max_participations or settings.training.rounds)


def check_units(settings: Settings, clients: int, num_examples: int) -> None:
    """Check that delta protects each unit of this fleet, its records or its clients.

    Raises:
        ConfigError: ``target_delta`` is larger than 1/n; n is named.
    """
    units = num_examples if settings.privacy.privacy_unit == "record" else clients
    if units:
        check_delta(settings.privacy.target_delta, units)


def charge_of(event: Event, *, run_id: str, round_index: int, unit_id: str, output_id: str, unit: str) -> Charge:
    """Ledger entry for an event of one unit, with the parameters that the history shows."""
    step = event.event if isinstance(event, Repeated) else event
    steps = event.count if isinstance(event, Repeated) else 1
    plain = unit == "record" and isinstance(step, PoissonGaussian)
    return Charge(
        run_id=run_id,
        round_index=round_index,
        unit_id=unit_id,
        output_id=output_id,
        noise_multiplier=_noise_multiplier(step),
        sampling_prob=getattr(step, "sampling_prob", 1.0),
        steps=steps,
        privacy_unit=unit,
        # A plain charge needs no event and keeps its bytes.
        event=None if plain else event_to_json(event),
    )


def spend_of(charge: Charge) -> tuple[Event, int]:
    """Event of a ledger entry, and how often it happened; see :func:`fedvit.privacy.events.event_from_json`."""
    if charge.event is None:
        return PoissonGaussian(charge.noise_multiplier, charge.sampling_prob), charge.steps
    return event_from_json(charge.event), 1


def _noise_multiplier(event: Event) -> float:
    """Noise multiplier of the one Gaussian mechanism that costs as much as the event."""
    match event:
        case Composed(parts) | SampledTogether(_, parts):
            return joint_noise_multiplier(_noise_multiplier(part) for part in parts)
        case Repeated(inner, count):
            return float(_noise_multiplier(inner) / count**0.5)
    return event.noise_multiplier

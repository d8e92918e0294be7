"""Where settings add noise, whom that trusts, and the parameters that follow for secure aggregation."""

from __future__ import annotations

import math
from typing import Any

from fedvit.config import Settings
from fedvit.privacy.mechanism import sensitivity
from fedvit.privacy.round_cost import round_noise_multiplier
from fedvit.secagg.parameters import parameters_for
from fedvit.secagg.task_plan import plan_of
from fedvit.types import TrainTask

_TRUST = {
    "client": "nobody",
    "distributed": "the other clients of a sum: as many as honest_survivors add their noise and do not collude",
    "server": "the aggregator, which gets updates without noise",
}


def noise_outlook(settings: Settings, *, clients: int, images: int, numbers: int) -> dict[str, Any]:
    """The place of the noise and what follows from it, by name, as JSON types.

    ``noise_over_central`` is the deviation of the noise on a sum without dropouts, over what one trusted party would
    add; of equal weights where each client adds all of it.

    Args:
        clients: number of clients in a cohort.
        images: number of training images that they have together.
        numbers: number of trained parameters.

    Raises:
        ConfigError: distributed noise is not possible with these settings.
        SecureAggregationError: there are too few clients for it.
    """
    privacy, secure = settings.privacy, settings.secure_aggregation
    place, noise_multiplier = privacy.noise_place, round_noise_multiplier(settings)
    facts = {
        "privacy_unit": privacy.privacy_unit,
        "noise_at": place,
        "trusted": _TRUST[place],
        "clients": clients,
        "noise_multiplier": noise_multiplier,
    }
    if place != "distributed":
        return facts | {"noise_over_central": math.sqrt(clients) if place == "client" else 1.0}
    task = TrainTask(
        run_id="",
        round_index=1,
        base_digest="",
        data_digest="",
        noise_multiplier=noise_multiplier,
        sampling_prob=privacy.sampling_prob,
        l2_clip_norm=privacy.l2_clip_norm,
        local_steps=settings.training.local_steps,
        learning_rate=settings.training.learning_rate,
        privacy_unit=privacy.privacy_unit,
        noise_at=place,
        participants=clients,
        sum_weight=float(images),
    )
    plan = plan_of(task, settings, numbers)
    parameters = parameters_for(
        "0" * 64,
        [f"client-{number:05}" for number in range(clients)],
        min_survivors=secure.survivors(clients),
        max_colluding=secure.max_colluding,
        dropout_rate=secure.dropout_rate,
        bits=plan.bits,
        length=plan.padded,
    )
    central = noise_multiplier * sensitivity(task)
    return facts | {
        "noise_over_central": math.sqrt(plan.variance(clients)) / central,
        "min_survivors": parameters.min_survivors,
        "honest_survivors": plan.honest,
        "neighbours": parameters.neighbours,
        "threshold": parameters.threshold,
        "ring_bits": plan.bits,
        "ring_bytes": math.ceil(plan.bits * plan.padded / 8),
        "float32_bytes": 4 * numbers,
    }

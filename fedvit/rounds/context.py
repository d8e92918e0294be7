"""Shared context of the training loop, and the starting point and the task of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedvit.aggregation.rule import Rule, State
from fedvit.config import Settings
from fedvit.ports import AccountantPort, ClockPort, FleetPort, ServerModelPort
from fedvit.store.store import Store
from fedvit.types import TrainTask, Weights, default_noise_place
from fedvit.wire.tensors import weights_digest

if TYPE_CHECKING:
    from fedvit.rounds.protection import Protection

_Array = TypeVar("_Array", bound="np.ndarray[Any, Any]")


@dataclass(frozen=True, slots=True)
class RoundContext:
    """The settings, the store and the ports of a training loop, and the protection that the settings ask for.

    ``simulated`` clients may leave the masks of secure aggregation out.
    """

    settings: Settings
    store: Store
    accountant: AccountantPort
    fleet: FleetPort
    model: ServerModelPort
    clock: ClockPort
    protection: Protection
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class RoundBase:
    """What the next round starts from.

    ``sent`` holds the weights and the rule's broadcast state; ``sent_digest`` identifies what clients release. All
    arrays are read-only: a rule that changed them in place would change what the round is compared with.
    """

    weights: Weights
    digest: str
    rule_state: State
    sent: Weights
    sent_digest: str

    @classmethod
    def of(cls, rule: Rule, weights: Weights, digest: str, rule_state: State) -> RoundBase:
        """The starting point with these weights, whose digest is known."""
        weights, rule_state = read_only(weights), read_only(rule_state)
        broadcast = read_only(rule.broadcast(weights, rule_state))
        sent = {**weights, **broadcast}
        return cls(weights, digest, rule_state, sent, weights_digest(sent) if broadcast else digest)


def read_only(arrays: Mapping[str, _Array]) -> dict[str, _Array]:
    """Read-only views of arrays."""
    views = {name: array.view() for name, array in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


def train_task(
    settings: Settings,
    run_id: str,
    round_index: int,
    *,
    base_digest: str,
    data_digest: str,
    noise_multiplier: float,
    l2_clip_norm: float,
    context_digest: str,
) -> TrainTask:
    """The task of a round under these settings; ``context_digest`` is theirs, see :meth:`Settings.context_digest`."""
    training, privacy, place = settings.training, settings.privacy, settings.privacy.noise_place
    return TrainTask(
        run_id=run_id,
        round_index=round_index,
        base_digest=base_digest,
        data_digest=data_digest,
        noise_multiplier=noise_multiplier,
        sampling_prob=privacy.sampling_prob,
        l2_clip_norm=l2_clip_norm,
        local_steps=training.local_steps,
        learning_rate=training.learning_rate,
        privacy_unit=privacy.privacy_unit,
        context_digest=context_digest,
        noise_at="" if place == default_noise_place(privacy.privacy_unit) else place,
    )

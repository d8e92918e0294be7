"""Scope and findings of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedvit.config import ModelConfig, Settings
from fedvit.config.privacy import HistogramConfig
from fedvit.types import TrainTask

ALPHA = 1e-4
"""The probability, at most, with which a statistical statement is wrong."""
STANDSTILL = 1e-30
"""A learning rate at which weights do not change by a bit, so that each step starts from the same weights."""
OTHER_NORMS = (0.3, 3.0)
"""Clipping norms that are audited beside the configured one: at 1, a norm equals its square and its inverse."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check of one subject.

    Attributes:
        check: the name of the check.
        subject: what was checked.
        passed: whether the assumption of the accountant holds.
        detail: the observation.
        claimed_epsilon: the accountant's epsilon, in findings about epsilon.
        lower_bound: a lower bound on epsilon from the released values.
    """

    check: str
    subject: str
    passed: bool
    detail: str
    claimed_epsilon: float | None = None
    lower_bound: float | None = None

    @classmethod
    def of(cls, check: str, subject: str, faults: Sequence[str], detail: str) -> Finding:
        """A finding that passes if there are no faults; its detail is the first fault, or ``detail``."""
        return cls(check, subject, not faults, faults[0] if faults else detail)


@dataclass(frozen=True, slots=True)
class Scope:
    """The mechanism and the model that are audited.

    Attributes:
        quick: fewer models and modes, and released values drawn in batches.
    """

    noise_multiplier: float = 1.0
    sampling_prob: float = 0.5
    l2_clip_norm: float = 1.0
    target_delta: float = 1e-5
    histogram_noise_multiplier: float = HistogramConfig().noise_multiplier
    model: ModelConfig = field(default_factory=lambda: ModelConfig(pretrained=False))
    image_size: int = 32
    quick: bool = False

    @classmethod
    def of(cls, settings: Settings, *, quick: bool) -> Scope:
        """The scope of these settings. Pretrained weights are not fetched, because they do not matter for the checks.

        Raises:
            ConfigError: no noise keeps a run within the budget.
        """
        from fedvit.privacy.round_cost import round_noise_multiplier

        privacy = settings.privacy
        return cls(
            noise_multiplier=round_noise_multiplier(settings),
            sampling_prob=privacy.sampling_prob,
            l2_clip_norm=privacy.l2_clip_norm,
            target_delta=privacy.target_delta,
            histogram_noise_multiplier=settings.histograms.noise_multiplier,
            model=settings.model.model_copy(update={"pretrained": False, "checkpoint": None}),
            image_size=settings.data.image_size,
            quick=quick,
        )

    def at_norms(self) -> list[Scope]:
        """This scope, and the same with other clipping norms."""
        return [self, *(replace(self, l2_clip_norm=norm) for norm in OTHER_NORMS if norm != self.l2_clip_norm)]

    def train_task(
        self,
        round_index: int = 1,
        *,
        sampling_prob: float = 1.0,
        local_steps: int = 1,
        learning_rate: float = STANDSTILL,
    ) -> TrainTask:
        """A record-level task with this scope's noise and clipping norm."""
        mechanism = self.noise_multiplier, sampling_prob, self.l2_clip_norm
        return TrainTask("audit", round_index, "base", "data", *mechanism, local_steps, learning_rate)

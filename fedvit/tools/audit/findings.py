"""What an audit looks at and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedvit.config import ModelConfig, Settings

ALPHA = 1e-4
"""How often, at most, a statement about chance may be wrong."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: which part of the suite.
        subject: what was looked at.
        passed: whether it is as the accountant assumes.
        detail: what was seen.
        claimed_epsilon: what the accountant says, where the finding is about that.
        lower_bound: on epsilon, by what was released.
    """

    check: str
    subject: str
    passed: bool
    detail: str
    claimed_epsilon: float | None = None
    lower_bound: float | None = None


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
    model: ModelConfig = field(default_factory=lambda: ModelConfig(pretrained=False))
    image_size: int = 32
    quick: bool = False

    @classmethod
    def of(cls, settings: Settings, *, quick: bool) -> Scope:
        """What these settings would train with. The weights do not matter to what is checked: none are fetched.

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
            model=settings.model.model_copy(update={"pretrained": False, "checkpoint": None}),
            image_size=settings.data.image_size,
            quick=quick,
        )

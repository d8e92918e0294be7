"""Settings of differential privacy and of private data-quality histograms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedvit.config.base import LEAST_NOISE_MULTIPLIER, Factor, PositiveFloat, PositiveInt, Probability, Section
from fedvit.types import MAX_FACTOR


class AdaptiveClipConfig(Section):
    """A clipping norm that follows a quantile of the updates' norms (Andrew et al. 2021, arXiv:1905.03871)."""

    target_quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of updates that stay below the clipping norm."
    )
    learning_rate: PositiveFloat = Field(0.2, description="Step of the norm's logarithm in each round.")
    count_noise_multiplier: PositiveFloat = Field(
        10.0, description="Noise multiplier of the count of unclipped updates, which is charged beside their sum."
    )


class PrivacyConfig(Section):
    """What is protected, how well, and by which noise."""

    privacy_unit: Literal["record", "client"] = Field(
        "record",
        description="'record': DP-SGD in each client, every example's gradient clipped. 'client': a client's whole "
        "update is clipped, and the aggregator adds noise to the sum.",
    )
    target_epsilon: PositiveFloat = Field(8.0, description="Budget: most epsilon that all rounds together may spend.")
    target_delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="Delta at which epsilon is stated.")
    noise_multiplier: Annotated[float, Field(ge=LEAST_NOISE_MULTIPLIER, le=MAX_FACTOR)] | None = Field(
        None,
        description="Standard deviation of the noise over the clipping norm; null calibrates it so that all rounds "
        "together spend at most target_epsilon.",
    )
    sampling_prob: Probability = Field(
        0.5, description="Probability that a record takes part in a local step (Poisson sampling)."
    )
    l2_clip_norm: Factor = Field(
        1.0, description="L2 norm to which a gradient, or with privacy_unit 'client' a whole update, is clipped."
    )
    noise: Literal["independent", "banded"] = Field(
        "independent",
        description="With privacy_unit 'client': independent noise, or the noise of a banded matrix mechanism, which "
        "later rounds partly cancel.",
    )
    bands: PositiveInt | None = Field(
        None, description="Bands of the matrix mechanism; at most training.cohort.min_separation."
    )
    adaptive_clip: AdaptiveClipConfig | None = Field(
        None, description="Adaptation of the clipping norm, with privacy_unit 'client'; null keeps it fixed."
    )
    require_second_approver: bool = Field(
        False, description="A budget reset comes into force only when a second admin has approved it."
    )

    @model_validator(mode="after")
    def _client_level_only(self) -> PrivacyConfig:
        if (self.noise == "banded") != (self.bands is not None):
            raise ValueError("noise 'banded' and bands go together")
        if self.privacy_unit == "record" and (self.noise != "independent" or self.adaptive_clip):
            raise ValueError("noise 'banded' and adaptive_clip belong to privacy_unit 'client'")
        if self.noise == "banded" and self.adaptive_clip:
            raise ValueError("noise 'banded' needs one clipping norm for the whole run: leave adaptive_clip out")
        return self


class HistogramConfig(Section):
    """Private histograms of the clients' data, which show drift and bad data."""

    every_rounds: PositiveInt | None = Field(
        10,
        description="Rounds from one collection to the next, the first of them in the first round; null collects none. "
        "A client is left out where its budget would not bear the rest of the run as well.",
    )
    noise_multiplier: Annotated[float, Field(ge=1, le=MAX_FACTOR)] = Field(
        5.25, description="Standard deviation of the Gaussian noise over the sensitivity of all counts."
    )

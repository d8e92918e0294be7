"""Settings of differential privacy and of private data-quality histograms."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedvit.config.base import LEAST_NOISE_MULTIPLIER, Factor, PositiveFloat, PositiveInt, Probability, Section
from fedvit.types import MAX_FACTOR, default_noise_place

MAX_PARTICIPANTS = 10_000
"""Most clients in one secure sum."""


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
        "update is clipped.",
    )
    noise_at: Literal["client", "distributed", "server"] | None = Field(
        None,
        description="Where noise is added, and so whom a client trusts. 'client': each client adds all of it, and "
        "trusts nobody. 'server': the aggregator adds it once to the sum. It is trusted with updates without noise, "
        "and privacy holds against everybody else. 'distributed': each client adds a share, and secure aggregation "
        "shows the aggregator nothing but the sum; so many other clients are trusted as secure_aggregation says. Null "
        "is 'client' with privacy_unit 'record', and 'server' with 'client'.",
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
        if self.noise_place != "server" and (self.noise != "independent" or self.adaptive_clip):
            raise ValueError(f"noise 'banded' and adaptive_clip do not go with noise_at {self.noise_place!r}")
        return self

    @property
    def noise_place(self) -> str:
        """``noise_at``, or its default."""
        return self.noise_at or default_noise_place(self.privacy_unit)


class SecureAggregationConfig(Section):
    """Secure aggregation, with ``privacy.noise_at`` 'distributed'; see docs/explanation/secure-aggregation.md."""

    min_survivors: Annotated[int, Field(ge=2, le=MAX_PARTICIPANTS)] | None = Field(
        None,
        description="Fewest clients whose sum is revealed; a round with fewer ends without one. The noise is made for "
        "so many. Null is 70 % of the cohort, at least 2.",
    )
    max_colluding: Annotated[int, Field(ge=0, le=MAX_PARTICIPANTS)] = Field(
        0,
        description="Clients that may collude with the aggregator: their shares of the noise are not counted. Fewer "
        "than min_survivors.",
    )
    dropout_rate: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.3, description="Largest share of a cohort that is expected to drop out of a round."
    )
    bits: Annotated[int, Field(ge=8, le=32)] = Field(
        24, description="Widest ring, in bits a number. The width used follows from cohort and noise, and is shown."
    )
    masks: bool = Field(
        True,
        description="Mask the contributions. False is for simulations and sweeps: quantisation and noise stay, and the "
        "aggregator sees each contribution.",
    )
    phase_timeout_s: PositiveFloat = Field(
        60.0, description="Seconds after which a phase of the protocol ends; silent clients drop out of the session."
    )

    @model_validator(mode="after")
    def _some_survivors_are_honest(self) -> SecureAggregationConfig:
        if self.min_survivors is not None and self.max_colluding >= self.min_survivors:
            raise ValueError("max_colluding must be below min_survivors, or nobody's noise is counted")
        return self

    def survivors(self, participants: int) -> int:
        """Fewest of so many participants whose sum is revealed."""
        return max(2, math.ceil(0.7 * participants)) if self.min_survivors is None else self.min_survivors


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

"""Settings of rounds: cohorts, local training, update validation, aggregation."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedvit.config.base import Factor, PositiveFloat, PositiveInt, Probability, Section
from fedvit.types import MAX_ROUND, MAX_STEPS, Encoding


class CohortConfig(Section):
    """Which clients take part in a round."""

    selection: Literal["all", "uniform", "poisson"] = Field(
        "all",
        description="'all': every eligible client. 'uniform': size of them at random. 'poisson': each with probability "
        "sampling_prob, by a secret coin.",
    )
    size: PositiveInt | None = Field(None, description="Updates that a round wants; required by selection 'uniform'.")
    over_selection: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="Additional clients drawn by 'uniform', as a share of size: a synchronous round commits with the "
        "first size updates and cancels the others (Bonawitz et al. 2019, arXiv:1902.01046).",
    )
    sampling_prob: Probability | None = Field(
        None, description="Probability that a client takes part in a round; required by selection 'poisson'."
    )
    min_clients: PositiveInt = Field(1, description="Fewest clients with which a round begins.")
    client_selection: Literal["any", "validated_only"] = Field(
        "any", description="Eligible clients: any active one, or only those that passed validation."
    )
    max_participations: PositiveInt | None = Field(
        None, description="Most rounds of one run that a client takes part in."
    )
    min_separation: PositiveInt = Field(1, description="Fewest rounds from one participation of a client to its next.")

    @model_validator(mode="after")
    def _each_selection_has_what_it_needs(self) -> CohortConfig:
        if self.selection == "uniform" and self.size is None:
            raise ValueError("selection 'uniform' needs a size")
        if self.selection != "uniform" and self.over_selection:
            raise ValueError("over_selection belongs to selection 'uniform'")
        if (self.selection == "poisson") != (self.sampling_prob is not None):
            raise ValueError("selection 'poisson' and sampling_prob go together")
        if self.selection == "poisson" and (self.max_participations is not None or self.min_separation > 1):
            raise ValueError("selection 'poisson' leaves no room for max_participations or min_separation")
        return self

    @property
    def draw_size(self) -> int | None:
        """Number of clients that ``uniform`` draws, over-selection included; None without a size."""
        return None if self.size is None else math.ceil(self.size * (1 + self.over_selection) - 1e-9)


class StalenessConfig(Section):
    """Weight of an update that is s versions old (Xie et al. 2019, arXiv:1903.03934); a fresh update weighs 1."""

    weight: Literal["constant", "polynomial", "hinge"] = Field(
        "polynomial",
        description="'constant': 1. 'polynomial': (1 + s)^-exponent. 'hinge': 1 up to s = hinge_from, then "
        "1 / (1 + hinge_slope (s - hinge_from)).",
    )
    exponent: PositiveFloat = Field(0.5, description="Exponent of 'polynomial'; larger discounts stale updates more.")
    hinge_from: Annotated[int, Field(ge=0)] = Field(4, description="Staleness, in versions, up to which 'hinge' is 1.")
    hinge_slope: PositiveFloat = Field(10.0, description="Discount of 'hinge' for each version beyond hinge_from.")


class ValidationConfig(Section):
    """Validation of client updates before aggregation."""

    max_update_norm: PositiveFloat | None = Field(
        None,
        description="Largest L2 norm of one client's update, privacy noise included. With privacy_unit 'record' it may "
        "only lower the bound that follows from the local steps and their noise; null leaves that bound, or none.",
    )
    max_client_share: Probability = Field(
        0.1,
        description="Largest share of one client in the average of a round; in a cohort too small for that, two equal "
        "shares. It caps weights by examples, and shortens the step of a round in which few clients answered.",
    )
    max_head_gradient: Probability = Field(
        0.25,
        description="Largest mean gradient, as a share of privacy.l2_clip_norm, by which a single update may move the "
        "linear head, where noise alone would not move it as far; after the first round also at most twice what the "
        "fleet moves it a round. Single numbers of the head keep two deviations of the noise, or what the fleet's "
        "fastest number moves a round. The rest is clipped. Used with privacy_unit 'record'.",
    )
    quarantine_after_rejections: PositiveInt | None = Field(
        3, description="Rejected updates after which a client is quarantined; null leaves that to the operator."
    )
    max_update_bytes: PositiveInt = Field(64 * 2**20, description="Largest encoded update, in bytes.")


class CompressionConfig(Section):
    """Encoding of single updates: those of remote clients, and of all where the rule needs single updates."""

    encodings: tuple[Encoding, ...] = Field(
        (),
        description="Encodings in order of preference; the first that a client supports is used, else float32. See "
        "fedvit.wire.encoding.",
    )
    top_k_fraction: Probability = Field(0.05, description="Share of all values that 'top_k' transmits.")


class AggregationModeConfig(Section):
    """Synchronous or buffered asynchronous rounds; see :class:`fedvit.rounds.steering.AggregationSettings`."""

    mode: Literal["synchronous", "asynchronous"] = Field(
        "synchronous", description="A round waits for its whole cohort, or commits as soon as its buffer is full."
    )
    buffer_size: PositiveInt | None = Field(
        None, description="Updates that an asynchronous round commits with; null takes half of those that take part."
    )
    staleness_tolerance: Annotated[int, Field(ge=0)] = Field(
        5, description="Most versions by which an update may be stale; a staler one is rejected."
    )


class TrainingConfig(Section):
    """Rounds, local steps and aggregation."""

    rounds: Annotated[int, Field(ge=1, le=MAX_ROUND)] = Field(30, description="Rounds of a run.")
    evaluate_every_rounds: PositiveInt = Field(
        1,
        description="Rounds from one evaluation on held-out images to the next. Other versions have no loss and no "
        "accuracy; a version that may be released is always evaluated.",
    )
    local_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = Field(
        1, description="Optimizer steps of a client in one round."
    )
    learning_rate: Factor = Field(2.0, description="Learning rate of the local steps.")
    server_learning_rate: PositiveFloat = Field(1.0, description="Factor on the aggregated update.")
    body_learning_rate: PositiveFloat | None = Field(
        None,
        description="Further factor on the aggregated update of all parameters but the linear head. Null is 0.1 where "
        "single records are protected and all of a model is trained, and 1 otherwise. A small factor keeps privacy "
        "noise, and attacks that are hidden in it, out of the body.",
    )
    head_directions: PositiveInt | Literal["auto", "all"] = Field(
        "auto",
        description="Principal directions, of the head's inputs over the server's held-out images, in which the linear "
        "head learns; labels are not used. 'auto' is the number of classes, at least 8, where single records are "
        "protected, and 'all' otherwise, with model.hybrid.linear_path, or where images are fewer than 4 a direction.",
    )
    aggregation: str = Field("fedavg", description="Name of the aggregation rule, of this package or of a plug-in.")
    aggregation_options: dict[str, Any] = Field(default_factory=dict, description="Options of the aggregation rule.")
    staleness: StalenessConfig = Field(StalenessConfig(), description="Weights of stale updates.")
    validation: ValidationConfig = Field(ValidationConfig(), description="Validation of client updates.")
    compression: CompressionConfig = Field(CompressionConfig(), description="Encoding of client updates.")
    physical_batch_size: PositiveInt = Field(
        32, description="Examples differentiated at once. It bounds memory and does not change the result."
    )
    ranks: PositiveInt = Field(
        1,
        description="Processes that take a client's local steps. Above 1 every client is a silo, placed as section "
        "finetune says.",
    )
    round_timeout_s: PositiveFloat = Field(600.0, description="Seconds without any answer after which a round ends.")
    round_deadline_s: PositiveFloat | None = Field(
        None,
        description="Seconds after its start at which a round ends; null sets no deadline. It does not apply to "
        "Poisson cohorts, where an update that came late would change the sampling probability.",
    )
    initial_mode: AggregationModeConfig = Field(
        AggregationModeConfig(), description="Mode of a new state folder, until an operator sets one."
    )
    cohort: CohortConfig = Field(CohortConfig(), description="Selection of clients.")

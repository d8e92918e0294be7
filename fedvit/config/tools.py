"""Settings of fine-tuning, simulation, drills and sweeps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedvit.config.base import PositiveFloat, PositiveInt, Probability, Section
from fedvit.config.training import AggregationModeConfig


class FinetuneConfig(Section):
    """``fedvit finetune``: one model on a whole data set by record-level DP-SGD on several processes (Ray Train).

    Sampling, clipping and noise are those of section ``privacy``; ``training.physical_batch_size`` is that of a rank.
    """

    ranks: PositiveInt = Field(1, description="Processes of the job.")
    min_ranks: PositiveInt | None = Field(
        None,
        description="Fewest ranks with which the job starts, or continues after the loss of a node; null needs all.",
    )
    steps: PositiveInt = Field(60, description="Optimizer steps of the job.")
    checkpoint_every_steps: PositiveInt = Field(
        20, description="Steps from one checkpoint to the next, which are charged together in advance."
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="Optimizer.")
    learning_rate: PositiveFloat = Field(2.0, description="Learning rate.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Momentum of optimizer 'sgd'.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Floating-point type of forward and backward passes; noise is always float32."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Device of a rank; 'cuda' reserves a GPU for it.")
    cpus_per_rank: Annotated[float, Field(gt=0)] = Field(0.5, description="CPUs reserved in Ray for each rank.")
    threads_per_rank: PositiveInt = Field(1, description="Torch threads of each rank.")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="How often a job that lost ranks continues from its last checkpoint."
    )
    start_timeout_s: PositiveFloat = Field(60.0, description="Seconds that all ranks may take to start.")

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        if self.min_ranks is not None and self.min_ranks > self.ranks:
            raise ValueError(f"min_ranks ({self.min_ranks}) must not be above ranks ({self.ranks})")
        if self.optimizer == "adam" and self.momentum:
            raise ValueError("momentum belongs to optimizer 'sgd'")
        return self


class DelayConfig(Section):
    """Time of a simulated client from task to answer, in virtual seconds."""

    kind: Literal["log_normal", "constant"] = Field(
        "log_normal", description="'log_normal': median_s * exp(sigma z), z standard normal. 'constant': median_s."
    )
    median_s: PositiveFloat = Field(300.0, description="Median time, in virtual seconds.")
    sigma: Annotated[float, Field(ge=0, le=5)] = Field(1.2, description="Standard deviation of log time.")
    client_variance_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5,
        description="Share of the variance of log time that belongs to the client in all its tasks; the rest is drawn "
        "for each task.",
    )
    dropout_prob: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Probability that a task is never answered because its client disconnects."
    )
    dropout_detection_s: PositiveFloat = Field(
        150.0, description="Virtual seconds from a disconnection until the server notices it."
    )
    stop_on_cancel: bool = Field(
        False,
        description="A client whose task was cancelled stops at once. Otherwise it works to the end of that task, and "
        "its next one begins late.",
    )


FaultKind = Literal["sign_flip", "scale", "noise", "nan", "label_flip"]


class FaultConfig(Section):
    """A group of simulated clients with faulty or malicious updates."""

    share: Probability = Field(description="Share of the fleet in this group, drawn for each seed.")
    kinds: Annotated[tuple[FaultKind, ...], Field(min_length=1)] = Field(
        description="Faults, applied in this order. 'label_flip' trains class c as C - 1 - c. 'sign_flip' negates the "
        "update, 'scale' multiplies it by factor, 'noise' adds normal noise, 'nan' makes one value NaN."
    )
    factor: float = Field(10.0, description="Factor of 'scale'.")
    noise_stddev: PositiveFloat = Field(1.0, description="Standard deviation of 'noise'.")


class SimulationConfig(AggregationModeConfig):
    """What ``fedvit simulate`` adds to the settings of a run: simulated clients, faults and virtual time."""

    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of delays, faults, cohorts and batches.")
    private: bool = Field(
        True,
        description="Clip, add noise and charge the budget. If false, clients train by plain SGD; the report says so.",
    )
    evaluate_every_s: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Virtual seconds from one evaluation on held-out images to the next; 0 evaluates every version.",
    )
    target_accuracy: Probability | None = Field(None, description="Held-out accuracy at which the run ends.")
    max_hours: PositiveFloat | None = Field(None, description="Virtual hours after which the run ends.")
    delays: DelayConfig = Field(DelayConfig(), description="Times of the simulated clients.")
    faults: tuple[FaultConfig, ...] = Field((), description="Groups of faulty clients.")

    @model_validator(mode="after")
    def _faulty_groups_fit(self) -> SimulationConfig:
        if sum(fault.share for fault in self.faults) > 1:
            raise ValueError("the shares of faults add up to more than the whole fleet")
        return self


class DrillConfig(Section):
    """Faults that ``fedvit drill`` injects into a running system."""

    faults: tuple[FaultConfig, ...] = Field(
        (), description="Groups of faulty virtual clients; refused outside the state folder of a drill."
    )


class RangeConfig(Section):
    """A range to draw a parameter from: integers where both ends are integers."""

    low: int | float = Field(description="Lower end.")
    high: int | float = Field(description="Upper end.")
    log: bool = Field(False, description="Uniform in the logarithm, instead of in the value.")

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 where log is true")
        return self


class SweepConfig(Section):
    """What ``fedvit sweep`` tries; early stopping by successive halving."""

    parameters: dict[str, tuple[Any, ...] | RangeConfig] = Field(
        default_factory=dict,
        description="Settings to vary, by a short name or as section.key, each with a list of values or a range.",
    )
    trials: PositiveInt | None = Field(
        None, description="Configurations to draw; null tries every combination of the lists."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the drawn configurations.")
    seeds: PositiveInt = Field(1, description="Seeds of the simulation with which each configuration is run.")
    first_rung: PositiveInt | None = Field(
        None, description="Rounds after which trials are compared for the first time; null stops none early."
    )
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3,
        description="Rounds of each rung over those of the rung before. A trial continues while it is among the best "
        "1/reduction_factor of those that are at least as private.",
    )
    margin: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Standard errors by which a trial may miss that and continue."
    )
    window: PositiveInt = Field(3, description="Last versions over which the accuracy of a trial is averaged.")
    concurrent_trials: PositiveInt = Field(2, description="Trials that run at the same time.")
    cpus_per_trial: PositiveFloat = Field(1.0, description="CPUs that each trial reserves in Ray.")

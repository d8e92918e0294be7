"""Typed configuration: what can be set, within which bounds, what goes with what; fedvit.settings reads it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedvit.types import NEVER_AUTOMATIC, Encoding, RemediationAction, Variant

LEAST_NOISE_MULTIPLIER = 0.3
"""Less noise than this protects nothing worth the name, and the accountants have no reliable answer for it."""

Probability = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PartitionConfig(_Section):
    """How the training images are dealt out to virtual clients.

    ``dirichlet`` draws each class's shares from Dirichlet(alpha) (Hsu et al. 2019, arXiv:1909.06335); ``shard`` sorts
    by label and deals ``shards_per_client`` pieces (McMahan et al. 2017); ``natural`` deals whole units (GTSRB tracks).
    """

    scheme: Literal["iid", "dirichlet", "shard", "natural"] = "dirichlet"
    clients: PositiveInt = 30
    alpha: PositiveFloat = 1.0
    shards_per_client: PositiveInt = 2
    min_examples: PositiveInt = 8
    seed: int = 7


class DataConfig(_Section):
    """Where images come from. ``source`` is ``traffic-lights``, ``folder``, ``gtsrb``, or a torchvision dotted name."""

    source: str = "traffic-lights"
    path: Path | None = None
    image_size: Annotated[int, Field(ge=16, le=1024)] = 64
    options: dict[str, Any] = Field(default_factory=dict)
    partition: PartitionConfig = PartitionConfig()


class HybridConfig(_Section):
    """The small ViT on the frozen EfficientNet-Lite0 stem (``model.name: hybrid_lite0``)."""

    depth: PositiveInt = 2
    width: Annotated[int, Field(ge=8)] = 96
    heads: PositiveInt = 4
    mlp_ratio: PositiveFloat = 2.0
    bands: PositiveInt = 3
    layer_scale_init: PositiveFloat = 1e-3

    @model_validator(mode="after")
    def _heads_divide_width(self) -> HybridConfig:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class ModelConfig(_Section):
    """Which Vision Transformer, and what of it is trained: all, the head, biases and head, or LoRA adapters and head.

    ``name`` is ``hybrid_lite0`` or any timm ViT. ``checkpoint`` is a local safetensors or .pth file that replaces the
    download of pretrained weights.
    """

    name: str = "hybrid_lite0"
    pretrained: bool = True
    checkpoint: Path | None = None
    trainable: Literal["all", "head", "biases", "adapters"] = "all"
    adapter_rank: PositiveInt = 4
    seed: int = 0
    hybrid: HybridConfig = HybridConfig()


class CohortConfig(_Section):
    """Who takes part in a round.

    ``poisson`` tosses a secret coin for every eligible client, heads with ``sampling_prob``. ``max_participations`` in
    a run and ``min_separation`` in rounds between two of them hold for every client; the store's records decide.
    ``uniform`` draws ``over_selection`` times ``size`` more clients than the round wants (Bonawitz et al. 2019,
    arXiv:1902.01046): a synchronous round commits with the first ``size`` updates and gives the others up.
    """

    selection: Literal["all", "uniform", "poisson"] = "all"
    size: PositiveInt | None = None
    over_selection: Annotated[float, Field(ge=0, le=10)] = 0.0
    sampling_prob: Probability | None = None
    min_clients: PositiveInt = 1
    client_selection: Literal["any", "validated_only"] = "any"
    max_participations: PositiveInt | None = None
    min_separation: PositiveInt = 1

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
    def places(self) -> int | None:
        """How many ``uniform`` draws, those that a round wants and those beyond; None where there is no size."""
        return None if self.size is None else math.ceil(self.size * (1 + self.over_selection) - 1e-9)


class StalenessConfig(_Section):
    """What an update counts that is s versions old (Xie et al. 2019, arXiv:1903.03934); a fresh one always counts 1.

    ``constant``: 1. ``polynomial``: (1 + s)^-``exponent``. ``hinge``: 1 up to ``hinge_from``, then
    1 / (1 + ``hinge_slope`` (s - ``hinge_from``)).
    """

    weight: Literal["constant", "polynomial", "hinge"] = "polynomial"
    exponent: PositiveFloat = 0.5
    hinge_from: Annotated[int, Field(ge=0)] = 4
    hinge_slope: PositiveFloat = 10.0


class ValidationConfig(_Section):
    """What update validation lets in.

    ``max_update_norm`` bounds the L2 norm of one client's update, privacy noise included; left out, any finite one
    passes. A client comes into quarantine when ``quarantine_after`` of its updates were refused; null leaves that to
    the operator. One that is sent as bytes may have ``max_update_bytes`` of them.
    """

    max_update_norm: PositiveFloat | None = None
    quarantine_after: PositiveInt | None = 3
    max_update_bytes: PositiveInt = 64 * 2**20


class CompressionConfig(_Section):
    """The form in which one client's update travels: a remote client's, or any where the rule takes single updates.

    The first of ``encodings`` that a client knows is used, and float32 where it knows none; see
    :mod:`fedvit.wire.encoding`. ``top_k`` keeps ``top_k_fraction`` of all values.
    """

    encodings: tuple[Encoding, ...] = ()
    top_k_fraction: Probability = 0.05


class FirstModeConfig(_Section):
    """Whom rounds wait for: see :class:`fedvit.rounds.steering.AggregationSettings`."""

    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    buffer_size: PositiveInt | None = None
    staleness_tolerance: Annotated[int, Field(ge=0)] = 5


class TrainingConfig(_Section):
    """Rounds and the local step.

    ``aggregation`` is the name of a rule, one of ours or one that another package offers; its own settings are
    ``aggregation_options``. See docs/adding-a-rule.md. A version that is not evaluated has no loss and no accuracy;
    one that may be released always is. A round ends after ``round_timeout_s`` of silence; with ``round_deadline_s``
    also that long after it began, unless its cohort is a secret Poisson sample: there nobody may be late. With
    ``ranks`` above 1 every client is a silo: so many processes take its local steps, placed as ``finetune`` says.
    """

    rounds: PositiveInt = 30
    evaluate_every_rounds: PositiveInt = 1
    local_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 2.0
    server_learning_rate: PositiveFloat = 1.0
    aggregation: str = "fedavg"
    aggregation_options: dict[str, Any] = Field(default_factory=dict)
    staleness: StalenessConfig = StalenessConfig()
    validation: ValidationConfig = ValidationConfig()
    compression: CompressionConfig = CompressionConfig()
    physical_batch_size: PositiveInt = 32
    ranks: PositiveInt = 1
    round_timeout_s: PositiveFloat = 600.0
    round_deadline_s: PositiveFloat | None = None
    first_mode: FirstModeConfig = FirstModeConfig()
    cohort: CohortConfig = CohortConfig()


class WorkloadConfig(_Section):
    """A model and clients of your own in the place of a Vision Transformer on images.

    ``clients`` names a :class:`fedvit.clients.workload.VirtualClients` as ``package.module:Class``, which every proxy
    imports: name only what you would run. ``options`` are for that class.
    """

    clients: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class AdaptiveClipConfig(_Section):
    """A clipping norm that follows a quantile of the updates' norms (Andrew et al. 2021, arXiv:1905.03871).

    ``count_noise_multiplier`` is that of the count of unclipped updates, which is charged beside their sum.
    """

    target_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: PositiveFloat = 0.2
    count_noise_multiplier: PositiveFloat = 10.0


class PrivacyConfig(_Section):
    """What is protected, how well, and by which noise.

    ``privacy_unit: record`` is DP-SGD in each client: ``sampling_prob`` of its records a step, each gradient clipped to
    ``l2_clip_norm``. ``client`` clips a client's whole update to ``l2_clip_norm`` and adds noise once, at the
    aggregator: independent noise, or with ``noise: banded`` noise of which later rounds take back a part.
    ``noise_multiplier`` left out is calibrated so that all rounds together spend at most ``target_epsilon``. With
    ``second_approver`` a new budget comes into force only when another admin approves it.
    """

    privacy_unit: Literal["record", "client"] = "record"
    target_epsilon: PositiveFloat = 8.0
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise_multiplier: Annotated[float, Field(ge=LEAST_NOISE_MULTIPLIER)] | None = None
    sampling_prob: Probability = 0.5
    l2_clip_norm: PositiveFloat = 1.0
    noise: Literal["independent", "banded"] = "independent"
    bands: PositiveInt | None = None
    adaptive_clip: AdaptiveClipConfig | None = None
    second_approver: bool = False

    @model_validator(mode="after")
    def _client_level_only(self) -> PrivacyConfig:
        if (self.noise == "banded") != (self.bands is not None):
            raise ValueError("noise 'banded' and bands go together")
        if self.privacy_unit == "record" and (self.noise != "independent" or self.adaptive_clip):
            raise ValueError("noise 'banded' and adaptive_clip belong to privacy_unit 'client'")
        if self.noise == "banded" and self.adaptive_clip:
            raise ValueError("noise 'banded' needs one clipping norm for the whole run: leave adaptive_clip out")
        return self


class HistogramConfig(_Section):
    """What clients tell of their data as a whole, so that drift and bad data are seen without it; see docs/drift.md.

    In the first round of a run and every ``every_rounds`` from there on, each client of the cohort counts its records
    in histograms and adds Gaussian noise of ``noise_multiplier`` times the sensitivity, which is charged before; null
    asks nobody. A client whose budget would not bear the rest of the run beside it is not asked.
    """

    every_rounds: PositiveInt | None = 10
    noise_multiplier: Annotated[float, Field(ge=1)] = 5.25


class ReleaseConfig(_Section):
    """When a committed version is exported, signed and offered to replicas and vehicles.

    ``serve_variant`` is where a new state folder begins; from then on the state remembers what the fleet was switched
    to. A version is refused when its held-out accuracy is more than ``max_accuracy_drop`` below the current release's.
    A canary sends ``canary_images`` held-out images through candidate and current model, and wants the same answer to
    a share of ``min_canary_agreement``.
    """

    every_rounds: PositiveInt = 10
    variants: tuple[Variant, ...] = (Variant.STANDARD, Variant.EDGE_OPTIMIZED)
    serve_variant: Variant = Variant.STANDARD
    min_agreement: Probability = 0.995
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = 0.05
    canary_images: PositiveInt = 64
    min_canary_agreement: Probability = 0.9

    @model_validator(mode="after")
    def _served_variant_is_built(self) -> ReleaseConfig:
        if self.serve_variant not in self.variants:
            raise ValueError(f"serve_variant {self.serve_variant.value!r} must be one of variants")
        return self


class ServingConfig(_Section):
    """The HTTP side on Ray Serve."""

    host: str = "127.0.0.1"
    port: Port = 8000
    control_replicas: PositiveInt = 1
    inference_min_replicas: PositiveInt = 1
    inference_max_replicas: PositiveInt = 2
    poll_interval_s: PositiveFloat = 1.0


class EdgeConfig(_Section):
    """The edge processes started beside the system; a real vehicle runs ``fedvit-edge`` with the same options."""

    host: str = "127.0.0.1"
    ports: tuple[Port, ...] = (8081, 8082)
    poll_interval_s: PositiveFloat = 1.0

    @field_validator("ports")
    @classmethod
    def _ports_differ(cls, ports: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ports)) != len(ports):
            raise ValueError("the same port appears twice")
        return ports


class FleetConfig(_Section):
    """How vehicles show that they are there.

    One replica on two cores hears 10,000 vehicles once a minute, and not twice: see docs/benchmarks.md.
    A remote client or a depot is connected while its last sign of life is younger than ``heartbeat_timeout_s``.
    ``mailbox_url`` is where vehicles that cannot reach the API leave messages: a path or an fsspec URL, by default the
    folder ``mailbox`` in ``home``. Every ``look_every_s`` the fleet is counted and, if enabled, the mailbox emptied.
    A remote client that trains asks for its next task every ``task_interval_s``. With ``scrape_vehicles`` Prometheus
    also asks those that registered with the capability ``metrics``, a host:port: whoever registers chooses it.
    """

    heartbeat_interval_s: PositiveFloat = 60.0
    heartbeat_timeout_s: PositiveFloat = 150.0
    mailbox_url: str | None = None
    look_every_s: PositiveFloat = 5.0
    task_interval_s: PositiveFloat = 5.0
    scrape_vehicles: bool = False

    @model_validator(mode="after")
    def _timeout_spans_an_interval(self) -> FleetConfig:
        if self.heartbeat_timeout_s <= self.heartbeat_interval_s:
            raise ValueError("heartbeat_timeout_s must be above heartbeat_interval_s")
        return self


class IncidentsConfig(_Section):
    """The incident log. An alert that fires again within ``reopen_within_s`` of its incident's end reopens that one."""

    reopen_within_s: PositiveFloat = 3600.0


class RemediationConfig(_Section):
    """What the runbook does about an alert and the system may do by itself; see docs/incidents.md.

    Each action of ``allow`` runs at most once in ``cooldown_s``, all together ``max_actions_per_hour`` times an hour,
    and none may leave more than ``max_client_share`` of the active clients out.
    """

    allow: tuple[RemediationAction, ...] = ()
    cooldown_s: PositiveFloat = 900.0
    max_actions_per_hour: PositiveInt = 4
    max_client_share: Probability = 0.1

    @field_validator("allow", mode="before")
    @classmethod
    def _may_be_automatic(cls, given: Any) -> Any:
        for name in given if isinstance(given, list | tuple) else ():
            if name in NEVER_AUTOMATIC:
                raise ValueError(f"{name!r} is never automatic: only a person may decide that")
            if name not in list(RemediationAction):
                raise ValueError(f"{str(name)[:100]!r} is no action; there are {', '.join(RemediationAction)}")
        return given


class OidcConfig(_Section):
    """An OpenID Connect issuer whose JSON web tokens are accepted; scopes are words in ``scope_claim``."""

    issuer: str
    audience: str
    jwks_path: Path | None = None
    jwks_url: str | None = None
    algorithm: Literal["RS256", "PS256", "ES256", "EdDSA"] = "RS256"
    scope_claim: str = "scope"

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> OidcConfig:
        if (self.jwks_path is None) == (self.jwks_url is None):
            raise ValueError("give either jwks_path or jwks_url")
        if self.jwks_url is not None and not self.jwks_url.startswith("https://"):
            raise ValueError("jwks_url must begin with https://")
        return self


class AccessConfig(_Section):
    """Who may ask the control API, and how often.

    ``open_loopback`` is the development mode: whoever reaches the loopback port may do everything but reset the privacy
    budget and report a breach. Limits hold for each control replica.
    """

    mode: Literal["open_loopback", "tokens"] = "open_loopback"
    acknowledge_proxy: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    oidc: OidcConfig | None = None
    requests_per_s: PositiveFloat = 50.0
    burst: PositiveInt = 100
    max_failed_attempts: PositiveInt = 10
    failed_attempts_window_s: PositiveFloat = 60.0
    max_body_bytes: PositiveInt = 1_048_576
    max_json_depth: PositiveInt = 32
    request_timeout_s: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _certificate_and_key(self) -> AccessConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self


class RayConfig(_Section):
    """How actors are placed. CPUs are Ray's book-keeping; threads are what an actor really uses."""

    address: str | None = None
    proxies: PositiveInt = 2
    threads_per_proxy: PositiveInt = 1
    actor_cpus: Annotated[float, Field(ge=0)] = 0.1
    start_timeout_s: PositiveFloat = 180.0
    dashboard: bool = True

    def cluster_address(self) -> str | None:
        """The running cluster to join, by ``address`` or Ray's own ``RAY_ADDRESS``; None to start one here."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


class FinetuneConfig(_Section):
    """``fedvit finetune``: one model on a whole data set, record-level DP-SGD on ``ranks`` processes (Ray Train).

    What is drawn, clipped and noised is in ``privacy``; ``training.physical_batch_size`` is a rank's. Every
    ``checkpoint_every_steps`` are one release: charged before, kept after. With ``min_ranks`` a job has as many ranks
    as there is room for when it begins, and goes on with so few when a node is lost. Each is given ``cpus_per_rank``
    of Ray's CPUs, a GPU on ``device: cuda``, and computes with ``threads_per_rank``. A job that lost ranks goes on
    from its last checkpoint, ``max_failures`` times.
    """

    ranks: PositiveInt = 1
    min_ranks: PositiveInt | None = None
    steps: PositiveInt = 60
    checkpoint_every_steps: PositiveInt = 20
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: PositiveFloat = 2.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_rank: Annotated[float, Field(gt=0)] = 0.5
    threads_per_rank: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=0)] = 3
    start_timeout_s: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        if self.min_ranks is not None and self.min_ranks > self.ranks:
            raise ValueError(f"min_ranks ({self.min_ranks}) must not be above ranks ({self.ranks})")
        if self.optimizer == "adam" and self.momentum:
            raise ValueError("momentum belongs to optimizer 'sgd'")
        return self


class DelayConfig(_Section):
    """How long a simulated client takes from task to answer, in virtual seconds.

    ``log_normal``: ``median_s * exp(sigma z)``, z standard normal; ``client_share`` of its variance is the client's own
    from round to round, the rest is drawn anew for every task. ``constant``: ``median_s``. With ``dropout_prob`` a task
    is never answered: its client falls silent on the way, which the server notices ``dropout_noticed_s`` later. One
    that is given up does not know it and works on, so that its next task begins late; with ``given_up_stops`` it is
    free at once.
    """

    kind: Literal["log_normal", "constant"] = "log_normal"
    median_s: PositiveFloat = 300.0
    sigma: Annotated[float, Field(ge=0, le=5)] = 1.2
    client_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    dropout_prob: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dropout_noticed_s: PositiveFloat = 150.0
    given_up_stops: bool = False


FaultKind = Literal["sign_flip", "scale", "noise", "nan", "label_flip"]


class FaultConfig(_Section):
    """A group of simulated clients that err, or lie: ``share`` of the fleet, drawn anew for every seed.

    The ``kinds`` act one after another: ``label_flip`` learns class c as C - 1 - c; of the update, ``sign_flip`` turns
    the sign, ``scale`` multiplies by ``factor``, ``noise`` adds normals of standard deviation ``deviation``, and
    ``nan`` spoils one value.
    """

    share: Probability
    kinds: Annotated[tuple[FaultKind, ...], Field(min_length=1)]
    factor: float = 10.0
    deviation: PositiveFloat = 1.0


class SimulationConfig(_Section):
    """What ``fedvit simulate`` adds to the settings of a run: rounds, clients, time and trouble that are not real.

    ``mode``, ``buffer_size`` and ``staleness_tolerance`` are what an operator sets with ``fedvit aggregation mode``.
    ``seed`` draws delays, faults, cohorts and batches. Without ``private`` clients train by plain SGD, nothing is
    clipped, noised or charged, and the report says so. The held-out images are asked after every version, or once in
    ``evaluate_every_s`` virtual seconds. A run ends with its rounds, ``max_hours`` or at ``target_accuracy``.
    """

    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    buffer_size: PositiveInt | None = None
    staleness_tolerance: Annotated[int, Field(ge=0)] = 5
    seed: Annotated[int, Field(ge=0)] = 0
    private: bool = True
    evaluate_every_s: Annotated[float, Field(ge=0)] = 0.0
    target_accuracy: Probability | None = None
    max_hours: PositiveFloat | None = None
    delays: DelayConfig = DelayConfig()
    faults: tuple[FaultConfig, ...] = ()

    @model_validator(mode="after")
    def _faulty_groups_fit(self) -> SimulationConfig:
        if sum(fault.share for fault in self.faults) > 1:
            raise ValueError("the shares of faults add up to more than the whole fleet")
        return self


class RehearsalConfig(_Section):
    """What a drill breaks on purpose: virtual clients of the running system that lie. Refused anywhere else."""

    faults: tuple[FaultConfig, ...] = ()


class RangeConfig(_Section):
    """Numbers to draw from: uniform between ``low`` and ``high``, or their logarithms; whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 where log is true")
        return self


class SweepConfig(_Section):
    """What ``fedvit sweep`` tries out; see docs/sweeps.md.

    ``parameters`` names settings, by a short name or as ``section.key``, with a list of values or a range each.
    ``trials`` so many configurations are drawn with ``seed``; left out, every combination of the lists is tried, each
    with ``seeds`` seeds of the simulation. With ``first_rung`` trials are compared after so many rounds, and again
    after ``reduction_factor`` times as many: one goes on while it is among the best 1/``reduction_factor`` of those
    that are at least as private, or by less than ``margin`` standard errors outside. Its score is the mean accuracy of
    its last ``window`` versions.
    """

    parameters: dict[str, tuple[Any, ...] | RangeConfig] = Field(default_factory=dict)
    trials: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: PositiveInt = 1
    first_rung: PositiveInt | None = None
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    margin: Annotated[float, Field(ge=0)] = 1.0
    window: PositiveInt = 3
    concurrent_trials: PositiveInt = 2
    cpus_per_trial: PositiveFloat = 1.0


class Settings(_Section):
    """Everything that can be set, with a working default each: no file at all is the traffic-light demo."""

    home: Path = Path("var")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    workload: WorkloadConfig = WorkloadConfig()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    histograms: HistogramConfig = HistogramConfig()
    release: ReleaseConfig = ReleaseConfig()
    serving: ServingConfig = ServingConfig()
    access: AccessConfig = AccessConfig()
    edge: EdgeConfig = EdgeConfig()
    fleet: FleetConfig = FleetConfig()
    incidents: IncidentsConfig = IncidentsConfig()
    remediation: RemediationConfig = RemediationConfig()
    ray: RayConfig = RayConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    simulation: SimulationConfig = SimulationConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def _without_privacy_nothing_is_asked_of_it(self) -> Settings:
        if not self.simulation.private and self.privacy.privacy_unit != "record":
            raise ValueError(
                "simulation.private false needs privacy.privacy_unit 'record': else the aggregator clips and noises "
                "what is not to be private"
            )
        return self

    @model_validator(mode="after")
    def _ranks_protect_records(self) -> Settings:
        if self.training.ranks > 1 and (self.privacy.privacy_unit != "record" or self.workload.clients is not None):
            raise ValueError("training.ranks above 1 needs privacy.privacy_unit 'record' and no workload.clients")
        return self

    @model_validator(mode="after")
    def _cohort_fits_the_privacy_unit(self) -> Settings:
        cohort, privacy = self.training.cohort, self.privacy
        if privacy.privacy_unit == "client" and self.training.validation.max_update_norm is not None:
            raise ValueError(
                "training.validation.max_update_norm would tell of a client's update before it is protected: with "
                "privacy.privacy_unit 'client', privacy.l2_clip_norm bounds it"
            )
        if privacy.privacy_unit == "client" and self.training.compression.encodings:
            raise ValueError(
                "training.compression.encodings may lift an update above the norm that it was clipped to, which the "
                "noise is sized for: they do not go with privacy.privacy_unit 'client'"
            )
        if privacy.privacy_unit == "record":
            if cohort.selection == "poisson":
                raise ValueError("training.cohort.selection 'poisson' belongs to privacy.privacy_unit 'client'")
        elif cohort.selection != "poisson" and cohort.max_participations is None:
            raise ValueError(
                "privacy.privacy_unit 'client' needs training.cohort.selection 'poisson', which amplifies privacy, or "
                "training.cohort.max_participations, a cap on what one client can lose without"
            )
        if privacy.bands is not None and privacy.bands > cohort.min_separation:
            raise ValueError("privacy.bands must not be above training.cohort.min_separation")
        return self

    def training_identity(self) -> dict[str, Any]:
        """What makes two training runs the same run: model, training and privacy. JSON types only.

        What has no say in a run is not named: runs from before there was such a setting must go on.
        """
        found = self.model_dump(
            mode="json",
            include={"model", "training", "privacy", *(("workload",) if self.workload.clients else ())},
            # Who has to approve what, and when somebody is kept out, change nothing in a run.
            exclude={
                "privacy": {"second_approver"},
                "training": {
                    "validation": {"quarantine_after", "max_update_bytes"},
                    "evaluate_every_rounds": True,
                    "first_mode": True,
                },
            },
        )
        _drop_defaults(found["privacy"], PrivacyConfig, "noise", "bands", "adaptive_clip")
        omitted = ("aggregation_options", "staleness", "compression", "round_deadline_s", "ranks")
        _drop_defaults(found["training"], TrainingConfig, *omitted)
        _drop_defaults(found["training"]["validation"], ValidationConfig, "max_update_norm")
        if not found["training"]["validation"]:
            del found["training"]["validation"]
        newer = ("sampling_prob", "max_participations", "min_separation", "over_selection")
        _drop_defaults(found["training"]["cohort"], CohortConfig, *newer)
        return found

    def training_digest(self) -> str:
        """SHA-256 of :meth:`training_identity`, hex."""
        return hashlib.sha256(json.dumps(self.training_identity(), sort_keys=True).encode()).hexdigest()


def _drop_defaults(section: dict[str, Any], kind: type[_Section], *names: str) -> None:
    defaults = kind().model_dump(mode="json")
    for name in names:
        if section[name] == defaults[name]:
            del section[name]

"""The root of the settings: all sections, the rules between them, and what identifies a training run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fedvit.config.base import Section
from fedvit.config.model import DataConfig, ModelConfig, WorkloadConfig
from fedvit.config.operation import (
    AccessConfig,
    BackupConfig,
    EdgeConfig,
    FleetConfig,
    IncidentsConfig,
    RayConfig,
    ReleaseConfig,
    RemediationConfig,
    ServingConfig,
)
from fedvit.config.privacy import HistogramConfig, PrivacyConfig, SecureAggregationConfig
from fedvit.config.tools import DrillConfig, FinetuneConfig, SimulationConfig, SweepConfig
from fedvit.config.training import CohortConfig, TrainingConfig, ValidationConfig
from fedvit.types import default_noise_place

_NOISED_BODY = 0.1
_LEAST_DIRECTIONS = 8


class Settings(Section):
    """All settings. Each has a working default: without any, the program is the traffic-light demo."""

    home: Path = Field(Path("var"), description="State folder: database, blobs, keys and logs.")
    data: DataConfig = Field(DataConfig(), description="Data set.")
    model: ModelConfig = Field(ModelConfig(), description="Vision Transformer.")
    workload: WorkloadConfig = Field(WorkloadConfig(), description="Model and clients of your own.")
    training: TrainingConfig = Field(TrainingConfig(), description="Rounds and aggregation.")
    privacy: PrivacyConfig = Field(PrivacyConfig(), description="Differential privacy.")
    secure_aggregation: SecureAggregationConfig = Field(
        SecureAggregationConfig(), description="Secure aggregation, with privacy.noise_at 'distributed'."
    )
    histograms: HistogramConfig = Field(HistogramConfig(), description="Private data-quality histograms.")
    release: ReleaseConfig = Field(ReleaseConfig(), description="Model releases.")
    serving: ServingConfig = Field(ServingConfig(), description="HTTP API and inference.")
    access: AccessConfig = Field(AccessConfig(), description="Access to the API.")
    edge: EdgeConfig = Field(EdgeConfig(), description="Edge processes.")
    fleet: FleetConfig = Field(FleetConfig(), description="Vehicles.")
    backup: BackupConfig = Field(BackupConfig(), description="Backups.")
    incidents: IncidentsConfig = Field(IncidentsConfig(), description="Incident log.")
    remediation: RemediationConfig = Field(RemediationConfig(), description="Automatic runbook actions.")
    ray: RayConfig = Field(RayConfig(), description="Placement on Ray.")
    finetune: FinetuneConfig = Field(FinetuneConfig(), description="Multi-rank fine-tuning.")
    simulation: SimulationConfig = Field(SimulationConfig(), description="Simulation.")
    drill: DrillConfig = Field(DrillConfig(), description="Fault injection in drills.")
    sweep: SweepConfig = Field(SweepConfig(), description="Parameter sweeps.")

    @model_validator(mode="after")
    def _no_client_level_privacy_in_a_run_without_privacy(self) -> Settings:
        if not self.simulation.private and self.privacy.privacy_unit != "record":
            raise ValueError(
                "simulation.private false needs privacy.privacy_unit 'record': otherwise the aggregator "
                "clips and adds noise in a run that is not private"
            )
        if not self.simulation.private and self.privacy.noise_place != "client":
            raise ValueError("simulation.private false needs privacy.noise_at 'client': no noise is added at all")
        return self

    @model_validator(mode="after")
    def _ranks_protect_records(self) -> Settings:
        if self.training.ranks > 1 and (
            self.privacy.privacy_unit != "record" or self.workload.clients_class is not None
        ):
            raise ValueError("training.ranks above 1 needs privacy.privacy_unit 'record' and no workload.clients_class")
        return self

    @model_validator(mode="after")
    def _noise_is_where_it_can_be(self) -> Settings:
        training, privacy, place = self.training, self.privacy, self.privacy.noise_place
        named = f"privacy.noise_at {place!r}"
        if place == "client":
            if privacy.privacy_unit == "client" and training.cohort.selection == "poisson":
                raise ValueError(
                    f"{named} shows who takes part: training.cohort.selection 'poisson' does not go with it"
                )
            return self
        if privacy.privacy_unit == "record":
            if training.local_steps > 1:
                raise ValueError(f"{named} needs training.local_steps 1: one record may change all of several steps")
            if training.ranks > 1 or self.workload.clients_class is not None:
                raise ValueError(
                    f"{named} with privacy.privacy_unit 'record' needs training.ranks 1 and no workload.clients_class, "
                    "which add noise themselves"
                )
            if training.validation.max_update_norm is not None:
                raise ValueError(
                    f"training.validation.max_update_norm does not go with {named}: updates have no noise yet"
                )
            if training.compression.encodings:
                raise ValueError(
                    f"training.compression.encodings do not go with {named}: they may change an update by more than "
                    "the noise is made for"
                )
        return self

    @model_validator(mode="after")
    def _secure_aggregation_fits(self) -> Settings:
        if self.privacy.noise_place != "distributed":
            return self
        named, cohort = "privacy.noise_at 'distributed'", self.training.cohort
        if cohort.selection == "poisson":
            raise ValueError(
                f"training.cohort.selection 'poisson' does not go with {named}, which shows who takes part"
            )
        if cohort.over_selection:
            raise ValueError(f"training.cohort.over_selection does not go with {named}, whose sum holds all who answer")
        for key, mode in (("training.initial_mode", self.training.initial_mode), ("simulation", self.simulation)):
            if mode.mode == "asynchronous":
                raise ValueError(f"{key}.mode 'asynchronous' does not go with {named}: a sum is of one round")
        least, size = self.secure_aggregation.min_survivors, cohort.size
        if least is not None and cohort.selection == "uniform" and size is not None and size < least:
            raise ValueError("secure_aggregation.min_survivors must not be above training.cohort.size")
        return self

    @model_validator(mode="after")
    def _cohort_fits_the_privacy_unit(self) -> Settings:
        cohort, privacy = self.training.cohort, self.privacy
        if privacy.privacy_unit == "client" and self.training.validation.max_update_norm is not None:
            raise ValueError(
                "training.validation.max_update_norm would depend on a client's update before it is protected: with "
                "privacy.privacy_unit 'client', privacy.l2_clip_norm bounds it"
            )
        if privacy.privacy_unit == "client" and self.training.compression.encodings:
            raise ValueError(
                "training.compression.encodings may lift an update above the norm that it was clipped to, which "
                "determines the noise: leave them out with privacy.privacy_unit 'client'"
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

    @property
    def body_learning_rate(self) -> float:
        """The factor on the aggregated update of everything but the head: as set, or its default."""
        if self.training.body_learning_rate is not None:
            return self.training.body_learning_rate
        noised = self.privacy.privacy_unit == "record" and self.simulation.private
        return _NOISED_BODY if noised and self.model.trainable == "all" else 1.0

    def head_directions(self, classes: int) -> int | None:
        """In how many directions the head of so many classes learns: as set, or its default; None stands for all."""
        directions = self.training.head_directions
        if directions == "auto":
            noised = self.privacy.privacy_unit == "record" and self.simulation.private
            # What is whitened has no few directions that hold most of it.
            return max(_LEAST_DIRECTIONS, classes) if noised and not self.model.has_linear_path else None
        return None if directions == "all" else directions

    def training_identity(self) -> dict[str, Any]:
        """The settings that determine a training run: model, training and privacy, as JSON types.

        Settings without influence on the weights are left out, and newer ones at their default: a run that began
        before a setting existed must continue.
        """
        identity = self.model_dump(
            mode="json",
            include={
                *("model", "training", "privacy"),
                *(("workload",) if self.workload.clients_class else ()),
                *(("secure_aggregation",) if self.privacy.noise_place == "distributed" else ()),
            },
            exclude={
                "privacy": {"require_second_approver"},
                "secure_aggregation": {"phase_timeout_s"},
                "training": {
                    "validation": {"quarantine_after_rejections", "max_update_bytes"},
                    "evaluate_every_rounds": True,
                    "initial_mode": True,
                },
            },
        )
        training, hybrid = identity["training"], identity["model"]["hybrid"]
        if not hybrid["linear_path"]:
            del hybrid["linear_path"]
        _drop_defaults(identity["privacy"], PrivacyConfig, "noise", "bands", "adaptive_clip")
        if self.privacy.noise_place == default_noise_place(self.privacy.privacy_unit):
            del identity["privacy"]["noise_at"]
        _drop_defaults(
            training,
            TrainingConfig,
            "aggregation_options",
            "staleness",
            "compression",
            "round_deadline_s",
            "ranks",
            "body_learning_rate",
            "head_directions",
        )
        _drop_defaults(
            training["validation"], ValidationConfig, "max_update_norm", "max_client_share", "max_head_gradient"
        )
        if not training["validation"]:
            del training["validation"]
        participation = ("sampling_prob", "max_participations", "min_separation", "over_selection")
        _drop_defaults(training["cohort"], CohortConfig, *participation)
        return identity

    def training_digest(self) -> str:
        """SHA-256 of :meth:`training_identity`, hex."""
        return hashlib.sha256(json.dumps(self.training_identity(), sort_keys=True).encode()).hexdigest()

    def context_digest(self, classes: Sequence[str], frozen_digest: str) -> str:
        """SHA-256, hex, of all that determines a client's output beside its task and its data.

        Left out are the budget, which server and vehicle set for themselves, and the path of a checkpoint, whose
        content is in the frozen weights or in those that a round starts from.

        Args:
            classes: of the data set, in the order of the labels.
            frozen_digest: SHA-256, hex, of the weights that never travel.

        Raises:
            ValueError: a number in the options of the rule is not finite.
        """
        identity = self.training_identity()
        del identity["model"]["checkpoint"], identity["privacy"]["target_epsilon"], identity["privacy"]["target_delta"]
        facts = {
            "settings": identity,
            "image_size": self.data.image_size,
            "classes": list(classes),
            "frozen_digest": frozen_digest,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _drop_defaults(section: dict[str, Any], kind: type[Section], *names: str) -> None:
    defaults = kind().model_dump(mode="json")
    for name in names:
        if section[name] == defaults[name]:
            del section[name]

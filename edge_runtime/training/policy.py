"""Policy of a vehicle's owner: what a server may ask of the vehicle. It is signed with the owner's key.

The vehicle enforces it before it loads an image or builds a model. The epsilons are enforced by
:class:`edge_runtime.training.outputs.OutputLedger`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedvit.config import LEAST_NOISE_MULTIPLIER, Settings
from fedvit.errors import ConfigError, ForbiddenError, IntegrityError, UsageError
from fedvit.types import CLIENT_ID, DIGEST, MAX_EXAMPLES, MAX_FACTOR, MAX_STEPS, TrainTask
from fedvit.wire.histograms import HistogramRequest
from fedvit.wire.signatures import sign_document, verify_document

_MAX_CHARACTERS = 2**20
_KIND = {"_type": "fedvit-vehicle-policy", "format": 1}
"""Part of every signed policy, so that signatures of other content are not valid for one."""
Epsilon = Annotated[float, Field(gt=0, le=MAX_FACTOR)]


class Purpose(StrEnum):
    """The kinds of output that a vehicle computes on its images."""

    UPDATE = "update"
    HISTOGRAM = "histogram"


class _Part(BaseModel):
    """A frozen part of a policy; unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AllowedModel(_Part):
    """A model that may be trained."""

    name: str = Field(min_length=1, max_length=200, description="As in model.name.")
    frozen_digests: tuple[Annotated[str, Field(pattern=DIGEST)], ...] | None = Field(
        None, description="SHA-256 of the frozen weights, and so of the checkpoints, that are allowed; null allows any."
    )


class VehiclePolicy(_Part):
    """What a server may ask of a vehicle. Without a policy file the defaults apply."""

    models: tuple[AllowedModel, ...] = Field(
        (AllowedModel(name="hybrid_lite0", frozen_digests=None),), description="Models that may be trained."
    )
    purposes: tuple[Purpose, ...] = Field(tuple(Purpose), description="Outputs that may be computed.")
    min_noise_multiplier: float = Field(
        LEAST_NOISE_MULTIPLIER,
        ge=LEAST_NOISE_MULTIPLIER,
        le=MAX_FACTOR,
        description="Least noise multiplier of an output.",
    )
    max_epsilon: Epsilon = Field(8.0, description="Largest epsilon of all outputs together, at target_delta.")
    max_epsilon_per_day: Epsilon | None = Field(
        None, description="Largest epsilon of the outputs of any 24 hours; null sets no limit beside max_epsilon."
    )
    target_delta: float = Field(1e-5, gt=0, le=0.1, description="Delta at which epsilon is stated.")
    max_local_steps: int = Field(100, ge=1, le=MAX_STEPS, description="Most steps of an update.")
    max_sampling_prob: float = Field(1.0, gt=0, le=1, description="Largest sampling probability of an update.")
    noise_at: tuple[Literal["client", "distributed"], ...] = Field(
        ("client",),
        min_length=1,
        description="Where the noise of updates may be added: client, all of it by this vehicle; distributed, a share "
        "of it by each client under secure aggregation, so that one update alone has too little noise.",
    )
    min_honest_survivors: int = Field(
        2,
        ge=1,
        le=MAX_EXAMPLES,
        description="With distributed noise: fewest clients that must survive a round and not collude with the server.",
    )
    participants: dict[Annotated[str, Field(pattern=CLIENT_ID)], Annotated[str, Field(pattern=DIGEST)]] | None = Field(
        None,
        description="Public identity keys, hex, of the clients that may be in a session of secure aggregation with "
        "this vehicle, by client id; null accepts the first key that is seen of each.",
    )

    def check_update(self, task: TrainTask, settings: Settings, frozen_digest: str) -> None:
        """Check that the vehicle may compute this update.

        Args:
            settings: those that came with the task.
            frozen_digest: SHA-256, hex, of the weights that never travel.

        Raises:
            ForbiddenError: it may not.
        """
        if task.privacy_unit != "record" or task.noise_place == "server":
            raise ForbiddenError("This vehicle releases nothing without noise of its own.")
        if task.noise_place not in self.noise_at:
            raise _forbidden(f"noise at {task.noise_place!r}", f"noise at {', '.join(self.noise_at)}")
        self._check(Purpose.UPDATE, task.noise_multiplier)
        if task.local_steps > self.max_local_steps:
            raise _forbidden(f"{task.local_steps} local steps", f"at most {self.max_local_steps}")
        if task.sampling_prob > self.max_sampling_prob:
            raise _forbidden(f"a sampling probability of {task.sampling_prob}", f"at most {self.max_sampling_prob}")
        name = settings.model.name
        allowed = [model for model in self.models if model.name == name]
        if not allowed:
            names = ", ".join(model.name for model in self.models) or "no model"
            raise _forbidden(f"the model {name!r}", names)
        if not any(model.frozen_digests is None or frozen_digest in model.frozen_digests for model in allowed):
            raise _forbidden(f"the frozen weights {frozen_digest} of {name!r}", "those that it lists")

    def check_survivors(self, honest: int) -> None:
        """Check the number of honest survivors that distributed noise counts on; raises ForbiddenError."""
        if honest < self.min_honest_survivors:
            raise _forbidden(f"{honest} honest survivors", f"at least {self.min_honest_survivors}")

    def check_histogram(self, request: HistogramRequest) -> None:
        """Check that the vehicle may compute this histogram; raises ForbiddenError if it may not."""
        if request.privacy_unit != "record":
            raise ForbiddenError("This vehicle histograms records, and not without noise of its own.")
        self._check(Purpose.HISTOGRAM, request.noise_multiplier)

    def _check(self, purpose: Purpose, noise_multiplier: float) -> None:
        if purpose not in self.purposes:
            raise _forbidden(f"the purpose {purpose.value!r}", ", ".join(self.purposes) or "none")
        if not noise_multiplier >= self.min_noise_multiplier:
            raise _forbidden(f"a noise multiplier of {noise_multiplier}", f"at least {self.min_noise_multiplier}")


def sign_policy(policy: VehiclePolicy, key: Ed25519PrivateKey) -> str:
    """The text of a policy file, signed with the owner's key."""
    return sign_document({**_KIND, **policy.model_dump(mode="json")}, key)


def verify_policy(text: str, owner_keys: list[Ed25519PublicKey]) -> VehiclePolicy:
    """The policy in the text of a policy file, if one of these keys signed it.

    Raises:
        IntegrityError: the signature is not the owner's, or the signed content is no policy.
    """
    signed = verify_document(text, owner_keys, "vehicle policy", _MAX_CHARACTERS)
    if any(signed.get(name) != value for name, value in _KIND.items()):
        raise IntegrityError("What is signed is no vehicle policy.", cure="Sign one with `fedvit-edge policy sign`.")
    try:
        return VehiclePolicy.model_validate({name: value for name, value in signed.items() if name not in _KIND})
    except ValidationError as error:
        raise IntegrityError(f"In the vehicle policy, {_explained(error)}.") from None


def read_policy(path: Path, owner_keys: list[Ed25519PublicKey]) -> VehiclePolicy:
    """The policy in a policy file; see :func:`verify_policy`.

    Raises:
        UsageError: the file cannot be read.
    """
    return verify_policy(_text(path), owner_keys)


def read_draft(path: Path | None) -> VehiclePolicy:
    """The policy in a YAML file that is not signed; fields that it lacks, or all without a file, are the defaults.

    Raises:
        UsageError: the file cannot be read.
        ConfigError: a field is unknown or out of range; it is named.
    """
    if path is None:
        return VehiclePolicy()
    try:
        fields: Any = yaml.safe_load(_text(path)) or {}
        return VehiclePolicy.model_validate(fields)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except ValidationError as error:
        allowed = ", ".join(VehiclePolicy.model_fields)
        raise ConfigError(f"In {path}, {_explained(error)}.", cure=f"A policy has the fields {allowed}.") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The policy {path} cannot be read: {error}.") from None


def _explained(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in fault["loc"]) or "the policy"
    return f"{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _forbidden(what: str, allowed: str) -> ForbiddenError:
    message = f"The policy of this vehicle's owner does not allow {what}"
    return ForbiddenError(f"{message}.", cure=f"It allows {allowed}.")

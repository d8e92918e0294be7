"""What the store takes and gives beyond the domain's own nouns, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fedvit.types import ClientOutcome


@dataclass(frozen=True, slots=True)
class FleetInfo:
    """The fleet that a state folder belongs to. ``classes`` in the order of the model's outputs."""

    data_digest: str
    partition: Mapping[str, Any]
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoundCommit:
    """What a finished round leaves behind. Values that are not finite are stored as absent: JSON has no word for them.

    ``weights_digest`` and ``frozen_digest`` name blobs; ``outcomes`` has at most one entry a client of the cohort.
    """

    weights_digest: str
    frozen_digest: str
    epsilon: float
    loss: float | None
    accuracy: float | None
    metrics: Mapping[str, float]
    lineage: Mapping[str, Any]
    outcomes: tuple[ClientOutcome, ...]
    duration_s: float


@dataclass(frozen=True, slots=True)
class Release:
    """One step of what replicas and vehicles are told to run; a roll-back is a new step.

    ``artifacts`` maps a variant to the digest of its blob, ``envelopes`` a variant to its signed manifest, JSON text.
    ``serve_variant`` is what the fleet runs unless it is pinned; None in a state that knew no such choice.
    """

    sequence: int
    version: str
    artifacts: Mapping[str, str]
    envelopes: Mapping[str, str]
    at: datetime
    reason: str
    serve_variant: str | None = None


@dataclass(frozen=True, slots=True)
class Derivation:
    """A version that is made from another one without training. ``lineage`` is added to the origin's."""

    origin: str
    lineage: Mapping[str, Any]
    artifacts: Mapping[str, str]
    metrics: Mapping[str, float]

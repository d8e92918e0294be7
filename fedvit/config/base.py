"""Base class of all settings sections, and the bounded number types they share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedvit.types import MAX_FACTOR

LEAST_NOISE_MULTIPLIER = 0.3
"""Smallest noise multiplier accepted: below it the accountants have no reliable answer and protection is negligible."""

Probability = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(gt=0, le=MAX_FACTOR)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """A section of the settings: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

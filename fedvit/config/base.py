"""Base class of all settings sections, and the bounded number types they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedvit.atomic_write import is_unicode
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

    @field_validator("*")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        # Settings travel as JSON, and a name of other bytes is no JSON.
        if isinstance(value, str | Path) and not is_unicode(str(value)):
            raise ValueError("the name is not valid UTF-8; rename the file or folder")
        return value

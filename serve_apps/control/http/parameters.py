"""Query parameters that several routes take."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from fedvit.api.base import MAX_INTEGER

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=MAX_INTEGER)]
# SQLite's integers end there.
RowOffset = Annotated[int, Query(ge=0, le=2**63 - 1)]

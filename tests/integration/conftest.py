"""Integration tests drive the installed commands as a user does, each in a state folder and on ports of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import SMALL, Fedvit


@pytest.fixture
def fedvit(tmp_path: Path) -> Iterator[Fedvit]:
    """A small system; whatever a failed test left running is stopped."""
    system = Fedvit(tmp_path / "var", dict(SMALL))
    yield system
    system.call("down", configured=False)

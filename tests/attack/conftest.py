"""The table of attacks, written to docs/ when the attacks ran in full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedvit.atomic_write import write_atomically
from tests.attack.table import AttackTable

DOCS = Path(__file__).parents[2] / "docs"
FULL = os.environ.get("ATTACK") == "full"
"""Whether attacks run in full, as ``make attack`` asks, or in the short form of ``make test``."""


@pytest.fixture(scope="session")
def attack_table(request: pytest.FixtureRequest) -> Iterator[AttackTable]:
    """The table that every attack adds its result to."""
    table = AttackTable()
    yield table
    print(f"\n{table.page()}")
    if FULL and not request.session.testsfailed and not request.config.option.keyword:
        write_atomically(DOCS / "security.md", table.page())


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether the attacks run in full."""
    return FULL

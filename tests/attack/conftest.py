"""The table of attacks, written to docs/ when the attacks ran in full."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fedvit.types import utc_now
from tests.attack.table import AttackTable, page_of

FULL = os.environ.get("ATTACK") == "full"
"""Whether attacks run in full, as ``make attack`` asks, or in the short form of ``make test``."""


@pytest.fixture(scope="session")
def attack_table(request: pytest.FixtureRequest) -> Iterator[AttackTable]:
    """The table that every attack adds its result to. It is published if whole files ran in full and all passed."""
    table = AttackTable(day=utc_now().date().isoformat())
    yield table
    print(f"\n{page_of(table.rows)}")
    session, whole_files = request.session, not any("::" in argument for argument in request.config.args)
    if FULL and not session.testsfailed and not request.config.option.keyword and whole_files:
        table.publish({item.nodeid.split("::")[0] for item in session.items})


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether the attacks run in full."""
    return FULL

"""The drill starts one system for all its commands, and says at the end what became of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("drill", "effects")

from drill import Drill  # noqa: E402  # rewritten first, so that a failed check shows what it saw

REPORT: dict[str, str] = {}


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """The system as the operator finds it: up, training, with a first release and some traffic."""
    result = Drill(Path(tmp_path_factory.mktemp("drill")) / "checkout")
    try:
        result.start()
        yield result
    finally:
        result.stop()


@pytest.fixture(scope="session")
def report() -> dict[str, str]:
    """What became of each command."""
    return REPORT


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the list."""
    if REPORT:
        terminalreporter.section("the runbook, command by command")
        for command, fate in REPORT.items():
            terminalreporter.write_line(f"{fate:<40} {command}")

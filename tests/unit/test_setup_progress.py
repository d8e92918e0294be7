"""The progress that ``make setup`` shows: what pip names is counted, what it complains about is passed on."""

from __future__ import annotations

import runpy
import sys
from io import StringIO
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "pip_progress.py"
OUTPUT = """Collecting numpy==2.1.0 (from -r constraints-hashes.txt (line 3))
  Downloading numpy-2.1.0.whl (16.0 MB)
Requirement already satisfied: torch==2.10.0 in /x
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES
Installing collected packages: numpy
"""


class Terminal(StringIO):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_packages_are_counted_on_a_terminal_and_errors_are_always_shown(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    shown = Terminal() if terminal else StringIO()
    monkeypatch.setattr(sys, "stdin", StringIO(OUTPUT))
    monkeypatch.setattr(sys, "stdout", shown)
    runpy.run_path(str(SCRIPT))["main"](4)
    text = shown.getvalue()
    assert "DO NOT MATCH THE HASHES" in text
    assert ("2 of 4 packages" in text) is terminal
    assert ("left" in text) is terminal

"""24 hours of operation in fast-forward: the exporters stay as small as they were in the morning.

``make monitoring-day`` has 10,000 clients and looks every five minutes; here there are fewer of both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("MONITORING_DAY") == "full"
CLIENTS, STEP_MINUTES = (10_000, 5) if FULL else (1_000, 60)
LEARNED_BY_HOUR = 4.0
LIMITS = {"series": 250, "exposition_bytes": 40_000, "files": 30, "files_bytes": 500_000, "held_bytes": 500_000}


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a process of its own: the metrics of this one are those of all tests."""
    folder = tmp_path_factory.mktemp("metrics")
    words = ["--clients", str(CLIENTS), "--step-minutes", str(STEP_MINUTES)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "metrics_day.py"), *words],
        env={**os.environ, MULTIPROCESS_VARIABLE: str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    readings: list[dict[str, Any]] = json.loads(done.stdout)
    return readings


# The first of them waits for the day.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", LIMITS)
def test_it_does_not_grow_over_the_day(readings: list[dict[str, Any]], kind: str) -> None:
    values = [(reading["hour"], reading[kind]) for reading in readings if reading[kind] is not None]
    morning = max(value for hour, value in values if hour <= LEARNED_BY_HOUR)
    later = [value for hour, value in values if hour > LEARNED_BY_HOUR]
    print(f"\n{kind}: morning {morning}, later {min(later)} to {max(later)}, at last {later[-1]}")
    assert readings[-1]["hour"] == 24
    assert morning <= LIMITS[kind]
    # Which classes and outcomes turned up, and how long numbers are, differs a little.
    assert max(later) <= morning * 1.1 + (4 if kind == "files" else 0)

"""What `make run` promises, on the real images and with the real settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Fedvit

pytestmark = pytest.mark.ray


def test_the_demo_reaches_its_figures_and_writes_its_report(tmp_path: Path) -> None:
    fedvit = Fedvit(tmp_path / "var", {"ray.dashboard": "false"})
    printed = fedvit.json("run")
    summary = json.loads((fedvit.home / "report" / "summary.json").read_text())
    assert summary == printed
    assert summary["test_accuracy"] >= 0.90
    assert 0 < summary["epsilon"] <= 8
    assert summary["delta"] == 1e-5
    assert summary["privacy_unit"] == "record"
    assert summary["rounds"] == 30
    assert set(summary["recall"]) == {"red", "yellow", "green"}
    assert set(summary["targets"]) == {"inference", "edge-1", "edge-2"}
    for target in summary["targets"].values():
        assert target["agreement"] >= 0.995
        assert target["accuracy"] == pytest.approx(summary["test_accuracy"], abs=0.005)
        assert 0 < target["p50_ms"] <= target["p95_ms"]
    page = (fedvit.home / "report" / "index.html").read_text()
    for word in ("Learning curve", "Epsilon", "Confusion", "Latency", summary["model_version"]):
        assert word.lower() in page.lower()
    # Ended by itself, and nothing is left.
    assert fedvit.json("status", configured=False)["system"] == "down"

"""``fedvit sweep`` on a real Ray: warm workers, kill -9 in the middle, and the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import environment
from pyarrow import parquet

from fedvit.settings import load_settings
from fedvit.tools.sweep.space import plan_sweep

pytestmark = [pytest.mark.ray, pytest.mark.campaign]

NOISE, TOLERANCE = [0.8, 1.6], [0, 3]


@pytest.fixture
def config(tmp_path: Path, images: Path) -> Path:
    tree: dict[str, Any] = {
        "home": str(tmp_path / "var"),
        "data": {
            "source": "folder",
            "path": str(images),
            "image_size": 32,
            "partition": {"scheme": "iid", "clients": 6, "min_examples": 2},
        },
        "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
        "training": {"rounds": 4, "aggregation": "fedbuff"},
        "privacy": {"target_epsilon": 50, "target_delta": 1e-3},
        "ray": {"dashboard": False},
        "simulation": {"mode": "asynchronous", "buffer_size": 2},
        "sweep": {"parameters": {"noise_multiplier": NOISE, "staleness_tolerance": TOLERANCE}, "first_rung": 2},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fedvit.cli.main", "sweep", "--config", str(config), "--json", *more]


def test_a_killed_sweep_goes_on_and_runs_no_finished_trial_again(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "var" / "sweep"
    driver = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, env=environment())
    deadline_s = time.monotonic() + 240
    while not list(folder.glob("trials/*.json")) and driver.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*.json")}
    assert 0 < len(before) < 4, "killed too late or too early to show anything"
    assert not (folder / "index.html").exists()

    done = subprocess.run(command(config), capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    plans = plan_sweep(load_settings(config, environ={}))
    assert [trial["trial_id"] for trial in summary["trials"]] == [plan.trial_id for plan in plans]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for trial in summary["trials"]:
        assert trial["status"] in ("completed", "stopped_early")
        assert 0 < trial["epsilon"] <= trial["planned_epsilon"] if trial["status"] == "completed" else True
    # Two workers and two sweeps: whoever came later to one of them found it warm.
    assert sum(not trial["warm"] for trial in summary["trials"]) <= 4
    rows = parquet.read_table(folder / "trials.parquet").to_pylist()
    assert [(row["param.noise_multiplier"], row["param.staleness_tolerance"]) for row in rows] == [
        (noise, late) for noise in NOISE for late in TOLERANCE
    ]
    page = (folder / "index.html").read_text()
    for chart in ("pareto", "heat", "parallel"):
        assert f'id="{chart}-' in page

    chosen = load_settings(folder / "best.yaml", environ={})
    assert chosen.privacy.noise_multiplier == summary["chosen"]["parameters"]["noise_multiplier"]
    assert chosen.training.initial_mode.mode == "asynchronous"
    assert chosen.training.initial_mode.buffer_size == 2

    again = subprocess.run(command(config), capture_output=True, text=True, env=environment(), check=False)
    assert json.loads(again.stdout) == summary

"""kill -9 of a rank in the middle of a fine-tuning job: it ends where it would have ended, and pays once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import environment

from fedvit.finetune.checkpoint import Checkpoint
from fedvit.finetune.job import Finetuning, with_noise
from fedvit.finetune.ranks import Ranks
from fedvit.incidents.drills.processes import below
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.types import FloatArray, Weights
from fedvit.wire.tensors import decode_weights

pytestmark = [pytest.mark.ray, pytest.mark.campaign]

RANK = "ray::RayTrainWorker"
STEPS, RANGE, DELTA = 24, 4, 1e-3
SETTINGS: dict[str, Any] = {
    # On small steps rounding stays rounding.
    "finetune": {"steps": STEPS, "checkpoint_every_steps": RANGE, "learning_rate": 0.1, "ranks": 2},
    "model": {"pretrained": False, "hybrid": {"width": 32}},
    "privacy": {"noise_multiplier": 2.0, "sampling_prob": 0.25, "target_delta": DELTA, "target_epsilon": 50.0},
    "ray": {"dashboard": False},
}
TIMEOUT_S = 240.0


@pytest.fixture
def settings(images: Path) -> dict[str, Any]:
    return SETTINGS | {"data": {"source": "folder", "path": str(images), "image_size": 32}}


def started(home: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    config = home.parent / "finetune.yaml"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "fedvit.cli.main", "finetune", "--json", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--home", str(home)], stdout=subprocess.PIPE, stderr=sys.stderr, env=environment(), text=True
    )


def await_charges(home: Path, process: subprocess.Popen[str], count: int) -> None:
    """Return when so many ranges are on the ledger: the last of them is being taken."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        # Asked without a pause, the answers would take a core from what is waited for.
        time.sleep(0.05)
        if (home / "state.db").exists():
            with Store.open(home) as store:
                if len(store.ledger.entries()) >= count:
                    return
    raise AssertionError(f"{count} ranges were not charged; exit status {process.poll()}")


def without_ray(home: Path, tree: dict[str, Any]) -> Weights:
    """The same job, undisturbed, on one rank that is this process; its ledger is not looked at."""
    settings = with_noise(load_settings(environ={}, overrides={**tree, "home": home}))
    kept = []
    job = Finetuning(settings, Ranks(), charge=lambda charges: None, save=lambda step, files: kept.append(files))
    assert job.run().steps == STEPS
    return Checkpoint.from_files(kept[-1], job.plan.digest).weights


def flat(weights: Weights) -> FloatArray:
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


def test_a_killed_rank_is_replaced_and_the_ledger_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    home = tmp_path / "var"
    process = started(home, settings)
    try:
        await_charges(home, process, 3)
        ranks = below(process.pid, RANK)
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGKILL)
        outcome, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.terminate()
        process.wait()
    report = json.loads(outcome)
    assert process.returncode == 0
    assert (report["steps"], report["ranks"], report["stopped"]) == (STEPS, 2, None)
    with Store.open(home) as store:
        charges = [entry.charge for entry in store.ledger.entries()]
        assert store.ledger.verify() == len(charges)
    assert [(charge.round_index, charge.steps) for charge in charges] == [(i, RANGE) for i in range(0, STEPS, RANGE)]
    assert report["epsilon_spent"] == pytest.approx(epsilon_pld({PoissonGaussian(2.0, 0.25): STEPS}, DELTA))
    torch.set_num_threads(1)
    result, truth = (
        flat(decode_weights(Path(report["weights"]).read_bytes(), max_bytes=1 << 30)),
        flat(without_ray(home, settings)),
    )
    assert np.linalg.norm(result - truth) / np.linalg.norm(truth) < 1e-5

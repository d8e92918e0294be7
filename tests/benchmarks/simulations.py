"""What the simulated benchmarks share: runs side by side on all cores, over one data set that is read once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedvit.config import Settings
from fedvit.settings import load_settings
from fedvit.tools.simulation.run import Simulated, simulate
from fedvit.tools.simulation.world import ImageWorld

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "simulation"
PICTURES = ROOT / "docs" / "pictures"
Plan = tuple[str, Settings]
_world: list[ImageWorld] = []


def gtsrb() -> Path:
    """The data set: the first argument, or what ``GTSRB_ZIP`` names."""
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("GTSRB_ZIP")
    if not named:
        raise SystemExit("Name the GTSRB zip or folder: GTSRB_ZIP=path/to/GTSRB.zip make bench-async")
    return Path(named).absolute()


def example(name: str, **overrides: Any) -> Settings:
    """The settings of an example on that data set."""
    data = {**overrides.pop("data", {}), "path": gtsrb()}
    return load_settings(EXAMPLES / f"{name}.yaml", environ={}, overrides={"data": data, **overrides})


def run_all(plans: Sequence[Plan]) -> list[Simulated]:
    """Every plan, one thread a process, in the order of the plans; all are of one world."""
    torch.set_num_threads(1)
    world = ImageWorld(plans[0][1])
    assert all(world.fits(settings) for _, settings in plans)
    world.load()
    _world[:] = [world]
    # Forked, so that nothing is read twice.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return list(pool.imap(_run, plans, chunksize=1))


def _run(plan: Plan) -> Simulated:
    name, settings = plan
    result = simulate(settings, _world[0], name)
    reached = f"{result.accuracy:.3f}" if result.accuracy is not None else "nothing"
    seed, hours = settings.simulation.seed, result.points[-1].hours if result.points else 0.0
    print(f"{name}, seed {seed}: {result.status.value} at {reached}, {hours:.2f} h {result.reason or ''}", flush=True)
    return result

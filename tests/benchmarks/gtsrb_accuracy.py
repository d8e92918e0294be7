"""Accuracy on traffic signs at several privacy budgets, by where noise is added, by fleet, and without each choice.

Run by ``make results`` on the GTSRB zip that GTSRB_ZIP (or the first argument) names. Every run is one line of
docs/results/gtsrb.json, written as soon as runs of its kind have ended; what is there already is not run again. The
page docs/results.md is generated from it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from opacus.accountants.utils import get_noise_multiplier
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch.nn import functional

from fedvit.config import Settings
from fedvit.privacy.round_cost import round_noise_multiplier
from fedvit.settings import load_settings
from fedvit.tools.simulation.world import ImageWorld
from tests.benchmarks.simulations import ROOT, gtsrb, run_all

FILE = ROOT / "docs" / "results" / "gtsrb.json"
PAGE = ROOT / "docs" / "results.md"
SEEDS = 3
ROUNDS = 30
DELTA = 1e-5
RATES: dict[float | None, float] = {8.0: 1000.0, 4.0: 800.0, 2.0: 550.0, 1.0: 350.0}
"""Learning rates by epsilon, for the noise of the sum."""
OWN_RATES: dict[float | None, float] = {8.0: 500.0, 4.0: 350.0, 2.0: 250.0, 1.0: 150.0}
"""The same where every vehicle adds all of the noise."""
OPACUS = "Opacus, centralised, same features and steps"
# No delays: what is measured is accuracy.
_WAITING = {"training": {"round_timeout_s": 1e6}, "simulation": {"delays": {"kind": "constant", "dropout_prob": 0.0}}}
_WITHOUT_PRIVACY = {
    "simulation": {"private": False},
    "training": {"local_steps": 10, "physical_batch_size": 512},
    "privacy": {"noise_at": "client"},
}
_MASKS = {"secure_aggregation": {"masks": False}}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: a name, the budgets, and what differs from examples/gtsrb.yaml.

    ``rates`` are the learning rates by epsilon; None stands for a run without privacy. ``images`` are protected
    together: the noise is so many times that for one.
    """

    table: str
    name: str
    rates: Mapping[float | None, float]
    changes: Mapping[str, Any]
    images: int = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One run."""

    table: str
    name: str
    target_epsilon: float | None
    seed: int
    epsilon: float | None
    accuracy: float


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict[str, Any]()
    for part in parts:
        for name, value in part.items():
            merged[name] = _merged(merged.get(name, {}), value) if isinstance(value, Mapping) else value
    return merged


def _distributed(vehicles: int = 30, **changes: Any) -> dict[str, Any]:
    data = {"partition": {"clients": vehicles}}
    return _merged(_MASKS, {"data": data, "secure_aggregation": {"min_survivors": vehicles * 9 // 10}}, changes)


_TWO: dict[float | None, float] = {epsilon: RATES[epsilon] for epsilon in (8.0, 2.0)}
_BY_NOISE = "Where noise is added, 30 vehicles"
_BY_FLEET = "Distributed noise, larger fleets of the same images"
_TRACKS = "Distributed noise, 30 vehicles, whole tracks (10 images) protected"
_WITHOUT = "Distributed noise, 30 vehicles, one choice undone"
ROWS = (
    Row(_BY_NOISE, "distributed over the vehicles", RATES, _distributed()),
    Row(_BY_NOISE, "at the server, once", RATES, {"privacy": {"noise_at": "server"}}),
    Row(_BY_NOISE, "at each vehicle, all of it", OWN_RATES, {"privacy": {"noise_at": "client"}}),
    Row(_BY_NOISE, "without privacy, 10 steps a round", {None: 175.0}, _WITHOUT_PRIVACY),
    Row(_TRACKS, "noise for ten times the sensitivity", {8.0: 200.0}, _distributed(), images=10),
    Row(_BY_FLEET, "100 vehicles", _TWO, _distributed(100)),
    Row(_BY_FLEET, "300 vehicles", _TWO, _distributed(300)),
    Row(
        _WITHOUT,
        "no linear path: pooled tokens alone",
        {8.0: RATES[8.0]},
        _distributed(model={"hybrid": {"linear_path": False}}, training={"physical_batch_size": 512}),
    ),
    Row(
        _WITHOUT,
        "clipping norm 1 (learning rate a fifth)",
        {epsilon: rate / 5 for epsilon, rate in _TWO.items()},
        _distributed(privacy={"l2_clip_norm": 1.0}),
    ),
    Row(
        _WITHOUT,
        "no momentum (learning rate doubled)",
        {epsilon: 2 * rate for epsilon, rate in _TWO.items()},
        _distributed(training={"aggregation_options": {"momentum": 0.0}}),
    ),
    Row(_WITHOUT, "half of the images a step", _TWO, _distributed(privacy={"sampling_prob": 0.5})),
)


def main() -> None:
    """Run what is missing, and write the page."""
    FILE.parent.mkdir(exist_ok=True)
    results = stored()
    known = {(r.table, r.name, r.target_epsilon, r.seed) for r in results}
    plans = [
        (row, epsilon, seed)
        for row in ROWS
        for epsilon in row.rates
        for seed in range(SEEDS)
        if (row.table, row.name, epsilon, seed) not in known
    ]
    by_world = groupby(plans, lambda plan: (plan[0].changes.get("data"), plan[0].changes.get("model")))
    for _, group in by_world:
        wanted = list(group)
        runs = run_all([(row.name, settings_of(_changes(row, *rest))) for row, *rest in wanted])
        for (row, epsilon, seed), run in zip(wanted, runs, strict=True):
            if run.accuracy is None or run.points[-1].round_index != ROUNDS:
                raise SystemExit(f"{row.name} at {epsilon}: {run.status} {run.reason}")
            spent = None if epsilon is None else round(run.epsilon, 3)
            results.append(Result(row.table, row.name, epsilon, seed, spent, round(run.accuracy, 4)))
        _write(results)
    for result in _by_opacus({(r.target_epsilon, r.seed) for r in results if r.name == OPACUS}):
        results.append(result)
        _write(results)
    PAGE.write_text(page(results))


def stored() -> list[Result]:
    """The results so far."""
    return [Result(**each) for each in json.loads(FILE.read_text())] if FILE.exists() else []


def settings_of(changes: Mapping[str, Any]) -> Settings:
    """examples/gtsrb.yaml with changes."""
    return load_settings(ROOT / "examples" / "gtsrb.yaml", environ={}, overrides=dict(changes))


def page(results: Iterable[Result]) -> str:
    """docs/results.md."""
    parts, every = [(ROOT / "tests" / "benchmarks" / "results_head.md").read_text()], list(results)
    for table in dict.fromkeys(result.table for result in every):
        rows = [result for result in every if result.table == table]
        budgets = sorted({r.target_epsilon for r in rows}, key=lambda e: -math.inf if e is None else -e)
        heads = ["no privacy" if each is None else f"epsilon {each:g}" for each in budgets]
        parts += [f"## {table}", "", "| | " + " | ".join(heads) + " |"]
        parts.append("|---|" + "---:|" * len(budgets))
        for name in dict.fromkeys(result.name for result in rows):
            cells = [_cell([r.accuracy for r in rows if (r.name, r.target_epsilon) == (name, e)]) for e in budgets]
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _cell(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    return f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"


def _changes(row: Row, epsilon: float | None, seed: int) -> dict[str, Any]:
    budget = {"privacy": {} if epsilon is None else {"target_epsilon": epsilon}}
    budget["training"] = {"learning_rate": row.rates[epsilon]}
    once = {"training": {"evaluate_every_rounds": ROUNDS}, "simulation": {"seed": seed}, "data": {"path": gtsrb()}}
    changes = _merged(_WAITING, row.changes, budget, once)
    if row.images == 1:
        return changes
    noise = row.images * round_noise_multiplier(settings_of(changes))
    return _merged(changes, {"privacy": {"noise_multiplier": noise}})


def _by_opacus(known: Set[tuple[float | None, int]]) -> Iterable[Result]:
    """The same steps on all images in one place, by Opacus' optimiser and its accountant."""
    missing = [(epsilon, seed) for epsilon in (8.0, 2.0) for seed in range(SEEDS) if (epsilon, seed) not in known]
    if not missing:
        return
    torch.set_num_threads(1)
    settings = settings_of({"data": {"path": gtsrb()}})
    world = ImageWorld(settings)
    world.load()
    data = [world._data.load(client.client_id) for client in world.clients]
    inputs, labels = torch.cat([each.features for each in data]), torch.cat([each.labels for each in data])
    for epsilon, seed in missing:
        weight = _opacus_weight(settings, inputs, labels, epsilon, seed)
        accuracy = world.server.evaluate({"body.head.weight": weight.numpy()}).accuracy
        yield Result(_BY_NOISE, OPACUS, epsilon, seed, epsilon, round(accuracy, 4))


def _opacus_weight(
    settings: Settings, inputs: torch.Tensor, labels: torch.Tensor, epsilon: float, seed: int
) -> torch.Tensor:
    torch.manual_seed(seed)
    head = GradSampleModule(torch.nn.Linear(inputs.shape[1], int(labels.max()) + 1, bias=False))
    torch.nn.init.zeros_(head._module.weight)
    noise = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=1.0, steps=ROUNDS, accountant="rdp"
    )
    momentum, clip = settings.training.aggregation_options["momentum"], settings.privacy.l2_clip_norm
    plain = torch.optim.SGD(head.parameters(), lr=RATES[epsilon], momentum=momentum)
    optimizer = DPOptimizer(plain, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=len(labels))
    for _ in range(ROUNDS):
        # In parts, so that the gradients of all images need not be in memory at once.
        parts = torch.arange(len(labels)).split(64)
        for position, part in enumerate(parts, start=1):
            functional.cross_entropy(head(inputs[part]), labels[part]).backward()
            optimizer.signal_skip_step(do_skip=position < len(parts))
            optimizer.step()
            optimizer.zero_grad()
    return head._module.weight.detach()


def _write(results: list[Result]) -> None:
    FILE.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Benchmark of robust rules: a fifth of the clients attacks, on real traffic signs, beside the plain mean.

Run by ``make bench-robust`` on the GTSRB zip that GTSRB_ZIP (or the first argument) names; writes
docs/benchmarks/robust_gtsrb.json and docs/pictures/robust_gtsrb.svg. BENCH_ROUNDS, 5 n + 1 of them, shortens it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from fedvit.atomic_write import write_atomically
from fedvit.tools.report.simulation_charts import bars_chart, standalone
from fedvit.tools.simulation.run import Simulated
from fedvit.types import RunStatus
from tests.benchmarks.results import write_result
from tests.benchmarks.simulations import PICTURES, Plan, example, run_all

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "61"))
CLIENTS, ATTACKERS = 30, 6
CLEAN = "no attack"
ATTACKS: dict[str, tuple[str, ...]] = {
    CLEAN: (),
    "signs flipped": ("sign_flip",),
    "scaled by 10": ("scale",),
    "flipped and scaled by 10": ("sign_flip", "scale"),
}
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "multi_krum": {"num_byzantine": ATTACKERS},
    "trimmed_mean": {"trim_fraction": ATTACKERS / CLIENTS},
    "geometric_median": {},
    "trimmed_mean, mixed": {"trim_fraction": ATTACKERS / CLIENTS, "mixing": ATTACKERS},
    "geometric_median, mixed": {"mixing": ATTACKERS},
}
PICTURE = "![Test accuracy of rules by attack](pictures/robust_gtsrb.svg)\n\n"
BY_TRACK_NOTE = (
    " Each vehicle holds whole tracks, so honest updates differ from each other as much as attacks do. Robust rules "
    "lose accuracy because they cannot distinguish the two; rules that work on each coordinate lose most."
)
BY_TRACK = (CLEAN, "signs flipped")


def main() -> None:
    """Measure and write."""
    figures = _measured("iid", tuple(ATTACKS))
    clean = figures["fedavg"][CLEAN]
    write_atomically(PICTURES / "robust_gtsrb.svg", standalone(bars_chart(figures, reference=clean)))
    _write("robust_gtsrb", "images divided at random", figures, PICTURE + _what())
    _write("robust_gtsrb_by_track", "whole tracks", _measured("natural", BY_TRACK), _what() + BY_TRACK_NOTE)


def _write(name: str, partition: str, figures: dict[str, dict[str, float]], what: str) -> None:
    clean = figures["fedavg"][CLEAN]
    points = {f"{rule}, worst attack / clean fedavg": round(_worst(figures[rule]) / clean, 3) for rule in RULES}
    write_result(
        name,
        title=f"Robust rules by attack, a fifth of the clients attacks: traffic signs, {partition}",
        what=what,
        command="make bench-robust",
        figures=figures,
        ratios=points,
    )
    print(json.dumps({"figures": figures, "ratios": points}, indent=2), flush=True)


def _measured(scheme: str, attacks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    runs = {run.name: run for run in run_all(list(_plans(scheme, attacks)))}
    return {rule: {attack: _accuracy(runs[f"{rule}, {attack}"]) for attack in attacks} for rule in RULES}


def _plans(scheme: str, attacks: tuple[str, ...]) -> Iterator[Plan]:
    for rule, options in RULES.items():
        for attack in attacks:
            kinds = ATTACKS[attack]
            training = {"rounds": ROUNDS, "aggregation": rule.split(",")[0], "aggregation_options": options}
            faults = [{"share": ATTACKERS / CLIENTS, "kinds": kinds, "factor": 10}] if kinds else []
            data = {"partition": {"scheme": scheme}}
            yield f"{rule}, {attack}", example("faulty", data=data, training=training, simulation={"faults": faults})


def _accuracy(run: Simulated) -> float:
    """At the end; of a run that diverged, what was last seen of it."""
    if run.accuracy is None or (run.status is RunStatus.COMPLETED and run.points[-1].accuracy is None):
        raise SystemExit(f"{run.name} was not evaluated at its end.")
    return round(run.accuracy, 4)


def _worst(row: dict[str, float]) -> float:
    return min(accuracy for attack, accuracy in row.items() if attack != CLEAN)


def _what() -> str:
    return (
        f"Test accuracy on GTSRB (reduced, 32 pixels) after {ROUNDS} rounds of {CLIENTS} vehicles, {ATTACKERS} of "
        "which flip the sign of their update, scale it by 10, or both. The model is a small ViT on frozen "
        "EfficientNet-Lite0 features, with 10 local steps of plain SGD in each round, one learning rate for all rules, "
        "one seed, without privacy. Coordinator, rules and update validation are those of a real run. Mixed: every "
        "update is first averaged with its nearest neighbours. A run whose weights are not finite ends, and the table "
        "has its last accuracy before that."
    )


if __name__ == "__main__":
    main()

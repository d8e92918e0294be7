"""Asynchronous against synchronous rounds on real traffic signs by track, in virtual time, to the same accuracy.

Run by ``make bench-async`` on the GTSRB zip that GTSRB_ZIP (or the first argument) names; writes
docs/benchmarks/async_gtsrb.json and docs/pictures/async_gtsrb.svg. The synchronous side is tuned: it waits for all,
draws more than it wants, or has a deadline. BENCH_SEEDS shortens it.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from fedvit.atomic_write import write_atomically
from fedvit.tools.report.simulation_charts import accuracy_chart, standalone
from fedvit.tools.simulation.run import Simulated
from tests.benchmarks.results import write_result
from tests.benchmarks.simulations import PICTURES, Plan, example, run_all

SEEDS = int(os.environ.get("BENCH_SEEDS", "3"))
TARGET = 0.6
COHORT = 50
ASYNCHRONOUS = "asynchronous, buffer of 10"
ALL, OVER = "synchronous, waits for all", "synchronous, first 38 of 50"
DEADLINES_S = (150.0, 300.0, 600.0)
AT_ONCE_DEADLINES_S = (75.0, 150.0, 300.0)


def _deadline(deadline_s: float) -> str:
    return f"synchronous, deadline {deadline_s:g} s"


def _at_once(deadline_s: float) -> str:
    return f"synchronous, deadline {deadline_s:g} s, slow ones stop at once"


def main() -> None:
    """Measure and write."""
    runs = run_all([plan for seed in range(SEEDS) for plan in _plans(seed)])
    figures = {
        name: _figures([run for run in runs if run.name == name]) for name in dict.fromkeys(r.name for r in runs)
    }
    hours = {name: row["hours"] for name, row in figures.items()}
    best = min(map(_deadline, DEADLINES_S), key=lambda name: hours[name])
    best_at_once = min(map(_at_once, AT_ONCE_DEADLINES_S), key=lambda name: hours[name])
    shown = [ALL, OVER, best, ASYNCHRONOUS]
    picture = accuracy_chart([r for name in shown for r in runs if r.name == name], target=TARGET, log_time=True)
    write_atomically(PICTURES / "async_gtsrb.svg", standalone(picture))
    ratios = {
        f"{name} / asynchronous": round(hours[name] / hours[ASYNCHRONOUS], 2) for name in [*shown[:3], best_at_once]
    }
    write_result(
        "async_gtsrb",
        title="Asynchronous against synchronous rounds: traffic signs by track, in virtual time",
        what=_what(),
        command="make bench-async",
        figures=figures,
        ratios=ratios,
    )
    print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))


def _plans(seed: int) -> Iterator[Plan]:
    def plan(name: str, file: str, training: dict[str, Any], **delays: Any) -> Plan:
        simulation = {"seed": seed, "target_accuracy": TARGET, "delays": delays}
        return name, example(file, training=training, simulation=simulation)

    yield plan(ALL, "synchronous", {})
    yield plan(OVER, "synchronous", {"cohort": {"size": 38, "over_selection": COHORT / 38 - 1}})
    for deadline_s in DEADLINES_S:
        yield plan(_deadline(deadline_s), "synchronous", {"round_deadline_s": deadline_s})
    for deadline_s in AT_ONCE_DEADLINES_S:
        yield plan(_at_once(deadline_s), "synchronous", {"round_deadline_s": deadline_s}, stop_on_cancel=True)
    yield plan(ASYNCHRONOUS, "asynchronous", {})


def _figures(runs: Sequence[Simulated]) -> dict[str, float]:
    hours = [run.hours_to(TARGET) for run in runs]
    reached = [item for item in hours if item is not None]
    if len(reached) < len(runs):
        raise SystemExit(
            f"{runs[0].name}: {[run.accuracy for run in runs]} after {[run.points[-1].hours for run in runs]} h"
        )
    tasks = [sum(run.outcomes.values()) - run.outcomes["in_flight"] for run in runs]
    used = [run.outcomes["accepted"] for run in runs]
    return {
        "hours": round(statistics.median(reached), 2),
        "fastest": round(min(reached), 2),
        "slowest": round(max(reached), 2),
        "versions": statistics.median(len(run.points) for run in runs),
        "updates": statistics.median(used),
        "tasks_without_use_%": round(100 * (1 - sum(used) / sum(tasks))),
    }


def _what() -> str:
    return (
        "![Test accuracy over virtual hours](pictures/async_gtsrb.svg)\n\n"
        f"Virtual hours to {TARGET:.0%} test accuracy: median, fastest and slowest of {SEEDS} seeds. 100 vehicles hold "
        f"whole tracks of GTSRB (reduced, 32 pixels). {COHORT} of them work at a time and take 8 local steps. A task "
        "takes log-normal time (median 300 s, sigma 1.2; half of the variance is the vehicle's own). One task in ten "
        "is never answered, which is detected 150 s later. The model is a small ViT on frozen EfficientNet-Lite0 "
        "features, without privacy. Coordinator, rules, update validation and buffer are those of a real run, in "
        "simulated time. The synchronous side was tuned on seed 0 (local learning rate 5, 10, 20; server learning rate "
        "1, 2; momentum; 8 or 16 local steps). It may wait for all updates, over-select and commit with the first, or "
        "end at a deadline. A vehicle whose task was cancelled works on, because the server cannot reach it before it "
        "answers; the rows that say so assume that it stops at once. The last column is the share of tasks whose "
        "result was not used. A tuned deadline comes near asynchronous rounds, and with vehicles that stop at once "
        "even exceeds them, but it discards most of the vehicles' work."
    )


if __name__ == "__main__":
    main()

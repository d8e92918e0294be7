"""A sweep of 24 trials over noise, staleness and buffer, killed in the middle and gone on with by the same command.

Run by ``make bench-sweep``; writes docs/benchmarks/sweep.json and docs/pictures/sweep_*.svg. With GTSRB_ZIP the trials
are of traffic signs, and the files are called sweep_gtsrb.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedvit.atomic_write import write_atomically
from fedvit.settings import load_settings
from fedvit.tools.report.simulation_charts import standalone
from fedvit.tools.report.sweep_charts import heat_chart, pareto_chart
from fedvit.tools.sweep.outcome import TrialOutcome, choose, configurations, pareto_front
from tests.benchmarks.results import write_result
from tests.benchmarks.simulations import PICTURES, ROOT
from tests.command import environment

KILLED_AFTER = 8
LIMIT_S = 1800.0


def main() -> None:
    """Measure and write."""
    zip_path = os.environ.get("GTSRB_ZIP")
    name = "sweep_gtsrb" if zip_path else "sweep"
    data = ["--set", "data.source=gtsrb", "--set", "data.image_size=32", "--data", zip_path] if zip_path else []
    with tempfile.TemporaryDirectory(prefix="fedvit-sweep-") as folder:
        figures, summary = _measured(Path(folder), data)
    _draw(name, summary)
    write_result(
        name,
        title=f"A sweep of {len(summary['trials'])} trials, killed in the middle" + (", on GTSRB" if zip_path else ""),
        what=_what(name, summary),
        command="GTSRB_ZIP=GTSRB.zip make bench-sweep" if zip_path else "make bench-sweep",
        figures={"sweep": figures},
        ratios={},
    )
    print(json.dumps(figures, indent=2))


def _measured(folder: Path, data: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
    command = [sys.executable, "-m", "fedvit.cli.main", "sweep", "-c", str(ROOT / "examples" / "sweep.yaml")]
    command += ["--to", str(folder), "--json", *data]
    began_s = time.monotonic()
    _killed(command, folder)
    kept = _written(folder)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=LIMIT_S)
    elapsed_s = time.monotonic() - began_s
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    assert {path: at for path, at in _written(folder).items() if path in kept} == kept, "a finished trial was run again"
    assert all((folder / name).stat().st_size for name in ("index.html", "trials.parquet", "best.yaml"))
    summary = json.loads(done.stdout)
    return _figures(summary, elapsed_s, len(kept)), summary


def _killed(command: list[str], folder: Path) -> None:
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline_s = time.monotonic() + LIMIT_S
    while len(_written(folder)) < KILLED_AFTER and driver.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.1)
    if driver.poll() is not None:
        raise SystemExit(f"The sweep ended with status {driver.returncode} before it could be killed.")
    driver.send_signal(signal.SIGKILL)
    driver.wait()


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}


def _figures(summary: dict[str, Any], elapsed_s: float, kept: int) -> dict[str, float]:
    trials = summary["trials"]
    assert len(trials) == summary["planned"] >= 24
    assert all(t["status"] in ("completed", "stopped_early") for t in trials), [t["status"] for t in trials]
    return {
        "trials": len(trials),
        "wall_s": round(elapsed_s, 1),
        "before_the_kill": kept,
        "stopped_early": sum(t["status"] == "stopped_early" for t in trials),
        "startup_median_s": round(statistics.median(t["startup_s"] for t in trials), 3),
        "startup_warm_max_s": round(max(t["startup_s"] for t in trials if t["warm"]), 3),
        "startup_cold_max_s": round(max(t["startup_s"] for t in trials if not t["warm"]), 3),
        "trial_median_s": round(statistics.median(t["seconds"] for t in trials), 2),
    }


def _draw(name: str, summary: dict[str, Any]) -> None:
    kept = [{k: v for k, v in trial.items() if k != "mean_staleness"} for trial in summary["trials"]]
    outcomes = [TrialOutcome.from_json(trial) for trial in kept]
    settings = load_settings(ROOT / "examples" / "sweep.yaml", environ={})
    result = configurations(outcomes)
    chosen = choose(result, settings.privacy.target_epsilon, settings.sweep.margin)
    write_atomically(PICTURES / f"{name}_pareto.svg", standalone(pareto_chart(result, pareto_front(result), chosen)))
    heat = heat_chart(outcomes, "noise_multiplier", "staleness_tolerance")
    write_atomically(PICTURES / f"{name}_heat.svg", standalone(heat))


def _what(name: str, summary: dict[str, Any]) -> str:
    chosen, cost = summary["chosen"], summary["cost"]
    selection = "Nothing was selected."
    if chosen is not None:
        selection = (
            f"Selected: {chosen['text']}, test accuracy {chosen['accuracy']:.3f} ± {chosen['standard_error']:.3f} at "
            f"epsilon {chosen['epsilon']:.2f}; with the whole sweep on the same data {cost['with_sweep']:.2f}."
        )
    return (
        f"![Accuracy over epsilon](pictures/{name}_pareto.svg) ![Noise and staleness](pictures/{name}_heat.svg)\n\n"
        f"`fedvit sweep --config examples/sweep.yaml`: private trials on real images in virtual time, two at a time. "
        f"The driver gets kill -9 after {KILLED_AFTER} trials, and the same command continues the sweep. wall_s is the "
        "time of both together, with two starts of Ray. Start-up is the time from the end of the previous trial of a "
        "worker, or from the worker's own beginning, to the work of the first client: cold workers read data and "
        "model, warm workers have them. The median is over all trials. "
        f"{selection}"
    )


if __name__ == "__main__":
    main()

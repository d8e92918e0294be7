"""Report of simulations: ``summary.json`` and the page ``index.html``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedvit.tools.report.html import write_html
from fedvit.tools.report.simulation_charts import accuracy_chart, outcomes_chart, staleness_chart
from fedvit.tools.report.summary import write_summary

if TYPE_CHECKING:
    from fedvit.config import Settings
    from fedvit.tools.simulation.run import Simulated

NOT_PRIVATE = (
    "Not private: clients trained by plain SGD, and nothing was clipped, noised or charged. "
    "Its result says nothing about a private run."
)
NO_MASKS = (
    "The masks of secure aggregation were left out: quantisation, noise and charges are those of a real run, but the "
    "simulated aggregator sees every contribution."
)
SIMULATED_KEYS = (
    "Simulated: the clients' delays, drop-outs and faults, and time itself. Real: data, training, loop, rules."
)
_SECTIONS = {"data", "model", "training", "privacy", "secure_aggregation", "simulation"}
COLUMNS = ("Run", "Seed", "Versions", "Updates", "Virtual hours", "Accuracy", "Hours to target", "Epsilon", "End")


def summary_of(runs: Sequence[Simulated], target_accuracy: float | None) -> dict[str, Any]:
    """The contents of ``summary.json``; ``epsilon`` is None without privacy."""
    return {
        "private": all(run.settings.simulation.private for run in runs),
        "masks_left_out": any(leaves_masks_out(run.settings) for run in runs),
        "target_accuracy": target_accuracy,
        "runs": [_run_summary(run, target_accuracy) for run in runs],
    }


def _run_summary(run: Simulated, target_accuracy: float | None) -> dict[str, Any]:
    settings = run.settings.model_dump(mode="json", include=_SECTIONS)
    return {
        "name": run.name,
        "seed": run.settings.simulation.seed,
        "status": run.status.value,
        "reason": run.reason,
        "epsilon": run.epsilon if math.isfinite(run.epsilon) else None,
        "accuracy": run.accuracy,
        "hours": run.points[-1].hours if run.points else 0.0,
        "hours_to_target": None if target_accuracy is None else run.hours_to(target_accuracy),
        "outcomes": dict(run.outcomes),
        "staleness": {str(late): run.staleness[late] for late in sorted(run.staleness)},
        "curve": [asdict(point) for point in run.points],
        "settings": settings,
    }


def write_report(folder: Path, runs: Sequence[Simulated], target_accuracy: float | None = None) -> None:
    """Write ``summary.json`` and ``index.html`` into ``folder``, each whole or not at all.

    Raises:
        UsageError: matplotlib is not installed.
    """
    summary = summary_of(runs, target_accuracy)
    write_summary(folder / "summary.json", summary)
    first_runs = list({run.name: run for run in reversed(runs)}.values())[::-1]
    write_html(
        folder / "index.html",
        "simulation.html",
        title="fedvit: a simulation",
        subtitle=SIMULATED_KEYS,
        warning=warning_of(summary),
        accuracy=accuracy_chart(runs, target=target_accuracy),
        outcomes=outcomes_chart(_by_name(runs, "outcomes")),
        staleness=staleness_chart(_by_name(runs, "staleness")),
        columns=COLUMNS,
        rows=run_rows(summary),
        settings=[(run.name, _settings_yaml(run)) for run in first_runs],
    )


def leaves_masks_out(settings: Settings) -> bool:
    """Whether a run with these settings has the noise of secure aggregation, and none of its masks."""
    return settings.privacy.noise_place == "distributed" and not settings.secure_aggregation.masks


def warning_of(summary: Mapping[str, Any]) -> str | None:
    """What a reader of the report has to know first."""
    if not summary["private"]:
        return NOT_PRIVATE
    return NO_MASKS if summary["masks_left_out"] else None


def run_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each run, in the order of :data:`COLUMNS`."""
    return [
        (
            run["name"],
            str(run["seed"]),
            str(len(run["curve"])),
            f"{run['outcomes']['accepted']:,}",
            f"{run['hours']:.2f}",
            cell(run["accuracy"], ".4f"),
            cell(run["hours_to_target"], ".2f"),
            cell(run["epsilon"], ".3f", missing="not private"),
            run["status"] if run["reason"] is None else f"{run['status']}: {run['reason']}",
        )
        for run in summary["runs"]
    ]


def cell(value: float | None, form: str, missing: str = "–") -> str:
    """A number in a table."""
    return missing if value is None else format(value, form)


def _by_name(runs: Sequence[Simulated], attribute: str) -> dict[str, Counter[Any]]:
    """The sum of counts over the seeds of each name."""
    counts: dict[str, Counter[Any]] = {}
    for run in runs:
        counts.setdefault(run.name, Counter()).update(getattr(run, attribute))
    return counts


def _settings_yaml(run: Simulated) -> str:
    return yaml.safe_dump(run.settings.model_dump(mode="json", include={"training", "simulation"}), sort_keys=False)

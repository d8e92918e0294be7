"""Summary of a run: as a JSON object and as tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fedvit.atomic_write import write_atomically
from fedvit.data.manifest import DataManifest
from fedvit.tools.report.probe import TargetSummary
from fedvit.types import BudgetReport, Evaluation, Run, default_noise_place

JsonObject = dict[str, Any]


def build_summary(
    *,
    evaluation: Evaluation,
    budget: BudgetReport,
    run: Run,
    model_version: str,
    manifest: DataManifest,
    targets: Mapping[str, TargetSummary],
    seconds: Mapping[str, float],
) -> JsonObject:
    """The contents of ``summary.json``; ``seconds`` by phase, ``epsilon`` as spent at ``delta``."""
    return {
        "test_accuracy": evaluation.accuracy,
        "recall": dict(evaluation.recall_by_class),
        "epsilon": budget.epsilon_spent,
        "delta": budget.target_delta,
        "privacy_unit": budget.privacy_unit,
        "noise_at": run.config.get("privacy", {}).get("noise_at") or default_noise_place(budget.privacy_unit),
        "noise_multiplier": run.noise_multiplier,
        "run_id": run.run_id,
        "rounds": run.rounds_done,
        "model_version": model_version,
        "data": {
            "name": manifest.name,
            "digest": manifest.digest,
            "num_train": manifest.num_train,
            "num_test": manifest.num_test,
        },
        "targets": {
            name: {
                "accuracy": target.accuracy,
                "agreement": target.agreement,
                "p50_ms": round(target.p50_ms, 3),
                "p95_ms": round(target.p95_ms, 3),
            }
            for name, target in targets.items()
        },
        "seconds": {phase: round(value_s, 3) for phase, value_s in seconds.items()},
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold; nothing was written.
    """
    write_atomically(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary without the targets as (name, value) rows."""
    data = summary["data"]
    recall = ", ".join(f"{name} {value:.3f}" for name, value in summary["recall"].items())
    return [
        ("Test accuracy", f"{summary['test_accuracy']:.4f}"),
        ("Recall by class", recall),
        ("Privacy", privacy_line(summary)),
        ("Noise", f"multiplier {summary['noise_multiplier']:.4g}, added at: {summary['noise_at']}"),
        ("Rounds", f"{summary['rounds']} of {summary['run_id']}"),
        ("Model version", str(summary["model_version"])),
        ("Data", f"{data['name']}: {data['num_train']:,} training and {data['num_test']:,} test images"),
        ("Data digest", str(data["digest"])),
        ("Seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in summary["seconds"].items())),
    ]


def privacy_line(summary: Mapping[str, Any]) -> str:
    """Epsilon, delta and the unit they protect, in one line."""
    return f"ε = {summary['epsilon']:.3f} at δ = {summary['delta']:g}, for one {summary['privacy_unit']}"


TARGET_COLUMNS = ("Target", "Accuracy", "Agreement", "p50 (ms)", "p95 (ms)")


def target_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each target, in the order of :data:`TARGET_COLUMNS`."""
    return [
        (name, f"{t['accuracy']:.4f}", f"{t['agreement']:.4f}", f"{t['p50_ms']:.1f}", f"{t['p95_ms']:.1f}")
        for name, t in summary["targets"].items()
    ]


def summary_tables(summary: Mapping[str, Any]) -> tuple[Table, Table]:
    """The run and its targets, as two Rich tables."""
    run = Table(title="Run", show_header=False, title_justify="left")
    run.add_column(style="bold", no_wrap=True)
    run.add_column(overflow="fold")
    for what, value in summary_rows(summary):
        # A whole digest would be broken into two lines; the report has it on one.
        run.add_row(what, f"{value[:16]}..., in full in the report" if what == "Data digest" else value)
    targets = Table(title="Targets", title_justify="left")
    for i, column in enumerate(TARGET_COLUMNS):
        targets.add_column(column, justify="right" if i else "left")
    for row in target_rows(summary):
        targets.add_row(*row)
    return run, targets

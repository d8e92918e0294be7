"""Benchmark results: one JSON file each, and the page generated from all of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
PACKAGES = ("torch", "onnxruntime", "ray", "opacus", "timm", "numpy")


def write_result(
    name: str,
    *,
    title: str,
    what: str,
    command: str,
    figures: Mapping[str, Mapping[str, float]],
    ratios: Mapping[str, float],
) -> None:
    """Write ``docs/benchmarks/<name>.json`` and generate docs/benchmarks.md anew."""
    result = {
        "title": title,
        "what": what,
        "command": command,
        "figures": figures,
        "ratios": ratios,
        "machine": machine(),
        "measured": datetime.now(UTC).date().isoformat(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    (FOLDER.parent / "benchmarks.md").write_text(page(results))


def machine() -> str:
    """Processor, cores and versions in one line."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def page(results: list[dict[str, Any]]) -> str:
    """docs/benchmarks.md."""
    parts = ["# Benchmarks", "", "Generated from docs/benchmarks/*.json by the commands named; do not edit."]
    for result in results:
        columns = list(next(iter(result["figures"].values())))
        parts += ["", f"## {result['title']}", "", result["what"], ""]
        parts += ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for name, figures in result["figures"].items():
            parts.append(f"| {name} | " + " | ".join(str(figures[column]) for column in columns) + " |")
        parts += ["", *(f"- {name}: {ratio}x" for name, ratio in result["ratios"].items())]
        parts += ["", f"`{result['command']}`, {result['measured']}, on {result['machine']}."]
    return "\n".join(parts) + "\n"

"""Our own round engine: empty rounds, large updates, a small CNN beside a bare loop, memory over 200 rounds, a million.

Run by ``make bench-rounds``; writes docs/benchmarks/rounds.json, rounds_million.json and docs/benchmarks.md.
BENCH_ROUNDS shortens it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.process_tree import TreeWatch
from tests.benchmarks.results import write_result
from tests.benchmarks.round_engine import run_rounds, running, settings_for

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "30"))
FLAT_ROUNDS, MILLION = 200, 1_000_000
BY_CLIENT: dict[str, Any] = {
    "privacy": {"privacy_unit": "client"},
    "training": {"cohort": {"selection": "poisson", "sampling_prob": 1.0}},
}
CNN_COHORT: dict[str, Any] = {
    "privacy": {"privacy_unit": "client", "l2_clip_norm": 1e-4},
    "training": {"cohort": {"selection": "uniform", "size": 20, "max_participations": 1000}},
}
EMPTY = {"clients": 500, "parameters": 1000}
BIG = {"clients": 20, "parameters": 5_500_000, "arrays": 20}
CNN = {"clients": 100, "examples": 50}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "500 empty clients x 1k, privacy unit client": ("EmptyClients", EMPTY, BY_CLIENT),
    "500 empty clients x 1k, unit record (500 charges)": ("EmptyClients", EMPTY, {}),
    "20 empty clients x 5.5 M fp32, unit client": ("EmptyClients", BIG, BY_CLIENT),
    "20 empty clients x 5.5 M fp32, unit record": ("EmptyClients", BIG, {}),
    "small CNN, 20 of 100 clients, unit client": ("CnnClients", CNN, CNN_COHORT),
}
COLUMNS = ("round_s", "slowest_s", "peak_mb")


def ours(kind: str, options: dict[str, Any], more: dict[str, Any], rounds: int) -> dict[str, float]:
    """One case, in a process of its own."""
    keywords = json.dumps({"rounds": rounds, **more})
    command = [sys.executable, "-m", "tests.benchmarks.round_engine", kind, json.dumps(options), keywords]
    return _figures(command)


def bare(rounds: int) -> dict[str, float]:
    """The bare loop of the small CNN."""
    case = json.dumps({"clients": 100, "cohort": 20, "examples": 50, "rounds": rounds, "warm": 3})
    return _figures([sys.executable, "-m", "tests.benchmarks.bare_loop", case])


def _figures(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    results: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {column: results[column] for column in COLUMNS}


def flatness() -> dict[str, float]:
    """Memory of the process tree in the second half of 200 rounds, beside that in the first after 20."""
    with tempfile.TemporaryDirectory(prefix="fedvit-bench-") as folder:
        settings = settings_for(Path(folder), "EmptyClients", EMPTY, rounds=FLAT_ROUNDS, **BY_CLIENT)
        with running(settings) as actors, TreeWatch(os.getpid()) as watch:
            started_s = time.monotonic()
            run_rounds(actors, settings)
    took_s = time.monotonic() - started_s
    halves = [
        statistics.median(mb for at, mb in watch.samples if low <= (at - started_s) / took_s <= high)
        for low, high in ((0.1, 0.5), (0.5, 1.0))
    ]
    return {"first_half_mb": round(halves[0], 1), "second_half_mb": round(halves[1], 1)}


def million() -> dict[str, float]:
    """Rounds of 1,000 out of a million registered clients, and what the actors hold beyond an idle system of 10."""
    idle = _memory_of(10, 10, rounds=3)
    return _memory_of(MILLION, 1000, rounds=max(5, ROUNDS // 3), idle_mb=idle["peak_mb"])


def _memory_of(clients: int, cohort: int, *, rounds: int, idle_mb: float = 0.0) -> dict[str, float]:
    options = {"clients": clients, "parameters": 1000}
    delta = {"target_delta": 1e-9, "noise_multiplier": 100.0}
    with tempfile.TemporaryDirectory(prefix="fedvit-bench-") as folder:
        settings = settings_for(Path(folder), "EmptyClients", options, rounds=rounds + 3, cohort=cohort, privacy=delta)
        started_s = time.perf_counter()
        with running(settings) as actors, TreeWatch(os.getpid()) as watch:
            ready_s = time.perf_counter() - started_s
            seconds = run_rounds(actors, settings)[2:]
    return {
        "round_s": round(statistics.median(seconds), 3),
        "slowest_s": round(max(seconds), 3),
        "register_and_start_s": round(ready_s, 1),
        "peak_mb": watch.peak_mb(),
        "over_idle_mb": round(watch.peak_mb() - idle_mb, 1),
    }


def write_million() -> dict[str, float]:
    """Measure and write the fleet of a million."""
    result = million()
    write_result(
        "rounds_million",
        title="A million registered clients",
        what=(
            "Cohorts of 1,000 clients with 1,000 parameters out of 1,000,000 registered ones, privacy unit record: "
            "1,000 charges a round. Memory is the PSS of the process tree; the idle system has 10 clients."
        ),
        command="make bench-rounds",
        figures={"cohort of 1,000": result},
        ratios={},
    )
    return result


def main() -> None:
    """Measure and write."""
    measured = {name: ours(*case, rounds=ROUNDS) for name, case in CASES.items()}
    # In turn, over and over: the machine may be slower at one time than at another.
    turns = [(ours(*CASES["small CNN, 20 of 100 clients, unit client"], rounds=ROUNDS), bare(ROUNDS)) for _ in range(3)]
    for name, index in (("small CNN, 20 of 100 clients, unit client", 0), ("the same CNN, bare loop", 1)):
        measured[name] = {c: statistics.median(turn[index][c] for turn in turns) for c in COLUMNS}
    flat = flatness()
    write_result(
        "rounds",
        title="A round of our own engine",
        what=(
            "Actors, coordinator, SQLite store (synchronous=FULL) and accountant are those of production, with two "
            f"proxies. Seconds are from one commit to the next, median of {ROUNDS}. Memory is the PSS of the process "
            "tree, including Ray. The bare loop has two processes with shared memory and nothing else. Over "
            f"{FLAT_ROUNDS} empty rounds the median memory was {flat['first_half_mb']:g} MB in the first half and "
            f"{flat['second_half_mb']:g} MB in the second."
        ),
        command="make bench-rounds",
        figures=measured,
        ratios={
            "CNN round / bare loop": round(statistics.median(a["round_s"] / b["round_s"] for a, b in turns), 3),
            "memory, second half / first half": round(flat["second_half_mb"] / flat["first_half_mb"], 3),
        },
    )
    result = write_million()
    print(json.dumps({"rounds": measured, "flat": flat, "million": result}, indent=2))


if __name__ == "__main__":
    main()

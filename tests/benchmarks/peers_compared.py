"""The same rounds on our engine, on Flower's and on pfl's: in turn, over and over, each in an environment of its own.

Run by ``make bench-peers``; writes docs/benchmarks/rounds_peers.json and docs/benchmarks.md. BENCH_TURNS (3) and
BENCH_ROUNDS (10) shorten it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from tests.benchmarks.results import write_result
from tests.benchmarks.rounds import BY_CLIENT, CASES, COLUMNS, ours

TURNS = int(os.environ.get("BENCH_TURNS", "3"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "10"))
WARM = 5
PEERS = Path(os.environ.get("BENCH_PEERS", ".bench-peers")).absolute()
ROOT = Path(__file__).parents[2]
_OURS = list(CASES.values())
EMPTY: dict[str, Any] = {"kind": "empty", "clients": 500, "parameters": 1000}
BIG: dict[str, Any] = {"kind": "empty", "clients": 20, "parameters": 5_500_000, "arrays": 20}
# Long enough for clients to have been everywhere: their images are made when a worker first meets them.
CNN_ROUNDS = 2 * ROUNDS
CNN: dict[str, Any] = {"kind": "cnn", "clients": 100, "cohort": 20, "examples": 50, "rounds": CNN_ROUNDS}
NAMES = {"empty": "500 empty clients x 1k", "big": "20 empty clients x 5.5 M fp32", "cnn": "small CNN, 20 of 100"}


def flower(case: dict[str, Any]) -> dict[str, float]:
    """Flower 1.41, two workers with one CPU each."""
    command = [str(PEERS / "flower" / "bin" / "python"), "-m", "tests.benchmarks.peers.flower_rounds"]
    return _peer([*command, json.dumps({**case, "rounds": case.get("rounds", ROUNDS), "warm": WARM})])


def pfl(case: dict[str, Any]) -> dict[str, float]:
    """pfl 0.6, two processes."""
    command = [str(PEERS / "pfl" / "bin" / "torchrun"), "--nproc-per-node", "2", "-m"]
    return _peer([*command, "tests.benchmarks.peers.pfl_rounds", json.dumps({"rounds": ROUNDS, **case, "warm": WARM})])


def _peer(command: list[str]) -> dict[str, float]:
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])}:\n{done.stderr[-2000:]}")
    results: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {column: results[column] for column in COLUMNS}


MEASURED = {
    "fedvit, " + NAMES["empty"]: lambda: ours("EmptyClients", _OURS[0][1], BY_CLIENT, ROUNDS),
    "fedvit, " + NAMES["empty"] + ", 500 charges": lambda: ours(*_OURS[1], ROUNDS),
    "Flower, " + NAMES["empty"]: lambda: flower(EMPTY),
    "fedvit, " + NAMES["big"]: lambda: ours(*_OURS[2], ROUNDS),
    "fedvit, " + NAMES["big"] + ", unit record": lambda: ours(*_OURS[3], ROUNDS),
    "Flower, " + NAMES["big"]: lambda: flower(BIG),
    "fedvit, " + NAMES["cnn"]: lambda: ours(*_OURS[4], CNN_ROUNDS),
    "Flower, " + NAMES["cnn"]: lambda: flower(CNN),
    "pfl, " + NAMES["cnn"]: lambda: pfl(CNN),
}


def main() -> None:
    """Measure and write."""
    turns = [{name: measured() for name, measured in MEASURED.items()} for _ in range(TURNS)]
    figures = {
        name: {c: round(statistics.median(turn[name][c] for turn in turns), 4) for c in COLUMNS} for name in MEASURED
    }
    pairs = {
        "Flower / fedvit, " + NAMES["empty"]: ("Flower, " + NAMES["empty"], "fedvit, " + NAMES["empty"]),
        "Flower / fedvit, " + NAMES["empty"] + ", 500 charges": (
            "Flower, " + NAMES["empty"],
            "fedvit, " + NAMES["empty"] + ", 500 charges",
        ),
        "Flower / fedvit, " + NAMES["big"]: ("Flower, " + NAMES["big"], "fedvit, " + NAMES["big"] + ", unit record"),
        "Flower / fedvit, " + NAMES["cnn"]: ("Flower, " + NAMES["cnn"], "fedvit, " + NAMES["cnn"]),
        "pfl / fedvit, " + NAMES["cnn"]: ("pfl, " + NAMES["cnn"], "fedvit, " + NAMES["cnn"]),
    }
    ratios = {
        name: round(statistics.median(turn[one]["round_s"] / turn[other]["round_s"] for turn in turns), 2)
        for name, (one, other) in pairs.items()
    }
    write_result(
        "rounds_peers",
        title="A round beside Flower and pfl",
        what=(
            f"Each of {TURNS} turns measures all systems one after another: {ROUNDS} rounds after {WARM} "
            f"({CNN_ROUNDS} rounds of the CNN). Medians, and the median of the turns' own ratios. fedvit runs with two "
            "proxies, SQLite store and accountant, Flower 1.41 with two workers of one CPU, pfl 0.6 with two "
            "processes; one thread each, models and images are kept in memory. Flower and pfl neither charge nor store "
            "anything. Memory is the PSS of the process tree."
        ),
        command="make bench-peers",
        figures=figures,
        ratios=ratios,
    )
    print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()

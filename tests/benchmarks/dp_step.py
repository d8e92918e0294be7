"""One step of differentially private training beside one ordinary step of the same model, and beside Opacus'.

In turn, over and over, on two threads; memory in a fresh process each. Run by ``make bench-dp``; writes
docs/benchmarks/dp_step.json (and dp_step_gpu.json where CUDA is present). BENCH_ROUNDS shortens it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

import torch

from tests.benchmarks.dp_variants import VARIANTS, Size, Step, build
from tests.benchmarks.results import write_result

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "15"))
THREADS = 2
OPACUS = "all, Opacus "
GPU_SIZE = Size("vit_base_patch16_224", image=224, patch=16, batch=64, device="cuda", autocast=True)


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(THREADS)
    size = Size()
    figures = _times(size)
    for name in figures:
        figures[name]["peak_MB"] = round(_peak_megabytes(name))
    _report("dp_step", size, figures, "threads fixed at 2; memory above the process before its first step")
    if torch.cuda.is_available():
        _report("dp_step_gpu", GPU_SIZE, _times(GPU_SIZE), f"on {torch.cuda.get_device_name()}, bfloat16")


def _report(file: str, size: Size, figures: dict[str, dict[str, float]], how: str) -> None:
    ratios = _ratios(figures)
    write_result(
        file,
        title=f"A step of private training: {size.name} at {size.image} pixels",
        what=(
            f"Forward, backward, clipping, noise and SGD; {size.name}, patches of {size.patch}, batch {size.batch}, "
            f"{how}. All weights, all biases and the head, or the head alone; median of {ROUNDS} turns. Opacus' modes "
            "that cannot do this model are left out."
        ),
        command="make bench-dp",
        figures=figures,
        ratios=ratios,
    )
    print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))


def _times(size: Size) -> dict[str, dict[str, float]]:
    steps: dict[str, Step] = {}
    for name in VARIANTS:
        try:
            steps[name] = build(name, size)
            steps[name]()
        except Exception as error:  # each mode of Opacus has its own way to fail
            if not name.startswith(OPACUS):
                raise
            steps.pop(name, None)
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    turns: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            turns[name].append(_timed_ms(step, size))
    return {name: {"ms": round(statistics.median(times), 1)} for name, times in turns.items()}


def _timed_ms(step: Step, size: Size) -> float:
    _wait(size)
    start = time.perf_counter()
    step()
    _wait(size)
    return (time.perf_counter() - start) * 1000


def _wait(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def _peak_megabytes(name: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.dp_memory", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _ratios(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    best = min((name for name in figures if name.startswith(OPACUS)), key=lambda name: figures[name]["ms"])
    pairs = {
        **{
            f"{mode}: private / ordinary": (f"{mode}, private", f"{mode}, ordinary")
            for mode in ("all", "biases", "head")
        },
        f"{best} / private": (best, "all, private"),
    }
    ratios = {label: round(figures[a]["ms"] / figures[b]["ms"], 2) for label, (a, b) in pairs.items()}
    memory = [figures[f"all, {kind}"].get("peak_MB") for kind in ("private", "ordinary")]
    if memory[0] and memory[1]:
        ratios["all: peak memory, private / ordinary"] = round(memory[0] / memory[1], 2)
    return ratios


if __name__ == "__main__":
    main()

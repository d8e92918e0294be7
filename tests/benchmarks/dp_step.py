"""One step of differentially private training beside one ordinary step of the same model, and beside Opacus'.

In turn, over and over, on two threads; each mode in a process of its own, because where a long-lived heap puts weights
is worth a tenth of the time; memory in a fresh process each. Run by ``make bench-dp``; writes
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
MODES = ("all", "biases", "head")
OPACUS = "all, Opacus "
GPU_SIZE = Size("vit_base_patch16_224", image=224, patch=16, batch=64, physical_batch=64, device="cuda", autocast=True)


def main(arguments: list[str]) -> None:
    """Measure and write; with a mode and a device, print the times of that one."""
    if arguments:
        torch.set_num_threads(THREADS)
        mode, device = arguments
        print(json.dumps(_times(mode, GPU_SIZE if device == "cuda" else Size())))
        return
    size = Size()
    turns = _modes("cpu")
    memory = {name: round(_peak_megabytes(name)) for name in turns}
    _report("dp_step", size, turns, memory, "threads fixed at 2; memory above the process before its first step")
    if torch.cuda.is_available():
        _report("dp_step_gpu", GPU_SIZE, _modes("cuda"), {}, f"on {torch.cuda.get_device_name()}, bfloat16")


def _report(file: str, size: Size, turns: dict[str, list[float]], memory: dict[str, int], how: str) -> None:
    figures: dict[str, dict[str, float]] = {
        name: {"ms": round(statistics.median(times), 1)} for name, times in turns.items()
    }
    for name, megabytes in memory.items():
        figures[name]["peak_MB"] = megabytes
    ratios = _ratios(turns, memory)
    write_result(
        file,
        title=f"A step of private training: {size.name} at {size.image} pixels",
        what=(
            f"Forward, backward, clipping, noise and SGD of {size.name}, patches of {size.patch}, batch {size.batch}, "
            f"{how}. Trained are all weights, all biases and the head, or the head alone. Private steps use physical "
            f"batches of {size.physical_batch}, the default of the setting. Medians of {ROUNDS} turns, in alternating "
            "order, and of the ratios within each turn. Modes of Opacus that do not support this model are left out."
        ),
        command="make bench-dp",
        figures=figures,
        ratios=ratios,
    )
    print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))


def _modes(device: str) -> dict[str, list[float]]:
    turns: dict[str, list[float]] = {}
    for mode in MODES:
        command = [sys.executable, "-m", "tests.benchmarks.dp_step", mode, device]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        turns |= json.loads(result.splitlines()[-1])
    return turns


def _times(mode: str, size: Size) -> dict[str, list[float]]:
    steps: dict[str, Step] = {}
    for name in [name for name in VARIANTS if name.startswith(f"{mode}, ")]:
        try:
            steps[name] = build(name, size)
            steps[name]()
        except Exception as error:  # each mode of Opacus has its own way to fail
            if not name.startswith(OPACUS):
                raise
            steps.pop(name, None)
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    turns: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        # There and back, so that nobody always follows the same one.
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            turns[name].append(_timed_ms(steps[name], size))
    return turns


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


def _ratios(turns: dict[str, list[float]], memory: dict[str, int]) -> dict[str, float]:
    best = min((name for name in turns if name.startswith(OPACUS)), key=lambda name: statistics.median(turns[name]))
    pairs = {
        **{f"{mode}: private / ordinary": (f"{mode}, private", f"{mode}, ordinary") for mode in MODES},
        f"{best} / private": (best, "all, private"),
    }
    ratios = {
        label: round(statistics.median(a / b for a, b in zip(turns[first], turns[second], strict=True)), 2)
        for label, (first, second) in pairs.items()
    }
    if memory:
        ratios["all: peak memory, private / ordinary"] = round(memory["all, private"] / memory["all, ordinary"], 2)
    return ratios


if __name__ == "__main__":
    main(sys.argv[1:])

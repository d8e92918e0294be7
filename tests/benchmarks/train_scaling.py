"""Two ranks against one on two cores, for private training and for its non-private twin. Run by ``make bench-train``.

One thread a rank. Rounds of one rank and of two take turns, each in processes of its own; within a round the two kinds
of step do. Writes docs/benchmarks/train_scaling.json. BENCH_ROUNDS shortens it.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys

from tests.benchmarks.dp_variants import Size
from tests.benchmarks.results import write_result

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
# The small batch shows what a step costs beside its arithmetic; private training takes large ones.
STEPS = {64: 3, 256: 2}
KINDS = ("ordinary", "private")
Seconds = dict[str, list[float]]


def main() -> None:
    """Measure and write."""
    figures: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    for batch in STEPS:
        rounds: dict[int, list[Seconds]] = {1: [], 2: []}
        for turn in range(ROUNDS):
            for count in (1, 2) if turn % 2 else (2, 1):
                rounds[count].append(_round(count, batch))
        for kind in KINDS:
            for count in (1, 2):
                seconds = _median(rounds[count], kind)
                figures[f"batch of {batch}, {kind}, {count} rank{'s' if count > 1 else ''}"] = {
                    "ms a step": round(1000 * seconds, 1),
                    "images/s": round(batch / seconds, 1),
                }
        pairs = list(zip(rounds[1], rounds[2], strict=True))
        scaling = {kind: [_median([one], kind) / _median([two], kind) for one, two in pairs] for kind in KINDS}
        compared = [private / plain for plain, private in zip(scaling["ordinary"], scaling["private"], strict=True)]
        results = {f"{kind}: 2 ranks / 1 rank": item for kind, item in scaling.items()}
        results["scaling, private / ordinary"] = compared
        ratios |= {f"batch of {batch}, {name}": round(statistics.median(item), 3) for name, item in results.items()}
        print(json.dumps({"batch": batch, "compared": compared, "ratios": ratios}, indent=2), flush=True)
    size = Size()
    write_result(
        "train_scaling",
        title="Private training on two ranks: the speed-up of the second",
        what=(
            f"{size.name}, patches of {size.patch}, {size.image} pixels, all weights. A batch is divided among the "
            f"ranks and processed in physical batches of {size.physical_batch}; gloo, one thread for each rank, on "
            "CPU. Private is the step of `fedvit finetune`: norms, clipping, noise, one all-reduce. Ordinary is the "
            f"same model under torch's DistributedDataParallel. {ROUNDS} rounds of some steps of each kind, with one "
            "rank and two in turn; medians, and medians of the ratios of neighbouring rounds. A step takes as long as "
            "its slowest rank."
        ),
        command="make bench-train",
        figures=figures,
        ratios=ratios,
    )


def _median(rounds: list[Seconds], kind: str) -> float:
    return statistics.median(second for item in rounds for second in item[kind])


def _round(count: int, batch: int) -> Seconds:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def command(index: int) -> list[str]:
        results = (index, count, port, STEPS[batch], batch)
        return [sys.executable, "-m", "tests.benchmarks.train_ranks", *map(str, results)]

    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen(command(index), env=environ, stdout=subprocess.PIPE, text=True) for index in range(count)]
    results = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank of {count} failed")
    result: Seconds = json.loads(results[0].splitlines()[-1])
    return result


if __name__ == "__main__":
    main()

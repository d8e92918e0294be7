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

from tests.benchmarks.results import write_result
from tests.benchmarks.train_ranks import SIZE

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
STEPS = 3
KINDS = ("ordinary", "private")
Seconds = dict[str, list[float]]


def main() -> None:
    """Measure and write."""
    rounds: dict[int, list[Seconds]] = {1: [], 2: []}
    for turn in range(ROUNDS):
        for count in (1, 2) if turn % 2 else (2, 1):
            rounds[count].append(_round(count))
    figures = {
        f"{kind}, {count} rank{'s' if count > 1 else ''}": {
            "ms a step": round(1000 * _median(rounds[count], kind), 1),
            "images/s": round(SIZE.batch / _median(rounds[count], kind), 1),
        }
        for kind in KINDS
        for count in (1, 2)
    }
    scaling = {
        kind: [_median([one], kind) / _median([two], kind) for one, two in zip(rounds[1], rounds[2], strict=True)]
        for kind in KINDS
    }
    ratios = {f"{kind}: 2 ranks / 1 rank": round(statistics.median(scaling[kind]), 3) for kind in KINDS}
    compared = [private / plain for plain, private in zip(scaling["ordinary"], scaling["private"], strict=True)]
    ratios["scaling, private / ordinary"] = round(statistics.median(compared), 3)
    write_result(
        "train_scaling",
        title="Private training on two ranks: what the second one brings",
        what=(
            f"{SIZE.name}, patches of {SIZE.patch}, {SIZE.image} pixels, all weights, a batch of {SIZE.batch} dealt "
            f"out to the ranks, physical batches of {SIZE.physical_batch}; gloo, one thread a rank, on CPU. Private: "
            "the step of `fedvit finetune`: norms, clipping, noise, one all-reduce. Ordinary: the same model under "
            f"torch's DistributedDataParallel. {ROUNDS} rounds of {STEPS} steps of each kind, one rank and two in "
            "turn; medians, and medians of the ratios of neighbouring rounds. A step ends when the slowest rank's does."
        ),
        command="make bench-train",
        figures=figures,
        ratios=ratios,
    )
    print(json.dumps({"figures": figures, "ratios": ratios, "scaling": scaling}, indent=2))


def _median(rounds: list[Seconds], kind: str) -> float:
    return statistics.median(second for found in rounds for second in found[kind])


def _round(count: int) -> Seconds:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.benchmarks.train_ranks"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, *map(str, (index, count, port, STEPS))], env=environ, stdout=subprocess.PIPE, text=True
        )
        for index in range(count)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank of {count} failed")
    found: Seconds = json.loads(told[0].splitlines()[-1])
    return found


if __name__ == "__main__":
    main()

"""The least that a round of the small CNN can cost: two processes that stay, weights exchanged by shared memory.

No clients that fail, nothing checked, charged, recorded or written. Imports torch and nothing of fedvit.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.multiprocessing as processes

from tests.benchmarks.process_tree import TreeWatch
from tests.benchmarks.small_cnn import SmallCnn, build_cnn

WORKERS = 2


def _work(orders: Connection, shared: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], examples: int) -> None:
    torch.set_num_threads(1)
    cnn = SmallCnn()
    while (clients := orders.recv()) is not None:
        base = {name: tensor.numpy() for name, tensor in shared.items()}
        for tensor in sums.values():
            tensor.zero_()
        for client in clients:
            local = cnn.fit(base, client, examples)
            for name, tensor in sums.items():
                tensor.add_(torch.from_numpy(local[name]))
        orders.send(len(clients))


def measure(clients: int, cohort: int, examples: int, rounds: int, warm: int) -> dict[str, float]:
    """Median and slowest seconds of a round, and the peak memory of the process tree in MB."""
    context = processes.get_context("spawn")
    shared = {name: p.detach().clone().share_memory_() for name, p in build_cnn().named_parameters()}
    sums = [{name: torch.zeros_like(tensor).share_memory_() for name, tensor in shared.items()} for _ in range(WORKERS)]
    pipes, workers = [], []
    for index in range(WORKERS):
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, shared, sums[index], examples), daemon=True)
        worker.start()
        pipes.append(here)
        workers.append(worker)
    rng, seconds = np.random.default_rng(0), []
    with TreeWatch(os.getpid()) as watch:
        for _ in range(warm + rounds):
            started_s = time.perf_counter()
            drawn = rng.choice(clients, cohort, replace=False).tolist()
            for index, pipe in enumerate(pipes):
                pipe.send(drawn[index::WORKERS])
            answered = sum(pipe.recv() for pipe in pipes)
            for name, tensor in shared.items():
                torch.div(sum(part[name] for part in sums), answered, out=tensor)
            seconds.append(time.perf_counter() - started_s)
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join()
    return {
        "round_s": round(statistics.median(seconds[warm:]), 4),
        "slowest_s": round(max(seconds[warm:]), 4),
        "peak_mb": watch.peak_mb(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

"""One rank, over gloo: times of ordinary and private steps of the same model on the same batch, dealt out.

Started by train_scaling.py, once for each number of ranks; the two kinds of step take turns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fedvit.finetune.ranks import RankedTrainer, Ranks
from fedvit.models.layers import Normalise
from fedvit.models.vision import VisionModel
from fedvit.types import TrainTask
from tests.benchmarks.dp_variants import CLASSES, CLIP, LEARNING_RATE, SIGMA, Size

_SECRET, _RELEASE = bytes(32), "benchmark"
Step = Callable[[], None]


def ordinary(ranks: Ranks, size: Size) -> Step:
    """The non-private twin as one would write it: DistributedDataParallel, which sums while it differentiates."""
    model, (images, labels) = size.model("all"), size.data()
    body = DistributedDataParallel(model.body) if ranks.count > 1 else model.body
    optimizer = torch.optim.SGD(body.parameters(), lr=LEARNING_RATE)
    own = ranks.own(torch.arange(size.batch))

    def step() -> None:
        # In the same physical batches, with one all-reduce a step.
        parts = own.split(size.physical_batch)
        for position, part in enumerate(parts, start=1):
            if ranks.count > 1:
                body.require_backward_grad_sync = position == len(parts)  # type: ignore[assignment]
            loss = functional.cross_entropy(body(images[part]), labels[part], reduction="sum") / len(own)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def private(ranks: Ranks, size: Size) -> Step:
    """A step of ``fedvit finetune``."""
    body, (images, labels) = size.model("all").body, size.data()
    model = VisionModel(Normalise([0.5] * 3, [0.5] * 3), body, size.image, CLASSES)
    trainer = RankedTrainer(model, ranks, physical_batch_size=size.physical_batch)
    task = TrainTask("benchmark", 0, "", "", SIGMA, 1.0, CLIP, 1, LEARNING_RATE)
    optimizer = trainer.optimizer(task, size.batch, _SECRET, _RELEASE)
    drawn = torch.arange(size.batch)
    return lambda: trainer.step(optimizer, images, labels, drawn)


def main(index: int, count: int, port: int, turns: int, batch: int) -> None:
    """Print the seconds of each step, by kind; on rank 0."""
    torch.set_num_threads(1)
    if count > 1:
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=index, world_size=count)
    ranks, size = Ranks.here(), Size(batch=batch)
    steps = {"ordinary": ordinary(ranks, size), "private": private(ranks, size)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        # There and back, so that neither always follows the other.
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            ranks.any(False)
            started_s = time.perf_counter()
            steps[name]()
            # The slowest rank is when a step is over.
            ranks.any(False)
            if turn:
                seconds[name].append(time.perf_counter() - started_s)
    if index == 0:
        print(json.dumps(seconds))
    if count > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

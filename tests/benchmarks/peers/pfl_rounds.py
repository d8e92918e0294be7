"""The small CNN's rounds on pfl; runs in an environment of its own, two processes by torchrun. Imports no fedvit."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.process_tree import TreeWatch
from tests.benchmarks.small_cnn import BATCH, LEARNING_RATE, build_cnn, examples_of

CASE: dict[str, Any] = json.loads(sys.argv[1])
MOMENTS: list[float] = []


class Cnn(nn.Module):
    """The small CNN as pfl wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = build_cnn()

    def loss(self, images: Tensor, labels: Tensor, eval: bool = False) -> Tensor:
        """Cross entropy of a batch."""
        return functional.cross_entropy(self.layers(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """None: nothing is evaluated."""
        return {}


class Timer(TrainingProcessCallback):
    """Notes when each round has ended."""

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """See pfl."""
        MOMENTS.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """All rounds."""
    torch.set_num_threads(1)
    cnn = Cnn()
    model = PyTorchModel(
        model=cnn,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(cnn.parameters(), lr=1.0),
    )
    data = {client: examples_of(client, CASE["examples"]) for client in range(CASE["clients"])}
    rng = np.random.default_rng(0)

    def dataset(client: int) -> Dataset:
        return Dataset(raw_data=list(data[client]), user_id=str(client))

    users = FederatedDataset(dataset, lambda: int(rng.integers(CASE["clients"])))
    params = NNAlgorithmParams(
        central_num_iterations=CASE["rounds"] + CASE["warm"],
        evaluation_frequency=10**6,
        train_cohort_size=CASE["cohort"],
        val_cohort_size=0,
    )
    MOMENTS.append(time.perf_counter())
    FederatedAveraging().run(
        algorithm_params=params,
        backend=SimulatedBackend(training_data=users, val_data=users),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=BATCH),
        callbacks=[Timer()],
    )


if __name__ == "__main__":
    # torchrun is the parent of both processes.
    with TreeWatch(os.getppid()) as watch:
        main()
    seconds = [after - before for before, after in pairwise(MOMENTS)][CASE["warm"] :]
    if int(os.environ["RANK"]) == 0:
        figures = {"round_s": statistics.median(seconds), "slowest_s": max(seconds), "peak_mb": watch.peak_mb()}
        print(json.dumps({key: round(value, 4) for key, value in figures.items()}))

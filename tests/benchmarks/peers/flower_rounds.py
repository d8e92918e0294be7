"""The same rounds on Flower's simulation engine; runs in an environment of its own. Imports nothing of fedvit.

Two Ray workers with one CPU each, no evaluation, metrics of one number: nothing that the comparison does not need.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from tests.benchmarks.process_tree import TreeWatch

CASE: dict[str, Any] = json.loads(sys.argv[1])
client_app, server_app = ClientApp(), ServerApp()
MOMENTS: list[float] = []


class TimedFedAvg(FedAvg):
    """Notes when each round has been aggregated."""

    def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
        """See FedAvg."""
        result = super().aggregate_train(*args, **kwargs)
        MOMENTS.append(time.perf_counter())
        return result


def initial_arrays() -> list[np.ndarray]:
    """The weights that a run starts from."""
    if CASE["kind"] == "cnn":
        from tests.benchmarks.small_cnn import SmallCnn

        return list(SmallCnn().weights().values())
    size = CASE["parameters"] // CASE.get("arrays", 1)
    return [np.zeros(size, np.float32) for _ in range(CASE.get("arrays", 1))]


_CNN: list[Any] = []


def trained(arrays: list[np.ndarray], client: int) -> list[np.ndarray]:
    """What a client makes of them; the model and the images stay in the worker, as ours do in a proxy."""
    if CASE["kind"] != "cnn":
        return arrays
    import torch

    from tests.benchmarks.small_cnn import SmallCnn

    if not _CNN:
        torch.set_num_threads(1)
        _CNN.append(SmallCnn())
    cnn = _CNN[0]
    names = [name for name, _ in cnn.model.named_parameters()]
    return list(cnn.fit(dict(zip(names, arrays, strict=True)), client, CASE["examples"]).values())


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's share of a round."""
    arrays = message.content["arrays"].to_numpy_ndarrays()
    local = trained(arrays, int(context.node_config["partition-id"]))
    count = CASE.get("examples", 10)
    content = RecordDict({"arrays": ArrayRecord(local), "metrics": MetricRecord({"num-examples": count})})
    return Message(content=content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    share = CASE.get("cohort", CASE["clients"]) / CASE["clients"]
    strategy = TimedFedAvg(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=CASE["clients"])
    MOMENTS.append(time.perf_counter())
    strategy.start(grid=grid, initial_arrays=ArrayRecord(initial_arrays()), num_rounds=CASE["rounds"] + CASE["warm"])


if __name__ == "__main__":
    with TreeWatch(os.getpid()) as watch:
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=CASE["clients"],
            backend_config={
                "init_args": {"num_cpus": 2, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    seconds = [after - before for before, after in pairwise(MOMENTS)][CASE["warm"] :]
    figures = {"round_s": statistics.median(seconds), "slowest_s": max(seconds), "peak_mb": watch.peak_mb()}
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))

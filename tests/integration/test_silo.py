"""A silo behind a client proxy: two ranks of a Ray Train job give the answer that one would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.client_proxy import ClientProxy
from actors.connection import connect
from actors.handles import fetch
from actors.spawn import spawn
from fedvit.clients.host import ClientHost, vision_host
from fedvit.config import Settings
from fedvit.evaluation.server_model import ServerModel
from fedvit.finetune.ranks import RankedTrainer, Ranks
from fedvit.models.build import build_model
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.settings import load_settings, settings_to_json
from fedvit.types import FloatArray, TrainTask
from fedvit.updates import PartialSum
from fedvit.wire.tensors import weights_digest

pytestmark = [pytest.mark.ray, pytest.mark.campaign]

CLIENT, TIMEOUT_S = "vehicle-00", 240.0


def one_rank(settings: Settings) -> ClientHost:
    """The silo's host on a single rank, without Ray."""
    model = build_model(settings.model, 2, settings.data.image_size)
    trainer = RankedTrainer(model, Ranks(), physical_batch_size=settings.training.physical_batch_size)
    return vision_host(settings, model=model, trainer=trainer)


@pytest.fixture
def settings(tmp_path: Path, images: Path) -> Iterator[Settings]:
    """Of a run with two silos, on a Ray of its own."""
    overrides: dict[str, Any] = {
        "home": tmp_path / "var",
        "data": {
            "source": "folder",
            "path": str(images),
            "image_size": 32,
            "partition": {"clients": 2, "scheme": "iid"},
        },
        "model": {"pretrained": False, "hybrid": {"width": 32}},
        "training": {"ranks": 2, "local_steps": 2},
        "ray": {"dashboard": False},
    }
    result = load_settings(environ={}, overrides=overrides)
    # As a system's start leaves it: a proxy refuses a node that does not see the key.
    load_or_create_root_secret(result.home)
    connect(result, {})
    yield result
    ray.shutdown()


def flat(sums: Mapping[str, Any]) -> FloatArray:
    return np.concatenate([np.asarray(sums[name]).ravel() for name in sorted(sums)])


def test_two_ranks_behind_a_proxy_give_the_answer_of_one(settings: Settings) -> None:
    base = ServerModel(settings).initial_weights()
    task = TrainTask("run-0001", 1, weights_digest(base), "data", 1.0, 0.5, 1.0, 2, 0.1)
    proxy = spawn(ClientProxy, "silo-proxy", settings, settings_to_json(settings))
    answer: PartialSum = fetch(proxy.train.remote(task, base, [CLIENT]), TIMEOUT_S)
    assert [outcome.error for outcome in answer.outcomes] == [None]
    torch.set_num_threads(1)
    alone = one_rank(settings).train(task, base, [CLIENT])
    assert answer.total_weight == alone.total_weight
    result, truth = flat(answer.weighted_sum), flat(alone.weighted_sum)
    assert np.linalg.norm(result - truth) / np.linalg.norm(truth) < 1e-5
    # No room: the client's answer names the rank.
    cramped = settings.model_copy(update={"finetune": settings.finetune.model_copy(update={"cpus_per_rank": 64.0})})
    other = spawn(ClientProxy, "cramped-proxy", settings, settings_to_json(cramped))
    (outcome,) = fetch(other.train.remote(task, base, [CLIENT]), TIMEOUT_S).outcomes
    assert "no room for fedvit-rank-0" in str(outcome.error)

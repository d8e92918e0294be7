"""Faulty clients in drills: only in the folder of a drill, and only after the drill activates them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from raises import raises_naming

from fedvit.clients.host import ClientHost, vision_host
from fedvit.config import Settings
from fedvit.errors import ConfigError, StateError
from fedvit.models.build import build_model
from fedvit.models.trainable import trainable_weights
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.tools.simulation.rehearsal import (
    activate_faults,
    allow_rehearsal,
    check_rehearsal,
    faulty_clients,
    rehearsed_host,
)
from fedvit.types import TrainTask
from fedvit.updates import PartialSum
from fedvit.wire.tensors import weights_digest

torch.set_num_threads(1)
FACTOR = 10.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Four clients with ten images each; one of them turns its updates round."""
    folder, draw = tmp_path_factory.mktemp("rehearsal"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 1)):
        for name in ("green", "red"):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return load_settings(
        environ={},
        overrides={
            "home": folder / "var",
            "data": {
                "source": "folder",
                "path": folder / "images",
                "image_size": 16,
                "partition": {"scheme": "iid", "clients": 4, "min_examples": 2},
            },
            "model": {
                "pretrained": False,
                "trainable": "head",
                "hybrid": {"depth": 1, "width": 16, "heads": 2, "pooling_bands": 2},
            },
            "drill": {"faults": [{"share": 0.25, "kinds": ["sign_flip", "scale"], "factor": FACTOR}]},
        },
    )


def update_of(host: ClientHost, settings: Settings, client_id: str) -> np.ndarray:
    base = trainable_weights(build_model(settings.model, 2, 16))
    task = TrainTask("run-0001", 1, weights_digest(base), "d" * 64, 1.0, 0.5, 1.0, 1, 1.0)
    answer: PartialSum = host.train(task, base, [client_id])
    assert answer.outcomes[0].error is None
    return np.concatenate([np.ravel(answer.weighted_sum[name]) for name in sorted(answer.weighted_sum)])


def test_outside_a_drill_it_is_refused_in_words(settings: Settings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"home": tmp_path})
    for refuse in (check_rehearsal, rehearsed_host):
        with raises_naming(ConfigError, "drill.faults", "fedvit drill high-loss"):
            refuse(elsewhere)
    without_faults = load_settings(environ={}, overrides={"home": tmp_path})
    check_rehearsal(without_faults)


def test_a_folder_with_a_state_cannot_become_a_rehearsals(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    with pytest.raises(StateError):
        allow_rehearsal(tmp_path)


def test_faults_occur_after_the_drill_activates_them(settings: Settings) -> None:
    allow_rehearsal(settings.home)
    (faulty,) = faulty_clients(settings)
    correct = next(f"vehicle-{i:02d}" for i in range(9) if f"vehicle-{i:02d}" != faulty)
    host, plain = rehearsed_host(settings), vision_host(settings)
    truth = {client_id: update_of(plain, settings, client_id) for client_id in (faulty, correct)}
    for client_id in truth:
        np.testing.assert_array_equal(update_of(host, settings, client_id), truth[client_id])
    activate_faults(settings.home)
    np.testing.assert_allclose(update_of(host, settings, faulty), -FACTOR * truth[faulty], rtol=1e-9)
    np.testing.assert_array_equal(update_of(host, settings, correct), truth[correct])

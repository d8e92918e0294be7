"""The server's model: every variant it can publish, tried out on held-out images, from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fedvit.evaluation.server_model import ServerModel
from fedvit.settings import load_settings
from fedvit.types import Variant

PER_CLASS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServerModel:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(3)
    for name, colour in {"dark": 40, "light": 180}.items():
        (folder / name).mkdir()
        for index in range(PER_CLASS):
            pixels = (colour + generator.integers(0, 60, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    overrides = {
        "data": {"source": "folder", "path": folder, "image_size": 32, "options": {"test_fraction": 0.5}},
        "model": {"pretrained": False, "hybrid": {"width": 16, "heads": 2, "depth": 4}},
    }
    return ServerModel(load_settings(environ={}, overrides=overrides))


def test_every_variant_is_exported_and_tried_out(model: ServerModel) -> None:
    weights = model.initial_weights()
    exports = {variant: model.export(weights, variant) for variant in Variant}
    blocks = {variant: export.complexity["blocks"] for variant, export in exports.items()}
    assert blocks == {
        Variant.STANDARD: 4,
        Variant.STANDARD_INT8: 4,
        Variant.EDGE_OPTIMIZED: 2,
        Variant.EDGE_OPTIMIZED_FP32: 2,
    }
    standard, light = exports[Variant.STANDARD], exports[Variant.EDGE_OPTIMIZED_FP32]
    assert standard.agreement == 1.0
    assert light.complexity["parameters"] < standard.complexity["parameters"]
    assert 0 < light.complexity["multiply_adds"] < standard.complexity["multiply_adds"]
    assert len(exports[Variant.STANDARD_INT8].content) < len(standard.content)
    for export in exports.values():
        trial = model.benchmark(export.content)
        assert len(trial.predicted) == PER_CLASS
        assert 0 < trial.p50_ms <= trial.p95_ms


def test_a_trial_may_be_limited_and_takes_images_of_every_class(model: ServerModel) -> None:
    content = model.export(model.initial_weights(), Variant.STANDARD).content
    everything = model.benchmark(content).predicted
    assert len(model.benchmark(content, 5).predicted) == 5
    assert model.benchmark(content, 1000).predicted == everything
    assert model.benchmark(content, 2).predicted == (everything[0], everything[-1])


def test_threads_do_not_see_each_other_s_weights(model: ServerModel) -> None:
    start, generator = model.initial_weights(), np.random.default_rng(5)
    other = {name: (array + generator.normal(size=array.shape)).astype(np.float32) for name, array in start.items()}
    expected = [model.evaluate(weights).loss for weights in (start, other)]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(lambda weights: model.evaluate(weights).loss, [start, other] * 8))
    assert losses == pytest.approx(expected * 8)

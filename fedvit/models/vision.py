"""Vision model: a frozen prefix, whose features can be cached, and a trainable body."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fedvit.errors import ModelError
from fedvit.models.layers import Body

FEATURE_BATCH = 128
"""Batch size of the frozen prefix."""


class VisionModel(nn.Module):
    """uint8 images [B, H, W, 3] (RGB, H = W = ``image_size``) to logits [B, ``num_classes``].

    ``prefix`` is never trained and always in eval mode; its output can be computed once and cached.
    """

    def __init__(self, prefix: nn.Module, body: Body, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.prefix = prefix.requires_grad_(False)
        self.body = body
        self.image_size = image_size
        self.num_classes = num_classes
        self.train(False)

    def train(self, mode: bool = True) -> VisionModel:
        """Set the mode of the body. The prefix stays in eval mode: its BatchNorm must not learn from private images."""
        super().train(mode)
        self.prefix.eval()
        return self

    @torch.no_grad()
    def features(self, images_u8: Tensor) -> Tensor:
        """The body's inputs, float32 [B, ...], for uint8 images [B, H, W, 3].

        Raises:
            ModelError: the images are not uint8 or not of the model's size.
        """
        expected = (self.image_size, self.image_size, 3)
        if images_u8.dtype != torch.uint8 or tuple(images_u8.shape[1:]) != expected:
            raise ModelError(
                f"The model was given {images_u8.dtype} images of shape {list(images_u8.shape)}.",
                cure=f"Give uint8 RGB images [B, {self.image_size}, {self.image_size}, 3].",
            )
        features: Tensor = self.prefix(images_u8)
        return features

    def blocks_owners(self) -> list[nn.Module]:
        """The modules whose ``blocks`` are the transformer blocks, in order: one, one per stage, or none."""
        owners = [m for m in self.modules() if isinstance(getattr(m, "blocks", None), nn.Sequential | nn.ModuleList)]
        return [m for m in owners if any(hasattr(block, "attn") for block in cast("nn.Sequential", m.blocks))]

    def forward(self, images_u8: Tensor) -> Tensor:
        logits: Tensor = self.body(self.prefix(images_u8))
        return logits

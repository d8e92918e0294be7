"""Layers of the models, and the interface of a trainable model body."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


class Normalise(nn.Module):
    """uint8 images [B, H, W, 3] to normalised float32 [B, 3, H, W].

    It is a part of the model, so that an exported network takes the camera's bytes and no caller can differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255.0 * torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, images_u8: Tensor) -> Tensor:
        scaled = (images_u8.to(torch.float32) - self.mean) / self.std
        # A permuted tensor is channels_last in memory, for which Opacus computes wrong patch-embedding gradients.
        return scaled.permute(0, 3, 1, 2).contiguous()


class Body(nn.Module):
    """The part of a model that may be trained: frozen features in, logits [B, num_classes] out."""

    def classifier(self) -> nn.Module:
        """The head."""
        raise NotImplementedError


class HeadBody(Body):
    """A linear head on a frozen, pooled embedding [B, D]."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def classifier(self) -> nn.Module:
        return self.head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features)
        return logits


class PositionEmbedding(nn.Module):
    """Fixed two-dimensional sine-cosine positions, added to tokens [B, rows * columns, width].

    A learned table would need privacy noise for every token (Vaswani et al. 2017, arXiv:1706.03762, found no benefit).
    """

    table: Tensor

    def __init__(self, rows: int, columns: int, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("table", scale * _sine_cosine_2d(rows, columns, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.table


def _sine_cosine_2d(rows: int, columns: int, width: int) -> Tensor:
    """[1, rows * columns, width]; half of the channels encode the row, half the column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    half = width // 2
    halves = [_sine_cosine(row.flatten(), half), _sine_cosine(column.flatten(), width - half)]
    return torch.cat(halves, dim=1).unsqueeze(0)


def _sine_cosine(position: Tensor, width: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = position.to(torch.float32)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width]


class BandPool(nn.Module):
    """Means over horizontal bands: tokens [B, rows * columns, width] to [B, bands * width].

    The vertical position of a traffic light is its meaning; a mean over all tokens would lose it.
    """

    def __init__(self, rows: int, columns: int, bands: int) -> None:
        super().__init__()
        self.rows, self.columns, self.bands = rows, columns, bands

    def forward(self, tokens: Tensor) -> Tensor:
        edges = [round(band * self.rows / self.bands) * self.columns for band in range(self.bands + 1)]
        means = [tokens[:, low:high].mean(dim=1) for low, high in pairwise(edges)]
        return torch.cat(means, dim=1)


class UnitScale(nn.Module):
    """Layer norm without parameters, scaled so that every vector [..., size] has L2 norm at most one.

    This bounds the head's per-example gradient norm for every image, so that clipping treats examples alike.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.layer_norm(vectors, [self.size]) / math.sqrt(self.size)


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable update of low rank (Hu et al. 2021, arXiv:2106.09685).

    ``base(x) + up(down(x))``; ``up`` starts at zero, so that the layer starts as ``base``.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        # skip_init, because the usual initialisation uses torch's global generator.
        self.lora_a = skip_init(nn.Linear, base.in_features, rank, bias=False)
        self.lora_b = skip_init(nn.Linear, rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        frozen: Tensor = self.base(x)
        update: Tensor = self.lora_b(self.lora_a(x))
        return frozen + update

    def merged(self) -> nn.Linear:
        """An equivalent plain layer."""
        has_bias = self.base.bias is not None
        linear: nn.Linear = skip_init(nn.Linear, self.base.in_features, self.base.out_features, bias=has_bias)
        weight = self.base.weight + self.lora_b.weight @ self.lora_a.weight
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if has_bias:
            linear.bias = nn.Parameter(self.base.bias.detach(), requires_grad=False)
        return linear


def replace_modules(root: nn.Module, old: Sequence[tuple[str, nn.Module]], new: Iterator[nn.Module]) -> None:
    """Replace the ``old`` modules, given by their names under ``root``, by the ``new`` ones."""
    for (name, _), module in zip(old, new, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, module)

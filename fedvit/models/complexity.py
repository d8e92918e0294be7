"""How large a network is, and how much it computes."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedvit.models.vision import VisionModel


def complexity(model: VisionModel) -> dict[str, float]:
    """``parameters``, transformer ``blocks``, and ``multiply_adds`` of one image (matrix products, convolutions)."""
    image = torch.zeros(1, model.image_size, model.image_size, 3, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "blocks": float(sum(len(cast("nn.Sequential", owner.blocks)) for owner in model.blocks_owners())),
        "multiply_adds": counter.get_total_flops() / 2,
    }

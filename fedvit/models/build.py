"""Construction of the configured vision model."""

from __future__ import annotations

import torch

from fedvit.config.model import HYBRID_NAME, ModelConfig
from fedvit.models.hybrid import build_hybrid
from fedvit.models.timm_vit import build_timm_vit
from fedvit.models.trainable import apply_trainable
from fedvit.models.vision import VisionModel


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> VisionModel:
    """The model that ``config`` describes, with its trainable mode applied.

    The same arguments give the same weights everywhere; torch's global generator is not used.

    Raises:
        ModelError: the name is unknown or not a ViT, weights are missing or do not fit, or the mode cannot be applied.
    """
    build = build_hybrid if config.name == HYBRID_NAME else build_timm_vit
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        prefix, body = build(config, num_classes, image_size)
    model = VisionModel(prefix, body, image_size, num_classes)
    apply_trainable(model, config.trainable, config.adapter_rank, seed=config.seed)
    return model

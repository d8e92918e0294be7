"""Models and records of audits: the smallest model of each family, a linear model, and hostile records."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedvit.clients.local import LocalTrainer
from fedvit.config import HybridConfig, ModelConfig
from fedvit.dp.bookkeeping import BookKeeping
from fedvit.dp.dpsgd import check_per_example_gradients
from fedvit.dp.gradients import PerExampleGradients
from fedvit.dp.opacus_gradients import OpacusGradients
from fedvit.models.build import build_model
from fedvit.models.layers import Body, HeadBody, Normalise
from fedvit.models.timm_vit import TimmBody
from fedvit.models.trainable import TrainableMode, apply_trainable
from fedvit.models.vision import VisionModel
from fedvit.types import FloatArray

IMAGE_SIZE, CLASSES = 16, 3
NO_CLASS = -100
"""The label that cross-entropy ignores: an example without a gradient."""
_NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _NARROW),
    "deit3": ("deit3_small_patch16_224", _NARROW),
    "dinov2": ("vit_small_patch14_dinov2", _NARROW),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", _NARROW),
    "beit": ("beit_base_patch16_224", _NARROW),
    "eva02": ("eva02_tiny_patch14_224", _NARROW),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2},
    ),
}
HYBRID, PATCHES = "hybrid", "patches alone"


def family(name: str, mode: TrainableMode) -> VisionModel:
    """A family's smallest model; its trained weights are random and not zero, because zeros would hide faults."""
    if name == HYBRID:
        config = ModelConfig(pretrained=False, trainable=mode, hybrid=HybridConfig(width=16, heads=2))
        return perturbed(build_model(config, CLASSES, 32))
    if name == PATCHES:
        with torch.random.fork_rng(devices=[]):
            # With these weights hostile images saturate almost all patches.
            torch.manual_seed(42)
            patches = VisionModel(Normalise([0.5] * 3, [0.5] * 3), _Patches(), IMAGE_SIZE, CLASSES)
        apply_trainable(patches, mode, 2)
        return perturbed(patches)
    import timm

    architecture, options = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(architecture, img_size=IMAGE_SIZE, num_classes=CLASSES, **options)
    model = VisionModel(Normalise([0.5] * 3, [0.5] * 3), TimmBody(vit), IMAGE_SIZE, CLASSES)
    apply_trainable(model, mode, 2)
    return perturbed(model)


class _Patches(Body):
    """A patch embedding and a head without other tokens, so that Opacus handles every layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, CLASSES)

    def classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(images).flatten(2).tanh().mean(dim=2))
        return logits


def perturbed(model: VisionModel, deviation: float = 0.1) -> VisionModel:
    """The model after adding random numbers to each trained weight."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.body.parameters():
            if parameter.requires_grad:
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))
    return model


class _Pixels(nn.Module):
    """The first ``count`` numbers of uint8 images, scaled to 0 to ``brightness``: one lit pixel is one feature."""

    def __init__(self, count: int, brightness: float) -> None:
        super().__init__()
        self._count, self._brightness = count, brightness

    def forward(self, images_u8: Tensor) -> Tensor:
        return images_u8.flatten(1)[:, : self._count].float() * (self._brightness / 255)


def linear_model(count: int, brightness: float = 8.0) -> VisionModel:
    """A linear head of zeros on ``count`` pixels (at most 768); with this brightness the bias has a small gradient."""
    head = nn.Linear(count, CLASSES)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return VisionModel(_Pixels(count, brightness), HeadBody(head), IMAGE_SIZE, CLASSES)


def trainer_of(model: VisionModel, engine: str | None = None, physical_batch_size: int = 64) -> LocalTrainer:
    """A trainer with the named engine, or with the one that it selects.

    Book-keeping is not checked first: a faulty one would be replaced by Opacus, and not be audited.

    Raises:
        ModelError: the engine does not support the model.
    """
    gradients: PerExampleGradients | None = None
    if engine == BookKeeping.engine:
        gradients = BookKeeping(model.body, "body.")
    elif engine == OpacusGradients.engine:
        gradients = OpacusGradients(model.body, "body.")
        check_per_example_gradients(gradients, ordinary_records(model, 2)[0])
    return LocalTrainer(model, physical_batch_size=physical_batch_size, gradients=gradients)


def weights_of(model: VisionModel) -> dict[str, FloatArray]:
    """The initial trainable weights."""
    from fedvit.models.trainable import trainable_weights

    return trainable_weights(model)


def ordinary_records(model: VisionModel, count: int) -> tuple[Tensor, Tensor]:
    """Features [count, ...] of random images, and labels [count]."""
    generator = torch.Generator().manual_seed(6)
    shape = (count, model.image_size, model.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return model.features(images), torch.arange(count) % CLASSES


def hostile_records(model: VisionModel) -> tuple[Tensor, Tensor]:
    """Ordinary records, a duplicate, one without a gradient, and ones with large, overflowing and NaN features."""
    features, labels = ordinary_records(model, 8)
    features[3], labels[3] = features[0], labels[0]
    labels[4] = NO_CLASS
    features[5] *= 1e4
    features[6] = 3e38
    features[7] = float("nan")
    return features, labels

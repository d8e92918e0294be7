"""The training steps that dp_step.py compares: the same small ViT, trained ordinarily, privately, and by Opacus."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional

from fedvit.config import TrainingConfig
from fedvit.dp.bookkeeping import BookKeeping
from fedvit.dp.dpsgd import SecretDPOptimizer
from fedvit.models.layers import Body, HeadBody
from fedvit.models.timm_vit import TimmBody
from fedvit.models.trainable import TrainableMode, apply_trainable
from fedvit.models.vision import VisionModel
from fedvit.privacy.randomness import SecretStream

CLIP, SIGMA, LEARNING_RATE = 1.0, 1.0, 0.1
CLASSES = 10
Step = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Size:
    """What is trained: a timm model and one batch of random pictures; ``autocast`` computes in bfloat16.

    Private steps take the batch in parts of ``physical_batch``, as a client does.
    """

    name: str = "vit_tiny_patch16_224"
    image: int = 32
    patch: int = 4
    batch: int = 64
    physical_batch: int = TrainingConfig().physical_batch_size
    device: str = "cpu"
    autocast: bool = False

    def model(self, mode: TrainableMode) -> VisionModel:
        """The model in a trainable mode, the same weights every time; only ``head`` has a frozen backbone."""
        torch.manual_seed(0)
        options = {"img_size": self.image, "patch_size": self.patch, "num_classes": CLASSES}
        vit: Any = timm.create_model(self.name, **options).to(self.device)
        prefix: nn.Module = nn.Identity()
        body: Body = TimmBody(vit)
        if mode == "head":
            body = HeadBody(vit.get_classifier())
            vit.reset_classifier(0)
            prefix = vit
        model = VisionModel(prefix, body, self.image, CLASSES)
        apply_trainable(model, mode, 4)
        return model

    def data(self) -> tuple[Tensor, Tensor]:
        """Normalised pictures [B, 3, S, S] and labels [B]."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.randint(0, CLASSES, (self.batch,), generator=generator)
        return images.to(self.device), labels.to(self.device)

    def precision(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.autocast)


def ordinary(size: Size, mode: TrainableMode) -> Step:
    """Forward, backward, SGD."""
    model, (images, labels) = size.model(mode), size.data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step() -> None:
        with size.precision():
            loss = functional.cross_entropy(model.body(_features(model, images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def private(size: Size, mode: TrainableMode) -> Step:
    """Forward, backward, clip, secret noise, SGD: what a client does in a step."""
    model, (images, labels) = size.model(mode), size.data()
    gradients = BookKeeping(model.body, "body.")
    optimizer = SecretDPOptimizer(
        list(gradients.parameters.values()),
        learning_rate=LEARNING_RATE,
        noise_multiplier=SIGMA,
        l2_clip_norm=CLIP,
        expected_batch=size.batch,
        noise_for_step=lambda step: SecretStream(bytes(32), "benchmark", {"step": step}),
    )

    def step() -> None:
        parts = torch.arange(size.batch).split(size.physical_batch)
        for position, part in enumerate(parts, start=1):
            with size.precision():
                gradients.clip(_features(model, images[part]), labels[part], CLIP)
            optimizer.signal_skip_step(do_skip=position < len(parts))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _features(model: VisionModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = model.prefix(images)
    return features


class _Tokens(nn.Module):
    """The raw parameters in a module of their own: on the whole transformer Opacus would differentiate it by vmap."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed

    def forward(self, patches: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed


class _OpacusBody(nn.Module):
    """The same transformer, laid out for Opacus."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.tokens = _Tokens(vit)
        self.patch_embed, self.blocks, self.norm, self.head = vit.patch_embed, vit.blocks, vit.norm, vit.head

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.blocks(self.tokens(self.patch_embed(images))))
        logits: Tensor = self.head(tokens[:, 0])
        return logits


def _opacus_body(size: Size) -> nn.Module:
    body: Any = size.model("all").body
    return _OpacusBody(body.vit).train()


def opacus_formed(size: Size, wrap: Callable[..., Any]) -> Step:
    """Opacus forming every gradient; ``wrap`` makes its module."""
    module, (images, labels) = wrap(_opacus_body(size)), size.data()
    optimizer = DPOptimizer(torch.optim.SGD(module.parameters(), lr=LEARNING_RATE), **_options(size))

    def step() -> None:
        with size.precision():
            loss = functional.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_ghost(size: Size) -> Step:
    """Opacus' ghost clipping: two backward passes."""
    module = GradSampleModuleFastGradientClipping(_opacus_body(size), max_grad_norm=CLIP, use_ghost_clipping=True)
    images, labels = size.data()
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=LEARNING_RATE), **_options(size)
    )
    criterion = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        with size.precision():
            loss = criterion(module(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _options(size: Size) -> dict[str, Any]:
    return {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "expected_batch_size": size.batch}


VARIANTS: dict[str, Callable[[Size], Step]] = {
    "all, ordinary": lambda size: ordinary(size, "all"),
    "all, private": lambda size: private(size, "all"),
    "all, Opacus hooks": lambda size: opacus_formed(size, GradSampleModule),
    "all, Opacus ghost clipping": opacus_ghost,
    "all, Opacus functorch": lambda size: opacus_formed(
        size, lambda body: GradSampleModule(body, force_functorch=True)
    ),
    "all, Opacus expanded weights": lambda size: opacus_formed(size, GradSampleModuleExpandedWeights),
    "biases, ordinary": lambda size: ordinary(size, "biases"),
    "biases, private": lambda size: private(size, "biases"),
    "head, ordinary": lambda size: ordinary(size, "head"),
    "head, private": lambda size: private(size, "head"),
}


def build(name: str, size: Size) -> Step:
    """One variant, ready to step.

    Raises:
        Exception: Opacus' own, in a mode that cannot do this model.
    """
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    return VARIANTS[name](size)

"""Clipped sums of per-example gradients, as an optimiser asks for them, whatever computes them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedvit.errors import ModelError
from fedvit.models.layers import Body

# As in Opacus: keeps an example without gradient finite, and every other a hair below the bound.
_NORM_MARGIN = 1e-6


class PerExampleGradients(ABC):
    """A private copy of a body that leaves the sum of clipped per-example gradients in ``parameter.grad``.

    The copy keeps whatever an engine does to a model away from the one it was made from; frozen parameters are shared.

    Args:
        body: in the trainable mode wanted.
        prefix: of the names in ``parameters``: the body's own name in its model, with the dot.
    """

    engine: str

    def __init__(self, body: Body, prefix: str) -> None:
        frozen = {id(p): p for p in body.parameters() if not p.requires_grad}
        self.module: nn.Module = copy.deepcopy(body, memo=dict(frozen)).eval()
        self.parameters = {prefix + name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.num_not_finite = 0

    def clip(self, features: Tensor, labels: Tensor, l2_clip_norm: float) -> None:
        """Put the sum over B examples into every ``grad``: each one's gradient of the cross-entropy, L2-clipped.

        An example whose gradient has no finite norm counts as zero; ``num_not_finite`` says how many did. That number
        is private: it must not leave the client without noise.

        Args:
            features: [B, ...]; B may be 0.
            labels: [B], int64 class indices.
        """
        self.num_not_finite = 0
        if len(labels) == 0:
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            return
        for name, clipped in self._clipped_sums(features, labels, l2_clip_norm).items():
            self.parameters[name].grad = clipped.to(self.parameters[name].dtype)

    def factors(self, norms: Tensor, l2_clip_norm: float) -> Tensor:
        """What each example of these gradient norms [B] is multiplied with: at most 1, and 0 without a finite norm."""
        finite = torch.isfinite(norms)
        self.num_not_finite = int((~finite).sum())
        return torch.where(finite, (l2_clip_norm / (norms + _NORM_MARGIN)).clamp(max=1.0), 0.0)

    @abstractmethod
    def samples(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """All gradients [B, ...] one by one, by name; for checks, because it costs what the engine saves.

        Raises:
            ModelError: the engine cannot do this model.
        """

    @abstractmethod
    def _clipped_sums(self, features: Tensor, labels: Tensor, l2_clip_norm: float) -> dict[str, Tensor]: ...

    def plain(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Torch's own gradient of the summed loss, by name."""
        loss = self._loss(self.module(features), labels)
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(self.parameters, found, strict=True))

    @torch.no_grad()
    def least_likely(self, features: Tensor) -> Tensor:
        """The class [B] that each example is called least: labels that give gradients well above rounding."""
        logits: Tensor = self.module(features)
        return logits.argmin(dim=1)

    def clear(self) -> None:
        """Forget all gradients, also what a pass that failed half way has left."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="sum")


def no_gradients(engine: str, reason: str) -> ModelError:
    """The error of a model that an engine has no true per-example gradients of."""
    return ModelError(
        f"{engine} cannot compute per-example gradients of this model: {reason}.",
        cure="Choose trainable 'head' or 'adapters', or another model.",
    )

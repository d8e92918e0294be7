"""Interface of the engines that compute clipped sums of per-example gradients."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedvit.errors import ModelError
from fedvit.models.layers import Body

# As in Opacus: avoids a division by zero, and leaves every other gradient just below the bound.
_NORM_MARGIN = 1e-6


class PerExampleGradients(ABC):
    """A copy of a body that leaves the sum of clipped per-example gradients in ``parameter.grad``.

    The original body is never changed by an engine; frozen parameters are shared.

    Args:
        body: in the trainable mode wanted.
        prefix: the body's own name in its model, with the dot; the names in ``parameters`` begin with it.
    """

    engine: str

    def __init__(self, body: Body, prefix: str) -> None:
        frozen = {id(p): p for p in body.parameters() if not p.requires_grad}
        self.module: nn.Module = copy.deepcopy(body, memo=dict(frozen)).eval()
        self.parameters = {prefix + name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.num_not_finite = 0

    def clip(self, features: Tensor, labels: Tensor, l2_clip_norm: float) -> None:
        """Put the sum of B examples' gradients of the cross-entropy, each L2-clipped, into every ``grad``.

        An example whose gradient has no finite norm counts as zero. ``num_not_finite`` is the number of such examples;
        it is private and must not leave the client without noise.

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
        """Clipping factors [B] for gradient norms [B]: at most 1, and 0 for a norm that is not finite."""
        finite = torch.isfinite(norms)
        self.num_not_finite = int((~finite).sum())
        return torch.where(finite, (l2_clip_norm / (norms + _NORM_MARGIN)).clamp(max=1.0), 0.0)

    @abstractmethod
    def samples(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Each example's own gradient [B, ...], by name; only for checks, because it is slow.

        Raises:
            ModelError: the engine does not support this model; the message names the parameter.
        """

    @abstractmethod
    def _clipped_sums(self, features: Tensor, labels: Tensor, l2_clip_norm: float) -> dict[str, Tensor]: ...

    def plain(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Torch's own gradient of the summed loss, by name."""
        loss = self._loss(self.module(features), labels)
        values = list(self.parameters.values())
        gradients = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
        return dict(zip(self.parameters, gradients, strict=True))

    def clear(self) -> None:
        """Delete all gradients, including those that a failed pass left behind."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="sum")


def no_gradients(engine: str, reason: str) -> ModelError:
    """The error for a model whose per-example gradients an engine cannot compute correctly."""
    return ModelError(
        f"{engine} cannot compute per-example gradients of this model: {reason}.",
        cure="Choose trainable 'head' or 'adapters', or another model.",
    )

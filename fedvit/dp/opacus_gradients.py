"""Per-example gradients by Opacus: the reference, and the engine for models that book-keeping does not support."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from timm.layers import LayerNorm
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from fedvit.dp.gradients import PerExampleGradients, no_gradients
from fedvit.dp.recorder import at_least_single
from fedvit.models.layers import Body

# Opacus looks up samplers by exact class; timm's subclass would use the slow path.
register_grad_sampler(LayerNorm)(compute_layer_norm_grad_sample)


@register_grad_sampler(LayerScale)  # type: ignore[untyped-decorator]  # opacus is untyped
def _layer_scale_grad_sample(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    product = activations[0] * backprops
    return {layer.gamma: product.flatten(1, -2).sum(dim=1)}


class OpacusGradients(PerExampleGradients):
    """An engine that materializes every gradient by Opacus' hooks, in more than twice the time of ordinary training.

    Raises:
        ModelError: Opacus does not support this body; the message names the layer.
    """

    engine = "Opacus"

    def __init__(self, body: Body, prefix: str) -> None:
        super().__init__(body, prefix)
        for name, part in self.module.named_modules():
            # Opacus handles modules in train mode only; all others (dropout, frozen norms) must stay deterministic.
            part.training = any(p.requires_grad for p in part.parameters(recurse=False))
            # A buffer may carry one example into another. Opacus refuses it too, but prints the whole layer.
            if part.training and any(True for _ in part.buffers()):
                raise no_gradients(self.engine, f"{prefix}{name} has both trainable parameters and buffers")
        self._wrapped = GradSampleModule(self.module, loss_reduction="sum", strict=True)

    def samples(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        try:
            return self._samples(features, labels)
        except RuntimeError as error:
            raise no_gradients(OpacusGradients.engine, str(error).splitlines()[0]) from error
        finally:
            self.clear()

    def plain(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self._wrapped.disable_hooks()
        try:
            with _quiet_hooks():
                return super().plain(features, labels)
        finally:
            self._wrapped.enable_hooks()

    def clear(self) -> None:
        super().clear()
        for parameter in self.parameters.values():
            parameter.__dict__.pop("_current_grad_sample", None)
            parameter.grad_sample, parameter._forward_counter = None, 0  # type: ignore[attr-defined]
        for module in self._wrapped.modules():
            for leftover in ("activations", "max_batch_len"):
                module.__dict__.pop(leftover, None)

    def _clipped_sums(self, features: Tensor, labels: Tensor, l2_clip_norm: float) -> dict[str, Tensor]:
        samples = self._samples(features, labels)
        # Autocast would round norms and sums, and the sum could exceed the bound.
        with torch.autocast(features.device.type, enabled=False):
            samples = {name: at_least_single(sample) for name, sample in samples.items()}
            squares = torch.stack([sample.flatten(1).square().sum(dim=1) for sample in samples.values()])
            factors = self.factors(squares.sum(dim=0).sqrt(), l2_clip_norm)
            counted = factors != 0
            self.clear()
            return {n: torch.einsum("i,i...", factors[counted], sample[counted]) for n, sample in samples.items()}

    def _samples(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with _quiet_hooks():
            # Contiguous: on a channels_last input Opacus computes wrong convolution gradients.
            self._loss(self._wrapped(features.contiguous()), labels).backward()
        return {name: _sample(name, parameter) for name, parameter in self.parameters.items()}


def _sample(name: str, parameter: nn.Parameter) -> Tensor:
    sample = getattr(parameter, "grad_sample", None)
    if not isinstance(sample, Tensor):
        raise no_gradients(OpacusGradients.engine, f"{name} got none")
    return sample


@contextmanager
def _quiet_hooks() -> Iterator[None]:
    """Suppress torch's warning that the first layers' inputs need no gradient, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield

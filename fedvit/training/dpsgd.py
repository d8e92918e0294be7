"""Record-level DP-SGD (Abadi et al. 2016, arXiv:1607.00133): per-example gradients, clipping, and secret noise."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from opacus.optimizers import DPOptimizer
from timm.layers import LayerNorm
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.nn import functional

from fedvit.errors import ModelError
from fedvit.privacy.randomness import SecretStream
from fedvit.vit.layers import Body

# Of a parameter's own gradient, and of the whole one: rounding, for gradients that ought to vanish.
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 1e-3, 1e-5

# Opacus looks samplers up by exact class; timm's subclass would fall onto its slow path.
register_grad_sampler(LayerNorm)(compute_layer_norm_grad_sample)


@register_grad_sampler(LayerScale)  # type: ignore[untyped-decorator]  # opacus is untyped
def _layer_scale_grad_sample(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    product = activations[0] * backprops
    return {layer.gamma: product.flatten(1, -2).sum(dim=1)}


class SecretDPOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus is untyped
    """Opacus' optimizer with noise from a client's secret stream, and non-finite examples counted as zero.

    Args:
        parameters: the trainable ones, always in the same order.
        learning_rate: of plain SGD.
        noise_multiplier: standard deviation of the noise over ``l2_clip_norm``.
        l2_clip_norm: bound on one example's gradient, L2 over all parameters together.
        expected_batch: constant divisor: sampling probability times number of examples. Never the drawn size, which is
            private.
        noise_for_step: the noise stream of the step of this index.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        learning_rate: float,
        noise_multiplier: float,
        l2_clip_norm: float,
        expected_batch: float,
        noise_for_step: Callable[[int], SecretStream],
    ) -> None:
        super().__init__(
            torch.optim.SGD(parameters, lr=learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=l2_clip_norm,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
        )
        self._noise_for_step = noise_for_step
        self._step_index = 0

    def clip_and_accumulate(self) -> None:
        """Add the clipped per-example gradients [B, ...] to the sums; a non-finite one counts as zero."""
        _zero_non_finite_examples(self.grad_samples)
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Put sum + noise into every gradient; the noise depends on secret, release and step alone."""
        stream = self._noise_for_step(self._step_index)
        self._step_index += 1
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = torch.from_numpy(deviation * stream.normal(parameter.numel()))
            noise = noise.to(parameter.device, parameter.dtype).view_as(parameter)
            parameter.grad = parameter.summed_grad.view_as(parameter) + noise


def _zero_non_finite_examples(grad_samples: list[Tensor]) -> None:
    """Zero, in every parameter, the examples whose gradient has no finite norm: one such would poison the sum."""
    squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in grad_samples]).sum(dim=0)
    bad = ~torch.isfinite(squares)
    if bool(bad.any()):
        for grad_sample in grad_samples:
            grad_sample[bad] = 0.0


class PerExampleGradients:
    """A private copy of a body that leaves a gradient [B, ...] an example in ``parameter.grad_sample``.

    The copy keeps Opacus' hooks away from the model it was made from; frozen parameters are shared with it.

    Args:
        body: in the trainable mode wanted.
        prefix: of the names in ``parameters``: the body's own name in its model, with the dot.

    Raises:
        ModelError: Opacus cannot do this body, naming the layer.
    """

    def __init__(self, body: Body, prefix: str) -> None:
        frozen = {id(p): p for p in body.parameters() if not p.requires_grad}
        module = copy.deepcopy(body, memo=dict(frozen))
        _train_mode_where_trained(module)
        _refuse_buffers(module, prefix)
        self._wrapped = GradSampleModule(module, loss_reduction="sum", strict=True)
        self.parameters = {prefix + name: p for name, p in module.named_parameters() if p.requires_grad}

    def compute(self, features: Tensor, labels: Tensor) -> None:
        """Fill ``grad_sample`` of every trainable parameter with B gradients of the cross-entropy loss; B may be 0."""
        if len(labels) == 0:
            for parameter in self.parameters.values():
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
            return
        with _quiet_hooks():
            self._loss(features, labels).backward()
        for parameter in self.parameters.values():
            parameter.grad = None

    def plain(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Torch's own gradient of the summed loss, by name."""
        self._wrapped.disable_hooks()
        try:
            with _quiet_hooks():
                found = torch.autograd.grad(self._loss(features, labels), list(self.parameters.values()))
        finally:
            self._wrapped.enable_hooks()
        return dict(zip(self.parameters, found, strict=True))

    @torch.no_grad()
    def least_likely(self, features: Tensor) -> Tensor:
        """The class [B] that each example is called least: labels that give gradients well above rounding."""
        logits: Tensor = self._wrapped(features)
        return logits.argmin(dim=1)

    def clear(self) -> None:
        """Forget all gradients, also what a pass that failed half way has left in Opacus' hooks."""
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.__dict__.pop("_current_grad_sample", None)
            parameter.grad_sample, parameter._forward_counter = None, 0  # type: ignore[attr-defined]
        for module in self._wrapped.modules():
            for leftover in ("activations", "max_batch_len"):
                module.__dict__.pop(leftover, None)

    def _loss(self, features: Tensor, labels: Tensor) -> Tensor:
        # Contiguous: on a channels_last input Opacus computes wrong convolution gradients.
        return functional.cross_entropy(self._wrapped(features.contiguous()), labels, reduction="sum")


@contextmanager
def _quiet_hooks() -> Iterator[None]:
    """The first layers' inputs need no gradient; torch warns of it at their hooks, though it is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _train_mode_where_trained(module: nn.Module) -> None:
    """Opacus observes modules in train mode only; everything else (dropout, frozen norms) must stay deterministic."""
    for part in module.modules():
        part.training = any(p.requires_grad for p in part.parameters(recurse=False))


def _refuse_buffers(module: nn.Module, prefix: str) -> None:
    """Opacus refuses them too, with a printout of the whole layer: a buffer may carry one example into another."""
    for name, part in module.named_modules():
        if part.training and any(True for _ in part.buffers()):
            raise _unsupported(f"{prefix}{name} has both trainable parameters and buffers")


def check_per_example_gradients(gradients: PerExampleGradients, features: Tensor) -> None:
    """Compare Opacus with plain differentiation, one example at a time: a wrong gradient would break the guarantee.

    Leaves random values in the parameters, because a fresh head of zeros would hide every fault below it.

    Args:
        features: of a few public, distinct images.

    Raises:
        ModelError: a parameter got no per-example gradient, or a wrong one.
    """
    _randomise(gradients.parameters)
    labels = gradients.least_likely(features)
    try:
        gradients.compute(features, labels)
    except RuntimeError as error:
        raise _unsupported(str(error).splitlines()[0]) from error
    batched = {name: _samples(name, p) for name, p in gradients.parameters.items()}
    gradients.clear()
    for index in range(len(features)):
        truth = gradients.plain(features[index : index + 1], labels[index : index + 1])
        _compare({name: g[index] for name, g in batched.items()}, truth)


def _compare(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    whole = torch.stack([g.norm() for g in truth.values()]).norm()
    for name, gradient in truth.items():
        allowed = _RELATIVE_TOLERANCE * gradient.norm() + _ABSOLUTE_TOLERANCE * whole
        if not bool((found[name] - gradient).norm() <= allowed):
            raise _unsupported(f"that of {name} is wrong")


def _randomise(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _samples(name: str, parameter: nn.Parameter) -> Tensor:
    samples = getattr(parameter, "grad_sample", None)
    if not isinstance(samples, Tensor):
        raise _unsupported(f"{name} got none")
    return samples


def _unsupported(reason: str) -> ModelError:
    return ModelError(
        f"Opacus cannot compute per-example gradients of this model: {reason}.",
        cure="Choose trainable 'head' or 'adapters', or another model.",
    )

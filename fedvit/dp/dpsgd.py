"""Record-level DP-SGD (Abadi et al. 2016, arXiv:1607.00133): choice of the gradient engine, and the noised step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from fedvit.dp.bookkeeping import BookKeeping
from fedvit.dp.gradients import PerExampleGradients, no_gradients
from fedvit.dp.opacus_gradients import OpacusGradients
from fedvit.errors import ModelError
from fedvit.models.layers import Body

# Of a parameter's gradient, and of the whole gradient: rounding, for gradients that should be zero.
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 1e-3, 1e-5


class Normals(Protocol):
    """A source of standard normal numbers, such as :class:`fedvit.privacy.randomness.SecretStream`."""

    def normal(self, count: int, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """``count`` numbers."""


class SecretDPOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # opacus is untyped
    """Opacus' optimizer for gradients that are already clipped, with noise from a client's secret stream.

    Before each step, every ``grad`` holds the clipped sum of a physical batch, see :class:`PerExampleGradients`.

    Args:
        parameters: the trainable ones, always in the same order.
        learning_rate: of plain SGD.
        noise_multiplier: standard deviation of the noise over ``l2_clip_norm``.
        l2_clip_norm: bound on one example's gradient, L2 over all parameters together.
        expected_batch: constant divisor: sampling probability times number of examples. The size of the drawn batch is
            private and is never used.
        noise_for_step: the noise stream of the step of this index.
        inner: makes the optimiser that takes the noised gradient, instead of plain SGD.
        first_step: index of the next step, for a resumed run.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        learning_rate: float,
        noise_multiplier: float,
        l2_clip_norm: float,
        expected_batch: float,
        noise_for_step: Callable[[int], Normals],
        inner: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        first_step: int = 0,
    ) -> None:
        super().__init__(
            torch.optim.SGD(parameters, lr=learning_rate) if inner is None else inner(parameters),
            noise_multiplier=noise_multiplier,
            max_grad_norm=l2_clip_norm,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
        )
        self._noise_for_step = noise_for_step
        self._step_index = first_step
        # The gradients of the latest step in one array; each ``grad`` is a view of a part of it.
        self._noised = torch.empty(0)

    def accumulate(self) -> None:
        """Add every ``grad`` to its sum, without the copy that Opacus makes of the first."""
        for parameter in self.params:
            if parameter.summed_grad is None:
                parameter.summed_grad = parameter.grad
            else:
                parameter.summed_grad += parameter.grad
            parameter.grad = None

    def add_noise(self) -> None:
        """Put sum + noise into every gradient. The noise depends on nothing but the secret, the output and the step."""
        stream = self._noise_for_step(self._step_index)
        self._step_index += 1
        deviation = self.noise_multiplier * self.max_grad_norm
        sizes = [parameter.numel() for parameter in self.params]
        # One draw for all parameters is faster and gives the same numbers.
        noise = torch.from_numpy(stream.normal(sum(sizes), np.float32))
        self._noised = noise.to(self.params[0].device, self.params[0].dtype)
        for parameter, own in zip(self.params, self._noised.split(sizes), strict=True):
            # Added to the noise, which is contiguous; a sum may not be.
            parameter.grad = own.view_as(parameter).mul_(deviation).add_(parameter.summed_grad)
            parameter.summed_grad = None

    def zero_grad(self, set_to_none: bool = False) -> None:
        self._noised = torch.empty(0)
        super().zero_grad(set_to_none)


def per_example_gradients(body: Body, prefix: str, features: Tensor) -> PerExampleGradients:
    """The cheapest engine that is correct for this body: book-keeping, or else Opacus.

    The engine's parameters hold random values afterwards.

    Args:
        body: in the trainable mode wanted.
        prefix: the body's own name in its model, with the dot.
        features: of a few public, distinct images, to check the engine with.

    Raises:
        ModelError: neither engine supports the body; the message names the parameter or the layer.
    """
    engines: tuple[type[PerExampleGradients], ...] = (BookKeeping, OpacusGradients)
    refusals: list[ModelError] = []
    for engine in engines:
        try:
            gradients = engine(body, prefix)
            check_per_example_gradients(gradients, features)
            return gradients
        except ModelError as error:
            refusals.append(error)
    reasons = " ".join(error.message for error in refusals)
    raise ModelError(reasons, cure=refusals[-1].cure) from refusals[0]


def check_per_example_gradients(gradients: PerExampleGradients, features: Tensor) -> None:
    """Compare an engine with plain differentiation, one example at a time: wrong gradients would void the guarantee.

    The parameters hold random values afterwards, because a fresh head of zeros would hide every fault below it.

    Args:
        features: of a few public, distinct images.

    Raises:
        ModelError: a parameter has no per-example gradient, a wrong one, or a wrong share in the clipped sum.
    """
    buffers = {name: buffer.clone() for name, buffer in gradients.module.named_buffers()}
    _randomise(gradients.parameters)
    # The least likely classes, whose gradients are well above rounding errors.
    with torch.no_grad():
        labels = gradients.module(features).argmin(dim=1)
    samples = gradients.samples(features, labels)
    truth = [gradients.plain(features[i : i + 1], labels[i : i + 1]) for i in range(len(features))]
    for index, true in enumerate(truth):
        _compare(gradients.engine, {name: each[index] for name, each in samples.items()}, true)
    norms = torch.stack([torch.stack([g.norm() for g in true.values()]).norm() for true in truth])
    # The mean, so that some examples are clipped and others are not.
    l2_clip_norm = float(norms.mean())
    factors = gradients.factors(norms, l2_clip_norm)
    gradients.clip(features, labels, l2_clip_norm)
    sums = {
        name: torch.stack([f * true[name] for f, true in zip(factors, truth, strict=True)]).sum(0) for name in samples
    }
    _compare(gradients.engine, {n: p.grad for n, p in gradients.parameters.items() if p.grad is not None}, sums)
    gradients.clear()
    for name, buffer in gradients.module.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise no_gradients(gradients.engine, f"the buffer {name} changes, and may carry one example into another")


def _compare(engine: str, computed: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    whole = torch.stack([g.norm() for g in truth.values()]).norm()
    for name, gradient in truth.items():
        allowed = _RELATIVE_TOLERANCE * gradient.norm() + _ABSOLUTE_TOLERANCE * whole
        if not bool((computed[name] - gradient).norm() <= allowed):
            raise no_gradients(engine, f"that of {name} is wrong")


def _randomise(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))

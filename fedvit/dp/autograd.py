"""Autograd functions that compute what torch's own do, and hand what parameters' gradients are made of to a tape."""

# mypy: disable-error-code="no-untyped-call, override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedvit.dp.recorder import GradientRecorder, Layer, sum_of_tokens

# One token in so many is few.
_FEW = 4
# Below this, no product of these numbers, nor a sum of such products, leaves float32.
_ORDINARY = 1e6


class RecordedLinear(Function):
    """``linear`` [B * k, ..., d] to [B * k, ..., p]; a weight of more dimensions is flattened to [p, d].

    Without a trained weight no activation is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Layer,
        tape: GradientRecorder,
    ) -> Tensor:
        """The layer's outputs."""
        ctx.save_for_backward(inputs if layer.weight is not None else None, weight)
        ctx.tape, ctx.layer = tape, layer
        return functional.linear(inputs, weight.flatten(1), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The inputs' gradient; the parameters' goes to the tape."""
        inputs, weight = ctx.saved_tensors
        tokens = _few_tokens(gradient, inputs, weight)
        reached = gradient if tokens is None else gradient[:, tokens]
        passed = reached @ weight.flatten(1).to(gradient.dtype) if ctx.needs_input_grad[1] else None
        if passed is not None and tokens is not None:
            everywhere = passed.new_zeros((*gradient.shape[:2], passed.shape[2]))
            passed = everywhere.index_copy_(1, tokens, passed)
        ctx.tape.add_linear(ctx.layer, inputs if inputs is None or tokens is None else inputs[:, tokens], reached)
        return None, passed, None, None, None, None


class RecordedLayerNorm(Function):
    """``layer_norm`` over the last dimension of [B * k, ..., d]."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        tape: GradientRecorder,
        weight_key: int | None,
        bias_key: int | None,
    ) -> Tensor:
        """The normalised inputs."""
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.float()
        outputs, mean, rstd = torch.native_layer_norm(inputs, weight.shape, weight, bias, eps)
        ctx.save_for_backward(inputs, mean, rstd, weight, bias)
        ctx.tape, ctx.keys = tape, (weight_key, bias_key)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The inputs' gradient; the parameters' goes to the tape."""
        inputs, mean, rstd, weight, bias = ctx.saved_tensors
        tape, (weight_key, bias_key) = ctx.tape, ctx.keys
        passed = None
        if ctx.needs_input_grad[1]:
            passed = torch.ops.aten.native_layer_norm_backward(
                gradient, inputs, list(weight.shape), mean, rstd, weight, bias, [True, False, False]
            )[0]
        shape = (tape.batch, -1, weight.shape[0])
        outputs = gradient.reshape(shape)
        if weight_key is not None:
            # Not through the normalised inputs: that would be one more array of their size.
            scale, offset = (rstd.reshape(tape.batch, 1, -1), (mean * rstd).reshape(tape.batch, 1, -1))
            product = torch.bmm(scale, outputs * inputs.reshape(shape))
            tape.add(weight_key, product - torch.bmm(offset, outputs))
        if bias_key is not None:
            tape.add(bias_key, sum_of_tokens(outputs))
        return None, passed, None, None, None, None, None, None


class RecordedValue(Function):
    """A parameter, or a value derived from some, laid out over the examples: every example's copy has its gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, shape: tuple[int, ...], tape: GradientRecorder, key: int
    ) -> Tensor:
        """``value`` in ``shape`` [B * k, ...], without a copy."""
        ctx.tape, ctx.key = tape, key
        return value.expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        """Nothing; the gradient goes to the tape."""
        ctx.tape.add(ctx.key, gradient)
        return None, None, None, None, None


def _few_tokens(gradient: Tensor, inputs: Tensor | None, weight: Tensor) -> Tensor | None:
    """Which tokens [n] of a gradient [B, T, p] are not zero in some example; None where they are many.

    Behind a class token the last block's gradient is zero at every other token, and zeros need no products. The first
    example's last token tells whether it is worth looking; on a GPU the question would cost more than the products.

    Numbers out of the ordinary need them all: zero times what is not finite is not zero, and an example whose norm is
    finite in one company and not in another would let its companions move the sum by more than their own part.
    """
    if gradient.dim() != 3 or gradient.device.type != "cpu" or bool(gradient[0, -1].any()):
        return None
    found = gradient.any(dim=2).any(dim=0).nonzero()[:, 0]
    if not 0 < len(found) <= gradient.shape[1] // _FEW:
        return None
    return found if all(map(_ordinary, (gradient[:, found], inputs, weight))) else None


def _ordinary(values: Tensor | None) -> bool:
    """Whether all are finite and far from the end of what float32 holds."""
    return values is None or all(bool(abs(end) < _ORDINARY) for end in values.aminmax())

"""Autograd functions that compute what torch's own compute and record the parts of parameter gradients."""

# mypy: disable-error-code="no-untyped-call, override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedvit.dp.recorder import GradientRecorder, Layer

# Tokens with a gradient are few if they are at most this fraction (1/n) of all.
_FEW = 4
# Products of numbers below this, and sums of such products, stay within float32.
_ORDINARY = 1e6


class RecordedLinear(Function):
    """``linear`` [B * k, ..., d] to [B * k, ..., p]; a weight of more dimensions is flattened to [p, d].

    No activation is stored if the weight is not trained.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, recorder: Any
    ) -> Tensor:
        ctx.save_for_backward(inputs if layer.weight is not None else None, weight)
        ctx.recorder, ctx.layer = recorder, layer
        return functional.linear(inputs, weight.flatten(1), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        tokens = _few_tokens(gradient, inputs, weight)
        selected = gradient if tokens is None else gradient[:, tokens]
        passed = selected @ weight.flatten(1).to(gradient.dtype) if ctx.needs_input_grad[1] else None
        if passed is not None and tokens is not None:
            everywhere = passed.new_zeros((*gradient.shape[:2], passed.shape[2]))
            passed = everywhere.index_copy_(1, tokens, passed)
        inputs = inputs if inputs is None or tokens is None else inputs[:, tokens]
        ctx.recorder.add_linear(ctx.layer, inputs, selected)
        return None, passed, None, None, None, None


class RecordedLayerNorm(Function):
    """``layer_norm`` over the last dimension of [B * k, ..., d]; ``keys`` are those of weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        recorder: GradientRecorder,
        keys: tuple[int | None, int | None],
    ) -> Tensor:
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.float()
        outputs, mean, rstd = torch.native_layer_norm(inputs, weight.shape, weight, bias, eps)
        ctx.save_for_backward(inputs, mean, rstd, weight, bias)
        ctx.recorder, ctx.keys = recorder, keys
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mean, rstd, weight, bias = ctx.saved_tensors
        recorder, (weight_key, bias_key) = ctx.recorder, ctx.keys
        passed = None
        if ctx.needs_input_grad[1]:
            passed = torch.ops.aten.native_layer_norm_backward(
                gradient, inputs, list(weight.shape), mean, rstd, weight, bias, [True, False, False]
            )[0]
        shape = (recorder.batch, -1, weight.shape[0])
        outputs = gradient.reshape(shape)
        if weight_key is not None:
            # Not through the normalised inputs: that would be one more array of their size.
            scale, offset = (rstd.reshape(recorder.batch, 1, -1), (mean * rstd).reshape(recorder.batch, 1, -1))
            product = torch.bmm(scale, outputs * inputs.reshape(shape))
            recorder.add(weight_key, product - torch.bmm(offset, outputs))
        if bias_key is not None:
            recorder.add(bias_key, outputs.sum(dim=1))
        return None, passed, None, None, None, None, None


class RecordedValue(Function):
    """A parameter, or a value derived from some, expanded over the examples; each example's copy has its gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, shape: tuple[int, ...], recorder: GradientRecorder, key: int
    ) -> Tensor:
        """``value`` in ``shape`` [B * k, ...], without a copy."""
        ctx.recorder, ctx.key = recorder, key
        return value.expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.recorder.add(ctx.key, gradient)
        return None, None, None, None, None


def _few_tokens(gradient: Tensor, inputs: Tensor | None, weight: Tensor) -> Tensor | None:
    """The tokens [n] of a gradient [B, T, p] that are not zero in some example; None if they are many.

    Behind a class token, the last block's gradient is zero at every other token, and zeros need no products. The first
    example's last token shows cheaply whether a search is worthwhile. On a GPU the search costs more than it saves.

    If a number is very large or not finite, all tokens are used, because zero times a non-finite value is not zero:
    otherwise an example's norm would depend on the other examples in its batch, and they could move the sum by more
    than their own share.
    """
    if gradient.dim() != 3 or gradient.device.type != "cpu" or bool(gradient[0, -1].any()):
        return None
    tokens = gradient.any(dim=2).any(dim=0).nonzero()[:, 0]
    if not 0 < len(tokens) <= gradient.shape[1] // _FEW:
        return None
    return tokens if all(map(_ordinary, (gradient[:, tokens], inputs, weight))) else None


def _ordinary(values: Tensor | None) -> bool:
    """Whether all values are finite and well below the largest float32."""
    return values is None or all(bool(abs(end) < _ORDINARY) for end in values.aminmax())

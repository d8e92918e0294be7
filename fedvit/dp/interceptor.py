"""Where trainable parameters meet data: each such call of torch is replaced by one that records for a tape.

A :class:`torch.overrides.TorchFunctionMode` sees every call of the forward pass, whatever module it comes from. Data is
what descends from the body's input; values that descend from trainable parameters alone are derived; all else is
neutral. Only a call that is given both can make one example's gradient differ from another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from fedvit.dp.autograd import RecordedLayerNorm, RecordedLinear, RecordedValue
from fedvit.dp.gradients import no_gradients
from fedvit.dp.recorder import GradientRecorder, Layer

_DATA, _SOURCE = "_fedvit_is_data", "_fedvit_source"


class OpInterceptor(TorchFunctionMode):
    """Active during a forward pass, after which the backward pass fills ``tape``.

    Args:
        parameters: the trainable ones, by name.
        tape: for the batch of this pass.

    Raises:
        ModelError: (in the forward pass) a parameter meets data in a call that cannot be recorded.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], tape: GradientRecorder) -> None:
        super().__init__()
        self.tape = tape
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def begin(self, features: Tensor) -> Tensor:
        """The body's input [B, ...], as data."""
        data = features.view_as(features)
        setattr(data, _DATA, True)
        return data

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        is_data = any(map(_is_data, tensors))
        if is_data and any(self.is_trained(tensor) for tensor in tensors):
            result = self._meet(func, args, kwargs, tensors)
        else:
            result = func(*args, **kwargs)
            if not is_data:
                _note_source(func, args, result)
        if is_data:
            for tensor in _tensors(result):
                setattr(tensor, _DATA, True)
        return result

    def is_trained(self, value: object) -> bool:
        """Whether this is a trainable parameter, or a value that descends from some and from no data."""
        return isinstance(value, Tensor) and value.requires_grad and not _is_data(value)

    def key(self, value: Tensor | None) -> int | None:
        """The tape's key of what is trained, None for anything else."""
        return self.tape.key(value) if value is not None and self.is_trained(value) else None

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        """A copy of ``value`` for every example, shaped to meet ``like`` [B * k, ...] elementwise."""
        count = like.shape[0] if like.ndim else 0
        source = getattr(value, _SOURCE, value)
        if count == 0 or count % self.tape.batch or value.ndim > like.ndim:
            raise _NoRecord
        if value.ndim < like.ndim or (source is value and value.shape[0] == 1):
            shape = (count, *(1,) * (like.ndim - 1 - value.ndim), *value.shape[value.ndim == like.ndim :])
            return self._recorded_value(value, shape, value)
        if source is not value and value.shape[0] == count:
            return self._recorded_value(value, tuple(value.shape), source)
        raise _NoRecord

    def _recorded_value(self, value: Tensor, shape: tuple[int, ...], source: Tensor) -> Tensor:
        tape = self.tape
        spread: Tensor = RecordedValue.apply(tape.anchor, value.detach(), shape, tape, tape.key(source))
        return spread

    def _meet(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        reason: Exception | None = None
        if func in _RECORDED:
            try:
                return _RECORDED[func](self, func, *args, **kwargs)
            except (_NoRecord, TypeError) as error:
                reason = error
        called = resolve_name(func) or getattr(func, "__name__", str(func))
        raise no_gradients("Book-keeping", f"{called} of {self._name(tensors)} is not among its calls") from reason

    def _name(self, tensors: Iterable[Tensor]) -> str:
        trained = [tensor for tensor in tensors if self.is_trained(tensor)]
        named = [self._names[id(tensor)] for tensor in trained if id(tensor) in self._names]
        return named[0] if named else f"a value made of parameters, {list(trained[0].shape)}"


class _NoRecord(Exception):
    """This call is of a known kind, but not of a shape that can be recorded."""


def _is_data(value: object) -> bool:
    return hasattr(value, _DATA)


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _note_source(func: Callable[..., Any], args: tuple[Any, ...], result: object) -> None:
    """A derived value laid out over a batch, and one plus constants, have the gradient of what they were made of."""
    trained = [value for value in args if isinstance(value, Tensor) and value.requires_grad]
    if func in _EXPANDING and isinstance(result, Tensor) and len(trained) == 1 and trained[0] is args[0]:
        source = getattr(args[0], _SOURCE, args[0])
        if (1, *result.shape[1:]) == tuple(source.shape) != tuple(result.shape):
            setattr(result, _SOURCE, source)


def _linear(
    meetings: OpInterceptor,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    if not _is_data(input) or _is_data(weight) or _is_data(bias) or input.ndim < 2:
        raise _NoRecord
    return _recorded_linear(meetings, input, weight, bias)


def _recorded_linear(meetings: OpInterceptor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tape = meetings.tape
    if inputs.shape[0] % tape.batch:
        raise _NoRecord
    layer = Layer(meetings.key(weight), meetings.key(bias))
    outputs: Tensor = RecordedLinear.apply(tape.anchor, inputs, weight.detach(), _detached(bias), layer, tape)
    return outputs


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _conv2d(
    meetings: OpInterceptor,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution as a linear layer on patches."""
    if groups != 1 or isinstance(padding, str) or not _is_data(input) or input.ndim != 4:
        raise _NoRecord
    stride, padding, dilation = map(_pair, (stride, padding, dilation))
    kernel = tuple(weight.shape[2:])
    sizes = [
        (size + 2 * pad - step * (side - 1) - 1) // jump + 1
        for size, pad, step, side, jump in zip(input.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    if kernel == stride and padding == (0, 0) and dilation == (1, 1):
        patches = _tiles(input, kernel, sizes)
    else:
        patches = functional.unfold(input, kernel, dilation, padding, stride).mT
    outputs = _recorded_linear(meetings, patches, weight, bias)
    images: Tensor = outputs.mT.unflatten(2, sizes)
    return images


def _tiles(images: Tensor, kernel: tuple[int, ...], sizes: list[int]) -> Tensor:
    """[B, C, H, W] to non-overlapping patches [B, rows * columns, C * height * width]."""
    (height, width), (rows, columns) = kernel, sizes
    whole = images[:, :, : rows * height, : columns * width]
    split = whole.reshape(*images.shape[:2], rows, height, columns, width)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(len(images), rows * columns, -1)


def _pair(value: Any) -> tuple[int, ...]:
    pair = tuple(value) if isinstance(value, Iterable) else (value,)
    return pair * 2 if len(pair) == 1 else pair


def _layer_norm(
    meetings: OpInterceptor,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    tape = meetings.tape
    if weight is None or not _is_data(input) or input.ndim < 2 or input.shape[0] % tape.batch:
        raise _NoRecord
    if tuple(normalized_shape) != tuple(input.shape[-1:]):
        raise _NoRecord
    keys = (meetings.key(weight), meetings.key(bias))
    outputs: Tensor = RecordedLayerNorm.apply(tape.anchor, input, weight.detach(), _detached(bias), eps, tape, *keys)
    return outputs


def _rms_norm(
    meetings: OpInterceptor,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor,
    eps: float | None = None,
) -> Tensor:
    normed = functional.rms_norm(input, normalized_shape, None, eps)
    return normed * meetings.spread(weight, input)


def _group_norm(
    meetings: OpInterceptor,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    result = functional.group_norm(input, num_groups, None, None, eps)
    shape = (-1, *(1,) * (input.ndim - 2))
    if weight is not None:
        result = result * _spread_if_trained(meetings, weight.view(shape), input)
    return result if bias is None else result + _spread_if_trained(meetings, bias.view(shape), input)


def _spread_if_trained(meetings: OpInterceptor, value: Any, like: Tensor) -> Any:
    return meetings.spread(value, like) if meetings.is_trained(value) else value


def _elementwise(meetings: OpInterceptor, func: Any, *args: Any, **kwargs: Any) -> Any:
    if any(map(meetings.is_trained, kwargs.values())) or not any(map(_is_data, args)):
        raise _NoRecord
    like = max((value for value in args if _is_data(value)), key=lambda value: value.ndim)
    return func(*(_spread_if_trained(meetings, value, like) for value in args), **kwargs)


def _concatenate(meetings: OpInterceptor, func: Any, tensors: Any, dim: int = 0) -> Any:
    like = next(value for value in tensors if _is_data(value))
    if dim % like.ndim == 0:
        raise _NoRecord
    return func([_spread_if_trained(meetings, value, like) for value in tensors], dim)


def _attention(
    meetings: OpInterceptor,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if not all(map(_is_data, (query, key, value))):
        raise _NoRecord
    return func(query, key, value, attn_mask=_spread_if_trained(meetings, attn_mask, query), **kwargs)


_EXPANDING = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.add, Tensor.add, Tensor.__add__}
_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "add_", "sub_", "mul_", "__add__", "__radd__", "__iadd__", "__sub__"),
    *("__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__"),
)
_RECORDED: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.conv2d: _conv2d,
    functional.conv2d: _conv2d,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    torch.cat: _concatenate,
    functional.scaled_dot_product_attention: _attention,
    **{getattr(owner, n): _elementwise for owner in (torch, Tensor) for n in _ELEMENTWISE if hasattr(owner, n)},
}

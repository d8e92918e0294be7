"""Interception of torch operations that apply trainable parameters to data: per-example gradient dispatch.

A :class:`torch.overrides.TorchFunctionMode` receives every call of the forward pass, from any module. Tensors computed
from the body's input are data; tensors computed from trainable parameters alone are derived values; all others are
neutral. Only calls with both data and trained values give examples different gradients. Each such call is replaced by
one that also records the parts of these gradients.
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
    """Replaces operations during a forward pass, so that the backward pass fills ``recorder``.

    Args:
        parameters: the trainable ones, by name.
        recorder: for the batch of this pass.

    Raises:
        ModelError: (in the forward pass) a parameter is applied to data by an operation that cannot be recorded.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], recorder: GradientRecorder) -> None:
        super().__init__()
        self.recorder = recorder
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def begin(self, features: Tensor) -> Tensor:
        """The body's input [B, ...], marked as data."""
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
            result = self._dispatch(func, args, kwargs, tensors)
        else:
            result = func(*args, **kwargs)
            if not is_data:
                _note_source(func, args, result)
        if is_data:
            for tensor in _tensors(result):
                setattr(tensor, _DATA, True)
        return result

    def is_trained(self, value: object) -> bool:
        """Whether this is a trainable parameter, or a value derived from some without data."""
        return isinstance(value, Tensor) and value.requires_grad and not _is_data(value)

    def key(self, value: Tensor | None) -> int | None:
        """The recorder's key of a trained value, None for any other."""
        return self.recorder.key(value) if value is not None and self.is_trained(value) else None

    def expand(self, value: Tensor, like: Tensor) -> Tensor:
        """``value`` expanded to one copy per example, for an elementwise operation with ``like`` [B * k, ...]."""
        count = like.shape[0] if like.ndim else 0
        source = getattr(value, _SOURCE, value)
        if count == 0 or count % self.recorder.batch or value.ndim > like.ndim:
            raise _NotRecordable
        if value.ndim < like.ndim or (source is value and value.shape[0] == 1):
            shape = (count, *(1,) * (like.ndim - 1 - value.ndim), *value.shape[value.ndim == like.ndim :])
            return self._recorded_value(value, shape, value)
        if source is not value and value.shape[0] == count:
            return self._recorded_value(value, tuple(value.shape), source)
        raise _NotRecordable

    def _recorded_value(self, value: Tensor, shape: tuple[int, ...], source: Tensor) -> Tensor:
        recorder = self.recorder
        spread: Tensor = RecordedValue.apply(recorder.anchor, value.detach(), shape, recorder, recorder.key(source))
        return spread

    def _dispatch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        reason: Exception | None = None
        if func in _RECORDED:
            try:
                return _RECORDED[func](self, func, *args, **kwargs)
            except (_NotRecordable, TypeError) as error:
                reason = error
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        raise no_gradients("Book-keeping", f"{name} of {self._name(tensors)} is not a supported operation") from reason

    def _name(self, tensors: Iterable[Tensor]) -> str:
        trained = [tensor for tensor in tensors if self.is_trained(tensor)]
        named = [self._names[id(tensor)] for tensor in trained if id(tensor) in self._names]
        return named[0] if named else f"a value derived from parameters, {list(trained[0].shape)}"


class _NotRecordable(Exception):
    """The operation is supported, but not with these arguments."""


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
    """Remember the source of a value that was expanded over a batch or had constants added: same gradient."""
    trained = [value for value in args if isinstance(value, Tensor) and value.requires_grad]
    if func in _EXPANDING and isinstance(result, Tensor) and len(trained) == 1 and trained[0] is args[0]:
        source = getattr(args[0], _SOURCE, args[0])
        if (1, *result.shape[1:]) == tuple(source.shape) != tuple(result.shape):
            setattr(result, _SOURCE, source)


def _linear(interceptor: OpInterceptor, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_data(input) or _is_data(weight) or _is_data(bias) or input.ndim < 2:
        raise _NotRecordable
    return _recorded_linear(interceptor, input, weight, bias)


def _recorded_linear(interceptor: OpInterceptor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    recorder = interceptor.recorder
    if inputs.shape[0] % recorder.batch:
        raise _NotRecordable
    layer = Layer(interceptor.key(weight), interceptor.key(bias))
    outputs: Tensor = RecordedLinear.apply(recorder.anchor, inputs, weight.detach(), _detached(bias), layer, recorder)
    return outputs


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _conv2d(
    interceptor: OpInterceptor,
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
        raise _NotRecordable
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
    outputs = _recorded_linear(interceptor, patches, weight, bias)
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
    interceptor: OpInterceptor,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    recorder = interceptor.recorder
    if weight is None or not _is_data(input) or input.ndim < 2 or input.shape[0] % recorder.batch:
        raise _NotRecordable
    if tuple(normalized_shape) != tuple(input.shape[-1:]):
        raise _NotRecordable
    anchor, keys = recorder.anchor, (interceptor.key(weight), interceptor.key(bias))
    outputs: Tensor = RecordedLayerNorm.apply(anchor, input, weight.detach(), _detached(bias), eps, recorder, keys)
    return outputs


def _rms_norm(
    interceptor: OpInterceptor, _: Any, input: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None
) -> Tensor:
    return functional.rms_norm(input, normalized_shape, None, eps) * interceptor.expand(weight, input)


def _group_norm(
    interceptor: OpInterceptor,
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
        result = result * _expand_if_trained(interceptor, weight.view(shape), input)
    return result if bias is None else result + _expand_if_trained(interceptor, bias.view(shape), input)


def _expand_if_trained(interceptor: OpInterceptor, value: Any, like: Tensor) -> Any:
    return interceptor.expand(value, like) if interceptor.is_trained(value) else value


def _elementwise(interceptor: OpInterceptor, func: Any, *args: Any, **kwargs: Any) -> Any:
    if any(map(interceptor.is_trained, kwargs.values())) or not any(map(_is_data, args)):
        raise _NotRecordable
    like = max((value for value in args if _is_data(value)), key=lambda value: value.ndim)
    return func(*(_expand_if_trained(interceptor, value, like) for value in args), **kwargs)


def _concatenate(interceptor: OpInterceptor, func: Any, tensors: Any, dim: int = 0) -> Any:
    like = next(value for value in tensors if _is_data(value))
    if dim % like.ndim == 0:
        raise _NotRecordable
    return func([_expand_if_trained(interceptor, value, like) for value in tensors], dim)


def _attention(
    interceptor: OpInterceptor,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if not all(map(_is_data, (query, key, value))):
        raise _NotRecordable
    return func(query, key, value, attn_mask=_expand_if_trained(interceptor, attn_mask, query), **kwargs)


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

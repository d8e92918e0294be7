"""Recorder of one backward pass, from which per-example gradient norms and the clipped sum are computed.

Book-keeping (Bu et al. 2023, arXiv:2210.00038): a layer's activations and output gradients determine every example's
gradient. Its norm is computed from Gram matrices without materializing it (Goodfellow 2015, arXiv:1510.01799; Li et al.
2022, arXiv:2110.05679); the sum of the clipped gradients is one matrix product.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# Cost of one number of a materialized gradient (written once, read twice), in multiply-adds of a Gram matrix.
_MATERIALIZED_NUMBER_COST = 24
# Limit on the memory of materialized gradients, relative to the activations and output gradients that they replace.
_MATERIALIZED_MEMORY = 1.0
# Numbers in a parameter that counts as small.
_SMALL = 1 << 14
# Rows of a Gram matrix at once. Fewer rows skip more of the symmetric half; more rows make faster products.
_GRAM_ROWS = 32
# Matrix products compute columns in vectors of this size.
_VECTOR = 16


@dataclass(slots=True)
class _LinearRecord:
    """A linear layer's activations [B, T, d] and output gradients [B, T, p], and its bias where possible."""

    weight: int
    bias: int | None
    stored_inputs: Tensor
    stored_outputs: Tensor

    @property
    def inputs(self) -> Tensor:
        return at_least_single(self.stored_inputs)

    @property
    def outputs(self) -> Tensor:
        return at_least_single(self.stored_outputs)

    def squares(self) -> Tensor:
        """Squared gradient norms [B] of weight (and bias): sum of (A A' + 1) * (G G')."""
        inputs, outputs, ones = self.inputs, self.outputs, float(self.bias is not None)
        tokens = outputs.shape[1]
        if tokens == 1:
            return (_squares(inputs) + ones) * _squares(outputs)
        rows = _GRAM_ROWS if outputs.device.type == "cpu" else tokens
        firsts = range(0, max(tokens - rows // 2, 1), rows)
        lasts = [*firsts[1:], tokens]
        parts = [_gram_rows(inputs, outputs, ones, *bounds) for bounds in zip(firsts, lasts, strict=True)]
        return torch.stack(parts).sum(dim=0)

    def materialized(self) -> Tensor:
        """The weight's gradients [B, p, d]."""
        return torch.bmm(self.outputs.mT, self.inputs)

    def weighted_sums(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the weight's gradients [p, d] and the bias' [p], weighted by the factors; not always contiguous."""
        inputs, outputs = self.inputs, self.outputs
        by_token, width = factors[:, None, None], inputs.shape[2]
        # The smaller of the two is multiplied by the factors and gives the columns of the product.
        if width < outputs.shape[2]:
            # The factors themselves are a further column: its product is the bias' gradient.
            scaled = inputs.new_empty((*inputs.shape[:2], width + _VECTOR))
            torch.mul(inputs, by_token, out=scaled[:, :, :width])
            scaled[:, :, width:] = by_token
            both = outputs.flatten(0, 1).T @ scaled.flatten(0, 1)
            return both[:, :width], both[:, width]
        outputs = outputs * by_token
        turned = inputs.flatten(0, 1).T @ outputs.flatten(0, 1)
        return turned.T, outputs.sum(dim=(0, 1))


@dataclass(frozen=True, slots=True)
class Layer:
    """Keys of a linear layer's weight and bias; None for one that is not trained."""

    weight: int | None
    bias: int | None


class GradientRecorder:
    """The per-example gradients of one batch of B: some materialized, some as factors of a matrix product.

    Args:
        parameters: the trainable ones, by name.
        batch: B, at least 1.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], batch: int) -> None:
        self.batch = batch
        # The recorded calls depend on this tensor in autograd's graph, instead of on the parameters themselves.
        self.anchor = torch.zeros((), requires_grad=True)
        self._names = list(parameters)
        # Trainable parameters come first, then values derived from them; a key is an index of this list.
        self._values: list[Tensor] = list(parameters.values())
        self._keys = {id(value): key for key, value in enumerate(self._values)}
        self._linear: list[_LinearRecord] = []
        self._materialized: dict[int, Tensor] = {}
        # Small gradients are allocated together and first: between large arrays they would fragment the heap.
        small = [value.numel() if value.numel() <= _SMALL else 0 for value in self._values]
        self._small = [torch.empty(0)] * len(small)
        if sum(small):
            like = next(iter(parameters.values()))
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self._small = list(torch.empty(batch, sum(small), dtype=dtype, device=like.device).split(small, dim=1))

    def key(self, value: Tensor) -> int:
        """The key of a parameter, or of a value derived from parameters."""
        if id(value) not in self._keys:
            self._keys[id(value)] = len(self._values)
            self._values.append(value)
        return self._keys[id(value)]

    def add(self, key: int, gradients: Tensor) -> None:
        """Add gradients [B * k, ...] of a value, k consecutive ones for each example."""
        grouped = at_least_single(gradients.reshape(self.batch, -1, *self._values[key].shape))
        summed = grouped[:, 0] if grouped.shape[1] == 1 else grouped.sum(dim=1)
        if key in self._materialized:
            # Not in place: the stored tensor may belong to autograd.
            self._materialized[key] = self._materialized[key] + summed
        elif key < len(self._small) and self._small[key].numel():
            self._materialized[key] = self._small[key].copy_(summed.reshape(self.batch, -1)).view(summed.shape)
        else:
            self._materialized[key] = summed

    def add_linear(self, layer: Layer, inputs: Tensor | None, outputs: Tensor) -> None:
        """Add a linear layer's output gradients [B * k, ..., p] and, if stored, its activations [B * k, ..., d]."""
        bias = layer.bias
        outputs = _by_example(outputs, self.batch)
        if layer.weight is not None and inputs is not None:
            record = _LinearRecord(layer.weight, None, _by_example(inputs, self.batch), outputs)
            if layer.weight < len(self._names) and _gram_is_cheaper(record):
                record.bias = bias if bias is not None and bias < len(self._names) else None
                bias = bias if record.bias is None else None
                self._linear.append(record)
            else:
                self.add(layer.weight, record.materialized())
        if bias is not None:
            self.add(bias, at_least_single(outputs.sum(dim=1)))

    def missing(self) -> list[str]:
        """The parameters that no gradient was recorded for."""
        recorded = set(self._materialized) | {p.weight for p in self._linear} | {p.bias for p in self._linear}
        return [name for key, name in enumerate(self._names) if key not in recorded]

    def finalize(self) -> None:
        """Complete the records once after the backward pass.

        Gradients of derived values are propagated to their parameters, and a parameter that was used more than once is
        materialized, because norms of sums need the cross terms.
        """
        own = self._values[: len(self._names)]
        for key in [key for key in self._materialized if key >= len(self._names)]:
            derived = self._values[key]
            gradients = self._materialized.pop(key).to(derived.dtype)
            propagated = torch.autograd.grad(
                derived, own, gradients, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            for own_key, gradient in enumerate(propagated):
                if gradient is not None:
                    self.add(own_key, gradient)
        uses = Counter(list(self._materialized))
        for record in self._linear:
            uses.update(key for key in (record.weight, record.bias) if key is not None)
        remaining = []
        for record in self._linear:
            if record.bias is not None and uses[record.bias] > 1:
                self.add(record.bias, record.outputs.sum(dim=1))
                record.bias = None
            if uses[record.weight] == 1:
                remaining.append(record)
                continue
            self.add(record.weight, record.materialized())
            if record.bias is not None:
                self.add(record.bias, record.outputs.sum(dim=1))
        self._linear = remaining

    def norms(self) -> Tensor:
        """L2 norms [B] over all parameters together."""
        squares = [record.squares() for record in self._linear]
        squares += [_squares(gradients) for gradients in self._materialized.values()]
        # Rounding may make a sum near zero negative.
        return torch.stack(squares).sum(dim=0).clamp_min(0.0).sqrt()

    def weighted_sums(self, factors: Tensor, *, last: bool = False) -> dict[str, Tensor]:
        """Sum over the examples, each times its factor [B], by parameter name.

        A factor of exactly zero removes its example, even one that is not finite. ``last`` releases each record as soon
        as it is summed, to save memory.
        """
        counted = factors != 0
        every = bool(counted.all())
        factors = factors if every else factors[counted]
        sums: dict[int, Tensor] = {}
        records = self._linear if last else list(self._linear)
        while records:
            record = records.pop()
            if not every:
                inputs, outputs = record.stored_inputs[counted], record.stored_outputs[counted]
                record = replace(record, stored_inputs=inputs, stored_outputs=outputs)
            sums[record.weight], bias = record.weighted_sums(factors)
            if record.bias is not None:
                sums[record.bias] = bias
        for key, gradients in self._materialized.items():
            selected = gradients if every else gradients[counted]
            # An explicit size instead of -1, which fails for zero examples.
            sums[key] = factors @ selected.reshape(len(selected), self._values[key].numel())
        return {n: sums[key].reshape(self._values[key].shape) for key, n in enumerate(self._names) if key in sums}


def _gram_rows(inputs: Tensor, outputs: Tensor, ones: float, first: int, last: int) -> Tensor:
    """Sum [B] over rows of the elementwise product of the Gram matrices; columns left of these rows count twice."""
    grams = [torch.bmm(x[:, first:last], x[:, :last].mT) for x in (inputs, outputs)]
    product = grams[0].add_(ones).mul_(grams[1])
    square: Tensor = product[:, :, first:].sum(dim=(1, 2))
    return square + 2 * product[:, :, :first].sum(dim=(1, 2)) if first else square


def _by_example(values: Tensor, batch: int) -> Tensor:
    # Detached: a recorder and a graph that refer to each other would live until the next garbage collection.
    return values.detach().reshape(batch, -1, values.shape[-1])


def at_least_single(values: Tensor) -> Tensor:
    """float64 as it is, anything else as float32: norms and sums need that precision in any autocast mode."""
    return values if values.dtype == torch.float64 else values.float()


def _gram_is_cheaper(record: _LinearRecord) -> bool:
    tokens, width, height = *record.stored_inputs.shape[1:], record.stored_outputs.shape[2]
    if width * height > _MATERIALIZED_MEMORY * tokens * (width + height):
        return True
    return tokens * tokens * (width + height) < _MATERIALIZED_NUMBER_COST * width * height


def _squares(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1)
    return norms.square()

"""What one backward pass leaves behind for every example: norms first, the clipped sum once, from the same records.

Book-keeping (Bu et al. 2023, arXiv:2210.00038): a layer's activations and output gradients determine every example's
gradient; its norm follows from Gram matrices without forming it (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022,
arXiv:2110.05679), and the sum over the clipped ones is one matrix product.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# One number of a formed gradient is written once and read twice: what that costs in multiply-adds of a Gram matrix.
_FORMED_NUMBER_COST = 24
# Formed gradients may take this much more memory than the activations and output gradients that they replace.
_FORMED_MEMORY = 1.0
# Parameters of at most so many numbers.
_SMALL = 1 << 14
# Rows of a Gram matrix at once: few, and half of it need not be computed; many, and the products are quicker.
_GRAM_ROWS = 32
# Columns of a matrix product come in vectors of this many.
_VECTOR = 16


@dataclass(slots=True)
class _Product:
    """A linear layer's activations [B, T, d] and output gradients [B, T, p]; the bias goes along where it can."""

    weight: int
    bias: int | None
    kept: Tensor
    kept_outputs: Tensor

    @property
    def inputs(self) -> Tensor:
        """The activations."""
        return at_least_single(self.kept)

    @property
    def outputs(self) -> Tensor:
        """The output gradients."""
        return at_least_single(self.kept_outputs)

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

    def formed(self) -> Tensor:
        """The weight's gradients [B, p, d]."""
        return torch.bmm(self.outputs.mT, self.inputs)

    def weighted_sums(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The weight's gradient [p, d] and the bias' [p], each example times its factor; as they lie, not in order."""
        inputs, outputs = self.inputs, self.outputs
        by_token, width = factors[:, None, None], inputs.shape[2]
        # Whichever is smaller takes the factors, and becomes the columns of the product.
        if width < outputs.shape[2]:
            # The factors themselves as a further column: what they are multiplied with is the bias' gradient.
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
    """A linear layer's call: the keys of its weight and bias where they are trained."""

    weight: int | None
    bias: int | None


class GradientRecorder:
    """The per-example gradients of one batch of B, some formed, some as factors.

    Args:
        parameters: the trainable ones, by name.
        batch: B, at least 1.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], batch: int) -> None:
        self.batch = batch
        # What the recorded calls hang on in autograd's graph, so that it never reaches the parameters themselves.
        self.anchor = torch.zeros((), requires_grad=True)
        self._names = list(parameters)
        # Trainable parameters come first, values derived from them after; a key is a place in this list.
        self._values: list[Tensor] = list(parameters.values())
        self._keys = {id(value): key for key, value in enumerate(self._values)}
        self._products: list[_Product] = []
        self._formed: dict[int, Tensor] = {}
        # Small gradients together, and before anything else: between the large arrays they would split the heap.
        small = [value.numel() if value.numel() <= _SMALL else 0 for value in self._values]
        self._small = [torch.empty(0)] * len(small)
        if sum(small):
            like = next(iter(parameters.values()))
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self._small = list(torch.empty(batch, sum(small), dtype=dtype, device=like.device).split(small, dim=1))

    def key(self, value: Tensor) -> int:
        """The place of a parameter, or of a value derived from parameters."""
        if id(value) not in self._keys:
            self._keys[id(value)] = len(self._values)
            self._values.append(value)
        return self._keys[id(value)]

    def add(self, key: int, gradients: Tensor) -> None:
        """Add gradients [B * k, ...] of a value, k of them an example, the example's own side by side."""
        grouped = at_least_single(gradients.reshape(self.batch, -1, *self._values[key].shape))
        summed = grouped[:, 0] if grouped.shape[1] == 1 else grouped.sum(dim=1)
        if key in self._formed:
            # Not in place: what is there may be autograd's own.
            self._formed[key] = self._formed[key] + summed
        elif key < len(self._small) and self._small[key].numel():
            self._formed[key] = self._small[key].copy_(summed.reshape(self.batch, -1)).view(summed.shape)
        else:
            self._formed[key] = summed

    def add_linear(self, layer: Layer, kept: Tensor | None, outputs: Tensor) -> None:
        """Add a linear layer's output gradients [B * k, ..., p] and what is kept of its activations [B * k, ..., d]."""
        bias = layer.bias
        outputs = _by_example(outputs, self.batch)
        if layer.weight is not None and kept is not None:
            product = _Product(layer.weight, None, _by_example(kept, self.batch), outputs)
            if layer.weight < len(self._names) and _ghost_is_cheaper(product):
                product.bias = bias if bias is not None and bias < len(self._names) else None
                bias = bias if product.bias is None else None
                self._products.append(product)
            else:
                self.add(layer.weight, product.formed())
        if bias is not None:
            self.add(bias, at_least_single(sum_of_tokens(outputs)))

    def missing(self) -> list[str]:
        """The parameters that no gradient was recorded for."""
        found = set(self._formed) | {p.weight for p in self._products} | {p.bias for p in self._products}
        return [name for key, name in enumerate(self._names) if key not in found]

    def settle(self) -> None:
        """Once, after the backward pass: bring derived values back to their parameters, and form what meets twice."""
        self._pull_back()
        meetings = Counter(list(self._formed))
        for product in self._products:
            meetings.update(key for key in (product.weight, product.bias) if key is not None)
        kept = []
        for product in self._products:
            if product.bias is not None and meetings[product.bias] > 1:
                self.add(product.bias, sum_of_tokens(product.outputs))
                product.bias = None
            if meetings[product.weight] > 1:
                # Norms of sums need the cross terms.
                self.add(product.weight, product.formed())
                if product.bias is not None:
                    self.add(product.bias, sum_of_tokens(product.outputs))
            else:
                kept.append(product)
        self._products = kept

    def norms(self) -> Tensor:
        """L2 norms [B] over all parameters together."""
        squares = [product.squares() for product in self._products]
        squares += [_squares(gradients) for gradients in self._formed.values()]
        # Rounding may take a vanishing sum below zero.
        return torch.stack(squares).sum(dim=0).clamp_min(0.0).sqrt()

    def weighted_sums(self, factors: Tensor, *, last: bool = False) -> dict[str, Tensor]:
        """Sum over the examples, each times its factor [B], by parameter name.

        A factor of exactly zero removes its example, even one that is not finite. ``last`` lets go of each record as
        soon as it is summed, so that the sums need no memory beside it.
        """
        kept = factors != 0
        everyone = bool(kept.all())
        sums: dict[int, Tensor] = {}
        products = self._products if last else list(self._products)
        while products:
            product = products.pop()
            if not everyone:
                product = replace(product, kept=product.kept[kept], kept_outputs=product.kept_outputs[kept])
            sums[product.weight], bias = product.weighted_sums(factors if everyone else factors[kept])
            if product.bias is not None:
                sums[product.bias] = bias
        for key, gradients in self._formed.items():
            chosen = gradients if everyone else gradients[kept]
            # Counted, not -1: of nobody, too, a sum has its size.
            flat = chosen.reshape(len(chosen), self._values[key].numel())
            sums[key] = (factors if everyone else factors[kept]) @ flat
        return {n: sums[key].reshape(self._values[key].shape) for key, n in enumerate(self._names) if key in sums}

    def _pull_back(self) -> None:
        own = self._values[: len(self._names)]
        for key in [key for key in self._formed if key >= len(self._names)]:
            gradients = self._formed.pop(key)
            pulled = torch.autograd.grad(
                self._values[key],
                own,
                gradients.to(self._values[key].dtype),
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
            for place, gradient in enumerate(pulled):
                if gradient is not None:
                    self.add(place, gradient)


def sum_of_tokens(outputs: Tensor) -> Tensor:
    """[B, T, p] to [B, p]."""
    return outputs.sum(dim=1)


def _gram_rows(inputs: Tensor, outputs: Tensor, ones: float, first: int, last: int) -> Tensor:
    """Rows of the Gram matrices' product up to the diagonal; they are symmetric: what is left of these counts twice."""
    grams = [torch.bmm(x[:, first:last], x[:, :last].mT) for x in (inputs, outputs)]
    product = grams[0].add_(ones).mul_(grams[1])
    square: Tensor = product[:, :, first:].sum(dim=(1, 2))
    return square + 2 * product[:, :, :first].sum(dim=(1, 2)) if first else square


def _by_example(values: Tensor, batch: int) -> Tensor:
    # Detached: a tape that held on to the graph, which knows the tape, would live until the garbage collector comes.
    return values.detach().reshape(batch, -1, values.shape[-1])


def at_least_single(values: Tensor) -> Tensor:
    """Norms and sums must be exact, whatever the model computes in."""
    return values if values.dtype == torch.float64 else values.float()


def _ghost_is_cheaper(product: _Product) -> bool:
    tokens, width, height = *product.kept.shape[1:], product.kept_outputs.shape[2]
    if width * height > _FORMED_MEMORY * tokens * (width + height):
        return True
    return tokens * tokens * (width + height) < _FORMED_NUMBER_COST * width * height


def _squares(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1)
    return norms.square()

"""Poisoned updates, from crude to adaptive: the adaptive ones are the best within given bounds of update validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedvit.aggregation.head import Head
from fedvit.aggregation.update_bounds import MechanismBounds, UpdateBound, as_matrix
from fedvit.clients.host import ClientData, vision_host
from fedvit.models.trainable import head_name, load_trainable_weights
from fedvit.types import TrainTask, Weights
from fedvit.updates import PartialSum
from tests.attack.federation import Attack, Update, World, features, triggered

Gradient = dict[str, Tensor]
_STEPS, _ROUNDS = 30, 80


@dataclass(frozen=True)
class Adversary:
    """The update that does most for an attack among those within the bounds (Frank and Wolfe 1956).

    The attacker knows the weights, the bounds, its own share, the rule, and images like those of everybody. It sends no
    noise of its own.

    Args:
        kind: of the trigger; None attacks the accuracy instead.
        target: the class of triggered images.
        within: ``norm``: as long as noise, in one direction. ``all``: of the shape of noise as well.
        part: of the bounds that it uses.
        vehicles: how many send this update together.
    """

    world: World
    kind: str | None
    target: int = 0
    within: Literal["norm", "all"] = "all"
    part: float = 0.999
    vehicles: int = 1

    def __call__(self, task: TrainTask, weights: Weights) -> Update:
        """The update for a task; an :data:`Attack`."""
        bounds = MechanismBounds(task, {name: array.shape for name, array in weights.items()})
        bound = bounds.of(self.world.num_examples)
        best = _along if self.within == "norm" else partial(_noise_like, head=self._head(weights, task.round_index))
        update = {name: torch.zeros(array.shape) for name, array in weights.items()}
        for step in range(_STEPS):
            downhill = {name: -gradient for name, gradient in self._gradients(weights, update).items()}
            towards, size = best(downhill, bound), 2 / (step + 2)
            update = {name: array + size * (towards[name] - array) for name, array in update.items()}
        return {name: self.part * array.numpy().astype(np.float64) for name, array in update.items()}

    def _head(self, weights: Weights, round_index: int) -> Head:
        """How far and where the aggregator lets one client move the head."""
        name, settings = head_name(self.world.model) or "", self.world.settings
        directions = settings.head_directions(self.world.model.num_classes)
        head = Head.of(
            name,
            weights,
            self.world.server.head_basis(weights, directions) if directions else None,
            max_gradient=settings.training.validation.max_head_gradient,
            initial=self.world.server.initial_weights()[name],
            rounds=round_index - 1,
        )
        assert head is not None
        return head

    def _gradients(self, weights: Weights, update: Gradient) -> Gradient:
        """Of the attacker's loss in its update, through the model that the round would make of it alone."""
        world, factors = self.world, influence(self.world, self.vehicles)
        mixed = {n: np.asarray(a + factors[n] * update[n].numpy(), np.float32) for n, a in weights.items()}
        load_trainable_weights(world.model, mixed)
        parameters = {n: p for n, p in world.model.named_parameters() if p.requires_grad}
        loss = functional.cross_entropy(world.model.body(world.known), world.known_labels)
        if self.kind is None:
            loss = -loss
        else:
            shown = world.known_with(self.kind)
            loss = loss + functional.cross_entropy(world.model.body(shown), torch.full((len(shown),), self.target))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return {n: factors[n] * gradient for n, gradient in zip(parameters, gradients, strict=True)}


@dataclass(frozen=True)
class Boosted:
    """Another attack's update, many times as long: by default so that the mean becomes what the attacker wants."""

    attack: Attack
    factor: float

    def __call__(self, task: TrainTask, weights: Weights) -> Update:
        return {name: self.factor * array for name, array in self.attack(task, weights).items()}


def influence(world: World, vehicles: int = 1) -> dict[str, float]:
    """How much of the update of so many vehicles together comes into the model, by parameter."""
    own, head = vehicles * world.num_examples, head_name(world.model) or ""
    share = own / (world.total + own)
    layer, body = head.rpartition(".")[0] + ".", world.settings.body_learning_rate
    names = [name for name, parameter in world.model.named_parameters() if parameter.requires_grad]
    return {name: share if name.startswith(layer) else share * body for name in names}


class _Records:
    """One client's records; implements :class:`fedvit.clients.host.ClientDataSource`."""

    def __init__(self, data: ClientData) -> None:
        self._data = data

    def load(self, client_id: str) -> ClientData:
        """The records."""
        return self._data


def trained_on(world: World, home: Path, poison: str, target: int = 0) -> Attack:
    """A vehicle that runs the ordered DP-SGD, noise included, on its own images.

    Args:
        poison: ``nothing``, ``flipped labels``, or the kind of a trigger on all images, which then have one label.
    """
    count, classes = world.num_examples, world.model.num_classes
    images, labels = world.known_images[:count], world.known_labels[:count]
    if poison == "flipped labels":
        labels = classes - 1 - labels
    elif poison != "nothing":
        images, labels = triggered(images, poison), torch.full_like(labels, target)
    data = _Records(ClientData(features(world.model, images), labels, poison))
    settings = world.settings.model_copy(update={"home": home})
    host = vision_host(settings, records=world.fleet, model=world.model, data=data)

    def attack(task: TrainTask, weights: Weights) -> Update:
        message = host.train(task, weights, ["attacker"])
        assert isinstance(message, PartialSum)
        return {name: array / message.total_weight for name, array in message.weighted_sum.items()}

    return attack


def without_noise(attack: Attack) -> Attack:
    """The same vehicle, which leaves its noise out."""

    def silent(task: TrainTask, weights: Weights) -> Update:
        return attack(replace(task, noise_multiplier=1e-9), weights)

    return silent


def _along(direction: Gradient, bound: UpdateBound) -> Gradient:
    """The longest update in this direction."""
    length = math.sqrt(sum(float((array**2).sum()) for array in direction.values()))
    return {name: array * (bound.norm / length) for name, array in direction.items()}


def _noise_like(direction: Gradient, bound: UpdateBound, head: Head) -> Gradient:
    """The update with the largest inner product with ``direction`` within all bounds.

    Its matrices have the singular vectors of the direction's. Their singular values are as large as noise may have
    them, and share what gradients may add; of small ones there is less, so that the whole is not longer than noise.
    Those of the head, weight and bias (if it has one) together, are as large as the aggregator leaves them.
    """
    layer = (head.weight,) if head.bias is None else (head.weight, head.bias)
    matrices = {name: torch.from_numpy(as_matrix(a.numpy())) for name, a in direction.items() if name not in layer}
    basis = torch.eye(direction[head.weight].shape[1]) if head.basis is None else torch.from_numpy(head.basis)
    columns = [direction[head.weight] @ basis.T, *(direction[name][:, None] for name in layer[1:])]
    matrices["head"] = torch.cat(columns, dim=1).double()
    parts = {name: torch.linalg.svd(matrix, False) for name, matrix in matrices.items()}
    limit = head.largest(bound, tuple(matrices["head"].shape))
    # Of what gradients may add in all matrices together, the head takes this much.
    of_head = [max(0.0, limit - bound.edge(*as_matrix(direction[name].numpy()).shape)) for name in layer]
    signal = math.sqrt(max(0.0, bound.signal**2 - sum(excess**2 for excess in of_head)))
    nuclear = {name: float(part[1].sum()) for name, part in parts.items() if name != "head"}
    whole = math.sqrt(sum(value**2 for value in nuclear.values())) or 1.0
    most = {name: bound.edge(*matrices[name].shape) + signal * own / whole for name, own in nuclear.items()}
    most["head"] = limit

    def limited(factor: float) -> Mapping[str, Tensor]:
        return {name: (factor * part[1]).clamp(max=most[name]) for name, part in parts.items()}

    low, high = 0.0, 1e12
    for _ in range(100):
        middle = math.sqrt(max(low, 1e-12) * high)
        length = math.sqrt(sum(float((values**2).sum()) for values in limited(middle).values()))
        low, high = (middle, high) if length <= bound.norm else (low, middle)
    values = limited(low)
    found = {name: (part[0] * values[name]) @ part[2] for name, part in parts.items() if name != "head"}
    of_layer = _towards(matrices["head"], limit, head.largest_number(bound), float(torch.linalg.norm(values["head"])))
    found[head.weight] = of_layer[:, : len(basis)] @ basis.double()
    found |= dict.fromkeys(layer[1:], of_layer[:, -1])
    return {name: matrix.reshape(direction[name].shape).float() for name, matrix in found.items()}


def _towards(direction: Tensor, largest: float, number: float, length: float) -> Tensor:
    """The matrix with about the largest inner product with ``direction`` under the limits on the head.

    Both limits together have no closed form; see Boyd et al. 2011, section 7.3, for the consensus of projections.

    Args:
        largest: limit on singular values.
        number: limit on the magnitude of each number.
        length: limit on the Frobenius norm.
    """

    def within(matrix: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(matrix, False)
        product: Tensor = (left * values.clamp(max=largest)) @ right
        return product

    projections = [within, lambda matrix: matrix.clamp(-number, number)]
    pull = 3 * largest * direction / max(float(torch.linalg.norm(direction)), 1e-30)
    found = direction
    places, prices = [torch.zeros_like(direction)] * 2, [torch.zeros_like(direction)] * 2
    for _ in range(_ROUNDS):
        found = sum((place - price for place, price in zip(places, prices, strict=True)), pull * 2) / 2
        places = [project(found + price) for project, price in zip(projections, prices, strict=True)]
        prices = [price + found - place for place, price in zip(places, prices, strict=True)]
    for project in projections * 3:
        found = project(found)
    return found * min(1.0, length / max(float(torch.linalg.norm(found)), 1e-30))

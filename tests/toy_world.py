"""A world that learns in milliseconds: clients with points in the plane, softmax regression, plain NumPy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedvit.aggregation.registry import rule_for
from fedvit.clients.contributions import RingEncoder
from fedvit.config import Settings
from fedvit.privacy.mechanism import clip_update
from fedvit.privacy.randomness import derive_secret
from fedvit.tools.simulation.faults import Faults
from fedvit.types import Client, ClientKind, ClientOutcome, Evaluation, TrainTask, Weights
from fedvit.updates import ClientAnswer, ClientUpdate, RingSum

CLASSES = 4
CENTRES = 2.0 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
PER_CLIENT = 40
Points = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


class ToyWorld:
    """Implements :class:`fedvit.tools.simulation.world.World`: four clouds, some seen more by one client.

    Attributes:
        trained: every training of a client, as (round, client).
    """

    head: str | None = None

    def __init__(self, count: int = 20) -> None:
        draw = np.random.default_rng(0)
        shares = draw.dirichlet(np.full(CLASSES, 2.0), size=count)
        self._held = {f"vehicle-{i:02d}": _points(draw, shares[i], PER_CLIENT) for i in range(count)}
        self._test = _points(draw, np.full(CLASSES, 1 / CLASSES), 1000)
        self.clients = [Client(name, ClientKind.VIRTUAL, PER_CLIENT) for name in self._held]
        self.server = self
        self.trained: list[tuple[int, str]] = []

    def training_clients(self, settings: Settings, faults: Faults) -> _ToyClients:
        return _ToyClients(self, settings, faults)

    def initial_weights(self) -> Weights:
        return {"bias": np.zeros(CLASSES, dtype=np.float32), "weight": np.zeros((2, CLASSES), dtype=np.float32)}

    def frozen_weights(self) -> Weights:
        return {}

    def head_basis(self, weights: Weights, directions: int) -> None:
        return None

    def evaluate(self, weights: Weights) -> Evaluation:
        points, labels = self._test
        chances = _chances(weights, points)
        confusion = np.zeros((CLASSES, CLASSES), dtype=int)
        np.add.at(confusion, (labels, chances.argmax(axis=1)), 1)
        loss = float(-np.log(chances[np.arange(len(labels)), labels] + 1e-12).mean())
        rows = tuple(tuple(row) for row in confusion.tolist())
        return Evaluation(loss, float(confusion.trace() / len(labels)), {}, rows, len(labels))


class _ToyClients:
    def __init__(self, world: ToyWorld, settings: Settings, faults: Faults) -> None:
        self._world, self._faults, self._settings = world, faults, settings
        by_client = settings.privacy.privacy_unit == "client"
        self._by_examples = not by_client and rule_for(settings).weighting == "examples"

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> ClientAnswer | RingSum:
        self._world.trained.append((task.round_index, client_id))
        points, labels = self._world._held[client_id]
        labels = self._faults.labels(client_id, labels, CLASSES)
        here = {name: array.astype(np.float64) for name, array in weights.items()}
        for _ in range(task.local_steps):
            wrong = _chances(here, points) - np.eye(CLASSES)[labels]
            here["bias"] -= task.learning_rate * wrong.mean(axis=0)
            here["weight"] -= task.learning_rate * points.T @ wrong / len(points)
        weight = float(len(labels)) if self._by_examples else 1.0
        sums = {name: weight * (array - weights[name]) for name, array in here.items()}
        if task.privacy_unit == "client":
            sums, _ = clip_update(sums, task.l2_clip_norm)
        own = ClientUpdate(task.round_index, ClientOutcome(client_id, len(labels)), sums, weight)
        answer = self._faults.alter(client_id, own)
        if task.noise_place != "distributed" or not isinstance(answer, ClientUpdate):
            return answer
        shapes = {name: array.shape for name, array in weights.items()}
        return RingEncoder(task, self._settings, shapes).encode(answer, derive_secret(bytes(32), client_id))


def _points(draw: np.random.Generator, shares: Points, count: int) -> tuple[Points, Labels]:
    labels = draw.choice(CLASSES, size=count, p=shares)
    return CENTRES[labels] + draw.normal(scale=1.2, size=(count, 2)), labels


def _chances(weights: Mapping[str, npt.NDArray[np.floating]], points: Points) -> Points:
    logits = points @ weights["weight"] + weights["bias"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))

"""A model and virtual clients of one's own, on the same actors, loop, store and accountant as the Vision Transformer.

Imports no torch: what a workload needs, it imports itself.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, TypeAlias, cast

import numpy as np

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import ClientHalf
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.partial_aggregator import PartialAggregator, check_base, failed
from fedvit.config import Settings
from fedvit.errors import ConfigError, ModelError, UpdateRejectedError
from fedvit.exact_sums import Sums, largest, subtract
from fedvit.ports import ClientHostPort, ExportedModel, ModelBenchmark, ServerModelPort
from fedvit.privacy.mechanism import clip_factor
from fedvit.privacy.secrets import derive_secret, load_or_create_root_secret
from fedvit.types import (
    Client,
    ClientKind,
    ClientOutcome,
    Evaluation,
    FloatArray,
    TrainTask,
    Variant,
    Weights,
)
from fedvit.updates import ClientAnswer, ClientUpdate, UpdateBundle, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, HistogramSpec

_SEED_BYTES = 8
_Answer: TypeAlias = tuple[ClientAnswer, float, float]


class VirtualClients(ABC):
    """What a researcher writes: one object trains all clients that its proxy hosts, and stays warm between rounds.

    Named by ``workload.clients_class`` as ``package.module:Class``. Every proxy and the aggregator make one of it.

    Attributes:
        protects_records: whether :meth:`fit` clips and noises as the task says. With ``privacy_unit: client`` it need
            not: the host clips, and the aggregator adds the noise.
    """

    protects_records: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def initial_weights(self) -> Weights:
        """The weights that a run starts from, float32 by name; equal settings give equal weights."""

    @abstractmethod
    def clients(self) -> Iterable[tuple[str, int]]:
        """Every client's id, and how many examples it has."""

    @abstractmethod
    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        """Train one client; return its weights and the number of examples that it weighs.

        Args:
            weights: of the round, read-only: they are shared by all clients of the machine.
            seed: 64 secret bits of this client and round. A repeated round repeats them, on whatever proxy.
        """

    def evaluate(self, weights: Weights) -> Evaluation | None:
        """The weights on held-out data of the server; None where there are none."""
        return None

    def registered(self) -> Iterable[Client]:
        """The clients as the store takes them."""
        return (Client(name, ClientKind.VIRTUAL, num_examples) for name, num_examples in self.clients())


def client_host(settings: Settings) -> ClientHostPort:
    """What a client proxy hosts: the workload's clients, or those of the configured Vision Transformer.

    Raises:
        DataError, ModelError, ConfigError: the settings name something that cannot be used.
    """
    host: ClientHostPort
    if settings.workload.clients_class is not None:
        host = WorkloadHost(settings)
    else:
        from fedvit.clients.host import vision_host

        host = vision_host(settings)
    limit_threads(settings)
    return host


def server_model(settings: Settings) -> ServerModelPort:
    """The global model on the server's side.

    Raises:
        DataError, ModelError, ConfigError: the settings name something that cannot be used.
    """
    model: ServerModelPort
    if settings.workload.clients_class is not None:
        model = WorkloadModel(settings)
    else:
        from fedvit.evaluation.server_model import ServerModel

        model = ServerModel(settings)
    limit_threads(settings)
    return model


def load_workload(settings: Settings) -> VirtualClients:
    """The workload that the settings name.

    Raises:
        ConfigError: there is no such class, or it does not do what the settings promise.
    """
    name = settings.workload.clients_class or ""
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"workload.clients_class {name!r} cannot be imported: {error}.", cure='Name it as "package.module:Class".'
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, VirtualClients)):
        raise ConfigError(f"workload.clients_class {name!r} is no VirtualClients.", cure="Extend that class.")
    if settings.privacy.privacy_unit == "record" and not kind.protects_records:
        raise ConfigError(
            f"workload.clients_class {name!r} does not say that it protects single records.",
            cure="Use privacy.privacy_unit 'client', or let fit clip and noise and set protects_records.",
        )
    return kind(settings)


class WorkloadHost:
    """Implements :class:`fedvit.ports.ClientHostPort` for a workload."""

    def __init__(self, settings: Settings) -> None:
        self._clients = load_workload(settings)
        self._settings = settings
        self._rule = rule_for(settings)
        if type(self._rule.client) is not ClientHalf:
            raise ConfigError(
                f"training.aggregation {self._rule.name!r} leads the local steps, and those of a workload are its own.",
                cure="Use a rule without a client half.",
            )
        self._root_secret = load_or_create_root_secret(settings.home)
        self._scratch: dict[str, FloatArray] = {}

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> UpdateMessage:
        """See :class:`fedvit.ports.ClientHostPort`.

        Raises:
            IntegrityError: these are not the weights that the task was made for.
        """
        check_base(task, weights)
        validator, single = (
            UpdateValidator.of(self._settings, self._rule, weights),
            self._rule.needs == "single_updates",
        )
        summing, parts = PartialAggregator(task, validator.shapes), list[ClientAnswer]()
        for client_id in sorted(client_ids):
            own, scale, peak = self._answer(task, weights, validator, client_id)
            if single:
                parts.append(_weighed(own, scale))
            else:
                summing.add(own, scale, peak=peak)
        return UpdateBundle(task.round_index, tuple(parts)) if single else summing.message()

    def histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        """None: what a workload's examples are, only it knows."""
        return []

    def _answer(self, task: TrainTask, base: Weights, validator: UpdateValidator, client_id: str) -> _Answer:
        try:
            return self._train_one(task, base, validator, client_id)
        except Exception as error:
            return failed(task, client_id, error), 1.0, 0.0

    def _train_one(self, task: TrainTask, base: Weights, validator: UpdateValidator, client_id: str) -> _Answer:
        """A client's answer, what its arrays are to be multiplied with, and the largest magnitude in them.

        Raises:
            UpdateRejectedError: it may not count.
        """
        local, num_examples = self._clients.fit(client_id, base, task, self._seed(task, client_id))
        outcome = ClientOutcome(client_id, num_examples)
        delta, peak = self._difference(local, base)
        if task.privacy_unit == "client":
            scale, within = clip_factor(delta, task.l2_clip_norm)
            weight = 1.0
        else:
            scale = weight = float(num_examples) if validator.by_examples else 1.0
            within = False
        # Float32 and unscaled still: what adds it up takes both into account.
        own = ClientUpdate(task.round_index, outcome, cast("Sums", delta), weight, int(within))
        if fault := validator.fault_of(own, scale, peak=peak):
            raise UpdateRejectedError(f"The update of {client_id} is refused: {fault}.")
        return own, scale, peak

    def _difference(self, local: Weights, base: Weights) -> tuple[dict[str, FloatArray], float]:
        """``local - base``, in arrays that the next client's overwrites, and the largest magnitude in it."""
        peaks = list[float]()
        if faults := sorted(n for n in local.keys() | base.keys() if n not in local or n not in base):
            raise UpdateRejectedError(f"fit returned the parameters {sorted(local)[:5]}; {faults[0]!r} is amiss.")
        for name, array in base.items():
            if np.shape(local[name]) != array.shape:
                raise UpdateRejectedError(f"fit returned {name!r} with the shape {list(np.shape(local[name]))}.")
            if name not in self._scratch:
                self._scratch[name] = np.empty_like(array)
            peaks.append(subtract(local[name], array, out=self._scratch[name]))
        return dict(self._scratch), largest(peaks)

    def _seed(self, task: TrainTask, client_id: str) -> int:
        name = f"workload/{client_id}/{task.run_id}/{task.round_index}/{task.base_digest}"
        return int.from_bytes(derive_secret(self._root_secret, name)[:_SEED_BYTES], "big")


class WorkloadModel:
    """Implements :class:`fedvit.ports.ServerModelPort` for a workload, which has no export."""

    exports = False

    def __init__(self, settings: Settings) -> None:
        self._clients = load_workload(settings)
        self._initial = {n: np.asarray(a, dtype=np.float32) for n, a in self._clients.initial_weights().items()}

    def initial_weights(self) -> Weights:
        """The weights that a run starts from."""
        return self._initial

    def frozen_weights(self) -> Weights:
        """Nothing is frozen that fedvit knows of."""
        return {}

    def evaluate(self, weights: Weights) -> Evaluation | None:
        """What the workload says of them."""
        return self._clients.evaluate(weights)

    def histogram_spec(self) -> HistogramSpec | None:
        """None; see :meth:`WorkloadHost.histograms`."""
        return None

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        """Raises ModelError."""
        raise _no_export()

    def benchmark(self, content: bytes, limit: int | None = None) -> ModelBenchmark:
        """Raises ModelError."""
        raise _no_export()


def _weighed(own: ClientAnswer, scale: float) -> ClientAnswer:
    if not isinstance(own, ClientUpdate):
        return own
    sums = {n: np.multiply(a, scale, dtype=np.float64) for n, a in own.weighted_sum.items()}
    return replace(own, weighted_sum=sums)


def _no_export() -> ModelError:
    return ModelError("A workload's model has no export.", cure="Serve it yourself from its weights: `fedvit model`.")


def limit_threads(settings: Settings) -> None:
    """Use as many threads as the settings give a proxy."""
    # More threads than free cores make torch wait for itself.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(settings.ray.threads_per_proxy)

"""Custom workloads: a user's own model and virtual clients, with the same actors, rounds, store and accountant.

This module does not import torch; a workload imports what it needs.
"""

from __future__ import annotations

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeAlias, TypeVar, cast

import numpy as np

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import ClientHalf
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.contributions import RingAggregator, RingEncoder, with_own_noise
from fedvit.clients.partial_aggregator import PartialAggregator, check_base, failed
from fedvit.clients.secure import SecureClients
from fedvit.clients.workload_checks import checked_clients, checked_evaluation, checked_fit, checked_weights
from fedvit.config import Settings
from fedvit.errors import ConfigError, DataError, ModelError, UpdateRejectedError
from fedvit.exact_sums import Sums, largest, peak_of, subtract
from fedvit.ports import ClientHostPort, ExportedModel, ModelBenchmark, ServerModelPort
from fedvit.privacy.mechanism import clip_factor
from fedvit.privacy.randomness import derive_secret, load_or_create_root_secret, output_id
from fedvit.secure_session import SecureAnswer, SecureSession
from fedvit.types import Client, ClientOutcome, Evaluation, FloatArray, TrainTask, Variant, Weights
from fedvit.updates import ClientAnswer, ClientFailures, ClientUpdate, UpdateBundle, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, HistogramSpec

_SEED_BYTES = 8
_OWN_REFERENCES = 2
"""What :func:`sys.getrefcount` says of an array that one name holds; views of it and tensors on it count as well."""
_Answer: TypeAlias = tuple[ClientAnswer, float, float]
_Part = TypeVar("_Part")


class VirtualClients(ABC):
    """Base class of a workload: one object trains all clients of a proxy and is kept between rounds.

    ``workload.clients_class`` names a subclass as ``package.module:Class``; every proxy and the aggregator create one
    object of it.

    Attributes:
        protects_records: whether :meth:`fit` clips and adds noise as the task says. It is not needed with
            ``privacy_unit: client``: the host clips, and the noise is added where ``privacy.noise_at`` says.
        public_client: id of a client of made-up or public data, which :meth:`fit` trains for one step before a run
            begins; :meth:`clients` need not yield it. Without one, :meth:`fit` is tried on one of the first clients;
            its result is discarded, and an error of it is shown.
    """

    protects_records: ClassVar[bool] = False
    public_client: ClassVar[str | None] = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def initial_weights(self) -> Weights:
        """The initial weights of a run by name, of any order in memory; equal settings give equal weights.

        They are copied, and converted to float32. Numbers must be finite.
        """

    @abstractmethod
    def clients(self) -> Iterable[tuple[str, int]]:
        """Every client's id, which matches :data:`fedvit.types.CLIENT_ID`, and its number of examples."""

    @abstractmethod
    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        """Train one client; return its weights and its number of examples, for weighting.

        A client that has no examples today contributes nothing to the round. One that returns more than :meth:`clients`
        said is rejected.

        Args:
            weights: of the round, a copy for this call: it may be changed in place, also through ``torch.from_numpy``.
            seed: 64 secret bits of this client and task; the same if the round is repeated, on any proxy.
        """

    def evaluate(self, weights: Weights) -> Evaluation | None:
        """Evaluation on held-out data of the server; None if there are none.

        Args:
            weights: a copy for this call.
        """
        return None

    def registered(self) -> Iterable[Client]:
        """The clients to register in the store, read one by one.

        Raises:
            WorkloadError: :meth:`clients` yields something else than ids and numbers of examples, or an id twice.
        """
        return checked_clients(self.clients)


def client_host(settings: Settings) -> ClientHostPort:
    """The client host of a proxy: that of the workload, or of the configured Vision Transformer.

    Raises:
        DataError, ModelError, ConfigError: a setting cannot be used.
    """
    if settings.workload.clients_class is not None:
        return limit_threads(settings, WorkloadHost(settings))
    from fedvit.clients.host import vision_host

    return limit_threads(settings, vision_host(settings))


def server_model(settings: Settings) -> ServerModelPort:
    """The global model on the server, of the workload or of the configured Vision Transformer.

    Raises:
        DataError, ModelError, ConfigError: a setting cannot be used.
    """
    if settings.workload.clients_class is not None:
        return limit_threads(settings, WorkloadModel(settings))
    from fedvit.evaluation.server_model import ServerModel

    return limit_threads(settings, ServerModel(settings))


def load_workload(settings: Settings) -> VirtualClients:
    """An object of the class that ``workload.clients_class`` names.

    Raises:
        ConfigError: there is no such class, or it does not protect the configured privacy unit.
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


def check_no_workload(settings: Settings, program: str) -> None:
    """Refuse a workload where a program, such as "A sweep", runs only the built-in clients and models for images.

    Raises:
        ConfigError: ``workload.clients_class`` is set.
    """
    if settings.workload.clients_class is not None:
        raise ConfigError(
            f"{program} works on images; workload.clients_class names {settings.workload.clients_class!r}.",
            cure="Leave workload.clients_class out; `fedvit run` trains a workload.",
        )


class WorkloadHost:
    """Implements :class:`fedvit.ports.ClientHostPort` for a workload; by default for the configured one."""

    def __init__(self, settings: Settings, clients: VirtualClients | None = None) -> None:
        self._clients = load_workload(settings) if clients is None else clients
        self._settings, self._rule = settings, rule_for(settings)
        if type(self._rule.client) is not ClientHalf:
            raise ConfigError(
                f"training.aggregation {self._rule.name!r} corrects local steps, which a workload takes itself.",
                cure="Use a rule without a client half.",
            )
        self._root_secret = load_or_create_root_secret(settings.home)
        self._secure = SecureClients(self._root_secret)
        self._scratch: dict[str, FloatArray] = {}
        self._lent: dict[str, FloatArray] = {}

    def train(
        self,
        task: TrainTask,
        weights: Weights,
        client_ids: Sequence[str],
        max_weight: int | None = None,
        num_examples: Mapping[str, int] | None = None,
        secure: Mapping[str, bytes] | None = None,
    ) -> UpdateMessage:
        check_base(task, weights)
        max_weights = {} if max_weight is None else {task.round_index: max_weight}
        validator = UpdateValidator.of(self._settings, self._rule, weights, num_examples, max_weights=max_weights)
        if task.noise_place == "distributed":
            return self._ring_sum(task, weights, validator, client_ids, secure)
        # Lazy: the arrays of an answer are overwritten by the next client's.
        answers = (self._answer(task, weights, validator, client_id) for client_id in sorted(client_ids))
        if self._rule.needs == "single_updates":
            return UpdateBundle(task.round_index, tuple(_weighted(answer, scale) for answer, scale, _ in answers))
        aggregator = PartialAggregator(task, validator.shapes)
        for answer, scale, peak in answers:
            aggregator.add(answer, scale, peak=peak)
        return aggregator.message()

    def _ring_sum(
        self,
        task: TrainTask,
        weights: Weights,
        validator: UpdateValidator,
        client_ids: Sequence[str],
        secure: Mapping[str, bytes] | None,
    ) -> UpdateMessage:
        encoder = RingEncoder(task, self._settings, validator.shapes)
        aggregator = RingAggregator(task, encoder.plan)
        for client_id in sorted(client_ids):
            answer, scale, _ = self._answer(task, weights, validator, client_id)
            own = _weighted(answer, scale)
            if isinstance(own, ClientFailures):
                aggregator.add(own)
                continue
            try:
                ring = encoder.encode(own, derive_secret(self._root_secret, client_id))
            except Exception as error:
                aggregator.add(failed(task, client_id, error))
                continue
            aggregator.add(ring if secure is None else self._secure.under_masks(task, ring, secure))
        return aggregator.message()

    def exchange(self, session: SecureSession, phase: str, requests: Mapping[str, bytes]) -> list[SecureAnswer]:
        return self._secure.exchange(session, phase, requests)

    def histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        return []  # a workload's examples are not known here

    def _answer(self, task: TrainTask, base: Weights, validator: UpdateValidator, client_id: str) -> _Answer:
        try:
            return self._train_one(task, base, validator, client_id)
        except Exception as error:
            return failed(task, client_id, error), 1.0, 0.0

    def _train_one(self, task: TrainTask, base: Weights, validator: UpdateValidator, client_id: str) -> _Answer:
        """A client's answer, the factor for its arrays, and the largest magnitude in them."""
        result = self._clients.fit(client_id, self._lend(base), task, self._seed(task, client_id))
        local, num_examples = checked_fit(result)
        if not num_examples:
            raise DataError(f"{client_id} has no examples today.")
        outcome = ClientOutcome(client_id, num_examples)
        delta, peak, norm = self._difference(local, base, with_norm=task.privacy_unit == "client")
        if task.privacy_unit == "client":
            (scale, within), weight = clip_factor(norm, task.l2_clip_norm), 1.0
        else:
            scale = weight = float(validator.weight_of(outcome, task.round_index))
            within = False
        # The arrays are float32 and not yet scaled, to avoid copies; the aggregator scales them.
        update = ClientUpdate(task.round_index, outcome, cast("Sums", delta), weight, int(within))
        if fault := validator.fault_of(update, scale, peak=peak):
            raise UpdateRejectedError(f"The update of {client_id} is refused: {fault}.")
        if task.privacy_unit == "client" and task.noise_place == "client":
            own = cast("ClientUpdate", _weighted(update, scale))
            own = with_own_noise(task, own, derive_secret(self._root_secret, client_id))
            return own, 1.0, peak_of(own.weighted_sum)
        return update, scale, peak

    def _lend(self, base: Weights) -> dict[str, FloatArray]:
        """Copies: a client that trains in place must not change what the others start from.

        An array that nobody holds any more is used again, because fresh memory takes longer than the copy.
        """
        for name, array in base.items():
            mine = self._lent.pop(name, None)
            if mine is None or sys.getrefcount(mine) > _OWN_REFERENCES or mine.shape != array.shape:
                mine = np.empty(array.shape, np.float32)
            np.copyto(mine, array)
            self._lent[name] = mine
        return dict(self._lent)

    def _difference(
        self, local: Weights, base: Weights, *, with_norm: bool
    ) -> tuple[dict[str, FloatArray], float, float]:
        """``local - base`` in arrays that the next client overwrites, the largest magnitude in it, and its L2 norm.

        The norm is 0 without ``with_norm``.
        """
        found = dict[str, tuple[float, float]]()
        if faults := sorted(n for n in local.keys() | base.keys() if n not in local or n not in base):
            raise UpdateRejectedError(f"fit returned the parameters {sorted(local)[:5]}; {faults[0]!r} is amiss.")
        for name, array in base.items():
            if np.shape(local[name]) != array.shape:
                raise UpdateRejectedError(f"fit returned {name!r} with the shape {list(np.shape(local[name]))}.")
            if name not in self._scratch:
                self._scratch[name] = np.empty(array.shape, np.float32)
            found[name] = subtract(local[name], array, out=self._scratch[name], squares=with_norm)
        # In the order of the arrays, on which the last bit of the norm depends.
        norm = math.sqrt(sum(found[name][1] for name in self._scratch))
        return dict(self._scratch), largest(peak for peak, _ in found.values()), norm

    def _seed(self, task: TrainTask, client_id: str) -> int:
        # The number of examples is not known before ``fit`` returns it.
        name = f"workload/{output_id(task, client_id, 0)}"
        return int.from_bytes(derive_secret(self._root_secret, name)[:_SEED_BYTES], "big")


class WorkloadModel:
    """Implements :class:`fedvit.ports.ServerModelPort` for a workload, which has no export."""

    exports = False
    head: str | None = None

    def __init__(self, settings: Settings, clients: VirtualClients | None = None) -> None:
        self._clients = load_workload(settings) if clients is None else clients
        self._initial = checked_weights(self._clients.initial_weights())

    def initial_weights(self) -> Weights:
        return self._initial

    def frozen_weights(self) -> Weights:
        return {}  # a workload's frozen weights are its own

    def head_basis(self, weights: Weights, directions: int) -> FloatArray | None:
        return None

    def evaluate(self, weights: Weights) -> Evaluation | None:
        return checked_evaluation(self._clients.evaluate(_copied(weights)))

    def histogram_spec(self) -> HistogramSpec | None:
        return None

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        raise _no_export()

    def benchmark(self, content: bytes, limit: int | None = None) -> ModelBenchmark:
        raise _no_export()


def _copied(weights: Weights) -> dict[str, FloatArray]:
    return {name: array.copy() for name, array in weights.items()}


def _weighted(answer: ClientAnswer, scale: float) -> ClientAnswer:
    if not isinstance(answer, ClientUpdate):
        return answer
    sums = {n: np.multiply(a, scale, dtype=np.float64) for n, a in answer.weighted_sum.items()}
    return replace(answer, weighted_sum=sums)


def _no_export() -> ModelError:
    return ModelError("A workload's model has no export.", cure="Serve it yourself from its weights: `fedvit model`.")


def limit_threads(settings: Settings, part: _Part) -> _Part:
    """``part``, after torch's threads are set to those of a proxy; with more threads than cores, torch is slow."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(settings.ray.threads_per_proxy)
    return part

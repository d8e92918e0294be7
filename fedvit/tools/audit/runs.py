"""Runs for audits: the real coordinator, store, ledger and hosts; clients return given updates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvit.aggregation.rule import GradientCorrection, RoundFacts
from fedvit.clients.host import ClientData, ClientHost
from fedvit.config import Settings
from fedvit.ports import AccountantPort, Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.randomness import SECRET_BYTES
from fedvit.rounds.context import RoundBase
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.protection import EXPECTED_COHORT, ClientLevel, Folded
from fedvit.rounds.steering import AggregationSettings, change_aggregation_settings
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel
from fedvit.tools.audit.findings import Scope
from fedvit.tools.audit.observe import Release, Vector, released_rounds
from fedvit.types import (
    Client,
    ClientKind,
    ClientOutcome,
    Cohort,
    FloatArray,
    Run,
    TrainingProgress,
    TrainTask,
    Weights,
)
from fedvit.updates import PartialSum, UpdateMessage
from fedvit.wire.histograms import HistogramRequest, HistogramSpec

Update = Mapping[str, FloatArray]
FIXED_KEY = bytes(range(SECRET_BYTES))
"""The root key of most audits, so that their findings are reproducible."""
NUM_EXAMPLES = 1
"""The records of each client."""


def run_settings(
    home: Path,
    scope: Scope,
    *,
    unit: str = "client",
    rounds: int = 1,
    cohort: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    histograms: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings with which the budget is never spent; by default all clients take part as a Poisson sample."""
    cohort = {"selection": "poisson", "sampling_prob": 1.0} if cohort is None else cohort
    mechanism = {"noise_multiplier": scope.noise_multiplier, "l2_clip_norm": scope.l2_clip_norm}
    mechanism |= {"sampling_prob": scope.sampling_prob, "target_epsilon": 1e6}
    overrides = {
        "home": home,
        "data": dict(data or {}),
        "training": {"rounds": rounds, "cohort": dict(cohort), **(training or {})},
        "privacy": {"privacy_unit": unit, **mechanism, **(privacy or {})},
        "histograms": {"every_rounds": None, **(histograms or {})},
        "release": {"every_rounds": 1000},
    }
    return load_settings(environ={}, overrides=overrides)


def write_key(home: Path, key: bytes = FIXED_KEY) -> None:
    """Write the root key of a state folder."""
    keys = home / "keys"
    for folder in (home, keys):
        folder.mkdir(mode=0o700, exist_ok=True)
    (keys / "root.key").touch(mode=0o600)
    (keys / "root.key").write_bytes(key)


def zero_updates(clients: int, size: int = 2) -> dict[str, Update]:
    """Updates of zeros: ``size`` numbers in one array, and one without dimensions."""
    zeros: Update = {"point": np.zeros(size, np.float32), "scale": np.zeros((), np.float32)}
    return {f"vehicle-{i:04d}": zeros for i in range(clients)}


class _Model(PointModel):
    """A point and a number without dimensions."""

    def initial_weights(self) -> Weights:
        return {**super().initial_weights(), "scale": np.zeros((), np.float32)}


class _FixedUpdates:
    """A trainer that returns given updates."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        self._updates = updates

    def train(
        self,
        task: TrainTask,
        base: Weights,
        features: Tensor,
        labels: Tensor,
        secret: bytes,
        client_id: str,
        correction: GradientCorrection | None = None,
    ) -> dict[str, FloatArray]:
        """The client's update."""
        return dict(self._updates[client_id])


class _OneRecord:
    """Every client has one record, which is never read."""

    def load(self, client_id: str) -> ClientData:
        """The record of a client."""
        return ClientData(torch.zeros(1, 1), torch.zeros(NUM_EXAMPLES, dtype=torch.long), "0" * 64)


def host_of(settings: Settings, updates: Mapping[str, Update]) -> ClientHost:
    """The real host of clients with given updates."""
    return ClientHost(settings, data=_OneRecord(), trainer=_FixedUpdates(updates), root_secret=FIXED_KEY)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to clients, and the charges that the ledger had when it was made."""

    request: TrainTask | HistogramRequest
    client_ids: tuple[str, ...]
    charges: tuple[Charge, ...]


class _HostFleet(FakeFleet):
    """Clients on a real host; every request to them is noted."""

    def __init__(self, run: AuditRun, updates: Mapping[str, Update], point: FloatArray) -> None:
        super().__init__(point, groups=run.groups)
        self._run, self._host = run, host_of(run.settings, updates)

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        self._run.note(task, cohort.client_ids)
        self.held = set(self._run.held(task.round_index, cohort.client_ids))
        return super().train(task, weights, cohort, timeout_s=timeout_s)

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        return self._run.alter(self._host.train(task, weights, client_ids))

    def request_histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> None:
        self._run.note(request, client_ids)
        super().request_histograms(request, client_ids)


@dataclass
class AuditRun:
    """A run with given updates.

    Args:
        settings: with a home that has a key; see :func:`run_settings` and :func:`write_key`.
        updates: by client; all of one size.
        groups: the number of messages of a round. A client answers alone if there are as many as clients.
        held: the clients of a cohort that answer in a later round; arguments: the round and the cohort.
        alter: changes the message of a group.
        mode: of the rounds; by default synchronous.
        spec: of the clients' histograms, if they have any.
        exact: whether epsilon is computed; otherwise charges are only written.

    Attributes:
        asked: the requests to the clients, in order.
    """

    settings: Settings
    updates: Mapping[str, Update]
    groups: int = 2
    held: Callable[[int, Sequence[str]], Collection[str]] = lambda round_index, client_ids: ()
    alter: Callable[[UpdateMessage], UpdateMessage] = lambda message: message
    mode: AggregationSettings | None = None
    spec: HistogramSpec | None = None
    exact: bool = False
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = store = Store.open(self.settings.home)
        store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        store.clients.register([Client(client_id, ClientKind.VIRTUAL, NUM_EXAMPLES) for client_id in self.updates])
        if self.mode is not None:
            wanted = self.mode
            change_aggregation_settings(store, lambda now: wanted)
        self.accountant: AccountantPort = (
            PrivacyAccountant(store, self.settings) if self.exact else GenerousAccountant(store)
        )
        size = max(np.size(update["point"]) for update in self.updates.values())
        self._point = np.zeros(size, np.float32)

    def __enter__(self) -> AuditRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def note(self, request: TrainTask | HistogramRequest, client_ids: Sequence[str]) -> None:
        """Note a request to clients."""
        charges = tuple(entry.charge for entry in self.store.ledger.entries())
        self.asked.append(Asked(request, tuple(client_ids), charges))

    def tasks(self) -> list[TrainTask]:
        """The tasks of the rounds, in order."""
        return [asked.request for asked in self.asked if isinstance(asked.request, TrainTask)]

    def run(self, stop_after: int | None = None) -> Run:
        """Begin or continue the run in a new coordinator, until it rests.

        Args:
            stop_after: committed rounds after which the loop is asked to stop; it ends with the round under way.
        """

        def stop(progress: TrainingProgress) -> None:
            if stop_after is not None and progress.rounds_done >= stop_after:
                loop.request_stop()

        model = _Model(self._point)
        model.spec = self.spec
        loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=self.accountant,
            fleet=_HostFleet(self, self.updates, self._point),
            model=model,
            on_progress=stop,
        )
        return loop.run()

    def released(self, stop_after: int | None = None) -> list[Release]:
        """The releases of whole clients, by round; with ``stop_after``, of a run that was stopped and continued.

        Raises:
            FedvitError: the run could not begin.
            RuntimeError: the run was not completed.
        """
        with released_rounds() as releases:
            if stop_after is not None:
                self.run(stop_after)
            run = self.run()
        if run.rounds_done != run.rounds_total:
            raise RuntimeError(f"the run ended as {run.status.value}: {run.reason}")
        return releases


def client_task(scope: Scope, round_index: int = 9) -> TrainTask:
    """A task of a round of whole clients."""
    return replace(scope.train_task(round_index, learning_rate=1.0), privacy_unit="client")


class Folding:
    """Single rounds of whole clients, folded by the real protection without a run around them.

    Args:
        expected: the expected cohort, by which sums are divided.
    """

    def __init__(self, settings: Settings, store: Store, expected: float) -> None:
        self._protection = ClientLevel(settings, store)
        self._run = store.runs.create(
            rounds_total=1,
            noise_multiplier=settings.privacy.noise_multiplier or 0.0,
            config={EXPECTED_COHORT: expected},
            config_digest="",
            data_digest="",
        )

    def fold(self, task: TrainTask, sums: Mapping[str, Vector], clients: int, within: int = 0) -> Folded:
        """Fold a sum of so many clients' clipped updates, so many of which were within the norm."""
        outcomes = tuple(ClientOutcome(f"vehicle-{i:04d}", NUM_EXAMPLES) for i in range(clients))
        answer = PartialSum(task.round_index, outcomes, sums, float(clients), within)
        zeros = {name: np.zeros(array.shape, np.float32) for name, array in sums.items()}
        base = RoundBase.of(self._protection.rule, zeros, "", {})
        return self._protection.fold(self._run, task, base, [answer], RoundFacts())

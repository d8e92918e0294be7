"""Check of neighbouring clients: one client changes a round's sum by at most the clipping norm."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvit.aggregation.rule import GradientCorrection
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.host import ClientData, ClientHost
from fedvit.config import Settings
from fedvit.privacy import mechanism
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.randomness import SECRET_BYTES
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.protection import ClientLevel
from fedvit.rounds.update_admission import AdmissionPolicy, UpdateAdmission
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, flat_arrays, released_rounds
from fedvit.tools.audit.records import ROUNDING
from fedvit.types import Client, ClientKind, FloatArray, TrainTask, Weights
from fedvit.updates import PartialSum, UpdateMessage
from fedvit.wire.tensors import encode_weights

CHECK = "neighbouring clients"
Update = Mapping[str, FloatArray]


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
        return ClientData(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), "0" * 64)


def _host(settings: Settings, updates: Mapping[str, Update]) -> ClientHost:
    """The real host with given data and updates. Whole clients are clipped here and noised at the aggregator."""
    return ClientHost(settings, data=_OneRecord(), trainer=_FixedUpdates(updates), root_secret=bytes(SECRET_BYTES))


class _Fleet(FakeFleet):
    """Hosts of such clients, two of them."""

    def __init__(self, settings: Settings, updates: Mapping[str, Update], point: FloatArray) -> None:
        super().__init__(point)
        self._host = _host(settings, updates)

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        return self._host.train(task, weights, client_ids)


class Rounds:
    """Client-level rounds by the real coordinator with a real store and ledger."""

    def __init__(self, home: Path, scope: Scope, updates: Mapping[str, Update], *, rounds: int = 1) -> None:
        self.settings = client_settings(home, scope, rounds)
        write_fixed_key(home)
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register([Client(client_id, ClientKind.VIRTUAL, 10) for client_id in updates])
        self.accountant = PrivacyAccountant(self.store, self.settings)
        size = max(np.size(update["point"]) for update in updates.values())
        self._point, self._updates = np.zeros(size, np.float32), updates

    def released(self, fleet: FakeFleet | None = None) -> list[Release]:
        """The releases of a run, by round.

        Raises:
            FedvitError: the run could not begin.
            RuntimeError: the run was not completed.
        """
        loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=self.accountant,
            fleet=fleet or _Fleet(self.settings, self._updates, self._point),
            model=_Model(self._point),
        )
        with released_rounds() as releases:
            run = loop.run()
        if run.rounds_done != run.rounds_total:
            raise RuntimeError(f"the run ended as {run.status.value}: {run.reason}")
        return releases


def write_fixed_key(home: Path) -> None:
    """Write the same root key in every audit, so that its findings are reproducible."""
    keys = home / "keys"
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    (keys / "root.key").write_bytes(bytes(range(SECRET_BYTES)))


def client_settings(home: Path, scope: Scope, rounds: int) -> Settings:
    """Settings with which all clients take part and the budget is never spent."""
    privacy: dict[str, Any] = {
        "privacy_unit": "client",
        "noise_multiplier": scope.noise_multiplier,
        "target_epsilon": 1e6,
        "l2_clip_norm": scope.l2_clip_norm,
    }
    cohort = {"selection": "poisson", "sampling_prob": 1.0}
    training = {"rounds": rounds, "cohort": cohort}
    overrides = {"home": home, "training": training, "privacy": privacy, "release": {"every_rounds": 1000}}
    return load_settings(environ={}, overrides=overrides)


def hostile_updates(l2_clip_norm: float) -> dict[str, Update]:
    """Long and short updates, one only in the scalar, a duplicate, a zero, and non-finite ones."""
    points = [[3.0, -4.0], [0.1, 0.2], [0.0, 0.0], [1e30, 0.0], [0.0, 0.0], [3.0, -4.0], [np.nan, 1.0], [np.inf, 0.0]]
    scales = [0.5, 0.0, 50.0, 0.0, 0.0, 0.5, 0.0, 1.0]
    return {
        f"vehicle-{i:04d}": {
            "point": np.array(point, np.float32) * np.float32(l2_clip_norm),
            "scale": np.array(scale * l2_clip_norm, np.float32),
        }
        for i, (point, scale) in enumerate(zip(points, scales, strict=True))
    }


def check(scope: Scope) -> Iterator[Finding]:
    """Compare rounds with and without each client, and weights of late answers."""
    faults, furthest = _round_faults(scope)
    detail = f"moves by {furthest:.7f} of the clipping norm at most"
    yield Finding.of(CHECK, "a round with and without each client", faults, detail)
    yield Finding.of(CHECK, "late answers", list(_late_faults(scope)), "a weight of 1 when fresh, then less")


def _round_faults(scope: Scope) -> tuple[list[str], float]:
    updates, faults, furthest = hostile_updates(scope.l2_clip_norm), [], 0.0
    whole = _one_round(scope, updates)
    for gone in updates:
        release = _one_round(scope, {c: update for c, update in updates.items() if c != gone})
        moved = float(np.linalg.norm(whole.total - release.total)) / scope.l2_clip_norm
        furthest = max(furthest, moved)
        if not moved <= 1 + ROUNDING:
            faults.append(f"{gone} moves the sum by {moved:.7f} clipping norms")
        if release.divisor != len(updates) - 1:
            faults.append(f"the sum is divided by {release.divisor:g}, not by the expected {len(updates) - 1}")
    if furthest < 0.999:
        faults.append(f"no client moves the sum by more than {furthest:.3g} clipping norms; nothing is shown")
    return faults, furthest


def _one_round(scope: Scope, updates: Mapping[str, Update]) -> Release:
    with tempfile.TemporaryDirectory() as home:
        rounds = Rounds(Path(home), scope, updates)
        try:
            (release,) = rounds.released()
        finally:
            rounds.store.close()
    return release


def _late_faults(scope: Scope) -> Iterator[str]:
    update = {"point": np.array([3.0, -4.0], np.float32), "scale": np.array(5.0, np.float32)}
    base = {name: np.zeros_like(array) for name, array in update.items()}
    task = client_task(scope)
    with tempfile.TemporaryDirectory() as home, Store.open(Path(home)) as store:
        settings = client_settings(Path(home), scope, 9)
        protection = ClientLevel(settings, store)
        validator = UpdateValidator.of(settings, protection.rule, base)
        answer = _host_answer(settings, task, base, update)
        weights = []
        for staleness in range(6):
            late = replace(answer, round_index=task.round_index - staleness)
            admission = UpdateAdmission(
                task.round_index,
                AdmissionPolicy("asynchronous", staleness_tolerance=9),
                validator,
                lambda _: ({"vehicle-0000"}, ()),
                fault_of=lambda update: protection.fault_of(update, task.run_id),
            )
            admission.admit(late)
            updates, _ = admission.close(room=None)
            clipped = [(late, scope.l2_clip_norm) for late in updates.updates()]
            sums = mechanism.total(base, clipped, scope.l2_clip_norm)
            weights.append(float(np.linalg.norm(flat_arrays(sums))) / scope.l2_clip_norm)
    if abs(weights[0] - 1) > ROUNDING:
        yield f"a fresh answer has a weight of {weights[0]:.7f}"
    for staleness, (earlier, later) in enumerate(itertools.pairwise(weights), start=1):
        if not later <= earlier * (1 + ROUNDING):
            yield f"an answer {staleness} versions late has a weight of {later:.7f}, after {earlier:.7f}"


def client_task(scope: Scope, round_index: int = 9) -> TrainTask:
    """A client-level task."""
    task = scope.train_task(round_index, learning_rate=1.0)
    return replace(task, run_id="run-0001", privacy_unit="client")


def _host_answer(settings: Settings, task: TrainTask, base: Weights, update: Update) -> PartialSum:
    based = replace(task, base_digest=hashlib.sha256(encode_weights(base)).hexdigest())
    answer = _host(settings, {"vehicle-0000": update}).train(based, base, ["vehicle-0000"])
    assert isinstance(answer, PartialSum)
    return answer

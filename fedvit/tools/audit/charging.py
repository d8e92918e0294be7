"""Check that every release is charged before it happens, once, and that charges survive a restart."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import PoissonGaussian
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet
from fedvit.tools.audit.clients import Rounds, Update
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.types import Cohort, TrainTask, Weights
from fedvit.updates import PartialSum, UpdateMessage

CHECK = "charging"
_ROUNDS = 3


class _LedgerReadingFleet(FakeFleet):
    """A fleet that reads the ledger when it is asked to train."""

    def __init__(self, store: Store) -> None:
        super().__init__(np.zeros(2, np.float32))
        self._store = store
        self.charged: list[set[int]] = []

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        self.charged.append({entry.charge.round_index for entry in self._store.ledger.entries()})
        return super().train(task, weights, cohort, timeout_s=timeout_s)

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        answer = super().train_group(task, weights, client_ids)
        assert isinstance(answer, PartialSum)
        return replace(answer, weighted_sum={**answer.weighted_sum, "scale": np.zeros(())})


def check(scope: Scope) -> Iterator[Finding]:
    """Run client-level rounds, then open the same state folder again."""
    zeros: Update = {"point": np.zeros(2, np.float32), "scale": np.zeros((), np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(Path(folder), scope, {"vehicle-0000": zeros, "vehicle-0001": zeros}, rounds=_ROUNDS)
        fleet = _LedgerReadingFleet(rounds.store)
        rounds.released(fleet)
        before = rounds.accountant.budget().epsilon_spent
        rounds.store.close()
        uncharged = [index for index, charged in enumerate(fleet.charged, start=1) if index not in charged]
        faults = [f"round {index} is released, and the ledger has no charge for it" for index in uncharged]
        yield Finding.of(CHECK, "before release", faults, f"{_ROUNDS} rounds")
        faults = list(_restart_faults(Path(folder), rounds, scope, before))
        detail = f"epsilon {before:.6f} before and after, and the chain is whole"
        yield Finding.of(CHECK, "after a restart", faults, detail)


def _restart_faults(home: Path, rounds: Rounds, scope: Scope, before: float) -> Iterator[str]:
    with Store.open(home) as store:
        after = PrivacyAccountant(store, rounds.settings).budget().epsilon_spent
        entries = store.ledger.verify()
    event = PoissonGaussian(scope.noise_multiplier, 1.0)
    expected = epsilon_pld({event: _ROUNDS}, rounds.settings.privacy.target_delta)
    if entries != _ROUNDS:
        yield f"the ledger has {entries} charges for {_ROUNDS} rounds"
    if abs(after - before) > 1e-9:
        yield f"epsilon was {before:.6f}, and is {after:.6f} after a restart"
    if abs(after - expected) > 1e-9:
        yield f"epsilon is {after:.6f}; what was released costs {expected:.6f}"

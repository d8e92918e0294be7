"""Check that every output is charged before clients are asked for it, once, for what it costs, and durably."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedvit.ports import POPULATION, Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event, Gaussian, PoissonGaussian, simplified
from fedvit.privacy.randomness import output_id
from fedvit.privacy.round_cost import spend_of
from fedvit.rounds.protection import protection_for
from fedvit.rounds.remote import RemoteWork
from fedvit.rounds.steering import AggregationSettings
from fedvit.store.store import Store
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.runs import NUM_EXAMPLES, Asked, AuditRun, run_settings, write_key, zero_updates
from fedvit.types import Client, ClientKind
from fedvit.wire.histograms import HistogramRequest, HistogramSpec

CHECK = "charging"
_ROUNDS, _CLIENTS, _SAMPLING_PROB = 3, 8, 0.5
_SPEC = HistogramSpec({"brightness": (1.0, 2.0)}, 1)


@dataclass(frozen=True, slots=True)
class Case:
    """A configured mechanism. ``late`` clients of an asynchronous round answer in the next one."""

    name: str
    unit: str
    cohort: Mapping[str, Any]
    local_steps: int = 1
    privacy: Mapping[str, Any] = field(default_factory=dict)
    histograms: bool = False
    late: int = 0

    @property
    def sampled(self) -> bool:
        """Whether the cohort is a secret sample, so that everybody is charged."""
        return bool(self.cohort["selection"] == "poisson")

    def cost(self, scope: Scope) -> dict[Event, int]:
        """The cost of a round for one unit: with adaptive clipping, that of sum and count together."""
        noise_multiplier = scope.noise_multiplier
        if self.unit == "record":
            return {PoissonGaussian(noise_multiplier, scope.sampling_prob): self.local_steps}
        return {PoissonGaussian(noise_multiplier, _SAMPLING_PROB) if self.sampled else Gaussian(noise_multiplier): 1}

    def run(self, home: Path, scope: Scope) -> AuditRun:
        """The run of this mechanism."""
        write_key(home)
        settings = run_settings(
            home,
            scope,
            unit=self.unit,
            rounds=_ROUNDS,
            cohort=self.cohort,
            privacy=self.privacy,
            training={"local_steps": self.local_steps},
            histograms={"every_rounds": 1} if self.histograms else {},
        )
        return AuditRun(
            settings,
            zero_updates(_CLIENTS),
            groups=_CLIENTS,
            held=lambda round_index, client_ids: client_ids[: self.late] if round_index < _ROUNDS else (),
            mode=AggregationSettings(mode="asynchronous", buffer_size=1) if self.late else None,
            spec=_SPEC,
            exact=True,
        )


def cases(scope: Scope) -> tuple[Case, ...]:
    """Every mechanism that can be configured."""
    over_selected = {"selection": "uniform", "size": 2, "over_selection": 1.0}
    poisson = {"selection": "poisson", "sampling_prob": _SAMPLING_PROB}
    capped = {**over_selected, "max_participations": 9}
    banded = {"selection": "uniform", "size": 2, "max_participations": 2, "min_separation": 3}
    adaptive = {"adaptive_clip": {"count_noise_multiplier": 1.25 * scope.noise_multiplier}}
    return (
        Case("records, over-selection", "record", over_selected, local_steps=3),
        Case("records, late updates, histograms", "record", {"selection": "all"}, histograms=True, late=1),
        Case("clients, Poisson cohorts", "client", poisson, histograms=True),
        Case("clients, over-selection, histograms", "client", capped, histograms=True),
        Case("clients, late updates", "client", {"selection": "all", "max_participations": 9}, late=1),
        Case("clients, banded noise", "client", banded, privacy={"noise": "banded", "bands": 3}),
        Case("clients, adaptive clipping", "client", capped, privacy=adaptive),
        Case("clients, adaptive clipping, Poisson cohorts", "client", poisson, privacy=adaptive),
    )


def check(scope: Scope) -> Iterator[Finding]:
    """Run every mechanism, open the state folder of one of them again, and offer a task that was not charged."""
    for case in cases(scope):
        with tempfile.TemporaryDirectory() as folder, case.run(Path(folder), scope) as run:
            status = run.run().status
            faults = [*_case_faults(case, scope, run)] or ([] if run.asked else [f"nobody is asked: {status.value}"])
            detail = f"{len(run.store.ledger.entries())} charges, each before its task"
        yield Finding.of(CHECK, case.name, faults, detail)
    with tempfile.TemporaryDirectory() as folder:
        run = next(case for case in cases(scope) if case.sampled).run(Path(folder), scope)
        with run:
            run.run()
            before = run.accountant.budget().epsilon_spent
        detail = f"epsilon {before:.6f} before and after, and the chain is whole"
        yield Finding.of(CHECK, "after a restart", list(_restart_faults(run, scope, before)), detail)
    yield Finding.of(CHECK, "a remote client", list(_remote_faults(scope)), "gets no task that is not charged")


def _case_faults(case: Case, scope: Scope, run: AuditRun) -> Iterator[str]:
    outputs = set[tuple[str, str]]()
    for asked in run.asked:
        if isinstance(asked.request, HistogramRequest):
            if case.sampled:
                yield "a secret sample is asked for histograms, which reveal it"
            cost: dict[Event, int] = {Gaussian(scope.histogram_noise_multiplier): 1}
        else:
            cost = case.cost(scope)
        for unit_id, output in _outputs(case, asked):
            outputs.add((unit_id, output))
            yield from _charge_faults(asked, unit_id, output, cost)
    charges = run.store.ledger.verify()
    if charges != len(outputs):
        yield f"the ledger has {charges} charges for {len(outputs)} outputs"


def _outputs(case: Case, asked: Asked) -> list[tuple[str, str]]:
    """The units that a request affects, and their outputs, as noise is derived for them."""
    if isinstance(asked.request, HistogramRequest):
        return [(client_id, asked.request.output_id(client_id, NUM_EXAMPLES)) for client_id in asked.client_ids]
    units: Sequence[str] = (POPULATION,) if case.sampled else asked.client_ids
    size = NUM_EXAMPLES if case.unit == "record" else 1
    return [(unit_id, output_id(asked.request, unit_id, size)) for unit_id in units]


def _charge_faults(asked: Asked, unit_id: str, output: str, cost: Mapping[Event, int]) -> Iterator[str]:
    kind, index = "a histogram" if isinstance(asked.request, HistogramRequest) else "a task", asked.request.round_index
    charges = [c for c in asked.charges if (c.round_index, c.unit_id, c.output_id) == (index, unit_id, output)]
    if len(charges) != 1:
        yield f"{unit_id} is asked for {kind} in round {index}, and the ledger has {len(charges)} charges for it"
    for charge in charges:
        if not _same_cost(charge, cost):
            charged = ", ".join(f"{times} x {event}" for event, times in dict([spend_of(charge)]).items())
            yield f"{kind} in round {index} is charged as {charged}; it costs {dict(cost)}"


def _same_cost(charge: Charge, cost: Mapping[Event, int]) -> bool:
    event, times = spend_of(charge)
    charged, due = simplified({event: times}), simplified(cost)
    if len(charged) != 1 or list(charged.values()) != list(due.values()):
        return False
    (one,), (other,) = charged, due
    same_sample = getattr(one, "sampling_prob", 1.0) == getattr(other, "sampling_prob", 1.0)
    return same_sample and bool(np.isclose(one.noise_multiplier, other.noise_multiplier, rtol=1e-9))


def _restart_faults(run: AuditRun, scope: Scope, before: float) -> Iterator[str]:
    with Store.open(run.settings.home) as store:
        after = PrivacyAccountant(store, run.settings).budget().epsilon_spent
        entries = store.ledger.verify()
    event = PoissonGaussian(scope.noise_multiplier, _SAMPLING_PROB)
    expected = epsilon_pld({event: _ROUNDS}, run.settings.privacy.target_delta)
    if entries != _ROUNDS:
        yield f"the ledger has {entries} charges for {_ROUNDS} rounds"
    if abs(after - before) > 1e-9:
        yield f"epsilon was {before:.6f}, and is {after:.6f} after a restart"
    if abs(after - expected) > 1e-9:
        yield f"epsilon is {after:.6f}; what was released costs {expected:.6f}"


def _remote_faults(scope: Scope) -> Iterator[str]:
    """A client whose number of records changes between the charge and the task."""
    client = Client("vehicle-0000", ClientKind.REMOTE, 10, capabilities={"training": {"encodings": ["float32"]}})
    task = scope.train_task()
    with tempfile.TemporaryDirectory() as folder:
        settings = run_settings(Path(folder), scope, unit="record", cohort={"selection": "all"})
        write_key(settings.home)
        with Store.open(settings.home) as store:
            store.clients.register([client])
            work = RemoteWork(settings, store)
            charges = protection_for(settings, store).charges(task, [client.client_id])
            if work.leave(task, client) is not None:
                yield "a task is offered before it is charged"
            PrivacyAccountant(store, settings).write(charges)
            if work.leave(task, client) is None:
                yield "a task that is charged is not offered; nothing is shown"
            if work.leave(task, replace(client, num_examples=11)) is not None:
                yield "a task for 11 records is offered, and one for 10 was charged"

"""Check that each configured mechanism adds the noise that it is charged for, at the place where it is configured."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedvit.ports import Charge
from fedvit.privacy.events import simplified
from fedvit.privacy.mechanism import sensitivity
from fedvit.privacy.round_cost import spend_of
from fedvit.rounds.protection import FACTS
from fedvit.store.store import Store
from fedvit.tools.audit.findings import OTHER_NORMS, Finding, Scope
from fedvit.tools.audit.observe import Release, Vector, flat_arrays, shared_round_randomness
from fedvit.tools.audit.randomness import DEVIATIONS, noise_faults
from fedvit.tools.audit.runs import AuditRun, Folding, client_task, host_of, run_settings, write_key, zero_updates
from fedvit.updates import PartialSum
from fedvit.wire.tensors import weights_digest

CHECK = "noise as charged"
_SIZE, _BANDS, _COUNTS = 2300, 3, 400
# All records are drawn: the charge is that of a Gaussian mechanism without sampling.
_SERVER_NOISE = {"noise_at": "server", "sampling_prob": 1.0}


@dataclass(frozen=True, slots=True)
class Case:
    """A mechanism. ``bands`` is that of its noise, ``stop_after`` the round after which it stops."""

    name: str
    cohort: Mapping[str, Any]
    privacy: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 3
    bands: int = 1
    stop_after: int | None = None
    unit: str = "client"


def check(scope: Scope) -> Iterator[Finding]:
    """The noise of sums against the charges on the ledger, at a clipping norm other than 1, and that of counts."""
    scope = replace(scope, l2_clip_norm=OTHER_NORMS[0])
    poisson, capped = {"selection": "poisson", "sampling_prob": 0.5}, {"selection": "all", "max_participations": 9}
    separated = {"selection": "uniform", "size": 2, "max_participations": 4, "min_separation": _BANDS}
    banded, clip = {"noise": "banded", "bands": _BANDS}, {"adaptive_clip": _adaptive(scope)}
    for case in (
        Case("Poisson cohorts", poisson),
        Case("capped participations", capped),
        Case("banded noise, with a restart", separated, banded, rounds=8, bands=_BANDS, stop_after=4),
        Case("adaptive clipping", capped, clip),
        Case("adaptive clipping, Poisson cohorts", poisson, clip),
        Case("records, noise at the server", {"selection": "all"}, _SERVER_NOISE, unit="record"),
    ):
        faults = list(_sum_faults(scope, case))
        detail = f"{case.rounds} times {_SIZE + 1} numbers, of the charged deviation, unrelated"
        yield Finding.of(CHECK, f"sums, {case.name}", faults, detail)
    detail = f"2 rounds and 2 clients, {_SIZE + 1} numbers each, of the charged deviation, unrelated"
    yield Finding.of(CHECK, "whole clients, their own noise", list(_own_noise_faults(scope)), detail)
    detail = f"{_COUNTS} counts, of the charged deviation over their sensitivity"
    yield Finding.of(CHECK, "counts of adaptive clipping", list(_count_faults(scope)), detail)


def _adaptive(scope: Scope) -> dict[str, float]:
    """Adaptive clipping whose count takes a large share of the round's cost."""
    return {"count_noise_multiplier": 1.25 * scope.noise_multiplier}


def _sum_faults(scope: Scope, case: Case) -> Iterator[str]:
    noise, charges = _noise_and_charges(scope, case, case.stop_after)
    if case.stop_after is not None:
        whole, _ = _noise_and_charges(scope, case, None)
        for index, (one, other) in enumerate(zip(noise, whole, strict=True), start=1):
            if not np.array_equal(one, other):
                yield f"round {index} has other noise in a run that is stopped and continued"
    strategy = _strategy(case.bands)
    # The strategy times the noise, which must be independent from one round to the next.
    independent = [sum(c * noise[t - k] for k, c in enumerate(strategy[: t + 1])) for t in range(len(noise))]
    charged = {_charged_multiplier(charge) for charge in charges}
    if len(charged) != 1:
        yield f"rounds are charged with the noise multipliers {sorted(charged)}"
    count = case.privacy.get("adaptive_clip", {}).get("count_noise_multiplier", math.inf)
    # What is left for the sum, if sum and count together have the charged one.
    precision = max(charged) ** -2 - count**-2
    if precision <= 0:
        yield f"a noise multiplier of {max(charged):.4g} is charged; the count alone has {count:.4g}"
        return
    numbers = [Release(np.zeros_like(each), np.asarray(each), 1.0) for each in independent]
    yield from noise_faults(numbers, precision**-0.5)


def _noise_and_charges(scope: Scope, case: Case, stop_after: int | None) -> tuple[list[Vector], list[Charge]]:
    """The noise of each round over its sensitivity, and the charges of the run."""
    with tempfile.TemporaryDirectory() as home:
        write_key(Path(home))
        settings = run_settings(
            Path(home), scope, unit=case.unit, rounds=case.rounds, cohort=case.cohort, privacy=case.privacy
        )
        with AuditRun(settings, zero_updates(2 * case.bands, _SIZE)) as run:
            releases = run.released(stop_after)
            norms = {task.round_index: sensitivity(task) for task in run.tasks()}
            charges = [entry.charge for entry in run.store.ledger.entries()]
    return [release.noise / norms[index] for index, release in enumerate(releases, start=1)], charges


def _own_noise_faults(scope: Scope) -> Iterator[str]:
    """Updates of zeros, as they leave the real host, over their sensitivity."""
    capped = {"selection": "all", "max_participations": 9}
    updates, noise = zero_updates(2, _SIZE), list[Release]()
    base = {name: np.zeros_like(array) for name, array in updates["vehicle-0000"].items()}
    with tempfile.TemporaryDirectory() as home:
        host = host_of(run_settings(Path(home), scope, cohort=capped, privacy={"noise_at": "client"}), updates)
        for round_index, client_id in itertools.product((1, 2), updates):
            task = replace(client_task(scope, round_index), base_digest=weights_digest(base), noise_at="client")
            answer = host.train(task, base, [client_id])
            assert isinstance(answer, PartialSum)
            noise.append(Release(np.zeros(0), flat_arrays(answer.total()) / task.l2_clip_norm, 1.0))
    yield from noise_faults(noise, scope.noise_multiplier)


def _charged_multiplier(charge: Charge) -> float:
    """The noise multiplier of the one Gaussian mechanism that costs as much."""
    event, times = spend_of(charge)
    (simple,) = simplified({event: times})
    return round(simple.noise_multiplier, 9)


def _strategy(bands: int) -> Sequence[float]:
    """A column of the strategy: the square root of the prefix sums, of norm 1 (see fedvit.privacy.correlated)."""
    column = np.array([math.comb(2 * k, k) / 4**k for k in range(bands)])
    return list(column / np.linalg.norm(column))


def _count_faults(scope: Scope) -> Iterator[str]:
    """The count's noise over its sensitivity, from the noised shares of many rounds."""
    count_noise = _adaptive(scope)["count_noise_multiplier"]
    clients = 2 * math.ceil(8 * count_noise)
    sums: dict[str, Vector] = {"point": np.zeros(2)}
    with tempfile.TemporaryDirectory() as home:
        settings = run_settings(Path(home), scope, privacy={"adaptive_clip": _adaptive(scope)})
        write_key(settings.home)
        with Store.open(settings.home) as store:
            folding = Folding(settings, store, expected=1.0 * clients)

            def counted(contributors: int, within: int, round_index: int = 1) -> float:
                task = client_task(scope, round_index)
                facts = folding.fold(task, sums, contributors, within).facts[FACTS]
                return clients * float(facts["noised_share"])

            with shared_round_randomness():
                whole = counted(clients, clients // 2)
                without = [counted(clients - 1, clients // 2), counted(clients - 1, clients // 2 - 1)]
            noised = np.array([counted(clients, clients // 2, index) for index in range(1, _COUNTS + 1)])
    sensitivity = max(abs(whole - other) for other in without)
    if not sensitivity > 0:
        yield "no client moves the count; nothing is shown"
        return
    share = float(noised.std()) / (sensitivity * count_noise)
    if abs(share - 1) > DEVIATIONS / math.sqrt(2 * _COUNTS):
        yield f"the noise of the count has {share:.4f} of the charged deviation"
    if len(np.unique(noised)) < _COUNTS:
        yield "the noise of the count is repeated"

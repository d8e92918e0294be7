"""Checks of neighbouring clients: one client changes a round's sum by at most the clipping norm, also when late."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedvit.aggregation.validation import UpdateValidator
from fedvit.config import Settings, StalenessConfig
from fedvit.privacy import mechanism
from fedvit.rounds.protection import ClientLevel
from fedvit.rounds.steering import AggregationSettings
from fedvit.rounds.update_admission import AdmissionPolicy, UpdateAdmission
from fedvit.store.store import Store
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, flat_arrays
from fedvit.tools.audit.records import ROUNDING
from fedvit.tools.audit.runs import AuditRun, Update, client_task, host_of, run_settings, write_key, zero_updates
from fedvit.types import TrainTask, Weights
from fedvit.updates import PartialSum, RingSum, UpdateMessage
from fedvit.wire.tensors import encode_weights

CHECK, LATE_CHECK = "neighbouring clients", "late updates"
_WEIGHTS = (
    StalenessConfig(weight="constant"),
    StalenessConfig(weight="polynomial"),
    StalenessConfig(weight="hinge", hinge_from=2),
)


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
    """Compare rounds with and without each client, and let a host return a sum that is too long."""
    for each in scope.at_norms():
        updates = hostile_updates(each.l2_clip_norm)
        gone = list(updates) if each == scope else list(updates)[:4]
        faults, furthest = _round_faults(each, updates, gone)
        subject = f"a round with and without each client, norm {each.l2_clip_norm:g}"
        yield Finding.of(CHECK, subject, faults, f"moves by {furthest:.7f} of the clipping norm at most")
    yield Finding.of(CHECK, "a sum that is not clipped", list(_unclipped_faults(scope)), "is rejected")


def check_late(scope: Scope) -> Iterator[Finding]:
    """The weights of late updates, and their clipping where the norm has changed meanwhile."""
    for config in _WEIGHTS:
        faults = list(_weight_faults(scope, config))
        yield Finding.of(LATE_CHECK, f"weight {config.weight}", faults, "1 when fresh, then never more")
    faults = list(_older_norm_faults(scope))
    yield Finding.of(LATE_CHECK, "clipped to an older norm", faults, "moves the sum by the present norm at most")


def _round_faults(scope: Scope, updates: Mapping[str, Update], gone: Sequence[str]) -> tuple[list[str], float]:
    faults, furthest = [], 0.0
    whole = _one_round(scope, updates)
    for client_id in gone:
        release = _one_round(scope, {c: update for c, update in updates.items() if c != client_id})
        moved = float(np.linalg.norm(whole.total - release.total)) / scope.l2_clip_norm
        furthest = max(furthest, moved)
        if not moved <= 1 + ROUNDING:
            faults.append(f"{client_id} moves the sum by {moved:.7f} clipping norms")
        if release.divisor != len(updates) - 1:
            faults.append(f"the sum is divided by {release.divisor:g}, not by the expected {len(updates) - 1}")
    if furthest < 0.999:
        faults.append(f"no client moves the sum by more than {furthest:.3g} clipping norms; nothing is shown")
    return faults, furthest


def _one_round(scope: Scope, updates: Mapping[str, Update]) -> Release:
    with tempfile.TemporaryDirectory() as home:
        write_key(Path(home))
        with AuditRun(run_settings(Path(home), scope), updates) as run:
            (release,) = run.released()
    return release


def _unclipped_faults(scope: Scope) -> Iterator[str]:
    """A host that returns a sum of half as much again as its client may contribute."""

    def lengthened(message: UpdateMessage) -> UpdateMessage:
        if isinstance(message, PartialSum) and message.outcomes[0].client_id == "vehicle-0000":
            return replace(message, weighted_sum={n: 1.5 * array for n, array in message.weighted_sum.items()})
        return message

    both = hostile_updates(scope.l2_clip_norm)
    with tempfile.TemporaryDirectory() as home:
        write_key(Path(home))
        updates = {client_id: both[client_id] for client_id in ("vehicle-0000", "vehicle-0002")}
        with AuditRun(run_settings(Path(home), scope), updates, alter=lengthened) as run:
            (release,) = run.released()
    moved = float(np.linalg.norm(release.total)) / scope.l2_clip_norm
    if not 0.999 <= moved <= 1 + ROUNDING:
        yield f"beside a client that is rejected, another one moves the sum by {moved:.7f} clipping norms"


def _weight_faults(scope: Scope, config: StalenessConfig) -> Iterator[str]:
    update = {"point": np.array([3.0, -4.0], np.float32), "scale": np.array(5.0, np.float32)}
    base = {name: np.zeros_like(array) for name, array in update.items()}
    task = client_task(scope)
    with tempfile.TemporaryDirectory() as home, Store.open(Path(home)) as store:
        settings = run_settings(Path(home), scope, rounds=9)
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
                staleness=config,
            )
            admission.admit(late)
            updates, _ = admission.close(room=None)
            late_updates = [late for late in updates.updates() if not isinstance(late, RingSum)]
            clipped = [(late, scope.l2_clip_norm) for late in late_updates]
            sums = mechanism.total(base, clipped, scope.l2_clip_norm)
            weights.append(float(np.linalg.norm(flat_arrays(sums))) / scope.l2_clip_norm)
    if abs(weights[0] - 1) > ROUNDING:
        yield f"a fresh answer has a weight of {weights[0]:.7f}"
    for staleness, (earlier, later) in enumerate(itertools.pairwise(weights), start=1):
        if not later <= earlier * (1 + ROUNDING):
            yield f"an answer {staleness} versions late has a weight of {later:.7f}, after {earlier:.7f}"


def _host_answer(settings: Settings, task: TrainTask, base: Weights, update: Update) -> PartialSum:
    based = replace(task, base_digest=hashlib.sha256(encode_weights(base)).hexdigest())
    answer = host_of(settings, {"vehicle-0000": update}).train(based, base, ["vehicle-0000"])
    assert isinstance(answer, PartialSum)
    return answer


def _older_norm_faults(scope: Scope) -> Iterator[str]:
    """Two rounds between which adaptive clipping lowers the norm; the only long update is late by one of them."""
    updates = {**zero_updates(9), "vehicle-0000": hostile_updates(100 * scope.l2_clip_norm)["vehicle-0000"]}
    clip = {"target_quantile": 0.05, "learning_rate": 2.0, "count_noise_multiplier": 1.25}
    with tempfile.TemporaryDirectory() as home:
        settings = run_settings(
            Path(home),
            replace(scope, noise_multiplier=1.0),
            rounds=2,
            cohort={"selection": "all", "max_participations": 2},
            privacy={"adaptive_clip": clip},
            training={"staleness": {"weight": "constant"}},
        )
        write_key(Path(home))
        run = AuditRun(
            settings,
            updates,
            groups=len(updates),
            held=lambda round_index, client_ids: client_ids[:1] if round_index == 1 else (),
            mode=AggregationSettings(mode="asynchronous", buffer_size=8),
        )
        with run:
            releases = run.released()
        older, present = (task.l2_clip_norm for task in run.tasks())
    moved = float(np.linalg.norm(releases[1].total)) / present
    if not present < 0.9 * older:
        yield f"the norm goes from {older:.3g} to {present:.3g}; nothing is shown"
    if not moved <= 1 + ROUNDING:
        yield f"an update of the round before moves the sum by {moved:.7f} clipping norms"
    if moved < 0.999:
        yield f"an update of the round before moves the sum by {moved:.3g} clipping norms; nothing is shown"

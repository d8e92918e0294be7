"""Check of neighbouring records: one record changes the released sum by at most the clipping norm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedvit.clients.local import LocalTrainer
from fedvit.dp.opacus_gradients import OpacusGradients
from fedvit.errors import ModelError
from fedvit.models.build import build_model
from fedvit.models.trainable import TrainableMode
from fedvit.models.vision import VisionModel
from fedvit.tools.audit import subjects
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, Vector, released_steps, shared_randomness

CHECK = "neighbouring records"
ROUNDING = 1e-5
_SAME_SUM = 1e-4
_SECRET = bytes(range(32))


@dataclass(frozen=True, slots=True)
class Case:
    """One of several ways to compute the same sum."""

    name: str = "as it is"
    physical_batch_size: int = 64
    channels_last: bool = False
    bfloat16: bool = False
    sampling_prob: float = 1.0
    local_steps: int = 1

    def records(self, features: Tensor) -> Tensor:
        """The features as the case has them in memory."""
        strided = self.channels_last and features.ndim == 4
        return features.contiguous(memory_format=torch.channels_last) if strided else features


PLAIN = Case()
CASES = (
    PLAIN,
    Case("one at a time", physical_batch_size=1),
    Case("three at a time", physical_batch_size=3),
    Case("channels_last", channels_last=True),
    Case("bfloat16", bfloat16=True),
    Case("Poisson, 3 steps", sampling_prob=0.6, local_steps=3, physical_batch_size=2),
    Case("empty batches", sampling_prob=1e-9, local_steps=2),
)
BRIEF = (PLAIN, Case("channels_last, three at a time", physical_batch_size=3, channels_last=True), CASES[4])


def check(scope: Scope) -> Iterator[Finding]:
    """The configured model, then the families, each by both engines where both can; then other clipping norms."""
    model = build_model(scope.model, subjects.CLASSES, scope.image_size)
    yield _audited(f"configured {scope.model.name}, {scope.model.trainable}", subjects.perturbed(model), scope)
    for name, mode, engine in _subjects(scope.quick):
        cases = CASES if not scope.quick or name in (subjects.PATCHES, "vit") else BRIEF
        yield _audited(f"{name}, {mode}, {engine}", subjects.family(name, mode), scope, engine, cases)
    for each, engine in itertools.product(reversed(scope.at_norms()[1:]), ("Book-keeping", OpacusGradients.engine)):
        subject = f"linear head, {engine}, norm {each.l2_clip_norm:g}"
        yield _audited(subject, subjects.linear_model(6), each, engine, (PLAIN,))


def _subjects(quick: bool) -> Iterator[tuple[str, TrainableMode, str]]:
    for engine in ("Book-keeping", OpacusGradients.engine):
        yield subjects.PATCHES, "all", engine
    modes: tuple[TrainableMode, ...] = ("all",) if quick else ("all", "head", "biases", "adapters")
    for name, mode in itertools.product([*subjects.FAMILIES, subjects.HYBRID], modes):
        yield name, mode, "Book-keeping"
        if not quick or name == subjects.HYBRID:
            yield name, mode, OpacusGradients.engine


def _audited(
    subject: str, model: VisionModel, scope: Scope, engine: str | None = None, cases: Sequence[Case] = CASES
) -> Finding:
    try:
        trainer = subjects.trainer_of(model, engine)
    except ModelError as error:
        # A refused model releases nothing; the other engine trains it.
        return Finding(CHECK, subject, engine == OpacusGradients.engine, f"refused: {error.message}")
    audit = _Neighbours(model, trainer, scope)
    faults = [fault for case in cases for fault in audit.faults(case)]
    detail = f"{len(cases)} cases; moves by {audit.furthest:.7f} of the clipping norm at most"
    return Finding.of(CHECK, subject, faults, detail)


class _Neighbours:
    """One trainer on hostile records, with each record and without it."""

    def __init__(self, model: VisionModel, trainer: LocalTrainer, scope: Scope) -> None:
        self._trainer, self._base = trainer, subjects.weights_of(model)
        self._features, self._labels = subjects.hostile_records(model)
        self._scope, self._whole_norm = scope, scope.l2_clip_norm
        self._gone = (0, 4, 5, 7) if scope.quick else tuple(range(len(self._labels)))
        self._plain: Vector | None = None
        self.furthest = 0.0

    def faults(self, case: Case) -> Iterator[str]:
        """The violations of the accountant's assumptions in a case."""
        self._trainer.physical_batch_size = case.physical_batch_size
        precision = torch.autocast("cpu", torch.bfloat16) if case.bfloat16 else nullcontext()
        furthest = 0.0
        everybody, together = list(range(len(self._labels))), None
        with precision:
            for gone in self._gone:
                rest = [index for index in everybody if index != gone]
                if case.sampling_prob == 1:
                    whole = together = together or self._released(case, everybody)
                else:
                    # The last record's coin is drawn last, so the others' coins are the same without it.
                    whole = self._released(case, [*rest, gone])
                without = self._released(case, rest)
                yield from self._control_faults(case, whole, without)
                distances = (np.linalg.norm(a.total - b.total) for a, b in zip(whole, without, strict=False))
                moved = float(max(distances, default=0.0))
                furthest = max(furthest, moved / self._whole_norm)
                if not moved <= self._whole_norm * (1 + ROUNDING):
                    yield f"{case.name}: record {gone} moves the sum by {moved / self._whole_norm:.7f} clipping norms"
            if together and not case.bfloat16:
                yield from self._other_sum(case, together[0].total)
        if furthest < 0.5 and case.sampling_prob > 0.5:
            yield f"{case.name}: no record moves the sum by more than {furthest:.3g} clipping norms; nothing is shown"
        self.furthest = max(self.furthest, furthest)

    def _released(self, case: Case, chosen: list[int]) -> list[Release]:
        task = self._scope.train_task(sampling_prob=case.sampling_prob, local_steps=case.local_steps)
        features, labels = case.records(self._features[chosen]), self._labels[chosen]
        with shared_randomness(_SECRET), released_steps() as releases:
            self._trainer.train(task, self._base, features, labels, _SECRET, "car")
        return releases

    def _control_faults(self, case: Case, whole: list[Release], without: list[Release]) -> Iterator[str]:
        if not len(whole) == len(without) == case.local_steps:
            yield f"{case.name}: {case.local_steps} steps add noise {len(whole)} times, {len(without)} without a record"
        for releases, count in ((whole, len(self._labels)), (without, len(self._labels) - 1)):
            if any(abs(r.divisor / (case.sampling_prob * count) - 1) > ROUNDING for r in releases):
                yield f"{case.name}: the sum is not divided by the expected {case.sampling_prob * count:g}"
        for one, other in zip(whole, without, strict=False):
            # Noise is the difference of float32 numbers that differ by it.
            slack = 1e-5 * (np.abs(one.total).max() + np.abs(one.noise).max() + 1)
            if not np.allclose(one.noise, other.noise, rtol=0, atol=slack):
                yield f"{case.name}: the noise depends on the records"
        if case.sampling_prob < 1e-6 and any(release.total.any() for release in whole):
            yield f"{case.name}: an empty batch has a sum"

    def _other_sum(self, case: Case, total: Vector) -> Iterator[str]:
        """Micro-batches and memory formats must not change the sum."""
        if self._plain is None:
            self._plain = total
        error = np.linalg.norm(total - self._plain) / np.linalg.norm(self._plain)
        if not error <= _SAME_SUM:
            yield f"{case.name}: the sum differs from the plain one by {error:.2g} of it"

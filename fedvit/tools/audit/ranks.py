"""Several ranks that take a step together: one record in one share, unrelated noise by blocks, equally many steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fedvit.config import HybridConfig, ModelConfig
from fedvit.errors import StateError
from fedvit.finetune.ranks import NOISE_BLOCK, RankedTrainer, Ranks
from fedvit.models.models import build_model
from fedvit.testing.ranks import on_ranks
from fedvit.tools.audit import subjects
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, released_steps, shared_randomness
from fedvit.tools.audit.randomness import noise_faults
from fedvit.types import TrainTask

CHECK = "ranks"
_COUNT, _IMAGE_SIZE = 2, 32
_ROUNDING, _SAME_SUM = 1e-5, 1e-4
_SECRET = bytes(range(32))
_STANDSTILL = 1e-30


def check(scope: Scope) -> Iterator[Finding]:
    """What a record moves on two ranks, what noise they add together, and whether nobody is left waiting."""
    audit = _Ranks(scope)
    for subject, faults in (
        ("a record on two ranks", audit.record_faults),
        ("noise of two ranks", audit.noise_faults),
        ("ranks without a record", audit.empty_faults),
    ):
        try:
            found = list(faults())
        except StateError as error:
            found = [error.message]
        yield Finding(CHECK, subject, not found, found[0] if found else audit.detail)


class _Ranks:
    """One model on each rank, of several noise blocks; the same records for all."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        config = ModelConfig(pretrained=False, hybrid=HybridConfig(width=64))
        models = [subjects.stirred(build_model(config, subjects.CLASSES, _IMAGE_SIZE)) for _ in range(_COUNT + 1)]
        self._models, self._alone = models[:_COUNT], models[_COUNT]
        self._base = subjects.weights_of(self._alone)
        self._features, self._labels = subjects.hostile_records(self._alone)
        self.detail = ""

    def record_faults(self) -> Iterator[str]:
        """With every record and without one: the sum of all ranks before noise, and that of one."""
        everybody = list(range(len(self._labels)))
        whole, furthest = self._together(everybody)[0].total, 0.0
        with released_steps() as seen, shared_randomness(_SECRET):
            self._train(Ranks(), everybody)
        error = float(np.linalg.norm(whole - seen[0].total) / np.linalg.norm(seen[0].total))
        if not error <= _SAME_SUM:
            yield f"the sum of {_COUNT} ranks differs from that of one by {error:.2g} of it"
        for gone in (0, 4, 5, 7) if self._scope.quick else everybody:
            without = self._together([index for index in everybody if index != gone])[0].total
            moved = float(np.linalg.norm(whole - without)) / self._scope.l2_clip_norm
            furthest = max(furthest, moved)
            if not moved <= 1 + _ROUNDING:
                yield f"record {gone} moves the sum of {_COUNT} ranks by {moved:.7f} clipping norms"
        self.detail = f"moves by {furthest:.7f} of the clipping norm at most; {_COUNT} ranks sum what one does"

    def noise_faults(self) -> Iterator[str]:
        """Each step as a whole, its last and shorter block too; then block by block, which may not be related."""
        releases = self._together([0], sampling_prob=1e-9, steps=2)
        blocks = [
            Release(release.total[start:stop], release.noise[start:stop], release.divisor)
            for release in releases
            for start, stop in _whole_blocks(len(release.noise))
        ]
        self.detail = f"{len(blocks)} blocks of {NOISE_BLOCK} numbers, of the charged deviation, unrelated"
        deviation = self._scope.noise_multiplier * self._scope.l2_clip_norm
        return chain(noise_faults(releases, deviation), noise_faults(blocks, deviation))

    def empty_faults(self) -> Iterator[str]:
        """One record, so that a rank has none for certain; then none at all."""
        for sampling_prob in (1.0, 1e-9):
            releases = self._together([1], sampling_prob=sampling_prob, steps=2)
            if len(releases) != 2:
                yield f"2 steps add noise {len(releases)} times"
            if sampling_prob < 1 and any(release.total.any() for release in releases):
                yield "an empty batch has a sum"
        self.detail = "2 steps, on all ranks, whoever is dealt a record"

    def _together(self, chosen: Sequence[int], sampling_prob: float = 1.0, steps: int = 1) -> list[Release]:
        """Each step's sum and noise, added up over the ranks."""
        with released_steps() as seen, shared_randomness(_SECRET):
            deltas = on_ranks(_COUNT, lambda ranks: self._train(ranks, chosen, sampling_prob, steps))
        if not all(torch.equal(deltas[0], delta) for delta in deltas):
            raise StateError("The ranks end with different weights.")
        # A rank goes on only when all have given their sum: those of a step come one after another.
        shares = [seen[start : start + _COUNT] for start in range(0, len(seen), _COUNT)]
        return [
            Release(np.sum([s.total for s in step], axis=0), np.sum([s.noise for s in step], axis=0), step[0].divisor)
            for step in shares
        ]

    def _train(self, ranks: Ranks, chosen: Sequence[int], sampling_prob: float = 1.0, steps: int = 1) -> Tensor:
        scope = self._scope
        model = self._alone if ranks.count == 1 else self._models[ranks.index]
        task = TrainTask(
            *("audit", 1, "base", "data", scope.noise_multiplier, sampling_prob, scope.l2_clip_norm),
            local_steps=steps,
            learning_rate=_STANDSTILL,
        )
        trainer = RankedTrainer(model, ranks, physical_batch_size=3)
        features, labels = self._features[list(chosen)], self._labels[list(chosen)]
        delta = trainer.train(task, self._base, features, labels, _SECRET, "depot")
        return torch.cat([torch.from_numpy(delta[name]).flatten() for name in sorted(delta)])


def _whole_blocks(size: int) -> list[tuple[int, int]]:
    return [(start, start + NOISE_BLOCK) for start in range(0, size - NOISE_BLOCK + 1, NOISE_BLOCK)]

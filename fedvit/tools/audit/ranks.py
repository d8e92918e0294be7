"""Check of several ranks: each record on one rank, unrelated noise in each block, equally many steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fedvit.config import HybridConfig, ModelConfig
from fedvit.errors import StateError
from fedvit.finetune.ranks import NOISE_BLOCK, RankedTrainer, Ranks
from fedvit.models.build import build_model
from fedvit.testing.ranks import on_ranks
from fedvit.tools.audit import subjects
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, released_steps, shared_randomness
from fedvit.tools.audit.randomness import noise_faults

CHECK = "ranks"
_COUNT, _IMAGE_SIZE = 2, 32
_ROUNDING, _SAME_SUM = 1e-5, 1e-4
_SECRET = bytes(range(32))


def check(scope: Scope) -> Iterator[Finding]:
    """The effect of a record on two ranks, their noise, and steps in which a rank has no record."""
    audit = _Ranks(scope)
    for subject, faults in (
        ("a record on two ranks", audit.record_faults),
        ("noise of two ranks", audit.noise_faults),
        ("ranks without a record", audit.empty_faults),
    ):
        try:
            found_faults = list(faults())
        except StateError as error:
            found_faults = [error.message]
        yield Finding.of(CHECK, subject, found_faults, audit.detail)


class _Ranks:
    """One model on each rank, of several noise blocks; the same records for all."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        config = ModelConfig(pretrained=False, hybrid=HybridConfig(width=64))
        models = [subjects.perturbed(build_model(config, subjects.CLASSES, _IMAGE_SIZE)) for _ in range(_COUNT + 1)]
        self._models, self._alone = models[:_COUNT], models[_COUNT]
        self._base = subjects.weights_of(self._alone)
        self._features, self._labels = subjects.hostile_records(self._alone)
        self.detail = ""

    def record_faults(self) -> Iterator[str]:
        """Compare the sums before noise: with and without each record, and of two ranks and one."""
        everybody = list(range(len(self._labels)))
        whole, furthest = self._together(everybody)[0].total, 0.0
        with released_steps() as releases, shared_randomness(_SECRET):
            self._train(Ranks(), everybody)
        error = float(np.linalg.norm(whole - releases[0].total) / np.linalg.norm(releases[0].total))
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
        """Check the noise of whole steps, and of single blocks, which must be unrelated."""
        releases = self._together([0], sampling_prob=1e-9, steps=2)
        if len(releases) != 2:
            return iter([f"2 steps that draw no record add noise {len(releases)} times"])
        starts = range(0, len(releases[0].noise) - NOISE_BLOCK + 1, NOISE_BLOCK)
        pieces = [(release, slice(start, start + NOISE_BLOCK)) for release in releases for start in starts]
        blocks = [Release(release.total[at], release.noise[at], release.divisor) for release, at in pieces]
        self.detail = f"{len(blocks)} blocks of {NOISE_BLOCK} numbers, of the charged deviation, unrelated"
        deviation = self._scope.noise_multiplier * self._scope.l2_clip_norm
        return chain(noise_faults(releases, deviation), noise_faults(blocks, deviation))

    def empty_faults(self) -> Iterator[str]:
        """Train with one record, so that one rank has none, and with empty batches."""
        for sampling_prob in (1.0, 1e-9):
            releases = self._together([1], sampling_prob=sampling_prob, steps=2)
            if len(releases) != 2:
                yield f"2 steps add noise {len(releases)} times"
            if sampling_prob < 1 and any(release.total.any() for release in releases):
                yield "an empty batch has a sum"
        self.detail = "2 steps, on all ranks, whether they have a record or not"

    def _together(self, chosen: Sequence[int], sampling_prob: float = 1.0, steps: int = 1) -> list[Release]:
        """The sum and the noise of each step, added up over the ranks."""
        with released_steps() as releases, shared_randomness(_SECRET):
            deltas = on_ranks(_COUNT, lambda ranks: self._train(ranks, chosen, sampling_prob, steps))
        if not all(torch.equal(deltas[0], delta) for delta in deltas):
            raise StateError("The ranks end with different weights.")
        # A rank continues only after all have contributed their sum, so the releases of a step are consecutive.
        shares = [releases[start : start + _COUNT] for start in range(0, len(releases), _COUNT)]
        return [
            Release(np.sum([s.total for s in step], axis=0), np.sum([s.noise for s in step], axis=0), step[0].divisor)
            for step in shares
        ]

    def _train(self, ranks: Ranks, chosen: Sequence[int], sampling_prob: float = 1.0, steps: int = 1) -> Tensor:
        model = self._alone if ranks.count == 1 else self._models[ranks.index]
        task = self._scope.train_task(sampling_prob=sampling_prob, local_steps=steps)
        trainer = RankedTrainer(model, ranks, physical_batch_size=3)
        features, labels = self._features[list(chosen)], self._labels[list(chosen)]
        delta = trainer.train(task, self._base, features, labels, _SECRET, "depot")
        return torch.cat([torch.from_numpy(delta[name]).flatten() for name in sorted(delta)])

"""White-box audit of one release: a lower bound on epsilon from thousands of releases with and without a canary.

The auditor is the accountant's adversary: it knows everything but the noise and whether the canary takes part. There
is no sampling, because amplification would weaken this test. Scores are projections on the canary's clipped
contribution. The bound is that of Gaussian mechanisms (Nasr et al. 2023, arXiv:2302.07956); without that assumption
10,000 releases show little at a small delta.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedvit.dp.dpsgd import SecretDPOptimizer
from fedvit.finetune.ranks import RankedDPOptimizer, Ranks, block_noise
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event, Gaussian
from fedvit.privacy.mechanism import clip_update
from fedvit.privacy.randomness import SecretStream
from fedvit.store.store import Store
from fedvit.testing.ranks import on_ranks
from fedvit.tools.audit import subjects
from fedvit.tools.audit.bounds import best_threshold, epsilon_of_mu, epsilon_without_assumptions, errors_at, mu_of
from fedvit.tools.audit.findings import ALPHA, Finding, Scope
from fedvit.tools.audit.runs import Folding, client_task, run_settings, write_key

RECORD_CHECK, RANKS_CHECK, CLIENT_CHECK = "released step", "released step of two ranks", "released round"
DRAWS, PILOT = 10_000, 2_000
"""Releases with and releases without the canary: for the bound, and before it for the threshold."""
TIGHTNESS = 0.8
_MOST_DRAWS = 60_000
_SECRET = bytes(range(32))
_BATCH = 500
_RANKS = 2

Scores = npt.NDArray[np.float64]
Draw = Callable[[bool, int, int], Scores]
"""Scores of releases; arguments: whether the canary is present, the first release's number, the count."""


def check_step(scope: Scope) -> Iterator[Finding]:
    """One step of DP-SGD, every record drawn."""
    draw = _StepReleases(scope)
    yield release_finding(RECORD_CHECK, scope, draw.batched if scope.quick else draw.one_by_one)


def check_ranks(scope: Scope) -> Iterator[Finding]:
    """The same step, its records and its noise shared by two ranks."""
    yield release_finding(RANKS_CHECK, scope, _RankedReleases(scope).batched)


def check_round(scope: Scope) -> Iterator[Finding]:
    """One round of whole clients, noise at the aggregator."""
    with tempfile.TemporaryDirectory() as home, Store.open(Path(home)) as store:
        write_key(Path(home))
        releases = _RoundReleases(scope, Folding(run_settings(Path(home), scope), store, expected=1.0))
        yield release_finding(CLIENT_CHECK, scope, releases.draw)


def draws_for(noise_multiplier: float) -> int:
    """The number of releases that show 0.8 of epsilon or more; it grows with the square of the noise."""
    return min(_MOST_DRAWS, math.ceil(DRAWS * max(1.0, noise_multiplier**2)))


def release_finding(check: str, scope: Scope, draw: Draw) -> Finding:
    """A lower bound on epsilon from releases of a Gaussian mechanism without sampling."""
    draws = draws_for(scope.noise_multiplier)
    spent: dict[Event, int] = {Gaussian(scope.noise_multiplier): 1}
    claimed = epsilon_pld(spent, scope.target_delta)
    pilot = [draw(present, 0, PILOT) for present in (False, True)]
    scores = [draw(present, PILOT, draws) for present in (False, True)]
    errors = errors_at(best_threshold(*pilot), *scores)
    bound = epsilon_of_mu(mu_of(errors, ALPHA), scope.target_delta)
    bare = epsilon_without_assumptions(errors, scope.target_delta, ALPHA)
    attainable = draws < _MOST_DRAWS
    passed = bound <= claimed and (bound >= TIGHTNESS * claimed or not attainable)
    detail = (
        f"{draws} + {draws} releases: epsilon at {scope.target_delta:g} is {bound:.3f} or more ({bare:.3f} without "
        f"assuming Gaussian noise), claimed is {claimed:.3f}"
    )
    if not attainable:
        detail += f"; so much noise would need more releases to show {TIGHTNESS} of it"
    return Finding(check, f"noise multiplier {scope.noise_multiplier:g}", passed, detail, claimed, bound)


class _StepReleases:
    """Releases of a linear head on six pixels; the canary is an image with a single lit pixel."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._model = subjects.linear_model(6)
        self._trainer = subjects.trainer_of(self._model, "Book-keeping")
        self._base = subjects.weights_of(self._model)
        features, labels = subjects.ordinary_records(self._model, 4)
        canary = torch.zeros(1, 6)
        canary[0, 5] = 1e3
        self._with = torch.cat([features, canary]), torch.cat([labels, torch.tensor([2])])
        self._without = features, labels
        self._engine = self._trainer.gradients
        self._engine.clear()
        whole, rest = self._sum(*self._with), self._sum(*self._without)
        self._known = rest
        self._direction = (whole - rest) / np.linalg.norm(whole - rest)

    def one_by_one(self, present: bool, first: int, count: int) -> Scores:
        """Scores of whole client rounds."""
        features, labels = self._with if present else self._without
        scores = np.empty(count)
        for number in range(count):
            task = self._scope.train_task(first + number, learning_rate=1.0)
            delta = self._trainer.train(task, self._base, features, labels, _SECRET, "car")
            released = -np.concatenate([delta[name].ravel() for name in self._engine.parameters]) * len(labels)
            scores[number] = self._direction @ (released - self._known)
        return scores / self._scope.l2_clip_norm

    def batched(self, present: bool, first: int, count: int) -> Scores:
        """Scores of many noised copies of the clipped sum at once."""
        total = self._sum(*(self._with if present else self._without))
        parts = [self._noised(total, present, first + start) for start in range(0, count, _BATCH)]
        return np.concatenate(parts)[:count] / self._scope.l2_clip_norm

    def _noised(self, total: npt.NDArray[np.float64], present: bool, number: int) -> Scores:
        copies = torch.nn.Parameter(torch.zeros(_BATCH, len(total)))
        optimizer = SecretDPOptimizer(
            [copies],
            learning_rate=1.0,
            noise_multiplier=self._scope.noise_multiplier,
            l2_clip_norm=self._scope.l2_clip_norm,
            expected_batch=1.0,
            noise_for_step=lambda step: SecretStream(_SECRET, "noise", {"present": present, "number": number}),
        )
        copies.grad = torch.from_numpy(total).float().expand(_BATCH, -1).clone()
        optimizer.step()
        released: Scores = -copies.detach().double().numpy()
        return (released - self._known) @ self._direction

    def _sum(self, features: Tensor, labels: Tensor) -> npt.NDArray[np.float64]:
        from fedvit.models.trainable import load_weights

        load_weights(self._engine.parameters, self._base)
        self._engine.clip(features, labels, self._scope.l2_clip_norm)
        gradients = [p.grad for p in self._engine.parameters.values() if p.grad is not None]
        flat: npt.NDArray[np.float64] = torch.cat([g.double().flatten() for g in gradients]).numpy()
        self._engine.clear()
        return flat


class _RankedReleases(_StepReleases):
    """Releases of ranks that each have the clipped sum of their own records; each copy has its own noise."""

    def _noised(self, total: npt.NDArray[np.float64], present: bool, number: int) -> Scores:
        features, labels = self._with if present else self._without
        shares = [self._sum(features[i::_RANKS], labels[i::_RANKS]) for i in range(_RANKS)]

        def step(ranks: Ranks) -> Tensor:
            copies = torch.nn.Parameter(torch.zeros(_BATCH, len(total)))
            optimizer = RankedDPOptimizer(
                [copies],
                ranks=ranks,
                learning_rate=1.0,
                noise_multiplier=self._scope.noise_multiplier,
                l2_clip_norm=self._scope.l2_clip_norm,
                expected_batch=1.0,
                noise_for_step=lambda step: block_noise(ranks, _SECRET, f"{present}/{number}", step),
            )
            copies.grad = torch.from_numpy(shares[ranks.index]).float().expand(_BATCH, -1).clone()
            optimizer.step()
            return -copies.detach()

        released: Scores = on_ranks(_RANKS, step)[0].double().numpy()
        return (released - self._known) @ self._direction


class _RoundReleases:
    """Rounds of three ordinary clients and a canary, whose update has a single number other than 0."""

    def __init__(self, scope: Scope, folding: Folding) -> None:
        self._scope, self._folding = scope, folding
        self._copies = _BATCH if scope.quick else 1
        generator = np.random.default_rng(3)
        others = [clip_update({"point": generator.normal(size=4)}, scope.l2_clip_norm)[0]["point"] for _ in range(3)]
        self._canary = clip_update({"point": np.array([0.0, 0.0, 0.0, 1e3])}, scope.l2_clip_norm)[0]["point"]
        self._others = np.sum(others, axis=0)

    def draw(self, present: bool, first: int, count: int) -> Scores:
        """Scores of releases by the aggregator's fold; if the scope is quick, of many copies of the sum at once."""
        numbers = range(first, first + count, self._copies)
        parts = [self._released(present, number)[:, 3] - self._others[3] for number in numbers]
        return np.concatenate(parts)[:count] / self._scope.l2_clip_norm

    def _released(self, present: bool, number: int) -> npt.NDArray[np.float64]:
        point = self._others + self._canary if present else self._others
        sums = {"point": np.tile(point, (self._copies, 1))}
        task = client_task(self._scope, round_index=number + 1)
        folded = self._folding.fold(task, sums, clients=4 if present else 3).weights["point"]
        return folded.astype(np.float64)

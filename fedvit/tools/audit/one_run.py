"""Audit of one training run with many planted canaries (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import PoissonGaussian
from fedvit.privacy.randomness import SecretStream
from fedvit.tools.audit import subjects
from fedvit.tools.audit.bounds import one_run_epsilon
from fedvit.tools.audit.findings import ALPHA, Finding, Scope
from fedvit.types import TrainTask

CHECK = "one run with canaries"
CANARIES, GUESSES, STEPS = 768, 384, 16
_SECRET = bytes(range(32))
# Small: the canaries' gradients stay what they were at the start, which is the worst that a run can do to them.
_LEARNING_RATE = 1e-3


def check(scope: Scope) -> Iterator[Finding]:
    """A private run of the real trainer: a linear head, and 768 pictures of one lit pixel each, about half of them in.

    Whoever is out is in its place a record without gradient: the number of records is public, and would give away
    how many coins fell which way. The guesses are on the highest and the lowest scores, half of them each.
    """
    present = SecretStream(_SECRET, "canaries", {}).coins(CANARIES, 0.5)
    correct = _correct_guesses(_scores(scope, present), present)
    # The theorem pays 2 * canaries * delta for each guess more or less: at a larger delta alpha would be spent by that.
    delta = min(scope.target_delta, ALPHA / (10 * CANARIES))
    bound = one_run_epsilon(canaries=CANARIES, guesses=GUESSES, correct=correct, delta=delta, alpha=ALPHA)
    claimed = epsilon_pld({PoissonGaussian(scope.noise_multiplier, scope.sampling_prob): STEPS}, delta)
    detail = (
        f"{correct} of {GUESSES} guesses about {CANARIES} canaries are right after {STEPS} steps: epsilon at "
        f"{delta:.2g} is {bound:.3f} or more, claimed is {claimed:.3f}"
    )
    yield Finding(CHECK, f"noise multiplier {scope.noise_multiplier:g}", bound <= claimed, detail, claimed, bound)


def _scores(scope: Scope, present: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """How far each canary's own weights moved towards its label."""
    model = subjects.lamps(CANARIES)
    trainer = subjects.trainer_of(model, "Book-keeping", physical_batch_size=CANARIES)
    labels = torch.arange(CANARIES) % subjects.CLASSES
    shown = torch.where(torch.from_numpy(present), labels, subjects.NO_CLASS)
    task = TrainTask(
        "audit",
        1,
        "base",
        "data",
        scope.noise_multiplier,
        scope.sampling_prob,
        scope.l2_clip_norm,
        STEPS,
        _LEARNING_RATE * CANARIES / scope.l2_clip_norm,
    )
    features = 8.0 * torch.eye(CANARIES)
    delta = trainer.train(task, subjects.weights_of(model), features, shown, _SECRET, "car")
    moved = delta["body.head.weight"].astype(np.float64)
    towards = np.full((CANARIES, subjects.CLASSES), -1 / subjects.CLASSES)
    towards[np.arange(CANARIES), labels.numpy()] += 1
    return np.asarray(np.sum(moved.T * towards, axis=1))


def _correct_guesses(scores: npt.NDArray[np.float64], present: npt.NDArray[np.bool_]) -> int:
    order = np.argsort(scores)
    lowest, highest = order[: GUESSES // 2], order[-(GUESSES // 2) :]
    return int(np.sum(~present[lowest]) + np.sum(present[highest]))

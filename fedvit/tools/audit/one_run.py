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

CHECK = "one run with canaries"
CANARIES, GUESSES, STEPS = 768, 384, 16
_SECRET = bytes(range(32))
# Small: the canaries' gradients hardly change during the run, which is the worst case.
_LEARNING_RATE = 1e-3


def check(scope: Scope) -> Iterator[Finding]:
    """A private run of the real trainer on a linear head, and 768 images of one lit pixel, about half of them present.

    An absent canary is replaced by a record without gradient, because the number of records is public. Half of the
    guesses are on the highest scores and half on the lowest.
    """
    present = SecretStream(_SECRET, "canaries", {}).coins(CANARIES, 0.5)
    correct = _correct_guesses(_scores(scope, present), present)
    # The theorem adds up to 2 * canaries * delta to the p-value; a larger delta would use up alpha.
    delta = min(scope.target_delta, ALPHA / (10 * CANARIES))
    bound = one_run_epsilon(canaries=CANARIES, guesses=GUESSES, correct=correct, delta=delta, alpha=ALPHA)
    claimed = epsilon_pld({PoissonGaussian(scope.noise_multiplier, scope.sampling_prob): STEPS}, delta)
    detail = (
        f"{correct} of {GUESSES} guesses about {CANARIES} canaries are right after {STEPS} steps: epsilon at "
        f"{delta:.2g} is {bound:.3f} or more, claimed is {claimed:.3f}"
    )
    yield Finding(CHECK, f"noise multiplier {scope.noise_multiplier:g}", bound <= claimed, detail, claimed, bound)


def _scores(scope: Scope, present: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The change of each canary's own weights towards its label."""
    model = subjects.linear_model(CANARIES)
    trainer = subjects.trainer_of(model, "Book-keeping", physical_batch_size=CANARIES)
    labels = torch.arange(CANARIES) % subjects.CLASSES
    shown = torch.where(torch.from_numpy(present), labels, subjects.NO_CLASS)
    learning_rate = _LEARNING_RATE * CANARIES / scope.l2_clip_norm
    task = scope.train_task(sampling_prob=scope.sampling_prob, local_steps=STEPS, learning_rate=learning_rate)
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

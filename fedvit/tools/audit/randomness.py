"""Checks that noise has the charged deviation and is fresh, and that batches and cohorts are Poisson samples."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedvit.cohort.selection import draw_cohort
from fedvit.config import CohortConfig
from fedvit.tools.audit import subjects
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, drawn_batches, released_steps
from fedvit.tools.audit.runs import AuditRun, run_settings, write_key, zero_updates

NOISE_CHECK, SAMPLING_CHECK = "fresh noise", "Poisson sampling"
_SECRET = bytes(range(32))
DEVIATIONS = 5.0
"""The allowed deviation of a standard normal: it is exceeded once in a million on either side."""
_UNITS, _ROUNDS = 48, 150


def check_noise(scope: Scope) -> Iterator[Finding]:
    """The noise of several steps, rounds and clients, at several clipping norms."""
    for each in scope.at_norms():
        for subject, releases in (
            ("steps, rounds and clients", _steps(each)),
            ("rounds of whole clients", _rounds(each)),
        ):
            faults = list(noise_faults(releases, each.noise_multiplier * each.l2_clip_norm))
            size = len(releases[0].noise)
            detail = f"{len(releases)} times {size} numbers, of the charged deviation, unrelated"
            yield Finding.of(NOISE_CHECK, f"{subject}, norm {each.l2_clip_norm:g}", faults, detail)


def _steps(scope: Scope) -> list[Release]:
    model = subjects.linear_model(768)
    trainer, base = subjects.trainer_of(model, "Book-keeping"), subjects.weights_of(model)
    features, labels = subjects.ordinary_records(model, 2)
    with released_steps() as releases:
        for round_index, client_id in ((1, "car"), (2, "car"), (2, "bus")):
            task = scope.train_task(round_index, sampling_prob=1e-9, local_steps=2)
            trainer.train(task, base, features, labels, _SECRET, client_id)
    return releases


def _rounds(scope: Scope) -> list[Release]:
    with tempfile.TemporaryDirectory() as home:
        write_key(Path(home))
        with AuditRun(run_settings(Path(home), scope, rounds=3), zero_updates(2, 2300)) as run:
            return run.released()


def noise_faults(releases: list[Release], deviation: float) -> Iterator[str]:
    """Differences of noise from independent normals of this deviation: in deviation, mean and correlation."""
    for number, release in enumerate(releases):
        size = len(release.noise)
        share = float(release.noise.std()) / deviation
        if abs(share - 1) > DEVIATIONS / math.sqrt(2 * size):
            yield f"the noise of release {number} has {share:.4f} of the charged deviation"
        if abs(float(release.noise.mean())) > DEVIATIONS * deviation / math.sqrt(size):
            yield f"the noise of release {number} is not centred"
    for (one, first), (other, second) in combinations(enumerate(releases), 2):
        related = float(np.corrcoef(first.noise, second.noise)[0, 1])
        if abs(related) > DEVIATIONS / math.sqrt(len(first.noise)):
            yield f"the noise of releases {one} and {other} is related: correlation {related:.3f}"


def check_sampling(scope: Scope) -> Iterator[Finding]:
    """The drawn records and clients of many rounds."""
    q = min(0.5, scope.sampling_prob)
    for subject, drawn in (("records of a step", _drawn_records(scope, q)), ("clients of a round", _drawn_clients(q))):
        faults = list(sampling_faults(drawn, q))
        yield Finding.of(SAMPLING_CHECK, subject, faults, f"{len(drawn)} draws of {drawn.shape[1]}, each for itself")


def sampling_faults(drawn: npt.NDArray[np.bool_], probability: float) -> Iterator[str]:
    """Differences of draws [R, N] from independent coins: in size, in frequency of units, from one draw to the next."""
    rounds, units = drawn.shape
    variance = probability * (1 - probability)
    sizes = drawn.sum(axis=1)
    # Chi-square with R degrees of freedom, as a standard normal (Wilson and Hilferty 1931).
    ratio = float(np.mean((sizes - probability * units) ** 2)) / (variance * units)
    score = (ratio ** (1 / 3) - (1 - 2 / (9 * rounds))) / math.sqrt(2 / (9 * rounds))
    if abs(score) > DEVIATIONS:
        yield f"the variance of their number is {ratio:.3f} of that of independent coins"
    shares = (drawn.mean(axis=0) - probability) / math.sqrt(variance / rounds)
    if np.abs(shares).max() > DEVIATIONS:
        yield f"number {int(np.abs(shares).argmax())} is drawn too often or too rarely"
    centred = drawn - probability
    related = float(np.sum(centred[1:] * centred[:-1])) / (variance * math.sqrt((rounds - 1) * units))
    if abs(related) > DEVIATIONS:
        yield f"who is drawn depends on who was drawn before ({related:.1f} standard deviations)"


def _drawn_records(scope: Scope, probability: float) -> npt.NDArray[np.bool_]:
    model = subjects.linear_model(1)
    trainer, base = subjects.trainer_of(model, "Book-keeping"), subjects.weights_of(model)
    features, labels = torch.arange(_UNITS).float()[:, None], torch.zeros(_UNITS, dtype=torch.int64)
    drawn = np.zeros((2 * _ROUNDS, _UNITS), np.bool_)
    for round_index in range(_ROUNDS):
        task = scope.train_task(round_index, sampling_prob=probability, local_steps=2)
        with drawn_batches() as batches:
            trainer.train(task, base, features, labels, _SECRET, "car")
        for step, batch in enumerate(batches):
            drawn[2 * round_index + step, batch.astype(np.int64)] = True
    return drawn


def _drawn_clients(probability: float) -> npt.NDArray[np.bool_]:
    config = CohortConfig(selection="poisson", sampling_prob=probability)
    ids = [f"vehicle-{i:04d}" for i in range(_UNITS)]
    drawn = np.zeros((2 * _ROUNDS, _UNITS), np.bool_)
    for round_index in range(2 * _ROUNDS):
        cohort = draw_cohort(config, ids, run_id="audit", round_index=round_index, secret=_SECRET)
        drawn[round_index] = np.isin(ids, cohort.client_ids)
    return drawn

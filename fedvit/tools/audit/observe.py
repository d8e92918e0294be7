"""Observation of training internals for audits: sums before noise, noise, and drawn batches.

Each context manager replaces a function while it is open. For one thread, and for audits and tests only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedvit.clients import local
from fedvit.dp.dpsgd import SecretDPOptimizer
from fedvit.dp.gradients import PerExampleGradients
from fedvit.drift import measures
from fedvit.exact_sums import Sums
from fedvit.privacy import mechanism
from fedvit.privacy.randomness import SecretStream
from fedvit.rounds import protection

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Release:
    """One addition of noise: the sum before it [D], the noise [D], and what they are divided by."""

    total: Vector
    noise: Vector
    divisor: float


@contextmanager
def _replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def released_steps() -> Iterator[list[Release]]:
    """Every addition of noise to a sum of clipped gradients."""
    releases: list[Release] = []
    add_noise = SecretDPOptimizer.add_noise

    def recorded(optimizer: SecretDPOptimizer) -> None:
        total = _flat([parameter.summed_grad for parameter in optimizer.params])
        add_noise(optimizer)
        noised = _flat([parameter.grad for parameter in optimizer.params])
        releases.append(Release(total, noised - total, float(optimizer.expected_batch_size)))

    with _replaced(SecretDPOptimizer, "add_noise", recorded):
        yield releases


@contextmanager
def released_rounds() -> Iterator[list[Release]]:
    """Every addition of noise to a sum of clipped client updates, in the order of the arrays' names."""
    releases: list[Release] = []
    noised_mean = mechanism.noised_mean

    def recorded(sums: Sums, noise: Vector, *, divisor: float) -> Sums:
        releases.append(Release(flat_arrays(sums), noise.copy(), divisor))
        return noised_mean(sums, noise, divisor=divisor)

    with _replaced(mechanism, "noised_mean", recorded):
        yield releases


@contextmanager
def drawn_batches() -> Iterator[list[npt.NDArray[np.float64]]]:
    """The first feature of each example in every clipped batch; audits use it as the number of the example."""
    batches: list[npt.NDArray[np.float64]] = []
    clip = PerExampleGradients.clip

    def recorded(engine: PerExampleGradients, features: torch.Tensor, labels: torch.Tensor, norm: float) -> None:
        batches.append(features.flatten(1)[:, 0].double().numpy().copy())
        clip(engine, features, labels, norm)

    with _replaced(PerExampleGradients, "clip", recorded):
        yield batches


@contextmanager
def shared_randomness(secret: bytes) -> Iterator[None]:
    """Make coins and noise depend on purpose and step only, so that neighbouring data sets get equal ones.

    Without it, streams also depend on the records. A shorter draw of coins is a prefix of a longer one, so the record
    that one data set lacks should be the last.
    """

    def stream(_: bytes, purpose: str, release: str, step: int) -> SecretStream:
        return SecretStream(secret, purpose, {"step": step})

    with _replaced(local, "_stream", stream):
        yield


@contextmanager
def shared_round_randomness() -> Iterator[None]:
    """Make the noise of rounds depend on key, purpose and round only, so that sums of neighbours get equal noise."""

    def stream(secret: bytes, purpose: str, context: dict[str, Any]) -> SecretStream:
        return SecretStream(secret, purpose, {"round_index": context["round_index"]})

    with _replaced(protection, "SecretStream", stream):
        yield


@contextmanager
def histograms_without_noise() -> Iterator[None]:
    """Histograms of bounded counts alone."""

    class _Silence:
        def __init__(self, *_: Any) -> None:
            pass

        def normal(self, count: int) -> Vector:
            return np.zeros(count)

    with _replaced(measures, "SecretStream", _Silence):
        yield


def flat_arrays(arrays: Mapping[str, Any]) -> Vector:
    """All numbers of named arrays [D], in the order of the names."""
    return np.concatenate([np.asarray(arrays[name], dtype=np.float64).ravel() for name in sorted(arrays)])


def _flat(tensors: list[torch.Tensor]) -> Vector:
    flat: Vector = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu().numpy()
    return flat

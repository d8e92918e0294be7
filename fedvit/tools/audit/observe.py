"""Windows onto what training keeps to itself: sums before noise, noise, draws. Nothing they watch is computed anew.

Each watches a class, or a module's function, while it is open. For one thread, and for audits and tests alone.
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
from fedvit.exact_sums import Sums
from fedvit.privacy import mechanism
from fedvit.privacy.randomness import SecretStream

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
    seen: list[Release] = []
    add_noise = SecretDPOptimizer.add_noise

    def watched(optimizer: SecretDPOptimizer) -> None:
        total = _flat([parameter.summed_grad for parameter in optimizer.params])
        add_noise(optimizer)
        noised = _flat([parameter.grad for parameter in optimizer.params])
        seen.append(Release(total, noised - total, float(optimizer.expected_batch_size)))

    with _replaced(SecretDPOptimizer, "add_noise", watched):
        yield seen


@contextmanager
def released_rounds() -> Iterator[list[Release]]:
    """Every addition of noise to a sum of clipped client updates, in the order of the arrays' names."""
    seen: list[Release] = []
    noised_mean = mechanism.noised_mean

    def watched(sums: Sums, noise: Vector, *, divisor: float) -> Sums:
        seen.append(Release(flat_arrays(sums), noise.copy(), divisor))
        return noised_mean(sums, noise, divisor=divisor)

    with _replaced(mechanism, "noised_mean", watched):
        yield seen


@contextmanager
def drawn_batches() -> Iterator[list[npt.NDArray[np.float64]]]:
    """The first feature of every example of every batch that is clipped, as an example's number."""
    seen: list[npt.NDArray[np.float64]] = []
    clip = PerExampleGradients.clip

    def watched(engine: PerExampleGradients, features: torch.Tensor, labels: torch.Tensor, norm: float) -> None:
        seen.append(features.flatten(1)[:, 0].double().numpy().copy())
        clip(engine, features, labels, norm)

    with _replaced(PerExampleGradients, "clip", watched):
        yield seen


@contextmanager
def shared_randomness(secret: bytes) -> Iterator[None]:
    """Coins and noise by purpose and step alone: two neighbouring data sets get the same.

    Otherwise they never do, because streams are bound to the very records. A shorter draw of coins begins like a longer
    one: the record that one of the data sets lacks is best the last.
    """

    def stream(_: bytes, purpose: str, release: str, step: int) -> SecretStream:
        return SecretStream(secret, purpose, {"step": step})

    with _replaced(local, "_stream", stream):
        yield


def flat_arrays(arrays: Mapping[str, Any]) -> Vector:
    """All numbers of named arrays [D], in the order of the names."""
    return np.concatenate([np.asarray(arrays[name], dtype=np.float64).ravel() for name in sorted(arrays)])


def _flat(tensors: list[torch.Tensor]) -> Vector:
    flat: Vector = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu().numpy()
    return flat

"""Data-parallel DP-SGD: several processes take one step together, with the same output as one process.

Every rank draws the records of a step for the whole data set, from the same secret, and takes its own share of them. A
rank without a record takes part, too, so that all ranks take the same number of steps. Each rank adds the noise of its
own blocks of the gradient: the sum over ranks is the clipped sum plus noise of exactly
``noise_multiplier * l2_clip_norm`` in every number. Neither records nor noise depend on the number of ranks: a step
that is repeated by fewer ranks has the same output, see docs/adr/0013.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn

from fedvit.clients.local import Features, LocalTrainer
from fedvit.dp.dpsgd import SecretDPOptimizer
from fedvit.errors import StateError
from fedvit.models.vision import VisionModel
from fedvit.privacy.randomness import SecretStream
from fedvit.types import TrainTask

NOISE_BLOCK = 1 << 15
"""Numbers of the gradient that share a noise stream, and therefore a rank."""
_DIGEST_BYTES = 32


class Ranks:
    """The ``count`` processes that take a step together, from the view of the one of this ``index``, from 0.

    ``device`` is that of the tensors that are summed.
    """

    def __init__(self, index: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.index, self.count, self.device = index, count, device or torch.device("cpu")

    @classmethod
    def here(cls, device: torch.device | None = None) -> Ranks:
        """The ranks of torch's default process group; this process alone if there is none."""
        if not distributed.is_initialized():
            return cls(device=device)
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def sum(self, values: Tensor) -> None:
        """Replace ``values`` by its sum over all ranks; every rank must call it equally often."""
        if self.count > 1:
            distributed.all_reduce(values)

    def own(self, drawn: Tensor) -> Tensor:
        """This rank's share of the records [B] of a step; shares differ by at most one record."""
        return drawn[self.index :: self.count]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        count = torch.tensor([int(flag)], device=self.device)
        self.sum(count)
        return bool(count.item())

    def check_agreed(self, what: str, digest: bytes) -> None:
        """Check that all ranks have the same digest of ``what``.

        Args:
            digest: 32 bytes, not secret.

        Raises:
            StateError: a rank has another one; the message names the rank. All ranks raise it.
        """
        digests = torch.zeros(self.count, _DIGEST_BYTES, dtype=torch.int64, device=self.device)
        digests[self.index] = torch.tensor(list(digest), dtype=torch.int64)
        self.sum(digests)
        for other in range(1, self.count):
            if not torch.equal(digests[0], digests[other]):
                raise StateError(
                    f"Rank {other} has another {what} than rank 0.",
                    cure="Every node has to read the same data and the same state folder.",
                )


class RankNoise:
    """Standard normals in this rank's blocks of a step and zeros elsewhere; the sum over ranks has all numbers."""

    def __init__(self, ranks: Ranks, stream_of: Callable[[int], SecretStream]) -> None:
        self._ranks, self._stream_of = ranks, stream_of

    def normal(self, count: int, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """An array [``count``]; see :meth:`fedvit.privacy.randomness.SecretStream.normal`."""
        noise = np.zeros(count, dtype=dtype)
        blocks = range(-(-count // NOISE_BLOCK))
        for block in blocks[self._ranks.index :: self._ranks.count]:
            own = noise[block * NOISE_BLOCK : (block + 1) * NOISE_BLOCK]
            own[:] = self._stream_of(block).normal(len(own), dtype)
        return noise


class RankedDPOptimizer(SecretDPOptimizer):
    """:class:`SecretDPOptimizer` on one of several ranks; ``noise_for_step`` gives the :class:`RankNoise` of a step.

    Before a step, every ``grad`` holds the clipped sum of this rank's records; after it, all ranks have equal weights.
    """

    def __init__(self, parameters: list[nn.Parameter], *, ranks: Ranks, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._ranks = ranks

    def add_noise(self) -> None:
        """Put the sum and the noise of all ranks into every gradient, by one all-reduce in place."""
        super().add_noise()
        self._ranks.sum(self._noised)


class RankedTrainer(LocalTrainer):
    """:class:`LocalTrainer` on one of several ranks: all ranks make the same calls and get the same results.

    Args:
        model: on the device that computes.
        bfloat16: forward and backward passes under autocast; norms, sums and noise stay float32.
        inner: makes the optimiser that takes the noised gradient; by default plain SGD.

    Raises:
        ModelError: the trainable part has no correct per-example gradients.
    """

    def __init__(
        self,
        model: VisionModel,
        ranks: Ranks,
        *,
        physical_batch_size: int,
        bfloat16: bool = False,
        inner: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__(model, physical_batch_size=physical_batch_size)
        self._ranks, self._bfloat16, self._inner = ranks, bfloat16, inner

    def optimizer(
        self, task: TrainTask, num_examples: int, secret: bytes, output: str, first_step: int = 0
    ) -> RankedDPOptimizer:
        return RankedDPOptimizer(
            list(self.parameters.values()),
            ranks=self._ranks,
            learning_rate=task.learning_rate,
            noise_multiplier=task.noise_multiplier,
            l2_clip_norm=task.l2_clip_norm,
            expected_batch=task.sampling_prob * num_examples,
            noise_for_step=partial(block_noise, self._ranks, secret, output),
            inner=self._inner,
            first_step=first_step,
        )

    def step(self, optimizer: SecretDPOptimizer, features: Features, labels: Tensor, drawn: Tensor) -> None:
        """One step on the records that are drawn for all ranks together; see :meth:`LocalTrainer.step`."""
        super().step(optimizer, features, labels, self._ranks.own(drawn))

    def _clip(self, features: Features, labels: Tensor, part: Tensor, l2_clip_norm: float) -> None:
        with torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._bfloat16):
            self.gradients.clip(self._moved(features[part]), self._moved(labels[part]), l2_clip_norm)

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self._ranks.device, non_blocking=True)


def block_noise(ranks: Ranks, secret: bytes, output: str, step: int) -> RankNoise:
    """A rank's share of the noise of a step."""

    def stream_of(block: int) -> SecretStream:
        return SecretStream(secret, "noise of a block", {"release": output, "step": step, "block": block})

    return RankNoise(ranks, stream_of)

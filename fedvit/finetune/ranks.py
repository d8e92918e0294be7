"""Data-parallel DP-SGD: several processes take one step together, and release what one of them would.

The mask of a step is drawn once for the whole data set, by everybody from the same secret, and dealt out; a rank that
is dealt no record takes part like every other, so that all take the same number of steps. Each rank adds the noise of
its own blocks of the gradient; the sum over ranks is the clipped sum plus noise of exactly
``noise_multiplier * l2_clip_norm`` in every number. Neither mask nor noise depends on how many ranks there are: a step
that is repeated by fewer is the same release, see docs/adr/0013.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
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
"""Numbers of the gradient that have a noise stream of their own, and so belong to one rank."""
_DIGEST_BYTES = 32


class Ranks:
    """The processes that take a step together, seen from one of them.

    Args:
        index: this one's, from 0.
        count: how many there are.
        device: where tensors have to lie that are summed.
    """

    def __init__(self, index: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.index, self.count, self.device = index, count, device or torch.device("cpu")

    @classmethod
    def here(cls, device: torch.device | None = None) -> Ranks:
        """Those of torch's default process group; this process alone where there is none."""
        if not distributed.is_initialized():
            return cls(device=device)
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def sum(self, values: Tensor) -> None:
        """Replace ``values`` by its sum over all ranks; each has to call it equally often."""
        if self.count > 1:
            distributed.all_reduce(values)

    def own(self, drawn: Tensor) -> Tensor:
        """This rank's share of the records [B] of a step: as many as any other's, or one less."""
        return drawn[self.index :: self.count]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        raised = torch.tensor([int(flag)], device=self.device)
        self.sum(raised)
        return bool(raised.item())

    def check_agreed(self, what: str, digest: bytes) -> None:
        """Make sure that all ranks have the same of something.

        Args:
            digest: of 32 bytes, no secret.

        Raises:
            StateError: one has another; both ranks are named. All ranks raise it.
        """
        told = torch.zeros(self.count, _DIGEST_BYTES, dtype=torch.int64, device=self.device)
        told[self.index] = torch.tensor(list(digest), dtype=torch.int64)
        self.sum(told)
        for other in range(1, self.count):
            if not torch.equal(told[0], told[other]):
                raise StateError(
                    f"Rank {other} has another {what} than rank 0.",
                    cure="Every node has to read the same data and the same state folder.",
                )


class OwnNoise:
    """Standard normals in this rank's blocks of a step, zeros in the others'; all ranks' together fill every number.

    Args:
        stream_of: the secret stream of the block of this index.
    """

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
    """:class:`SecretDPOptimizer` on one of several ranks; ``noise_for_step`` gives the :class:`OwnNoise` of a step.

    Before a step every ``grad`` holds the clipped sum of this rank's records; after it all ranks have the same weights.
    """

    def __init__(self, parameters: list[nn.Parameter], *, ranks: Ranks, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._ranks = ranks

    def add_noise(self) -> None:
        """Put the sum and the noise of all ranks into every gradient: one all-reduce of all numbers, where they lie."""
        super().add_noise()
        self._ranks.sum(self._noised)


class RankedTrainer(LocalTrainer):
    """:class:`LocalTrainer` on one of several ranks: all of them make the same call and get the same answer.

    Args:
        model: on the device that is to compute.
        bfloat16: forward and backward passes under autocast; norms, sums and noise are float32 as ever.
        inner: makes the optimiser that takes the noised gradient; plain SGD where there is none.

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

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return self._gradients.parameters

    def optimizer(
        self, task: TrainTask, num_examples: int, secret: bytes, release: str, first_step: int = 0
    ) -> RankedDPOptimizer:
        """The optimiser of a release, about to take the step of this index."""
        return RankedDPOptimizer(
            list(self._gradients.parameters.values()),
            ranks=self._ranks,
            learning_rate=task.learning_rate,
            noise_multiplier=task.noise_multiplier,
            l2_clip_norm=task.l2_clip_norm,
            expected_batch=task.sampling_prob * num_examples,
            noise_for_step=partial(block_noise, self._ranks, secret, release),
            inner=self._inner,
            first_step=first_step,
        )

    def step(self, optimizer: SecretDPOptimizer, features: Features, labels: Tensor, drawn: Tensor) -> None:
        """One step on the records that are ``drawn`` for all ranks together, in physical batches.

        Args:
            features: as :meth:`VisionModel.features` gives them, on any device.
            labels: [N], int64 class indices.
            drawn: indices [B] by :func:`fedvit.clients.local.drawn_records`, the same on every rank.
        """
        self._step(optimizer, features, labels, drawn)

    def _optimizer(self, task: TrainTask, num_examples: int, secret: bytes, release: str) -> SecretDPOptimizer:
        return self.optimizer(task, num_examples, secret, release)

    def _step(self, optimizer: SecretDPOptimizer, features: Features, labels: Tensor, drawn: Tensor) -> None:
        super()._step(optimizer, features, labels, self._ranks.own(drawn))

    def _clip(self, features: Features, labels: Tensor, part: Tensor, l2_clip_norm: float) -> None:
        with self._precision():
            self._gradients.clip(self._moved(features[part]), self._moved(labels[part]), l2_clip_norm)

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self._ranks.device, non_blocking=True)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=self._bfloat16)


def block_noise(ranks: Ranks, secret: bytes, release: str, step: int) -> OwnNoise:
    """A rank's share of the noise of a step."""

    def stream_of(block: int) -> SecretStream:
        return SecretStream(secret, "noise of a block", {"release": release, "step": step, "block": block})

    return OwnNoise(ranks, stream_of)

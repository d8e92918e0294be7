"""Per-example clipping at close to the price of ordinary training: one backward pass, norms, one clipped sum.

Book-keeping (Bu et al. 2023, arXiv:2210.00038).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedvit.dp.gradients import PerExampleGradients, no_gradients
from fedvit.dp.interceptor import OpInterceptor
from fedvit.dp.recorder import GradientRecorder


class BookKeeping(PerExampleGradients):
    """Linear layers, patch embeddings, norms, LayerScale, tokens and position biases, in whatever module they are.

    Under autocast the forward and backward passes are in its precision, norms and sums in float32.
    """

    engine = "Book-keeping"

    def samples(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """All gradients [B, ...] one by one, by name.

        Raises:
            ModelError: a parameter meets data in a call that cannot be recorded, or never does.
        """
        tape = self._record(features, labels)
        for name in tape.missing():
            raise no_gradients(self.engine, f"{name} got none, because it never meets an example")
        each = [tape.weighted_sums(factors) for factors in torch.eye(len(labels), device=features.device)]
        return {name: torch.stack([sums[name] for sums in each]) for name in self.parameters}

    def norms(self, features: Tensor, labels: Tensor) -> Tensor:
        """L2 norms [B] of the examples' gradients over all parameters together."""
        return self._record(features, labels).norms()

    def _clipped_sums(self, features: Tensor, labels: Tensor, l2_clip_norm: float) -> dict[str, Tensor]:
        tape = self._record(features, labels)
        with torch.autocast(features.device.type, enabled=False):
            return tape.weighted_sums(self.factors(tape.norms(), l2_clip_norm), last=True)

    def _record(self, features: Tensor, labels: Tensor) -> GradientRecorder:
        self.clear()
        tape = GradientRecorder(self.parameters, len(labels))
        meetings = OpInterceptor(self.parameters, tape)
        data = meetings.begin(features)
        with meetings:
            logits = self.module(data)
        loss = self._loss(logits, labels)
        # Autocast would round the norms as well.
        with torch.autocast(features.device.type, enabled=False):
            loss.backward()
            self._refuse_other_ways()
            tape.settle()
        return tape

    def _refuse_other_ways(self) -> None:
        """Autograd must not have come to a parameter: no call may have been missed."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.clear()
                raise no_gradients(self.engine, f"{name} meets examples where book-keeping does not see it")

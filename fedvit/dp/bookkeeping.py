"""Per-example clipping by book-keeping: one backward pass, norms, one clipped sum (Bu et al. 2023, arXiv:2210.00038).

It costs little more than ordinary training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedvit.dp.gradients import PerExampleGradients, no_gradients
from fedvit.dp.interceptor import OpInterceptor
from fedvit.dp.recorder import GradientRecorder


class BookKeeping(PerExampleGradients):
    """An engine for linear layers, patch embeddings, norms, LayerScale, tokens and position biases, in any module.

    Under autocast, the forward and backward passes use its precision; norms and sums use float32.
    """

    engine = "Book-keeping"

    def samples(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        recorder = self._record(features, labels)
        for name in recorder.missing():
            raise no_gradients(self.engine, f"{name} got none, because it is never applied to an example")
        each = [recorder.weighted_sums(factors) for factors in torch.eye(len(labels), device=features.device)]
        return {name: torch.stack([sums[name] for sums in each]) for name in self.parameters}

    def norms(self, features: Tensor, labels: Tensor) -> Tensor:
        """L2 norms [B] of the examples' gradients over all parameters together."""
        return self._record(features, labels).norms()

    def _clipped_sums(self, features: Tensor, labels: Tensor, l2_clip_norm: float) -> dict[str, Tensor]:
        recorder = self._record(features, labels)
        with torch.autocast(features.device.type, enabled=False):
            return recorder.weighted_sums(self.factors(recorder.norms(), l2_clip_norm), last=True)

    def _record(self, features: Tensor, labels: Tensor) -> GradientRecorder:
        self.clear()
        recorder = GradientRecorder(self.parameters, len(labels))
        interceptor = OpInterceptor(self.parameters, recorder)
        data = interceptor.begin(features)
        with interceptor:
            logits = self.module(data)
        loss = self._loss(logits, labels)
        # Autocast would round the norms as well.
        with torch.autocast(features.device.type, enabled=False):
            loss.backward()
            # A gradient from autograd itself shows that the interceptor missed a call.
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    self.clear()
                    reason = f"{name} is applied to examples where book-keeping cannot observe it"
                    raise no_gradients(self.engine, reason)
            recorder.finalize()
        return recorder

"""Local training that a rule's client half leads: what it adds to a gradient depends on no record.

So it is added after the step, beside the clipped and noised gradient: the privacy is that of the step without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedvit.aggregation.rule import Drift
from fedvit.clients.local import Features, LocalTrainer
from fedvit.clients.plain import PlainTrainer
from fedvit.dp.dpsgd import SecretDPOptimizer


class _Lead:
    """One client's drift, ready for the trainer's parameters."""

    def __init__(self, drift: Drift, learning_rate: float) -> None:
        self._pull, self._learning_rate = drift.pull, learning_rate
        self._anchor = {n: torch.from_numpy(a) for n, a in (drift.anchor or {}).items()}
        self._shift = {n: torch.from_numpy(a) for n, a in (drift.shift or {}).items()}

    def steps(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """How far each parameter is led from where it is now: ``- lr (pull (w - anchor) + shift)``."""
        return {name: -self._learning_rate * self._drift(name, p.detach()) for name, p in parameters.items()}

    def _drift(self, name: str, parameter: Tensor) -> Tensor:
        found = torch.zeros_like(parameter)
        if name in self._anchor:
            found += self._pull * (parameter - self._anchor[name])
        if name in self._shift:
            found += self._shift[name]
        return found


@contextmanager
def _led(lead: _Lead | None, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """A step that begins where it began without the lead, and ends that much further."""
    further = lead.steps(parameters) if lead else {}
    yield
    with torch.no_grad():
        for name, step in further.items():
            parameters[name].add_(step)


class CorrectedLocalTrainer(LocalTrainer):
    """DP-SGD whose steps a rule leads; see :class:`LocalTrainer`."""

    _lead: _Lead | None = None

    def lead(self, drift: Drift | None, learning_rate: float) -> None:
        """What leads the next client's steps; None: nothing."""
        self._lead = None if drift is None else _Lead(drift, learning_rate)

    def _step(self, optimizer: SecretDPOptimizer, features: Features, labels: Tensor, drawn: Tensor) -> None:
        with _led(self._lead, self._gradients.parameters):
            super()._step(optimizer, features, labels, drawn)


class CorrectedPlainTrainer(PlainTrainer):
    """SGD whose steps a rule leads, those that draw no record included; see :class:`PlainTrainer`."""

    _lead: _Lead | None = None

    def lead(self, drift: Drift | None, learning_rate: float) -> None:
        """What leads the next client's steps; None: nothing."""
        self._lead = None if drift is None else _Lead(drift, learning_rate)

    def _step(self, features: Tensor, labels: Tensor, drawn: Tensor, learning_rate: float) -> None:
        with _led(self._lead, self._parameters):
            super()._step(features, labels, drawn, learning_rate)

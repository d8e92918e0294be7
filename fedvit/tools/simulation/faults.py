"""Clients that do not do as they are told: what they learn, and what becomes of their updates on the way. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedvit.config import FaultConfig, FaultKind
from fedvit.tools.simulation.delays import generator
from fedvit.types import LabelArray
from fedvit.updates import ClientAnswer, ClientUpdate

Arrays = Mapping[str, npt.NDArray[np.float64]]
Behaviour = Callable[[Arrays, FaultConfig, np.random.Generator], Arrays]
"""A client's own update, by name, as it arrives. It belongs to a group and has a generator of its own."""


def _turned(update: Arrays, _: FaultConfig, __: np.random.Generator) -> Arrays:
    return {name: -array for name, array in update.items()}


def _scaled(update: Arrays, fault: FaultConfig, _: np.random.Generator) -> Arrays:
    return {name: fault.factor * array for name, array in update.items()}


def _noisy(update: Arrays, fault: FaultConfig, draw: np.random.Generator) -> Arrays:
    return {n: update[n] + fault.noise_stddev * draw.standard_normal(update[n].shape) for n in sorted(update)}


def _spoilt(update: Arrays, _: FaultConfig, __: np.random.Generator) -> Arrays:
    first = min(update)
    array = update[first].copy()
    array.flat[0] = np.nan
    return {**update, first: array}


BEHAVIOURS: Mapping[FaultKind, Behaviour] = {
    "sign_flip": _turned,
    "scale": _scaled,
    "noise": _noisy,
    "nan": _spoilt,
}


class Faults:
    """Which clients err, and how.

    Args:
        groups: disjoint, each a share of the fleet, rounded down to whole clients.
        client_ids: the fleet.
        seed: of the simulation.
    """

    def __init__(self, groups: Sequence[FaultConfig], client_ids: Sequence[str], seed: int) -> None:
        self._seed = seed
        self.of: dict[str, FaultConfig] = {}
        ids = sorted(client_ids)
        drawn = [ids[i] for i in generator(seed, "faulty").permutation(len(ids))]
        for group in groups:
            # 0.3 of 10 is a little less than 3.
            count = int(group.share * len(ids) + 1e-9)
            members, drawn = drawn[:count], drawn[count:]
            self.of |= dict.fromkeys(members, group)

    def labels(self, client_id: str, labels: LabelArray, num_classes: int) -> LabelArray:
        """What a client takes its labels [N] for."""
        fault = self.of.get(client_id)
        return num_classes - 1 - labels if fault and "label_flip" in fault.kinds else labels

    def sent(self, client_id: str, answer: ClientAnswer) -> ClientAnswer:
        """What arrives of a client's own answer."""
        fault = self.of.get(client_id)
        if fault is None or not isinstance(answer, ClientUpdate) or not answer.total_weight:
            return answer
        draw = generator(self._seed, "fault", client_id, answer.round_index)
        # Of the update itself, whatever it weighs in a sum.
        update: Arrays = {name: array / answer.total_weight for name, array in answer.weighted_sum.items()}
        for kind in fault.kinds:
            if kind in BEHAVIOURS:
                update = BEHAVIOURS[kind](update, fault, draw)
        return replace(answer, weighted_sum={name: answer.total_weight * array for name, array in update.items()})

"""Faulty clients: wrong labels and altered updates. Pure."""

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
Alteration = Callable[[Arrays, FaultConfig, np.random.Generator], Arrays]
"""Alters a client's update by the fault of its group and a generator for this update."""


def _noisy(update: Arrays, fault: FaultConfig, draw: np.random.Generator) -> Arrays:
    return {n: update[n] + fault.noise_stddev * draw.standard_normal(update[n].shape) for n in sorted(update)}


def _with_nan(update: Arrays, _: FaultConfig, __: np.random.Generator) -> Arrays:
    first = min(update)
    array = update[first].copy()
    array.flat[0] = np.nan
    return {**update, first: array}


ALTERATIONS: Mapping[FaultKind, Alteration] = {
    "sign_flip": lambda update, _, __: {name: -array for name, array in update.items()},
    "scale": lambda update, fault, _: {name: fault.factor * array for name, array in update.items()},
    "noise": _noisy,
    "nan": _with_nan,
}


class Faults:
    """The faulty clients and their faults.

    Args:
        groups: disjoint groups, each a share of the fleet, rounded down to whole clients.
        client_ids: the fleet.
        seed: the seed of the simulation.
    """

    def __init__(self, groups: Sequence[FaultConfig], client_ids: Sequence[str], seed: int) -> None:
        self._seed = seed
        self.of: dict[str, FaultConfig] = {}
        ids = sorted(client_ids)
        shuffled = [ids[i] for i in generator(seed, "faulty").permutation(len(ids))]
        for group in groups:
            # 0.3 of 10 is a little less than 3.
            count = int(group.share * len(ids) + 1e-9)
            members, shuffled = shuffled[:count], shuffled[count:]
            self.of |= dict.fromkeys(members, group)

    def labels(self, client_id: str, labels: LabelArray, num_classes: int) -> LabelArray:
        """The labels [N] that a client trains on."""
        fault = self.of.get(client_id)
        return num_classes - 1 - labels if fault and "label_flip" in fault.kinds else labels

    def alter(self, client_id: str, answer: ClientAnswer) -> ClientAnswer:
        """A client's answer after its faults."""
        fault = self.of.get(client_id)
        if fault is None or not isinstance(answer, ClientUpdate) or not answer.total_weight:
            return answer
        draw = generator(self._seed, "fault", client_id, answer.round_index)
        # Faults alter the update itself, not its weighted sum.
        update: Arrays = {name: array / answer.total_weight for name, array in answer.weighted_sum.items()}
        for kind in fault.kinds:
            if kind in ALTERATIONS:
                update = ALTERATIONS[kind](update, fault, draw)
        return replace(answer, weighted_sum={name: answer.total_weight * array for name, array in update.items()})

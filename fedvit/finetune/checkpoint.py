"""Checkpoint of a fine-tuning job as files: the next step, the weights and the optimizer state.

All random streams are derived from the number of the step, so that number is their position, too. Arrays are stored as
safetensors and everything else as JSON: nothing that is read can be code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedvit.dp.dpsgd import SecretDPOptimizer
from fedvit.errors import IntegrityError, UpdateRejectedError
from fedvit.types import FloatArray, Weights
from fedvit.wire.tensors import decode_weights, encode_weights

HEADER, ARRAYS = "checkpoint.json", "state.safetensors"
_OPTIMIZER = "optimizer/"
_MAX_BYTES = 64 * 2**30
OptimizerState = Mapping[str, Mapping[str, FloatArray]]
"""The optimizer's arrays, by parameter name and key."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a job after ``step`` steps, all of which are charged under ``ledger_run_id``.

    ``digest`` is that of the plan.
    """

    digest: str
    step: int
    ledger_run_id: str
    weights: Weights
    optimizer_state: OptimizerState

    def to_files(self) -> dict[str, bytes]:
        """The checkpoint's files by name."""
        states = self.optimizer_state.items()
        arrays = {f"{_OPTIMIZER}{name}/{key}": a for name, state in states for key, a in state.items()}
        header = {"digest": self.digest, "step": self.step, "ledger_run_id": self.ledger_run_id}
        return {HEADER: json.dumps(header, sort_keys=True).encode(), ARRAYS: encode_weights({**self.weights, **arrays})}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], digest: str) -> Checkpoint:
        """The inverse of :meth:`to_files`, for the job of this digest.

        Raises:
            IntegrityError: a file is missing or damaged, or the checkpoint belongs to another job.
        """
        try:
            header = json.loads(files[HEADER])
            result, step, ledger_run_id = header["digest"], header["step"], header["ledger_run_id"]
            arrays = decode_weights(files[ARRAYS], max_bytes=_MAX_BYTES)
        except (KeyError, TypeError, ValueError, UpdateRejectedError) as error:
            raise IntegrityError(
                f"The checkpoint cannot be read: {error}.", cure="Remove it: the job continues from the one before."
            ) from None
        if result != digest or not isinstance(step, int) or step < 0:
            raise IntegrityError(
                f"The checkpoint is of job {str(result)[:16]}, and this is {digest[:16]}.",
                cure="Give every job a folder of its own.",
            )
        weights, states = dict[str, FloatArray](), dict[str, dict[str, FloatArray]]()
        for name, array in arrays.items():
            if name.startswith(_OPTIMIZER):
                parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition("/")
                states.setdefault(parameter, {})[key] = array
            else:
                weights[name] = array
        return cls(digest, step, ledger_run_id, weights, states)


def optimizer_state(optimizer: SecretDPOptimizer, names: Sequence[str]) -> OptimizerState:
    """The optimizer state, which is computed from noised gradients only."""
    return {
        names[index]: {
            key: value.detach().to("cpu", torch.float32).numpy().copy()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        for index, state in optimizer.state_dict()["state"].items()
    }


def load_optimizer_state(optimizer: SecretDPOptimizer, names: Sequence[str], states: OptimizerState) -> None:
    """Restore what :func:`optimizer_state` returned."""
    content = optimizer.state_dict()
    # Copies, because torch would write into the arrays.
    content["state"] = {
        index: {key: torch.from_numpy(array.copy()) for key, array in states[name].items()}
        for index, name in enumerate(names)
        if name in states
    }
    optimizer.load_state_dict(content)

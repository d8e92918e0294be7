"""Where a fine-tuning job stands, as files: weights, the optimiser's memory, the next step, and what is charged.

Streams are derived from the step's number, so that number is their position too. Numbers are safetensors, the rest is
JSON; nothing that is read back can be code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fedvit.dp.dpsgd import SecretDPOptimizer
from fedvit.errors import IntegrityError, UpdateRejectedError
from fedvit.types import FloatArray, Weights
from fedvit.wire.tensors import decode_weights, encode_weights

POSITION, NUMBERS = "position.json", "state.safetensors"
_OPTIMIZER = "optimizer/"
_MAX_BYTES = 64 * 2**30
Memory = Mapping[str, Mapping[str, FloatArray]]
"""What an optimiser remembers of a parameter, by the parameter's name."""


@dataclass(frozen=True, slots=True)
class Position:
    """The next step of a job, of all streams and of the ledger: what was taken so far is charged, and under which name.

    Attributes:
        digest: the plan's.
        step: so many were taken.
        ledger_run_id: of the charges, the last of which ends at this step.
    """

    digest: str
    step: int
    ledger_run_id: str


def pack(position: Position, weights: Weights, memory: Memory) -> dict[str, bytes]:
    """A checkpoint's files by name."""
    remembered = {f"{_OPTIMIZER}{name}/{key}": a for name, arrays in memory.items() for key, a in arrays.items()}
    return {
        POSITION: json.dumps(asdict(position), sort_keys=True).encode(),
        NUMBERS: encode_weights({**weights, **remembered}),
    }


def unpack(files: Mapping[str, bytes], digest: str) -> tuple[Position, Weights, Memory]:
    """The inverse of :func:`pack`, for the job of this digest.

    Raises:
        IntegrityError: a file is missing or damaged, or the checkpoint is another job's.
    """
    try:
        position = Position(**json.loads(files[POSITION]))
        arrays = decode_weights(files[NUMBERS], max_bytes=_MAX_BYTES)
    except (KeyError, TypeError, ValueError, UpdateRejectedError) as error:
        raise IntegrityError(
            f"The checkpoint cannot be read: {error}.", cure="Remove it: the job goes on from the one before."
        ) from None
    if position.digest != digest or not isinstance(position.step, int) or position.step < 0:
        raise IntegrityError(
            f"The checkpoint is of job {str(position.digest)[:16]}, and this is {digest[:16]}.",
            cure="Give every job a folder of its own.",
        )
    weights, memory = dict[str, FloatArray](), dict[str, dict[str, FloatArray]]()
    for name, array in arrays.items():
        if name.startswith(_OPTIMIZER):
            parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition("/")
            memory.setdefault(parameter, {})[key] = array
        else:
            weights[name] = array
    return position, weights, memory


def memory_of(optimizer: SecretDPOptimizer, names: Sequence[str]) -> Memory:
    """What the optimiser remembers; it descends from noised gradients alone."""
    state = optimizer.state_dict()["state"]
    return {
        names[index]: {k: _to_numpy(v) for k, v in found.items() if isinstance(v, Tensor)}
        for index, found in state.items()
    }


def remind(optimizer: SecretDPOptimizer, names: Sequence[str], memory: Memory) -> None:
    """Give an optimiser its memory back."""
    state = optimizer.state_dict()
    # Copies: torch makes none, and would write into the arrays.
    state["state"] = {
        index: {key: torch.from_numpy(array.copy()) for key, array in memory[name].items()}
        for index, name in enumerate(names)
        if name in memory
    }
    optimizer.load_state_dict(state)


def _to_numpy(tensor: Tensor) -> FloatArray:
    return tensor.detach().to("cpu", torch.float32).numpy().copy()

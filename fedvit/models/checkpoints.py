"""Model checkpoints in local files, read without unpickling code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fedvit.errors import ModelError

_WRAPPERS = ("state_dict", "model_state_dict", "model")
# Modules that torch.compile, FSDP and activation checkpointing put around any other one.
_WRAPPED_MODULE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a PyTorch file, whatever its suffix.

    A PyTorch file holds the tensors plainly or, as training scripts save them, under ``state_dict``,
    ``model_state_dict`` or ``model``, beside other values. Names lose the parts that wrapping modules put before them
    (``module.`` of DataParallel, ``model.`` of Lightning, ``_orig_mod.`` of torch.compile): any first part that all
    names share, unless a single tensor has it.

    Raises:
        ModelError: the file is missing, unreadable, or has no tensors.
    """
    if not path.is_file():
        raise ModelError(f"There is no checkpoint file {path}.", cure="Set model.checkpoint to an existing file.")
    try:
        content = _read(path)
    except Exception as error:  # a parser of a corrupt file may raise anything
        refused = _REFUSED_GLOBAL.search(str(error))
        reason = f"it holds a {refused[1]}, which is not a tensor" if refused else type(error).__name__
        raise ModelError(
            f"The checkpoint {path} cannot be read: {reason}.",
            cure="Save the weights alone: torch.save(model.state_dict(), path), or an intact safetensors file.",
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"The checkpoint {path} holds no tensors by name.", cure="Save a state_dict into it.")
    return _without_wrappers(tensors)


def _read(path: Path) -> object:
    if _is_safetensors(path):
        return safetensors.torch.load_file(path)
    with torch.serialization.safe_globals(_harmless_types()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_safetensors(path: Path) -> bool:
    """By its beginning: the length of a JSON object, in 8 bytes, and the object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _harmless_types() -> list[Any]:
    """What training scripts save beside the weights: numbers and arrays of NumPy, and command-line arguments."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    # Files of NumPy 1 name its modules in another way.
    named = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
    ]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "O"}
    return [*named, *kinds, np.dtype, np.ndarray, argparse.Namespace]


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: _WRAPPED_MODULE.sub("", name) for name in tensors}
    while len(names) > 1:
        first = {short.partition(".")[0] for short in names.values()}
        if len(first) > 1 or any("." not in short for short in names.values()):
            break
        names = {name: short.partition(".")[2] for name, short in names.items()}
    return {short: tensors[name] for name, short in names.items()}


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Load ``state`` into ``module``; all names and shapes must agree.

    Raises:
        ModelError: names the first entry that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        fault = "lacks" if name in own else "has an entry that the model does not know:"
        raise ModelError(f"The checkpoint {source} {fault} {name}.", cure="Use a checkpoint of this very model.")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            message = f"In the checkpoint {source}, {name} has shape {list(state[name].shape)}."
            raise ModelError(message, cure=f"The model needs {list(tensor.shape)}.")
    module.load_state_dict(dict(state))

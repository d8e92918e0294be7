"""Model checkpoints in local files, read without unpickling code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fedvit.errors import ModelError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file or a PyTorch file (plain, or under ``model`` or ``state_dict``).

    Raises:
        ModelError: the file is missing, unreadable, or has no tensors.
    """
    if not path.is_file():
        raise ModelError(f"There is no checkpoint file {path}.", cure="Set model.checkpoint to an existing file.")
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of a corrupt file may raise anything
        raise ModelError(
            f"The checkpoint {path} cannot be read: {type(error).__name__}.",
            cure="Set model.checkpoint to an intact safetensors file, or a .pth file of tensors only.",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"The checkpoint {path} holds no tensors by name.", cure="Save a state_dict into it.")
    return tensors


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

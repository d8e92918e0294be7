"""Trainable part of a model: selection, reading and loading of its weights."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedvit.errors import ModelError
from fedvit.models.layers import LoraLinear, replace_modules
from fedvit.models.vision import FEATURE_BATCH, VisionModel
from fedvit.types import FloatArray, Weights

TrainableMode = Literal["all", "head", "biases", "adapters"]
# The attention projections of timm's ViT families, fused and not.
_ADAPTED = ("attn.qkv", "attn.proj", "attn.q_proj", "attn.k_proj", "attn.v_proj")


def apply_trainable(model: VisionModel, mode: TrainableMode, rank: int, *, seed: int = 0) -> None:
    """Select the trainable part of the body: ``all``, the ``head``, or the head and ``biases`` or ``adapters``.

    Biases are all parameters that add a constant vector (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199; with privacy,
    Bu et al. 2022, arXiv:2210.00036). Adapters are LoRA (Hu et al. 2021, arXiv:2106.09685) of ``rank`` on the attention
    projections of the blocks.

    Raises:
        ModelError: the trainable part has a BatchNorm, or no layer can have an adapter.
    """
    model.body.requires_grad_(mode == "all")
    model.body.classifier().requires_grad_(True)
    if mode == "biases":
        for name, parameter in model.body.named_parameters():
            # Position biases are tables [distances, heads], not vectors.
            parameter.requires_grad_(parameter.requires_grad or (name.endswith("bias") and parameter.ndim == 1))
    if mode == "adapters":
        _add_adapters(model, rank, seed)
    _refuse_batch_norm(model)


def _add_adapters(model: VisionModel, rank: int, seed: int) -> None:
    linears = [
        (name, module)
        for name, module in model.body.named_modules()
        if "blocks" in name.split(".") and name.endswith(_ADAPTED) and isinstance(module, nn.Linear)
    ]
    if not linears:
        message = "The model has no attention projection that an adapter could be put on."
        raise ModelError(message, cure="Choose trainable 'all' or 'head'.")
    for name, _ in linears:
        attention: Any = model.body.get_submodule(name.rpartition(".")[0])
        if hasattr(attention, "qkv_bias_separate"):
            # Otherwise BEiT and EVA read the weight directly and bypass the adapter.
            attention.qkv_bias_separate = True
    generator = torch.Generator().manual_seed(seed)
    replace_modules(model.body, linears, (LoraLinear(linear, rank, generator) for _, linear in linears))


def _refuse_batch_norm(model: VisionModel) -> None:
    for name, module in model.named_modules():
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if trained and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"The trainable layer {name} is a BatchNorm: it mixes examples, so none has a gradient of its own.",
                cure="Choose a model without BatchNorm, or train less of it.",
            )


def trainable_weights(model: VisionModel) -> dict[str, FloatArray]:
    """Copies of the trainable parameters by name, float32."""
    return {name: _to_numpy(p) for name, p in model.named_parameters() if p.requires_grad}


def head_name(model: VisionModel) -> str | None:
    """The name of the linear head's weight, if it is trained."""
    classifier = model.body.classifier()
    names = [f"{name}.weight" for name, module in model.named_modules() if module is classifier]
    parameters = dict(model.named_parameters())
    return names[0] if names and names[0] in parameters and parameters[names[0]].requires_grad else None


def head_inputs(model: VisionModel, features: Tensor) -> Tensor:
    """What the linear head multiplies for these features: [inputs, width], one or several inputs an image."""
    inputs = list[Tensor]()
    hook = model.body.classifier().register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        with torch.inference_mode():
            for batch in features.split(FEATURE_BATCH):
                model.body(batch)
    finally:
        hook.remove()
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in inputs])


def frozen_weights(model: VisionModel) -> dict[str, FloatArray]:
    """Copies of all other weights: frozen parameters and float buffers, float32.

    BatchNorm's integer step counters are left out: they are not used in eval mode.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    return {n: _to_numpy(t) for n, t in state.items() if n not in trained and t.is_floating_point()}


def load_trainable_weights(model: VisionModel, weights: Weights) -> None:
    """Overwrite the trainable parameters.

    Raises:
        ModelError: a name is missing or unknown, or a shape differs; the model is then unchanged.
    """
    load_weights({name: p for name, p in model.named_parameters() if p.requires_grad}, weights)


def load_weights(parameters: dict[str, nn.Parameter], weights: Weights) -> None:
    """Overwrite ``parameters`` with the ``weights`` of the same names; see :func:`load_trainable_weights`."""
    for name in sorted(parameters.keys() ^ weights.keys()):
        fault = "is missing from the weights" if name in parameters else "is no trainable parameter of this model"
        raise ModelError(f"{name} {fault}.", cure="Use weights of the same model configuration.")
    for name, parameter in parameters.items():
        if tuple(weights[name].shape) != tuple(parameter.shape):
            message = f"{name} has shape {list(weights[name].shape)} in the weights."
            raise ModelError(message, cure=f"This model needs {list(parameter.shape)}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float32)))


def _to_numpy(tensor: torch.Tensor) -> FloatArray:
    return tensor.detach().to("cpu", torch.float32).numpy().copy()

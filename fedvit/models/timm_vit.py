"""Any Vision Transformer of timm, by name, cut into a frozen prefix and a body that can be trained per example."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fedvit.config import ModelConfig
from fedvit.errors import ModelError
from fedvit.models.checkpoints import load_exactly, read_state_dict
from fedvit.models.layers import Body, HeadBody, Normalise

# timm's modules of Vision Transformers with a single classifier.
_VIT_MODULES = frozenset(
    {"vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "beit", "eva", "swin_transformer"}
)
_SIZE_CURE = "Choose a data.image_size that is a multiple of the model's patch size."


class TimmBody(Body):
    """A whole model of timm on normalised images [B, 3, S, S]."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def classifier(self) -> nn.Module:
        head: nn.Module = self.vit.get_classifier()
        return head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.vit(images)
        return logits


class Backbone(nn.Module):
    """A frozen ViT up to the embedding before its head: uint8 images [B, S, S, 3] to [B, D]."""

    def __init__(self, normalise: Normalise, vit: Any) -> None:
        super().__init__()
        self.normalise = normalise
        self.vit = vit

    def forward(self, images_u8: Tensor) -> Tensor:
        tokens = self.vit.forward_features(self.normalise(images_u8))
        embedding: Tensor = self.vit.forward_head(tokens, pre_logits=True)
        return embedding


def build_timm_vit(config: ModelConfig, num_classes: int, image_size: int) -> tuple[nn.Module, Body]:
    """Prefix and body of ``config.name``; the backbone is the prefix if only the head is trained.

    Raises:
        ModelError: the name is unknown or not a ViT, its weights are missing or do not fit, or it does not support
            the image size.
    """
    _check_name(config.name)
    vit = _create(config, num_classes, image_size)
    if type(vit).__module__.rpartition(".")[2] not in _VIT_MODULES:
        raise _no_vit(config.name)
    if config.checkpoint is not None:
        _load_checkpoint(vit, config)
    normalise = Normalise(vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
    _check_size(config.name, vit, normalise, image_size)
    if config.trainable == "head":
        head = vit.get_classifier()
        vit.reset_classifier(0)
        return Backbone(normalise, vit), HeadBody(head)
    return normalise, TimmBody(vit)


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, ["hybrid_lite0", *timm.list_models()], n=3)
    names = ", ".join(near)
    hint = f"Did you mean {names}?" if near else "Use hybrid_lite0, or a ViT of timm, e.g. vit_tiny_patch16_224."
    raise ModelError(f"There is no model named '{name}'.", cure=hint)


def _create(config: ModelConfig, num_classes: int, image_size: int) -> Any:
    download = config.pretrained and config.checkpoint is None
    try:
        return timm.create_model(config.name, pretrained=download, num_classes=num_classes, img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise _no_vit(config.name) from error
    except Exception as error:  # the hub client, the HTTP client and timm raise different types
        if not download:
            message = f"timm cannot build '{config.name}' for {image_size} pixels: {_first_line(error)}."
            raise ModelError(message, cure=_SIZE_CURE) from error
        message = f"The pretrained weights of '{config.name}' cannot be downloaded: {_first_line(error)}."
        raise ModelError(message, cure="Set model.checkpoint to a local file, or model.pretrained: false.") from error


def _no_vit(name: str) -> ModelError:
    cure = "Use hybrid_lite0, or a timm model such as vit_tiny_patch16_224."
    return ModelError(f"'{name}' is no plain Vision Transformer.", cure=cure)


def _load_checkpoint(vit: Any, config: ModelConfig) -> None:
    """Load a file. A head for another number of classes is not loaded; positions are resampled to the image size."""
    assert config.checkpoint is not None
    state = read_state_dict(config.checkpoint)
    convert = getattr(inspect.getmodule(type(vit)), "checkpoint_filter_fn", None)
    try:
        state = convert(state, vit) if convert else state
    except Exception as error:  # timm's converters expect all keys
        message = f"The checkpoint {config.checkpoint} is no '{config.name}': {_first_line(error)}."
        raise ModelError(message, cure="Use a checkpoint of this very model.") from error
    load_exactly(vit, _with_own_head(vit, state), config.checkpoint)


def _with_own_head(vit: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    head = vit.pretrained_cfg["classifier"] + "."
    own = {name: tensor for name, tensor in vit.state_dict().items() if name.startswith(head)}
    if all(name in state and state[name].shape == tensor.shape for name, tensor in own.items()):
        return dict(state)
    return {name: tensor for name, tensor in state.items() if not name.startswith(head)} | own


def _check_size(name: str, vit: Any, normalise: Normalise, image_size: int) -> None:
    patch = max(getattr(vit.patch_embed, "patch_size", (1, 1)))
    if image_size % patch:
        raise ModelError(f"'{name}' cuts images of {image_size} pixels into patches of {patch}.", cure=_SIZE_CURE)
    try:
        with torch.no_grad():
            vit.eval()(normalise(torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8)))
    except (AssertionError, RuntimeError, ValueError) as error:
        message = f"'{name}' cannot take images of {image_size} pixels: {_first_line(error)}."
        raise ModelError(message, cure=_SIZE_CURE) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

"""Settings of the data set, the model and a workload of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedvit.config.base import Factor, PositiveFloat, PositiveInt, Section


class PartitionConfig(Section):
    """How the training images are divided among virtual clients."""

    scheme: Literal["iid", "dirichlet", "shard", "natural"] = Field(
        "dirichlet",
        description="'iid': uniformly at random. 'dirichlet': each class in shares drawn from Dirichlet(alpha) (Hsu et "
        "al. 2019, arXiv:1909.06335). 'shard': sorted by label and cut into pieces (McMahan et al. 2017). 'natural': "
        "whole units of the data set, such as GTSRB tracks.",
    )
    clients: PositiveInt = Field(30, description="Number of virtual clients.")
    alpha: PositiveFloat = Field(1.0, description="Dirichlet concentration; smaller means more skewed classes.")
    shards_per_client: PositiveInt = Field(2, description="Pieces for each client under scheme 'shard'.")
    min_examples: PositiveInt = Field(8, description="Fewest images that a client may have.")
    seed: int = Field(7, description="Seed of the partition.")


class DataConfig(Section):
    """The labelled images that clients train on and the server evaluates with."""

    source: str = Field(
        "traffic-lights",
        description="'traffic-lights' (generated), 'folder', 'gtsrb', or the import path of a torchvision data set.",
    )
    path: Path | None = Field(None, description="Folder of the data set, relative to the settings file.")
    image_size: Annotated[int, Field(ge=16, le=1024)] = Field(64, description="Side of the square images, in pixels.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the data source.")
    partition: PartitionConfig = Field(PartitionConfig(), description="Division among virtual clients.")


class HybridConfig(Section):
    """The small ViT on the frozen EfficientNet-Lite0 stem (``model.name: hybrid_lite0``).

    Sizes are bounded, because a vehicle builds the model that a server names.
    """

    depth: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Number of transformer blocks.")
    width: Annotated[int, Field(ge=8, le=1024)] = Field(96, description="Token width; a multiple of heads.")
    heads: Annotated[int, Field(ge=1, le=64)] = Field(4, description="Attention heads of each block.")
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = Field(
        2.0, description="Width of a block's MLP over the token width."
    )
    pooling_bands: Annotated[int, Field(ge=1, le=128)] = Field(
        3, description="Horizontal bands of the image whose tokens are averaged separately before the head."
    )
    layer_scale_init: Factor = Field(1e-3, description="Initial LayerScale of each residual branch.")
    linear_path: bool = Field(
        False,
        description="Whether the head also reads the stem's features themselves, whitened by public photographs. With "
        "trainable 'head' and few large private steps this is the most accurate, and less robust against a hostile "
        "vehicle; see docs/explanation/private-step.md.",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> HybridConfig:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


HYBRID_NAME = "hybrid_lite0"


class ModelConfig(Section):
    """The Vision Transformer, and which of its parameters are trained."""

    name: Annotated[str, Field(max_length=200)] = Field(
        HYBRID_NAME, description="'hybrid_lite0', or the name of any ViT in timm."
    )
    pretrained: bool = Field(True, description="Start from pretrained weights, which timm downloads where necessary.")
    checkpoint: Path | None = Field(
        None, description="Local .safetensors or .pth file used instead of the download of pretrained weights."
    )
    trainable: Literal["all", "head", "biases", "adapters"] = Field(
        "all", description="Trained parameters: all, the head, biases and head, or LoRA adapters and head."
    )
    adapter_rank: Annotated[int, Field(ge=1, le=256)] = Field(
        4, description="Rank of the LoRA adapters under trainable 'adapters'."
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(0, description="Seed of the initial weights.")
    hybrid: HybridConfig = Field(HybridConfig(), description="Architecture of 'hybrid_lite0'.")

    @property
    def has_linear_path(self) -> bool:
        """Whether this is a hybrid with a linear path."""
        return self.name == HYBRID_NAME and self.hybrid.linear_path


class WorkloadConfig(Section):
    """A model and clients of your own in the place of a Vision Transformer on images."""

    clients_class: str | None = Field(
        None,
        description="Import path, package.module:Class, of a fedvit.clients.workload.VirtualClients. Every proxy "
        "imports it: name only code that you trust.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of that class.")

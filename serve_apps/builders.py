"""Application builders for ``serve build`` and ``serve deploy``, configured by a file instead of ``fedvit up``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from ray import serve

from fedvit.settings import environment_settings
from serve_apps.inference.app import build_inference_app


class InferenceArguments(BaseModel):
    """``args`` of the inference application.

    Args:
        control_url: whose releases are followed.
        trusted_key_file: the public key that signs them, as ``fedvit model export`` writes it.
        token_file: the token that they are fetched with, where one is demanded.
        node_labels: of the nodes that replicas may run on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    control_url: str
    trusted_key_file: Path
    token_file: Path | None = None
    node_labels: dict[str, str] = {}


def inference(args: InferenceArguments) -> serve.Application:
    """Inference replicas by themselves; settings come from ``FEDVIT_*`` variables and ``FEDVIT_CONFIG``.

    Raises:
        ConfigError: a setting is unknown or out of range.
        UsageError: the key is none.
    """
    return build_inference_app(
        environment_settings(),
        control_url=args.control_url,
        trusted_key=args.trusted_key_file.read_text().strip(),
        token_file=args.token_file,
        node_labels=args.node_labels,
    )

"""Silos: clients whose local training is a Ray Train job on several ranks.

A rank takes the same steps as in ``fedvit finetune``, from the round's weights. A silo's data reach the ranks through
the object store, once a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import torch
from torch import Tensor

from actors.trainer import absolute_paths, fit_ranks, rank_device
from fedvit.aggregation.rule import GradientCorrection
from fedvit.clients.host import ClientHost, vision_host
from fedvit.clients.local import check_records
from fedvit.config import Settings
from fedvit.errors import ConfigError
from fedvit.settings import settings_from_json, settings_to_json
from fedvit.types import FloatArray, TrainTask, Weights


def silo_host(settings: Settings) -> ClientHost:
    """A client host whose clients' local steps are taken by ``training.ranks`` ranks each."""
    return vision_host(settings, trainer=SiloTrainer(settings))


class SiloTrainer:
    """Implements :class:`fedvit.clients.local.Trainer` by a Ray Train job, placed by the section ``finetune``."""

    def __init__(self, settings: Settings) -> None:
        ranks = {"ranks": settings.training.ranks, "min_ranks": None}
        self._settings = absolute_paths(settings).model_copy(
            update={"finetune": settings.finetune.model_copy(update=ranks)}
        )

    def train(
        self,
        task: TrainTask,
        base: Weights,
        features: Tensor,
        labels: Tensor,
        secret: bytes,
        client_id: str,
        correction: GradientCorrection | None = None,
    ) -> Mapping[str, FloatArray]:
        """See :meth:`fedvit.clients.local.BodyTrainer.train`, and :func:`actors.trainer.run_ranks` for the errors.

        A rule that corrects the gradients of local steps is a ConfigError.
        """
        if correction is not None:
            raise ConfigError(
                f"training.aggregation {self._settings.training.aggregation!r} corrects the gradients of local steps, "
                "which several ranks do not support.",
                cure="Use a rule without a client half, or training.ranks 1.",
            )
        check_records(features, labels, client_id)
        records = ray.put((dict(base), features.numpy(), labels.numpy(), secret))
        config = {"settings": settings_to_json(self._settings), "task": task, "client": client_id, "records": [records]}
        job = f"{client_id}-{task.run_id}-{task.round_index}-{task.base_digest[:8]}"
        delta: Mapping[str, FloatArray] = fit_ranks(run_silo_rank, config, self._settings, job, "silo").return_value
        return delta


def run_silo_rank(config: Mapping[str, Any]) -> Mapping[str, FloatArray]:
    """The work of one rank in a round; all ranks return the same, and rank 0's result is used."""
    from fedvit.data.sources import open_source
    from fedvit.finetune.ranks import RankedTrainer, Ranks
    from fedvit.models.build import build_model

    settings = settings_from_json(config["settings"])
    torch.set_num_threads(settings.finetune.threads_per_rank)
    device = rank_device(settings)
    base, features, labels, secret = ray.get(config["records"][0])
    classes = len(open_source(settings.data).classes)
    trainer = RankedTrainer(
        build_model(settings.model, classes, settings.data.image_size).to(device),
        Ranks.here(device),
        physical_batch_size=settings.training.physical_batch_size,
        bfloat16=settings.finetune.precision == "bfloat16",
    )
    # Copies: arrays from the object store are read-only.
    records = torch.from_numpy(features.copy()), torch.from_numpy(labels.copy())
    return trainer.train(config["task"], base, *records, secret, config["client"])

"""Fine-tuning as a Ray Train job: a controller that restarts ranks, and ranks that communicate over gloo or NCCL.

Neither Ray Train's ``prepare_model`` nor its ``prepare_data_loader`` is used: the first wraps the model to average
gradients, which are summed here already; the second replaces Poisson samples by batches of a fixed size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from actors.handles import connect_accountant, namespace_of
from actors.rendezvous import RankConfig
from fedvit.config import FinetuneConfig, Settings
from fedvit.errors import FedvitError, InterruptedRunError, PlacementError
from fedvit.settings import settings_from_json, settings_to_json

# For a rank that hangs. A rank that is killed breaks its connections, which the others notice at once.
_COLLECTIVE_TIMEOUT_S = 600


def rank_name(index: int) -> str:
    """The name of a rank in messages."""
    return f"fedvit-rank-{index}"


def run_ranks(settings: Settings, job: str) -> tuple[Any, dict[str, bytes]]:
    """Train on ``finetune.ranks`` ranks, from the job's last checkpoint if it has one.

    Args:
        settings: complete, with absolute paths under which every node sees the state folder and the data set.
        job: the folder of the job's checkpoints, in ``finetune`` of the state folder.

    Returns:
        Rank 0's :class:`fedvit.finetune.job.Outcome`, and the last checkpoint's files.

    Raises:
        PlacementError: there is no room for a rank; it is named.
        InterruptedRunError: the user ended it.
        FedvitError: ranks failed more often than the settings allow; or the error that a rank raised.
    """
    config = {"settings": settings_to_json(settings)}
    result = fit_ranks(run_rank, config, settings, job, "finetune")
    if result.return_value is None:
        raise InterruptedRunError(
            f"{job} was interrupted.", cure="The checkpoints stay: the same command continues from the last one."
        )
    return result.return_value, files_of(result.checkpoint) if result.checkpoint else {}


def fit_ranks(
    loop: Callable[[Mapping[str, Any]], Any], arguments: Mapping[str, Any], settings: Settings, job: str, folder: str
) -> Any:
    """Run ``loop(arguments)`` on every rank, again from the last checkpoint where a rank is lost; rank 0's result.

    Args:
        folder: where in the state folder Ray Train keeps the job.

    Raises:
        PlacementError, FedvitError: see :func:`run_ranks`.
    """
    config = settings.finetune
    ranks = check_room(config)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.start_timeout_s)
    trainer = TorchTrainer(
        loop,
        train_loop_config=dict(arguments),
        torch_config=RankConfig(backend="nccl" if config.device == "cuda" else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=_scaling(config, ranks),
        run_config=train.RunConfig(
            name=job,
            storage_path=str(settings.home / folder),
            failure_config=train.FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=config.max_failures
            ),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return trainer.fit()
    except train.TrainingFailedError as error:
        raise training_error(error, job) from None


def run_rank(config: Mapping[str, Any]) -> Any:
    """The whole work of one rank."""
    import torch

    from fedvit.finetune.job import Finetuning
    from fedvit.finetune.ranks import Ranks

    settings = settings_from_json(config["settings"])
    torch.set_num_threads(settings.finetune.threads_per_rank)
    device = rank_device(settings)
    accountant = connect_accountant(namespace_of(settings.home))
    job = Finetuning(settings, Ranks.here(device), charge=accountant.charge, save=_save_checkpoint)
    checkpoint = train.get_checkpoint()
    return job.run(files_of(checkpoint) if checkpoint else None)


def absolute_paths(settings: Settings) -> Settings:
    """The settings with absolute paths: a rank works in a folder of its own."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    data = settings.data.model_copy(update={"path": absolute(settings.data.path)})
    model = settings.model.model_copy(update={"checkpoint": absolute(settings.model.checkpoint)})
    return settings.model_copy(update={"home": settings.home.absolute(), "data": data, "model": model})


def rank_device(settings: Settings) -> Any:
    """The device that Ray Train gave this rank."""
    import torch

    return train.torch.get_device() if settings.finetune.device == "cuda" else torch.device("cpu")


def files_of(checkpoint: train.Checkpoint) -> dict[str, bytes]:
    """A checkpoint's files by name."""
    with checkpoint.as_directory() as folder:
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _save_checkpoint(step: int, files: Mapping[str, bytes]) -> None:
    """Store a checkpoint through Ray Train; every rank has to call."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(folder) if files else None)


def _scaling(config: FinetuneConfig, ranks: int) -> train.ScalingConfig:
    # No more ranks than there is room for now: Ray Train counts all CPUs of a node, also those in use, and would wait
    # for ever.
    elastic = config.min_ranks is not None and config.min_ranks < ranks
    return train.ScalingConfig(
        num_workers=(config.min_ranks, ranks) if elastic else ranks,
        use_gpu=config.device == "cuda",
        resources_per_worker=_resources(config),
    )


def _resources(config: FinetuneConfig) -> dict[str, float]:
    return {"CPU": config.cpus_per_rank, **({"GPU": 1.0} if config.device == "cuda" else {})}


def check_room(config: FinetuneConfig) -> int:
    """Refuse at once ranks that could never be placed; return how many ranks can be.

    Raises:
        PlacementError: the ranks that a job needs ask for more than the cluster has free.
    """
    free, needed = ray.available_resources(), config.min_ranks or config.ranks
    placed = config.ranks
    for kind, share in _resources(config).items():
        room = int(free.get(kind, 0.0) / share + 1e-9)
        if room < needed:
            names = ", ".join(rank_name(index) for index in range(room, needed))
            raise PlacementError(
                f"Ray has no room for {names}: each asks for {share:g} {kind}, and {free.get(kind, 0.0):g} are free.",
                cure="Lower finetune.ranks or finetune.cpus_per_rank, or add nodes.",
            )
        placed = min(placed, room)
    return placed


def training_error(error: train.TrainingFailedError, job: str) -> FedvitError:
    """The error of fedvit that a rank raised, or a PlacementError with the last line of the cause."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, FedvitError):
            return cause
    reason = getattr(error, "controller_failure", None) or next(iter(failures.values()), error)
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return PlacementError(
        f"The ranks of {job} failed: {lines[-1]}",
        cure="The checkpoints stay: the same command continues from the last one. See the Ray dashboard.",
    )

"""``fedvit finetune`` from beginning to end: checks of the input, then Ray, ledger and ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import ray

from actors.connection import connect
from actors.handles import accountant_handle
from actors.spawn import spawn_accountant
from actors.trainer import absolute_paths, run_ranks
from fedvit.atomic_write import write_atomically
from fedvit.clients.workload import check_no_workload
from fedvit.config import Settings
from fedvit.data.records import ImageSource
from fedvit.data.sources import open_source
from fedvit.errors import StateError
from fedvit.finetune.checkpoint import Checkpoint
from fedvit.finetune.job import Outcome, Plan, plan_of, with_noise
from fedvit.models.build import build_model
from fedvit.models.export import check_export
from fedvit.models.trainable import trainable_weights
from fedvit.ports import FinetuneReport
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.store.locks import system_lock
from fedvit.store.store import Store
from fedvit.wire.tensors import encode_weights

WEIGHTS = "weights.safetensors"


def finetune(settings: Settings, on_step: Callable[[str], None]) -> FinetuneReport:
    """See :class:`fedvit.ports.SystemPort`. All clients of the state folder's ledger are charged.

    Raises:
        StateError: a system runs on the state folder, or the folder belongs to other data.
        ConfigError, DataError, ModelError, PlacementError: see :func:`fedvit.finetune.job.plan_of` and
            :func:`actors.trainer.run_ranks`.
    """
    started_s = time.monotonic()
    check_no_workload(settings, "Fine-tuning")
    on_step("Checking the data, the model and the state")
    settings = with_noise(absolute_paths(settings))
    source = open_source(settings.data)
    model = build_model(settings.model, len(source.classes), settings.data.image_size)
    variants, log = settings.release.variants, settings.home / "logs" / "export.log"
    check_export(model, variants, settings.data.image_size, log)
    plan = plan_of(settings, source, trainable_weights(model))
    with ExitStack() as stack:
        stack.enter_context(system_lock(settings.home))
        _check_folder(settings.home, plan, source)
        on_step("Starting Ray")
        stack.callback(ray.shutdown)
        connect(settings, {"RAY_USAGE_STATS_ENABLED": "0"})
        accountant = spawn_accountant(settings)
        on_step(f"Training {plan.job} on {settings.finetune.ranks} ranks")
        outcome, files = run_ranks(settings, plan.job)
        spent = accountant_handle(accountant).budget().epsilon_spent
    weights = settings.home / "finetune" / plan.job / WEIGHTS if files else None
    if weights is not None:
        write_atomically(weights, encode_weights(Checkpoint.from_files(files, plan.digest).weights))
    return _report(settings, plan, outcome, spent, weights, time.monotonic() - started_s)


def _check_folder(home: Path, plan: Plan, source: ImageSource) -> None:
    with Store.open(home) as store:
        bound = store.metadata.fleet()
    if bound is not None and bound.data_digest != plan.task.data_digest:
        raise StateError(
            f"The state folder {home} belongs to data {bound.data_digest[:12]}, and {source.name} is "
            f"{plan.task.data_digest[:12]}.",
            cure="Name another folder with --home: a ledger is about one data set.",
        )


def _report(
    settings: Settings, plan: Plan, outcome: Outcome, spent: float, weights: Path | None, seconds: float
) -> FinetuneReport:
    shown = outcome.evaluation
    assert shown is not None, "rank 0 evaluates"
    event = PoissonGaussian(plan.task.noise_multiplier, plan.task.sampling_prob)
    delta = settings.privacy.target_delta
    return FinetuneReport(
        job=plan.job,
        steps=outcome.steps,
        steps_total=settings.finetune.steps,
        ranks=outcome.ranks,
        device=outcome.device,
        images_per_s=outcome.images_per_s,
        accuracy=shown.accuracy,
        loss=shown.loss,
        recall_by_class=shown.recall_by_class,
        noise_multiplier=plan.task.noise_multiplier,
        epsilon=epsilon_pld({event: outcome.steps}, delta),
        epsilon_spent=spent,
        target_delta=delta,
        seconds=seconds,
        weights=None if weights is None else str(weights),
        stopped=None if outcome.error is None else str(outcome.error),
    )

"""Measurement of a trained system: every test image through every inference target, and the report of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console, Group
from rich.progress import Progress

from fedvit.api.transport import json_of
from fedvit.config import Settings
from fedvit.data.manifest import build_manifest
from fedvit.data.partition import VirtualFleet
from fedvit.errors import ConflictError, NotFoundError
from fedvit.evaluation.server_model import ServerModel
from fedvit.ports import SystemUrls
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.registry.publisher import why_no_release
from fedvit.store.store import Store
from fedvit.tools.report.details import Origin, spread_rows
from fedvit.tools.report.misclassified import PAGE, write_misclassified
from fedvit.tools.report.page import write_page
from fedvit.tools.report.probe import ProbeResult, Target, probe, summarise
from fedvit.tools.report.summary import build_summary, summary_tables, write_summary
from fedvit.types import Evaluation, LabelArray, ModelVersion
from fedvit.wire.images import sendable_image
from fedvit.wire.tensors import decode_weights

SWITCH_TIMEOUT_S = 60.0
MAX_WEIGHTS_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class _Reference:
    """The released version, evaluated with torch."""

    version: ModelVersion
    evaluation: Evaluation
    predictions: LabelArray


def measure(
    settings: Settings,
    urls: SystemUrls,
    seconds: dict[str, float],
    *,
    run_id: str | None,
    quiet: bool,
    token: str | None = None,
) -> dict[str, Any]:
    """Probe the inference application and the edges with every test image and write the report.

    Writes ``report/summary.json``, ``report/index.html`` and ``report/misclassified.html`` in the state folder and
    prints the summary as a table.

    Args:
        run_id: the run that is reported; the current release has to be of it. None admits any.
        seconds: the duration of each phase so far; that of the measurement is added.
        token: the bearer token of the inference application, if it demands one.

    Raises:
        NotFoundError: nothing is released, or a target does not serve the current release in time.
        ConflictError: the current release is of another run; the report stays as it is.
        FedvitError: a target fails to answer.
    """
    started_s = time.monotonic()
    store = Store.open(settings.home)
    version = _released(store, run_id)
    source = VirtualFleet.open(settings.data).source
    reference = _reference(settings, store, version)
    images = [sendable_image(source.read(record), settings.data.image_size) for record in source.test]
    labels = [record.label for record in source.test]
    results = _probe_all(_targets(settings, urls, token), images, reference.version.version, quiet)
    seconds["measuring"] = time.monotonic() - started_s
    manifest, page = build_manifest(source), settings.home / "report" / "index.html"
    summary = build_summary(
        evaluation=reference.evaluation,
        budget=PrivacyAccountant(store, settings).budget(),
        run=store.runs.get(reference.version.run_id),
        model_version=reference.version.version,
        manifest=manifest,
        targets={name: summarise(r, labels, reference.predictions.tolist()) for name, r in results.items()},
        seconds=seconds,
    )
    write_summary(page.with_name("summary.json"), summary)
    wrong = write_misclassified(page.with_name(PAGE), source, reference.predictions, reference.version.version)
    write_page(
        page,
        summary,
        curve=store.rounds.of_run(reference.version.run_id),
        confusion=reference.evaluation.confusion,
        latencies={name: result.latencies_s for name, result in results.items()},
        manifest=manifest,
        target_epsilon=settings.privacy.target_epsilon,
        origin=Origin.of(settings),
        spread=spread_rows(store.clients.all(active=True), store.rounds.participation()),
        misclassified=wrong,
    )
    if not quiet:
        Console().print(Group(*summary_tables(summary)))
        # On one line, to be copied.
        Console().print(f"Report: {page}", soft_wrap=True, markup=False, highlight=False)
    return summary


def _targets(settings: Settings, urls: SystemUrls, token: str | None) -> dict[str, Target]:
    # The token is valid for the control API and the inference application on its port, not for edges.
    inference = Target(urls.inference, token, settings.access.tls_cert)
    return {"inference": inference} | {f"edge-{i}": Target(url) for i, url in enumerate(urls.edges, start=1)}


def _released(store: Store, run_id: str | None) -> ModelVersion:
    release = store.releases.current()
    if release is None:
        message, cure = why_no_release(store)
        raise NotFoundError(message, cure=cure)
    version = store.versions.get(release.version)
    if run_id not in (None, version.run_id):
        raise _of_another_run(store, str(run_id), version)
    return version


def _reference(settings: Settings, store: Store, version: ModelVersion) -> _Reference:
    weights = decode_weights(store.blobs.get(version.weights_digest), max_bytes=MAX_WEIGHTS_BYTES)
    model = ServerModel(settings)
    return _Reference(version, model.evaluate(weights), model.predict(weights))


def _of_another_run(store: Store, run_id: str, current: ModelVersion) -> ConflictError:
    run, last = store.runs.get(run_id), store.versions.latest(run_id)
    ended = f"{run_id} is {run.status.replace('_', ' ')} after {run.rounds_done} of {run.rounds_total} rounds"
    reason = f": {run.reason}" if run.reason else "."
    refused = f" Its version {last.version} was refused: {last.refusal}" if last and last.refusal else ""
    return ConflictError(
        f"{ended}{reason}{refused} The current release, {current.version}, is of {current.run_id}, so there is nothing "
        "new to report.",
        cure=f"`fedvit model list` shows the versions; the report of {current.run_id} is left as it was.",
    )


def _probe_all(targets: Mapping[str, Target], images: list[bytes], version: str, quiet: bool) -> dict[str, ProbeResult]:
    results = {}
    with Progress(disable=quiet) as bar:
        for name, target in targets.items():
            _await_version(name, target, version)
            task = bar.add_task(f"querying {name}", total=len(images))
            results[name] = probe(target, images, on_image=partial(bar.advance, task))
    return results


def _await_version(name: str, target: Target, version: str) -> None:
    """Wait until a target serves the version: replicas and vehicles poll for new releases."""
    deadline_s = time.monotonic() + SWITCH_TIMEOUT_S
    health: dict[str, Any] = {}
    serves = None
    while time.monotonic() < deadline_s:
        health = json_of(target.health("/health/detailed", timeout_s=10))
        serves = (health.get("model") or {}).get("version")
        if serves == version:
            return
        time.sleep(0.2)
    why = f" Its last error: {health['last_error']}" if health.get("last_error") else ""
    raise NotFoundError(
        f"{name} does not serve {version} after {SWITCH_TIMEOUT_S:g} s; it serves {serves or 'no model'}.{why}",
        cure="See its log with `make logs`.",
    )

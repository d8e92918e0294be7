"""Checks of ports, the TLS key, data and model before a system starts."""

from __future__ import annotations

import hashlib
import json
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedvit.config import Settings
from fedvit.errors import ConfigError
from fedvit.processes import check_port_free, why_taken
from fedvit.types import Client

PORT_FREE_S = 20.0
IMAGE_SIZE = "image_size"
"""Key of the state's metadata: the size of the images that its models are trained with. It is part of no run."""


def check_ports(settings: Settings, *, joins: bool = False) -> None:
    """Make sure that every port can be listened on.

    Args:
        joins: a running cluster is joined, whose Serve may hold ``serving.port`` already.

    Raises:
        PortInUseError: one is taken; it and its setting are named.
    """
    ports = [("edge.ports", settings.edge.host, port) for port in settings.edge.ports]
    if not joins:
        ports.insert(0, ("serving.port", settings.serving.host, settings.serving.port))
    for key, host, port in ports:
        check_port_free(host, port, key)


def await_free_ports(settings: Settings) -> None:
    """Wait for at most :data:`PORT_FREE_S` until every port is free."""
    serving, edge = settings.serving, settings.edge
    places = [(serving.host, serving.port), *((edge.host, port) for port in edge.ports)]
    deadline_s = time.monotonic() + PORT_FREE_S
    while any(why_taken(*place) for place in places) and time.monotonic() < deadline_s:
        time.sleep(0.05)


def check_tls_key(settings: Settings) -> None:
    """Refuse a TLS key that every user of this machine can read; it is not this program's to change.

    Raises:
        ConfigError: it is one, or cannot be found.
    """
    path = settings.access.tls_key
    if path is None:
        return
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"'access.tls_key' {path} cannot be read: {error.strerror}.") from None
    if mode & stat.S_IRWXO:
        raise ConfigError(
            f"Every user can read 'access.tls_key' {path} (mode {mode:04o}).", cure=f"Run `chmod o-rwx {path}`."
        )


def check_budget(settings: Settings) -> None:
    """Refuse a budget below what the state folder has spent: no round could be trained, and no report could be true.

    Raises:
        ConfigError: ``privacy.target_epsilon`` is such a budget, and no operator has granted another one since.
        StateError: the ledger cannot be read with these settings.
    """
    from fedvit.privacy.accountant import PrivacyAccountant
    from fedvit.store.store import Store

    if not (settings.home / "state.db").exists():
        return
    with Store.open(settings.home) as store:
        budget = PrivacyAccountant(store, settings).budget()
    if budget.epsilon_spent > budget.target_epsilon:
        raise ConfigError(
            f"'privacy.target_epsilon' is {budget.target_epsilon:g}, and {settings.home} has spent "
            f"{budget.epsilon_spent:.4f} already at delta {budget.target_delta:g}.",
            cure="Set it to the budget that this fleet was promised, or name another folder with --home.",
        )


def check_secure_aggregation(settings: Settings) -> None:
    """Refuse settings of secure aggregation that are for simulations; raises ConfigError, which names the setting."""
    from fedvit.rounds.secure_sums import check_masks

    check_masks(settings)


def check_training(settings: Settings, on_step: Callable[[str], None]) -> Callable[[], None]:
    """Check the data, the clients and the model; return what writes the result into the state.

    Args:
        on_step: receives how many files of the data set are left out, if there are any.

    Raises:
        ConfigError: the size of the images is not that of the models in the state folder.
        DataError: an image cannot be read, or the data is of no use.
        ModelError: the model cannot be built, trained or exported.
        WorkloadError: the workload cannot be trained for one step.
    """
    from fedvit.data.manifest import build_manifest
    from fedvit.data.partition import VirtualFleet
    from fedvit.data.records import check_images
    from fedvit.data.skipped import skipped_files
    from fedvit.store.store import Store

    if settings.workload.clients_class is not None:
        return _check_workload(settings)
    fleet = VirtualFleet.open(settings.data)
    if skipped := sum(each.files for each in skipped_files(fleet.source)):
        on_step(f"{skipped} files are left out; `fedvit data inspect` lists them")
    manifest = build_manifest(fleet.source)
    known = trained = trained_size = None
    if (settings.home / "state.db").exists():
        with Store.open(settings.home) as store:
            known, trained = store.metadata.fleet(), store.runs.latest()
            trained_size = store.metadata.get(IMAGE_SIZE)
    if trained_size not in (None, settings.data.image_size):
        raise ConfigError(
            f"'data.image_size' is {settings.data.image_size}, and the models in {settings.home} were trained with "
            f"{trained_size}.",
            cure=f"Set it to {trained_size}, or name another folder with --home.",
        )
    if known is None:
        # Every image once, so that a broken one is named now and not in the middle of a round.
        check_images(fleet.source, (*fleet.source.train, *fleet.source.test), settings.data.image_size)
        fleet.check_disjoint()
    if trained is None or trained.config.get("model") != settings.training_identity()["model"]:
        _check_model(settings, len(manifest.classes))
    if _begins_a_run(settings):
        from fedvit.rounds.preflight import check_vision

        check_vision(settings, fleet)
    partition = {**settings.data.partition.model_dump(mode="json"), "digest": fleet.parts_digest()}

    def write() -> None:
        _write(settings, manifest.digest, partition, manifest.classes, fleet.clients())
        with Store.open(settings.home) as store:
            store.metadata.set(IMAGE_SIZE, settings.data.image_size)

    return write


def _begins_a_run(settings: Settings) -> bool:
    """Whether no round was trained yet with these settings."""
    from fedvit.rounds.steering import run_identity, run_request
    from fedvit.store.store import Store

    if not (settings.home / "state.db").exists():
        return True
    with Store.open(settings.home) as store:
        run = store.runs.latest()
        digest = run_identity(settings, run_request(store))[1]
        return run is None or run.config_digest != digest or run.rounds_done == 0


def _check_workload(settings: Settings) -> Callable[[], None]:
    """Build the workload once, so that a fault of it is named now; return what registers its clients."""
    from fedvit.clients.workload import client_host, load_workload

    client_host(settings)
    if _begins_a_run(settings):
        from fedvit.rounds.preflight import check_workload

        check_workload(settings)
    named = json.dumps(settings.workload.model_dump(mode="json"), sort_keys=True)
    digest = hashlib.sha256(named.encode()).hexdigest()
    return lambda: _write(settings, digest, {}, (), load_workload(settings).registered())


def _write(
    settings: Settings, digest: str, partition: Mapping[str, Any], classes: Sequence[str], clients: Iterable[Client]
) -> None:
    """Bind the state folder to the data and register the clients; the caller holds the system's lock."""
    from fedvit.atomic_write import remove_drafts
    from fedvit.rounds.steering import begin_in_initial_mode
    from fedvit.store.store import Store

    remove_drafts(settings.home / "blobs")
    with Store.open(settings.home) as store:
        store.metadata.bind_fleet(data_digest=digest, partition=partition, classes=classes)
        store.clients.register(clients, complete=True)
        begin_in_initial_mode(store, settings)


def _check_model(settings: Settings, num_classes: int) -> None:
    """Build the model, export it and run the result: what cannot be released is refused before it is trained."""
    # torch and timm are imported here, after everything that can be said without them.
    from fedvit.models.build import build_model
    from fedvit.models.export import check_export

    image_size, log = settings.data.image_size, settings.home / "logs" / "export.log"
    check_export(build_model(settings.model, num_classes, image_size), settings.release.variants, image_size, log)

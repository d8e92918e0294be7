"""``fedvit health-check | logs | diagnostics | backup | restore | config | data``: checks, state and settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer import Argument, Option

from fedvit.cli.api_session import control_client
from fedvit.cli.options import SYSTEM, Options, local_command
from fedvit.cli.output import console, print_json, show_fields, show_lines, show_text
from fedvit.cli.state import local_actor, named_edges, required_system, trusted_certificate
from fedvit.cli.system import system_facts
from fedvit.errors import FedvitError, IntegrityError, NoModelError, NotFoundError
from fedvit.processes import ray_log_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from fedvit.config import Settings

config = typer.Typer(help="The settings.", no_args_is_help=True)
data = typer.Typer(help="The data set and its partition over clients.", no_args_is_help=True)
PACKAGES = ("fedvit", "ray", "torch", "timm", "opacus", "onnxruntime", "dp-accounting", "sqlalchemy", "fastapi")
# With more of them, the table of `fedvit data inspect` would be wider than a terminal, or longer than what is read.
MOST_CLASSES, MOST_CLIENTS = 8, 50


@local_command()
def health_check(options: Options) -> None:
    """Check every part of the running system; status 1 unless all are well, or wait for the first release."""
    settings = options.settings()
    urls = required_system(settings.home).urls
    certificate = trusted_certificate(settings)
    control, waiting = _check_control(urls.control, settings)
    verdicts = {"control": control}
    for name, url in {"inference": urls.inference, **named_edges(urls)}.items():
        verdicts[name] = _check(url, certificate, waiting)
    if options.as_json:
        print_json(verdicts)
    else:
        for name, verdict in verdicts.items():
            colour = "green" if verdict == "ok" else "yellow" if verdict == waiting else "red"
            console.print(f"[bold]{name:<10}[/] [{colour}]{escape(verdict)}[/]", soft_wrap=True)
    if any(verdict not in ("ok", waiting) for verdict in verdicts.values()):
        raise typer.Exit(1)


def _check_control(url: str, settings: Settings) -> tuple[str, str | None]:
    """The verdict on the control API, and what its replicas and edges wait for, if they do."""
    from fedvit.registry.publisher import waiting_for_release

    try:
        with control_client(url, settings) as client:
            health = client.system.health()
    except FedvitError as error:
        return str(error), None
    training = health.training
    if health.release is None and training is not None and training.status == "running":
        return health.status, waiting_for_release(training.rounds_done, training.rounds_total)
    return health.status, None


def _check(url: str, certificate: Path | None, waiting: str | None) -> str:
    """The verdict on a target; ``waiting`` if it has no model because nothing is released yet."""
    import httpx

    from fedvit.api.transport import json_of
    from fedvit.tools.report.probe import Target

    try:
        response = Target(url, ca_file=certificate).health("/health", timeout_s=10)
        document = json_of(response)
        status = document.get("status", "")
        if waiting is not None and str(document.get("type", "")).endswith(f"/{NoModelError.code}"):
            return waiting
    except (httpx.HTTPError, IntegrityError) as error:
        return f"no answer: {error}"
    except (ValueError, AttributeError):
        status = ""
    return "ok" if response.is_success and status in ("ok", "") else f"{response.status_code} {status}".strip()


@local_command()
def backup(
    options: Options,
    folder: Annotated[Path, Argument(help="Where to write the backup.")] = Path("."),
    include_keys: Annotated[
        bool, Option("--include-keys", help="Put root key, signing key and backup key into the backup, too.")
    ] = False,
    no_encryption: Annotated[
        bool, Option("--no-encryption", help="Write a backup that everybody who gets it can read.")
    ] = False,
) -> None:
    """Write one consistent, encrypted and signed backup of the state; the system may go on training meanwhile.

    It is encrypted to `backup.recipients`, with the passphrase in `backup.passphrase_file`, or, where neither is set,
    to the key keys/backup.key of the state folder. Keep a copy of the folder keys on another machine: a restore on a
    new machine needs it.
    """
    from fedvit.store.backup import write_backup

    settings = options.settings()
    result = write_backup(settings.home, folder, settings.backup, include_keys=include_keys, encrypt=not no_encryption)
    show_text(f"{result.archive}  sha256 {result.sha256}", asdict(result), options.as_json)
    if options.as_json:
        return
    if result.key_file is not None:
        _warn(
            f"Only {result.key_file} opens this backup. Keep a copy of the folder {result.key_file.parent} on another "
            "machine."
        )
    elif not result.encrypted:
        _warn("This backup is not encrypted: it holds models, clients, tokens' hashes and the privacy ledger.")


@local_command()
def restore(
    options: Options,
    archive: Annotated[Path, Argument(help="A backup of `fedvit backup`.")],
    nothing_since: Annotated[
        bool, Option("--nothing-since", help="Confirm that nothing was released after the backup.")
    ] = False,
    key: Annotated[
        Path | None, Option("--key", help="File with the age key that opens it (default: keys/backup.key of --home).")
    ] = None,
    passphrase_file: Annotated[
        Path | None, Option("--passphrase-file", help="File with the passphrase (default: backup.passphrase_file).")
    ] = None,
    verify_key: Annotated[
        list[str] | None,
        Option("--verify-key", help="Public key of the system that signed it: a file or the text (repeatable)."),
    ] = None,
    new_keys: Annotated[
        bool, Option("--new-keys", help="Go on without the keys of the system, where they are lost.")
    ] = False,
) -> None:
    """Go back to a backup, once it is verified; what was spent since stays spent. The present state is kept aside.

    Root key and signing key of the system have to be in keys of the state folder, or in the backup. With --new-keys an
    unfinished run is ended, and vehicles refuse releases until they are given the new public key.
    """
    from fedvit.store.backup_keys import RestoreKeys
    from fedvit.store.restore import restore_backup

    settings = options.settings()
    keys = RestoreKeys(key, passphrase_file or settings.backup.passphrase_file, _public_keys(verify_key or []))
    result = restore_backup(
        settings.home, archive, actor=local_actor(), keys=keys, new_keys=new_keys, nothing_since=nothing_since
    )
    text = (
        f"{settings.home} is restored: {result.ledger_lines} ledger lines, {result.carried_lines} of them newer than "
        "the backup."
    )
    text += f" What was there is in {result.aside}." if result.aside else ""
    show_text(text, asdict(result), options.as_json)
    if options.as_json:
        return
    if result.frozen:
        _warn(
            f"The privacy ledger is frozen: {result.frozen.reason} Lift the freeze with `fedvit privacy unfreeze`, or "
            "grant a new budget."
        )
    if result.new_keys:
        _warn("The keys are new: give vehicles the new public key (`fedvit model export`). The last run was ended.")


def _public_keys(texts: list[str]) -> tuple[Ed25519PublicKey, ...]:
    """Public keys, each the text itself or a file that holds it."""
    from fedvit.wire.manifest import parse_public_key

    return tuple(parse_public_key(Path(text).read_text() if Path(text).is_file() else text) for text in texts)


def _warn(text: str) -> None:
    console.print(f"[yellow]Note:[/] {escape(text)}", highlight=False, soft_wrap=True)


@local_command()
def diagnostics(options: Options) -> None:
    """Versions, machine, state, disk and the last lines of the logs, for a support request."""
    settings = options.settings()
    disk = shutil.disk_usage(settings.home if settings.home.exists() else Path.cwd())
    facts: dict[str, Any] = {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": disk.free,
        "home": str(settings.home.resolve()),
        "status": system_facts(settings),
        "logs": {path.name: path.read_text(errors="replace").splitlines()[-20:] for path in _log_files(settings)},
    }
    if options.as_json:
        print_json(facts)
        return
    logs = facts.pop("logs")
    versions = [{"package": name, "version": version} for name, version in facts["versions"].items()]
    sizes = {
        key.removesuffix("_bytes"): f"{facts.pop(key) / 1e9:.1f} GB" for key in ("memory_bytes", "disk_free_bytes")
    }
    show_fields({**facts, **sizes, "versions": versions})
    for name, lines in logs.items():
        show_lines(f"last lines of {name}", lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _log_files(settings: Settings) -> list[Path]:
    return [*sorted((settings.home / "logs").glob("*.log")), *ray_log_files(settings.home)]


@local_command(options=("home", "config"))
def logs(
    options: Options, follow: Annotated[bool, Option("--follow", "-f", help="Go on as lines arrive.")] = False
) -> None:
    """Show the logs of the supervisor, the edges, and Ray's actors and replicas: those of the system on --home."""
    files = _log_files(options.settings())
    if not files:
        raise NotFoundError("There are no logs yet.", cure="Start the system: `fedvit up`.")
    command = ["tail", "-n", "50", *(["-F"] if follow else []), *map(str, files)]
    raise typer.Exit(subprocess.call(command))


@local_command(config, "show", options=SYSTEM)
def show_settings(options: Options) -> None:
    """Every setting as ``fedvit up`` would use it now: defaults, then the file, then the environment, then options."""
    import yaml

    settings = options.settings().model_dump(mode="json")
    if options.as_json:
        print_json(settings)
    else:
        # YAML, so that it can be saved and given to --config.
        typer.echo(yaml.safe_dump(settings, sort_keys=False), nl=False)


@local_command(data, "inspect", options=SYSTEM)
def inspect_data(options: Options) -> None:
    """Classes, sizes, clients, label skew, duplicates, skipped files and the content hash of the configured data set.

    Duplicates are images whose files are equal: of the test images with training images, and among training images.
    Classes at risk have so few training images that the noise of a run with these settings may hide them.
    """
    from fedvit.clients.workload import check_no_workload
    from fedvit.data.manifest import inspect
    from fedvit.data.noise_risk import classes_at_risk
    from fedvit.data.partition import VirtualFleet

    settings = options.settings()
    check_no_workload(settings, "`fedvit data inspect`")
    fleet = VirtualFleet.open(settings.data)
    facts = inspect(fleet.source, tuple(fleet.parts.values()))
    facts["classes_at_risk"] = [asdict(each) for each in classes_at_risk(settings, fleet)]
    if options.as_json:
        print_json(facts)
    else:
        show_fields(_data_fields(facts, tuple(fleet.parts)))


def _data_fields(facts: dict[str, Any], clients: Sequence[str]) -> dict[str, Any]:
    """What :func:`inspect_data` prints for people: counts as tables, those of the clients where a table can show them.

    Args:
        clients: the identifiers of the clients, in the order of ``facts["clients"]["class_counts"]``.
    """
    classes, counts = facts["classes"], facts["clients"].pop("class_counts")
    rows = [{"class": name, "train": facts["train"][name], "test": facts["test"][name]} for name in classes]
    spread = {f"{key}_per_client" if key != "count" else "clients": each for key, each in facts["clients"].items()}
    own = ("classes", "train", "test", "clients")
    fields = {**{key: each for key, each in facts.items() if key not in own}, **spread, "images_of_each_class": rows}
    if len(classes) > MOST_CLASSES or len(clients) > MOST_CLIENTS:
        return {**fields, "images_of_each_client": "shown by --json, because there are many"}
    names = zip(clients, counts, strict=True)
    return {
        **fields,
        "images_of_each_client": [{"client": c, **dict(zip(classes, row, strict=True))} for c, row in names],
    }

"""``fedvit health-check | logs | diagnostics | backup | restore | config | data``: checks, state and settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from fedvit.cli.api_session import control_client
from fedvit.cli.options import SYSTEM, Options, local_command
from fedvit.cli.output import console, print_facts, print_json, show_text
from fedvit.cli.state import local_actor, named_edges, required_system, trusted_certificate
from fedvit.cli.system import system_facts
from fedvit.errors import FedvitError, NotFoundError

if TYPE_CHECKING:
    from fedvit.config import Settings

config = typer.Typer(help="The settings.", no_args_is_help=True)
data = typer.Typer(help="The data set and its partition over clients.", no_args_is_help=True)
PACKAGES = ("fedvit", "ray", "torch", "timm", "opacus", "onnxruntime", "dp-accounting", "sqlalchemy", "fastapi")


@local_command()
def health_check(options: Options) -> None:
    """Check every part of the running system; status 1 unless all are well."""
    settings = options.settings()
    urls = required_system(settings.home).urls
    certificate = trusted_certificate(settings)
    verdicts = {"control": _check_control(urls.control, settings)}
    for name, url in {"inference": urls.inference, **named_edges(urls)}.items():
        verdicts[name] = _check(f"{url}/health", certificate)
    if options.as_json:
        print_json(verdicts)
    else:
        for name, verdict in verdicts.items():
            colour = "green" if verdict == "ok" else "red"
            console.print(f"[bold]{name:<10}[/] [{colour}]{escape(verdict)}[/]")
    if any(verdict != "ok" for verdict in verdicts.values()):
        raise typer.Exit(1)


def _check_control(url: str, settings: Settings) -> str:
    try:
        with control_client(url, settings) as client:
            return client.system.health().status
    except FedvitError as error:
        return str(error)


def _check(url: str, certificate: Path | None) -> str:
    import httpx

    from fedvit.tools.report.probe import Target

    try:
        with Target(url, ca_file=certificate).client(timeout_s=10) as http:
            response = http.get(url)
    except httpx.HTTPError as error:
        return f"no answer: {error}"
    status = response.json().get("status", "") if response.headers.get("content-type", "").endswith("json") else ""
    return "ok" if response.is_success and status in ("ok", "") else f"{response.status_code} {status}".strip()


@local_command()
def backup(options: Options, folder: Annotated[Path, Argument(help="Where to write the archive.")] = Path(".")) -> None:
    """Write one consistent, checksummed archive of the state; the system may go on training meanwhile."""
    from fedvit.store.backup import write_backup

    archive, digest = write_backup(options.settings().home, folder)
    show_text(f"{archive}  sha256 {digest}", {"archive": str(archive), "sha256": digest}, options.as_json)


@local_command()
def restore(
    options: Options,
    archive: Annotated[Path, Argument(help="An archive of `fedvit backup`.")],
    nothing_since: Annotated[
        bool, Option("--nothing-since", help="Confirm that nothing was released after the backup.")
    ] = False,
) -> None:
    """Go back to a backup, once it is verified; what was spent since stays spent. The present state is kept aside."""
    from fedvit.store.restore import restore_backup

    folder = options.settings().home
    result = restore_backup(folder, archive, actor=local_actor(), nothing_since=nothing_since)
    text = (
        f"{folder} is restored: {result.ledger_lines} ledger lines, {result.carried_lines} of them newer than the "
        "backup."
    )
    text += f" What was there is in {result.aside}." if result.aside else ""
    show_text(text, asdict(result), options.as_json)
    if result.frozen and not options.as_json:
        console.print(
            f"[yellow]The privacy ledger is frozen:[/] {escape(result.frozen.reason)} Lift the freeze with `fedvit "
            "privacy unfreeze`, or grant a new budget.",
            highlight=False,
            soft_wrap=True,
        )


@local_command()
def diagnostics(options: Options) -> None:
    """Versions, machine, state, disk and the last lines of the logs, for a support request."""
    settings = options.settings()
    disk = shutil.disk_usage(settings.home if settings.home.exists() else Path.cwd())
    facts = {
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
    print_facts(facts, options.as_json)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _log_files(settings: Settings) -> list[Path]:
    return sorted((settings.home / "logs").glob("*.log"))


@local_command(options=("home", "config"))
def logs(
    options: Options, follow: Annotated[bool, Option("--follow", "-f", help="Go on as lines arrive.")] = False
) -> None:
    """Show the logs of the supervisor, the edges, and Ray's actors and replicas."""
    files = _log_files(options.settings())
    ray_logs = Path("/tmp/ray/session_latest/logs")  # noqa: S108 - Ray's own fixed place
    if ray_logs.exists():
        files += sorted(ray_logs.glob("worker-*fedvit*.err")) + sorted((ray_logs / "serve").glob("replica_*.log"))
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


@local_command(data, "inspect", options=("config", "data", "assignments", "as_json"))
def inspect_data(options: Options) -> None:
    """Classes, sizes, clients, label skew, duplicates and the content hash of the configured data set."""
    from fedvit.data.manifest import inspect
    from fedvit.data.partition import VirtualFleet

    fleet = VirtualFleet.open(options.settings().data)
    print_facts(inspect(fleet.source, tuple(fleet.parts.values())), options.as_json)

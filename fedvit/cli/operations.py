"""The operator's commands behind ``make health-check | emergency-backup | diagnostics | logs``."""

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

from fedvit.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    console,
    explained,
    print_json,
    running_system,
    settings_from,
    trusted_certificate,
)
from fedvit.cli.control import control_client
from fedvit.cli.facts import facts_of
from fedvit.errors import FedvitError, NotFoundError, StateError

if TYPE_CHECKING:
    from fedvit.config import Settings

PACKAGES = ("fedvit", "ray", "torch", "timm", "opacus", "onnxruntime", "dp-accounting", "sqlalchemy", "fastapi")


def health_check(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Ask every part of the running system how it is; status 1 unless all are well."""
    with explained(as_json):
        settings = settings_from(config, home)
        running = running_system(settings.home)
        if running is None:
            raise StateError(f"Nothing runs on {settings.home}.", cure="Start it with `fedvit up`.")
        urls = running.urls
        targets = {"inference": urls.inference} | {f"edge-{i}": url for i, url in enumerate(urls.edges, start=1)}
        verdicts = {"control": _ask_control(urls.control, settings)}
        certificate = trusted_certificate(settings)
        verdicts |= {name: _ask(f"{url}/health", certificate) for name, url in targets.items()}
        if as_json:
            print_json(verdicts)
        else:
            for name, verdict in verdicts.items():
                colour = "green" if verdict == "ok" else "red"
                console.print(f"[bold]{name:<10}[/] [{colour}]{escape(verdict)}[/]")
        if any(verdict != "ok" for verdict in verdicts.values()):
            raise typer.Exit(1)


def _ask_control(url: str, settings: Settings) -> str:
    try:
        with control_client(url, settings) as client:
            return client.system.health().status
    except FedvitError as error:
        return str(error)


def _ask(url: str, certificate: Path | None) -> str:
    import httpx

    from fedvit.tools.report.probe import Target

    try:
        with Target(url, ca_file=certificate).client(timeout_s=10) as http:
            response = http.get(url)
    except httpx.HTTPError as error:
        return f"no answer: {error}"
    told = response.json().get("status", "") if response.headers.get("content-type", "").endswith("json") else ""
    return "ok" if response.is_success and told in ("ok", "") else f"{response.status_code} {told}".strip()


def backup(
    folder: Annotated[Path, typer.Argument(help="Where to write the archive.")] = Path("."),
    home: HomeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one consistent, checksummed archive of the state; the system may go on training meanwhile."""
    with explained(as_json):
        from fedvit.store.backup import write_backup

        archive, digest = write_backup(settings_from(config, home).home, folder)
        if as_json:
            print_json({"archive": str(archive), "sha256": digest})
        else:
            console.print(f"{archive}  sha256 {digest}", soft_wrap=True)


def restore(
    archive: Annotated[Path, typer.Argument(help="What `fedvit backup` wrote.")],
    nothing_since: Annotated[
        bool, typer.Option("--nothing-since", help="Answer for it that nothing was released after the backup.")
    ] = False,
    home: HomeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go back to a backup, once it is verified; what was spent since stays spent. The present state is kept aside."""
    with explained(as_json):
        from fedvit.cli.state import local_actor
        from fedvit.store.restore import restore_backup

        folder = settings_from(config, home).home
        done = restore_backup(folder, archive, actor=local_actor(), nothing_since=nothing_since)
        if as_json:
            print_json(asdict(done))
            return
        kept = f" What was there is in {done.aside}." if done.aside else ""
        console.print(
            f"{folder} is restored: {done.ledger_lines} ledger lines, {done.carried_lines} of them newer than the "
            f"backup.{kept}",
            highlight=False,
            soft_wrap=True,
        )
        if done.frozen:
            console.print(
                f"[yellow]The privacy ledger is frozen:[/] {escape(done.frozen.reason)} Answer for it with `fedvit "
                "privacy unfreeze`, or grant a new budget.",
                highlight=False,
                soft_wrap=True,
            )


def diagnostics(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """What somebody who helps from afar asks first: versions, machine, state, disk, the logs' last lines."""
    with explained(as_json):
        facts = _diagnose(settings_from(config, home))
        if as_json:
            print_json(facts)
        else:
            console.print_json(data=facts, default=str)


def _diagnose(settings: Settings) -> dict[str, Any]:
    disk = shutil.disk_usage(settings.home if settings.home.exists() else Path.cwd())
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": disk.free,
        "home": str(settings.home.resolve()),
        "status": facts_of(settings),
        "logs": {path.name: _tail(path) for path in _log_files(settings)},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _log_files(settings: Settings) -> list[Path]:
    return sorted((settings.home / "logs").glob("*.log"))


def _tail(path: Path, lines: int = 20) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:]


def logs(
    home: HomeOption = None,
    config: ConfigOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines arrive.")] = False,
) -> None:
    """Show the logs of the supervisor and the edges, and where Ray keeps those of actors and replicas."""
    with explained():
        files = _log_files(settings_from(config, home))
        ray_logs = Path("/tmp/ray/session_latest/logs")  # noqa: S108 - Ray's own fixed place
        if ray_logs.exists():
            files += sorted(ray_logs.glob("worker-*fedvit*.err")) + sorted((ray_logs / "serve").glob("replica_*.log"))
        if not files:
            raise NotFoundError("There are no logs yet.", cure="Start the system: `fedvit up`.")
        command = ["tail", "-n", "50", *(["-F"] if follow else []), *map(str, files)]
        raise typer.Exit(subprocess.call(command))

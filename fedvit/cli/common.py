"""What the commands share: settings from options, the running system, output, and errors as one sentence."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedvit.errors import ConfigError, FedvitError

if TYPE_CHECKING:
    from fedvit.config import Settings
    from fedvit.ports import SystemPort, SystemUrls

console = Console()
errors = Console(stderr=True)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file of settings.", envvar="FEDVIT_CONFIG")
]
HomeOption = Annotated[Path | None, typer.Option("--home", help="State folder (default: FEDVIT_HOME, or ./var).")]
DataOption = Annotated[Path | None, typer.Option("--data", help="The data set: a folder, a zip or a wheel.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting: --set training.rounds=5 (repeatable).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="A control API elsewhere (default: FEDVIT_URL, or the system of --home)."),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show the present state and the request; send nothing that changes anything.")
]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Return at once instead of waiting for the end.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at most.")]
OffsetOption = Annotated[int, typer.Option("--offset", min=0, help="How many to leave out first.")]
IfMatchOption = Annotated[
    int | None, typer.Option("--if-match", min=0, help="Only if this is still the revision that holds.")
]


def settings_from(
    config: Path | None, home: Path | None = None, data: Path | None = None, assignments: list[str] | None = None
) -> Settings:
    """Settings from a command's options.

    Raises:
        ConfigError: see :func:`fedvit.settings.load_settings`.
    """
    # Imported here: `fedvit --help` need not pay for it.
    from fedvit.settings import load_settings

    overrides: dict[str, Any] = {}
    for assignment in assignments or []:
        _assign(overrides, assignment)
    if home is not None:
        overrides["home"] = home
    if data is not None:
        overrides.setdefault("data", {})["path"] = data.absolute()
    return load_settings(config, overrides=overrides)


def _assign(tree: dict[str, Any], assignment: str) -> None:
    import yaml

    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment!r} has no value.", cure="Write --set section.key=value.")
    *sections, key = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = yaml.safe_load(text)


def find_system(settings: Settings) -> SystemPort:
    """The installed implementation of a running system.

    Raises:
        ConfigError: only the library or the edge runtime is installed.
    """
    found = list(entry_points(group="fedvit.system"))
    try:
        return found[0].load()(settings)  # type: ignore[no-any-return]
    except (IndexError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"This installation cannot run a whole system ({error}).", cure="Install fedvit[server,edge]."
        ) from None


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """A system that somebody left running, as its announcement tells."""

    pid: int
    urls: SystemUrls


def running_system(home: Path) -> RunningSystem | None:
    """The system that runs on this state folder, or None."""
    from fedvit.ports import SystemUrls

    if not _is_locked(home / "system.lock"):
        return None
    try:
        told = json.loads((home / "run" / "system.json").read_text())
        pid = int(told.pop("pid"))
    except (OSError, ValueError, KeyError):
        return None
    return RunningSystem(pid, SystemUrls(**{**told, "edges": tuple(told["edges"])}))


def trusted_certificate(settings: Settings) -> Path | None:
    """The certificate (PEM) of the system on this state folder: what it tells of itself, or its settings."""
    running = running_system(settings.home)
    told = running.urls.ca_file if running else None
    return settings.access.tls_cert if told is None else Path(told)


def _is_locked(path: Path) -> bool:
    """Whether a living process holds the lock; unlike a process id, it cannot outlive its holder."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


@contextmanager
def explained(as_json: bool = False) -> Iterator[None]:
    """Turn an error that fedvit understands into its sentence and its exit status; no stack trace."""
    try:
        yield
    except FedvitError as error:
        if as_json:
            print_json({"error": error.code, "message": error.message, "cure": error.cure})
        # A message may hold square brackets of its own.
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_status) from None

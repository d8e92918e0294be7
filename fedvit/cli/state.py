"""A state folder on the command line: the system that runs on it, its store, and its audit trail."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvit.errors import ConfigError, ConflictError, StateError

if TYPE_CHECKING:
    from fedvit.cli.options import Options
    from fedvit.config import Settings
    from fedvit.ports import SystemPort, SystemUrls
    from fedvit.store.store import Store


def find_system(settings: Settings) -> SystemPort:
    """The installed implementation of a system; ConfigError where only the library or the edge runtime is installed."""
    try:
        return next(iter(entry_points(group="fedvit.system"))).load()(settings)  # type: ignore[no-any-return]
    except (StopIteration, ModuleNotFoundError) as error:
        raise ConfigError(
            f"This installation cannot run a whole system ({error}).", cure="Install fedvit[server,edge]."
        ) from None


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """The process, the addresses and the settings of a system that runs, as it wrote them into its state folder."""

    pid: int
    urls: SystemUrls
    settings: Mapping[str, Any]


def running_system(home: Path) -> RunningSystem | None:
    """The system that runs on this state folder, or None."""
    from fedvit.ports import SystemUrls

    if not _is_locked(home / "system.lock"):
        return None
    try:
        facts = json.loads((home / "run" / "system.json").read_text())
        pid, settings = int(facts.pop("pid")), facts.pop("settings", {})
    except (OSError, ValueError, KeyError):
        return None
    return RunningSystem(pid, SystemUrls(**{**facts, "edges": tuple(facts["edges"])}), settings)


def settings_in_force(options: Options) -> Settings:
    """The settings of the system that runs on --home, or else those of the options.

    Raises:
        ConflictError: a system runs there, and the options name other settings, which it would not follow.
    """
    settings = options.settings()
    running = running_system(settings.home)
    if running is None or not running.settings:
        return settings
    if options.config is not None or options.data is not None or options.assignments:
        named, there = _flat(settings.model_dump(mode="json")), _flat(running.settings)
        changes = [
            f"{key} is {there.get(key)!r} there and {value!r} here"
            for key, value in named.items()
            if key != "home" and value != there.get(key)
        ]
        if changes:
            more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise ConflictError(
                f"The system on {settings.home} runs with other settings: {'; '.join(changes[:3])}{more}.",
                cure="Stop it with `fedvit down`, then repeat the command; or leave the settings out to use its own.",
            )
    from fedvit.settings import settings_from_json

    return settings_from_json(json.dumps(running.settings))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested settings by ``section.key``."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        values |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return values


def required_system(home: Path, cure: str = "Start it with `fedvit up`.") -> RunningSystem:
    """The system that runs on this state folder; StateError where none runs."""
    running = running_system(home)
    if running is None:
        raise StateError(f"Nothing runs on {home}.", cure=cure)
    return running


def named_edges(urls: SystemUrls) -> dict[str, str]:
    """The addresses of the edges, as edge-1, edge-2, ..."""
    return {f"edge-{number}": url for number, url in enumerate(urls.edges, start=1)}


def trusted_certificate(settings: Settings) -> Path | None:
    """The certificate (PEM) of the system on this state folder: the one it announced, or that of the settings."""
    running = running_system(settings.home)
    announced = running.urls.ca_file if running else None
    return settings.access.tls_cert if announced is None else Path(announced)


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


def open_existing_store(settings: Settings) -> Store:
    """The store of a state folder that exists, else StateError; reading must not make one."""
    if not (settings.home / "state.db").exists():
        raise StateError(
            f"There is no fedvit state at {settings.home}.", cure="Run `fedvit run`, or name the folder with --home."
        )
    from fedvit.store.store import Store

    return Store.open(settings.home)


def local_actor() -> str:
    """The user of this machine's command line, for the audit trail."""
    try:
        return f"local:{getpass.getuser()}"
    except (KeyError, OSError):  # In a container the user may have no name.
        return f"local:{os.getuid()}"


def audit_local(store: Store, action: str, params: Mapping[str, Any]) -> None:
    """Write one change that was made on the command line to the audit trail; ``action`` begins with ``CLI``."""
    from fedvit.store.records import AuditFacts

    origin: dict[str, Any] = {"actor": local_actor(), "scopes": (), "source": "local", "request_id": "cli"}
    store.audit.append(AuditFacts(**origin, action=action, params=params, before=None, after=None, status=200))

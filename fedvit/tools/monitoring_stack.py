"""Prometheus and Alertmanager beside a system: their configuration from the checkout's, and both as one command.

Both listen on loopback. Where the control API demands tokens they get their own, which are good while they run.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from fedvit.access.identity import Scope
from fedvit.access.tokens import temporary_token
from fedvit.config import Settings
from fedvit.errors import ConfigError, PlacementError
from fedvit.metrics.alert_rules import RULES, read_groups, scrape_interval_s, shortened
from fedvit.metrics.targets import FOLDER, SERVER, Target, targets_file, write_targets
from fedvit.processes import check_port_free, end_child, end_with_parent
from fedvit.store.store import Store

LOOPBACK = "127.0.0.1"
READY_S = 30.0
LOOK_S = 0.2
WEBHOOK = "/api/incidents/alerts"
SCRAPER, NOTIFIER = "prometheus of this system", "alertmanager of this system"
ALERTMANAGERS = ("prometheus-alertmanager", "alertmanager")


@dataclass(frozen=True, slots=True)
class Watchers:
    """How Prometheus and Alertmanager are run; ``factor`` times as fast as in service."""

    factor: float = 1.0
    prometheus_port: int = 9090
    alertmanager_port: int = 9093
    configs: Path = RULES.parent

    @property
    def prometheus(self) -> str:
        """Where Prometheus listens, host:port."""
        return f"{LOOPBACK}:{self.prometheus_port}"

    @property
    def alertmanager(self) -> str:
        """Where Alertmanager listens, host:port."""
        return f"{LOOPBACK}:{self.alertmanager_port}"


@contextmanager
def watching(settings: Settings, watchers: Watchers) -> Iterator[Callable[[], None]]:
    """Run both; what is yielded returns never, and raises when one of them ends by itself.

    Raises:
        ConfigError: a program is missing, or there is no configuration in this folder.
        PortInUseError: a port is taken.
        PlacementError: one of them did not start, or ended; its log says why.
    """
    programs = _program("prometheus"), _program(*ALERTMANAGERS)
    for port in (watchers.prometheus_port, watchers.alertmanager_port):
        check_port_free(LOOPBACK, port)
    with ExitStack() as stack:
        scraper, notifier = stack.enter_context(watcher_tokens(settings))
        folder = write_configs(settings, watchers, scraper, notifier)
        children = [
            _Child.start(stack, settings, "alertmanager", _alertmanager(programs[1], folder, watchers)),
            _Child.start(stack, settings, "prometheus", _prometheus(programs[0], folder, watchers)),
        ]
        for child, address in zip(children, (watchers.alertmanager, watchers.prometheus), strict=True):
            child.await_ready(f"http://{address}/-/ready")
        yield lambda: _attend(children)


def write_configs(
    settings: Settings, watchers: Watchers, scraper_token: Path | None, notifier_token: Path | None
) -> Path:
    """Write ``prometheus.yml``, ``rules.yml`` and ``alertmanager.yml`` into the state folder; return where.

    Raises:
        ConfigError: the checkout's cannot be read.
    """
    folder = (settings.home / "monitoring").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    groups = shortened(read_groups(watchers.configs / "rules"), watchers.factor)
    _write(folder / "rules.yml", {"groups": groups})
    _write(folder / "prometheus.yml", prometheus_config(settings, watchers, folder, scraper_token))
    _write(folder / "alertmanager.yml", alertmanager_config(settings, watchers, notifier_token))
    if not targets_file(settings.home, SERVER).exists():
        # Before its first start, too, a server that is not there is down.
        write_targets(settings.home, SERVER, [server_target(settings)])
    return folder


def server_target(settings: Settings) -> Target:
    """The control API, as Prometheus is to reach it."""
    serving, secure = settings.serving, settings.access.tls_cert is not None
    return Target(f"{serving.host}:{serving.port}", {"__scheme__": "https"} if secure else {})


def prometheus_config(settings: Settings, watchers: Watchers, folder: Path, token: Path | None) -> dict[str, Any]:
    """The checkout's ``prometheus.yml`` for this state folder."""
    config = _read(watchers.configs / "prometheus.yml")
    interval = f"{round(scrape_interval_s(watchers.factor) * 1000)}ms"
    config["global"] |= dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), interval)
    config["rule_files"] = [str(folder / "rules.yml")]
    config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [watchers.alertmanager]}]
    own = {"prometheus": watchers.prometheus, "alertmanager": watchers.alertmanager}
    for job in config["scrape_configs"]:
        for found in job.get("file_sd_configs", ()):
            found["files"] = [str((settings.home / FOLDER).resolve() / Path(name).name) for name in found["files"]]
        if job["job_name"] in own:
            job["static_configs"] = [{"targets": [own[job["job_name"]]]}]
        if job["job_name"] == "fed-server":
            job |= _access(settings, token)
    return config


def alertmanager_config(settings: Settings, watchers: Watchers, token: Path | None) -> dict[str, Any]:
    """The checkout's ``alertmanager.yml`` for this system."""
    config = _read(watchers.configs / "alertmanager.yml")
    route = config["route"]
    for wait in ("group_wait", "group_interval"):
        route[wait] = f"{max(1, round(int(route[wait].removesuffix('s')) / watchers.factor))}s"
    target = server_target(settings)
    for hook in (hook for receiver in config["receivers"] for hook in receiver.get("webhook_configs", ())):
        hook["url"] = f"{target.labels.get('__scheme__', 'http')}://{target.address}{WEBHOOK}"
        if access := _access(settings, token):
            hook["http_config"] = access
    return config


@contextmanager
def watcher_tokens(settings: Settings) -> Iterator[tuple[Path | None, Path | None]]:
    """Files with a token to scrape with and one to tell alerts with; None each where no token is demanded."""
    if settings.access.mode != "tokens":
        yield None, None
        return
    folder = (settings.home / "monitoring").resolve()
    scraper, notifier = folder / "scraper.token", folder / "notifier.token"
    with (
        Store.open(settings.home) as store,
        temporary_token(store, SCRAPER, Scope.VIEWER, scraper),
        temporary_token(store, NOTIFIER, Scope.ALERTS, notifier),
    ):
        yield scraper, notifier


def _access(settings: Settings, token: Path | None) -> dict[str, Any]:
    certificate = settings.access.tls_cert
    secure = {"tls_config": {"ca_file": str(certificate.resolve())}} if certificate else {}
    return secure | ({"authorization": {"credentials_file": str(token)}} if token else {})


@dataclass(frozen=True, slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, stack: ExitStack, settings: Settings, name: str, command: list[str]) -> _Child:
        log = settings.home / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # A group of its own: Ctrl-C reaches it through us.
            process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_parent
            )
        stack.callback(end_child, process)
        return cls(name, process, log)

    def check(self) -> None:
        if self.process.poll() is not None:
            raise PlacementError(f"{self.name} ended with status {self.process.returncode}.", cure=f"See {self.log}.")

    def await_ready(self, url: str) -> None:
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s:
            self.check()
            try:
                if httpx.get(url, timeout=1.0, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(LOOK_S)
        raise PlacementError(f"{self.name} is not ready after {READY_S:g} s.", cure=f"See {self.log}.")


def _attend(children: list[_Child]) -> None:
    while True:
        for child in children:
            child.check()
        time.sleep(LOOK_S)


def _program(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise ConfigError(f"{names[0]} is missing.", cure="apt-get install prometheus prometheus-alertmanager")
    return found


def _prometheus(program: str, folder: Path, watchers: Watchers) -> list[str]:
    return [
        *(program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'series'}"),
        *(f"--web.listen-address={watchers.prometheus}", f"--web.external-url=http://{watchers.prometheus}"),
        "--log.level=warn",
    ]


def _alertmanager(program: str, folder: Path, watchers: Watchers) -> list[str]:
    return [
        *(program, f"--config.file={folder / 'alertmanager.yml'}", f"--storage.path={folder / 'alertmanager'}"),
        *(f"--web.listen-address={watchers.alertmanager}", f"--web.external-url=http://{watchers.alertmanager}"),
        # Alone: else it would listen for others of its kind on every address.
        *("--cluster.listen-address=", "--log.level=warn"),
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", cure="Run it in the checkout's folder.") from None
    return config


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=120))

"""Prometheus and Alertmanager of a system, configured from the files of the checkout.

Both listen on loopback. If the control API demands tokens, they get tokens that are valid while they run.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from fedvit.access.identity import Scope
from fedvit.access.tokens import temporary_token
from fedvit.api.transport import exchange, open_http
from fedvit.config import Settings
from fedvit.errors import ConfigError, PlacementError
from fedvit.metrics.alert_rules import RULES, read_groups, scrape_interval_s, shortened
from fedvit.metrics.targets import FOLDER, SERVER, Target, targets_file, write_targets
from fedvit.processes import check_port_free, end_child, end_with_parent
from fedvit.store.store import Store

LOOPBACK = "127.0.0.1"
READY_S = 30.0
POLL_S = 0.2
MAX_ANSWER_BYTES = 64 * 1024
WEBHOOK = "/api/incidents/alerts"
SCRAPER, NOTIFIER = "prometheus of this system", "alertmanager of this system"
ALERTMANAGERS = ("prometheus-alertmanager", "alertmanager")


@dataclass(frozen=True, slots=True)
class MonitoringStack:
    """Ports and configuration of Prometheus and Alertmanager; they run ``factor`` times as fast as in service."""

    factor: float = 1.0
    prometheus_port: int = 9090
    alertmanager_port: int = 9093
    configs: Path = RULES.parent

    @property
    def prometheus(self) -> str:
        """The address of Prometheus, host:port."""
        return f"{LOOPBACK}:{self.prometheus_port}"

    @property
    def alertmanager(self) -> str:
        """The address of Alertmanager, host:port."""
        return f"{LOOPBACK}:{self.alertmanager_port}"


@contextmanager
def run_monitoring(settings: Settings, stack: MonitoringStack) -> Iterator[Callable[[], None]]:
    """Run both programs; yield a function that waits until one of them ends, and then raises.

    Raises:
        ConfigError: a program is missing, or this folder has no configuration.
        PortInUseError: a port is taken.
        PlacementError: a program did not start, or ended; see its log.
    """
    prometheus, alertmanager = _program("prometheus"), _program(*ALERTMANAGERS)
    for port in (stack.prometheus_port, stack.alertmanager_port):
        check_port_free(LOOPBACK, port)
    with ExitStack() as exits:
        scraper, notifier = exits.enter_context(monitoring_tokens(settings))
        folder = write_configs(settings, stack, scraper, notifier)
        # Without clustering: otherwise Alertmanager would listen for peers on every address.
        options = f"--storage.path={folder / 'alertmanager'}", "--cluster.listen-address="
        commands = {
            "alertmanager": _command(alertmanager, folder / "alertmanager.yml", stack.alertmanager, *options),
            "prometheus": _command(
                prometheus, folder / "prometheus.yml", stack.prometheus, f"--storage.tsdb.path={folder / 'series'}"
            ),
        }
        children = [_Child.start(exits, settings, name, command) for name, command in commands.items()]
        for child, address in zip(children, (stack.alertmanager, stack.prometheus), strict=True):
            child.await_ready(f"http://{address}/-/ready")
        yield lambda: _wait_for_end(children)


def write_configs(
    settings: Settings, stack: MonitoringStack, scraper_token: Path | None, notifier_token: Path | None
) -> Path:
    """Write ``prometheus.yml``, ``rules.yml`` and ``alertmanager.yml`` into the state folder; return its path.

    Raises:
        ConfigError: a file of the checkout cannot be read.
    """
    folder = (settings.home / "monitoring").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    groups = shortened(read_groups(stack.configs / "rules"), stack.factor)
    _write(folder / "rules.yml", {"groups": groups})
    _write(folder / "prometheus.yml", prometheus_config(settings, stack, folder, scraper_token))
    _write(folder / "alertmanager.yml", alertmanager_config(settings, stack, notifier_token))
    if not targets_file(settings.home, SERVER).exists():
        # So that a server that was never started is reported as down.
        write_targets(settings.home, SERVER, [server_target(settings)])
    return folder


def server_target(settings: Settings) -> Target:
    """The scrape target of the control API."""
    serving, secure = settings.serving, settings.access.tls_cert is not None
    return Target(f"{serving.host}:{serving.port}", {"__scheme__": "https"} if secure else {})


def prometheus_config(settings: Settings, stack: MonitoringStack, folder: Path, token: Path | None) -> dict[str, Any]:
    """The checkout's ``prometheus.yml`` for this state folder."""
    config = _read(stack.configs / "prometheus.yml")
    interval = f"{round(scrape_interval_s(stack.factor) * 1000)}ms"
    config["global"] |= dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), interval)
    config["rule_files"] = [str(folder / "rules.yml")]
    config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [stack.alertmanager]}]
    own = {"prometheus": stack.prometheus, "alertmanager": stack.alertmanager}
    for job in config["scrape_configs"]:
        for files in job.get("file_sd_configs", ()):
            files["files"] = [str((settings.home / FOLDER).resolve() / Path(name).name) for name in files["files"]]
        if job["job_name"] in own:
            job["static_configs"] = [{"targets": [own[job["job_name"]]]}]
        if job["job_name"] == "fed-server":
            job |= _access(settings, token)
    return config


def alertmanager_config(settings: Settings, stack: MonitoringStack, token: Path | None) -> dict[str, Any]:
    """The checkout's ``alertmanager.yml`` for this system."""
    config = _read(stack.configs / "alertmanager.yml")
    route = config["route"]
    for wait in ("group_wait", "group_interval"):
        route[wait] = f"{max(1, round(int(route[wait].removesuffix('s')) / stack.factor))}s"
    target = server_target(settings)
    for hook in (hook for receiver in config["receivers"] for hook in receiver.get("webhook_configs", ())):
        hook["url"] = f"{target.labels.get('__scheme__', 'http')}://{target.address}{WEBHOOK}"
        if access := _access(settings, token):
            hook["http_config"] = access
    return config


@contextmanager
def monitoring_tokens(settings: Settings) -> Iterator[tuple[Path | None, Path | None]]:
    """Files with a token for scraping and one for sending alerts; None each if no token is demanded."""
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
            # A session of its own, so that Ctrl-C reaches only this process.
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
        with open_http(url, timeout_s=1.0) as http:
            while time.monotonic() < deadline_s:
                self.check()
                with suppress(httpx.HTTPError):
                    request = http.build_request("GET", url)
                    if exchange(http, request, max_bytes=MAX_ANSWER_BYTES, deadline_s=1.0).is_success:
                        return
                time.sleep(POLL_S)
        raise PlacementError(f"{self.name} is not ready after {READY_S:g} s.", cure=f"See {self.log}.")


def _wait_for_end(children: list[_Child]) -> None:
    while True:
        for child in children:
            child.check()
        time.sleep(POLL_S)


def _program(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise ConfigError(f"{names[0]} is missing.", cure="apt-get install prometheus prometheus-alertmanager")


def _command(program: str, config: Path, address: str, *options: str) -> list[str]:
    listen = f"--web.listen-address={address}", f"--web.external-url=http://{address}"
    return [program, f"--config.file={config}", *listen, "--log.level=warn", *options]


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", cure="Run it in the checkout's folder.") from None
    return config


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=120))

"""A system under drill: started on the real ports, operated by commands in bash, and read through its API."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from fedvit.config import DataConfig, Settings
from fedvit.data.sources import open_source
from fedvit.errors import DrillError
from fedvit.processes import check_port_free
from fedvit.settings import load_settings

CONTROL = "http://127.0.0.1:8000"
EDGES = ("http://127.0.0.1:8081", "http://127.0.0.1:8082")
INFERENCE = (*EDGES, f"{CONTROL}/inference")
PROMETHEUS = "http://127.0.0.1:9090"
SYSTEM_PORTS = (8000, 8081, 8082, 8083, 8084, 8085)
MONITORING_PORTS = (9090, 9093)
TIMEOUT_S = 180.0
COMMAND_S = 240.0
STOP_S = 30.0
POLL_S = 0.1

# Little work in a round and much noise: a drill tests commands, not accuracy.
SETTINGS = {
    "FEDVIT_DATA__PARTITION__CLIENTS": "12",
    "FEDVIT_DATA__PARTITION__SCHEME": "iid",
    "FEDVIT_TRAINING__ROUNDS": "1000",
    "FEDVIT_PRIVACY__NOISE_MULTIPLIER": "100",
    "FEDVIT_RELEASE__EVERY_ROUNDS": "10",
    "FEDVIT_RELEASE__MAX_ACCURACY_DROP": "1",
    "FEDVIT_RELEASE__MIN_EXPORT_AGREEMENT": "0.5",
    "FEDVIT_RELEASE__MIN_CANARY_AGREEMENT": "0.5",
    "FEDVIT_RAY__DASHBOARD": "false",
}
_CALL = re.compile(r"^#http (\d{3}) (\S+) (\S+)$", re.MULTILINE)
_REMOVED_VARIABLES = ("FEDVIT_", "RAY_", "PROMETHEUS_", "MONITORING_", "MAKE", "MFLAGS")


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request that a command made."""

    status: int
    method: str
    url: str


@dataclass(frozen=True, slots=True)
class CommandResult:
    """Exit status, output and HTTP calls of a command."""

    command: str
    exit_status: int
    out: str
    err: str
    calls: tuple[Call, ...]

    def describe(self) -> str:
        """Command, exit status, calls and output, for the message of a failure."""
        calls = "".join(f"\n  {call.method} {call.url} -> {call.status}" for call in self.calls)
        return f"\n$ {self.command}\nexit status {self.exit_status}{calls}\n{self.out[-3000:]}\n{self.err[-2000:]}"

    def json(self) -> Any:
        """The one JSON document of its output."""
        return json.loads(self.out)

    def checked(self) -> CommandResult:
        """This result, if the command and all of its calls succeeded.

        Raises:
            DrillError: it failed; the message contains its output.
        """
        if self.exit_status or not all(200 <= call.status < 300 for call in self.calls):
            raise DrillError(f"A command failed.{self.describe()}")
        return self


def wait_until(what: str, condition: Callable[[], Any], within_s: float = TIMEOUT_S) -> Any:
    """Call ``condition`` repeatedly and return its first true value.

    Raises:
        DrillError: there is none in time; the message contains the last value.
    """
    deadline_s = time.monotonic() + within_s
    last: Any = None
    while time.monotonic() < deadline_s:
        try:
            last = condition()
        except (httpx.HTTPError, ValueError, KeyError) as error:
            last = error
        else:
            if last:
                return last
        time.sleep(POLL_S)
    raise DrillError(f"{what}: not within {within_s:g} s; at last: {last!r}")


@dataclass
class DrillSystem:
    """A system whose ``checkout`` is a temporary folder of links to the repository at ``root``.

    Attributes:
        settings: environment variables in addition to :data:`SETTINGS`.
        tokens: API tokens by scope.
        memory: values that later steps compare with.
    """

    checkout: Path
    root: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    _monitoring: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        """Fill the folder with links, so that commands write nothing into the repository."""
        self.checkout.mkdir(parents=True)
        for entry in self.root.iterdir():
            if not entry.name.startswith((".git", "var", "fedvit-backup")):
                (self.checkout / entry.name).symlink_to(entry)
        shims = self.checkout.with_name("shims")
        shims.mkdir()
        # This curl adds status, method and URL of each request to standard error.
        curl = shims / "curl"
        note = r"%{stderr}\n#http %{http_code} %{method} %{url_effective}\n"
        curl.write_text(f"#!/bin/sh\nexec {shutil.which('curl')} -w '{note}' \"$@\"\n")
        curl.chmod(0o755)
        outer = {k: v for k, v in os.environ.items() if not k.startswith(_REMOVED_VARIABLES)}
        path = os.pathsep.join(
            (str(shims), str(self.root / ".venv" / "bin"), str(Path(sys.executable).parent), outer["PATH"])
        )
        own = {"PATH": path, "PYTHONPATH": str(self.root), "COLUMNS": "200"}
        self.environment = {**outer, **SETTINGS, **self.settings, **own}

    @property
    def home(self) -> Path:
        """The state folder."""
        return self.checkout / "var"

    def read_settings(self) -> Settings:
        """The settings of the system."""
        return load_settings(environ=self.environment, overrides={"home": self.home})

    # --- commands ----------------------------------------------------------------------------------------------------

    def run(self, command: str, *, endless: bool = False, within_s: float = COMMAND_S) -> CommandResult:
        """Run ``command`` in bash; an ``endless`` one is ended with Ctrl-C after its first output.

        A command that takes longer than ``within_s`` is killed.
        """
        # Into files: a process left in the background would keep a pipe open.
        files = [self.checkout.with_name(name) for name in ("stdout", "stderr")]
        with files[0].open("wb") as out, files[1].open("wb") as err:
            process = subprocess.Popen(
                ["bash", "-o", "pipefail", "-c", command],
                cwd=self.checkout,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                if endless:
                    wait_until("its first line", lambda: files[0].stat().st_size or process.poll() is not None)
                    os.killpg(process.pid, signal.SIGINT)
                process.wait(within_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output, errors = (file.read_text(errors="replace") for file in files)
        calls = tuple(Call(int(status), method, url) for status, method, url in _CALL.findall(errors))
        return CommandResult(command, process.returncode, output, errors, calls)

    def fedvit(self, *words: str) -> Any:
        """The JSON of a ``fedvit`` command.

        Raises:
            DrillError: it failed.
        """
        return self.run(" ".join(("fedvit", *words, "--json"))).checked().json()

    # --- API ---------------------------------------------------------------------------------------------------------

    def request(self, path: str, method: str = "GET", scope: str | None = None, **options: Any) -> httpx.Response:
        """The response of the control API."""
        headers = {"Authorization": f"Bearer {self.tokens[scope]}"} if scope else {}
        return httpx.request(method, CONTROL + path, headers=headers, timeout=60, **options)

    def get(self, path: str, scope: str | None = None) -> Any:
        """The JSON of a successful GET.

        Raises:
            DrillError: the response has another status.
        """
        return self._json(path, "GET", scope)

    def post(self, path: str, scope: str | None = None, **body: Any) -> Any:
        """The JSON of a successful POST; see :meth:`get`."""
        return self._json(path, "POST", scope, json=body)

    def _json(self, path: str, method: str, scope: str | None, **options: Any) -> Any:
        response = self.request(path, method, scope, **options)
        if not response.is_success:
            url, text = response.request.url, response.text[:1000]
            raise DrillError(f"{method} {url} answered {response.status_code}: {text}")
        return response.json()

    def client(self, client_id: str) -> dict[str, Any]:
        """A client as the API shows it."""
        clients = self.get("/api/clients/status?limit=1000")["clients"]
        return next(client for client in clients if client["client_id"] == client_id)

    def operation(self, started: CommandResult) -> dict[str, Any]:
        """The operation that a command started, after it has succeeded.

        Raises:
            DrillError: it failed, or did not end in time.
        """
        name = started.json()["operation_id"]

        def ended() -> Any:
            current = self.get(f"/api/operations/{name}")
            return current if current["status"] in ("succeeded", "failed", "cancelled") else None

        operation: dict[str, Any] = wait_until(f"operation {name} ends", ended)
        if operation["status"] != "succeeded":
            raise DrillError(f"Operation {name} did not succeed: {operation}")
        return operation

    def wait_for_training(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """Wait until the training status meets the condition, and return the status."""

        def current() -> Any:
            response = self.request("/api/training/status")
            status = response.json()
            return status if response.is_success and condition(status) else None

        status: dict[str, Any] = wait_until(what, current)
        return status

    def wait_for_rest(self) -> None:
        """Wait until no round is under way and none will begin."""
        self.wait_for_training(lambda now: now["phase"] in ("resting", "idle"), "training rests")

    def rounds_done(self) -> int:
        """How many rounds of the current run are committed."""
        return int(self.get("/api/training/status")["rounds_done"])

    def wait_for_rounds(self, done: int, what: str) -> None:
        """Wait until more than ``done`` rounds of the current run are committed."""
        self.wait_for_training(lambda now: now["rounds_done"] > done, what)

    def wait_until_served(self, version: str, variant: str) -> None:
        """Wait until both edges and the replicas serve a version."""
        for base in INFERENCE:
            wait_until(f"{base} serves {version} {variant}", partial(_serves, base, version, variant))

    def request_inferences(self) -> None:
        """Request an inference of both edges and the replicas, so that there is a latency to measure."""
        image = sample_image()
        for base in INFERENCE:
            wait_until(f"{base} answers", partial(_infers, base, image))

    def wait_for_scrape(self) -> None:
        """Request inferences, and wait until Prometheus has scraped their latencies and the loss."""
        self.request_inferences()
        names = "fed_vit_autorl_(training_loss|inference_duration_seconds_count)"
        wait_until("Prometheus has scraped", lambda: query(f'count({{__name__=~"{names}"}}) >= 4'))

    # --- start and stop ----------------------------------------------------------------------------------------------

    def start(self, factor: float = 1.0) -> None:
        """Start the system and, if installed, Prometheus; return after the first release.

        Args:
            factor: how many times as fast as in service Prometheus scrapes and evaluates.

        Raises:
            PortInUseError: a port of the system is taken; the runbook prints these ports, so no others can be used.
            DrillError: it does not start.
        """
        for port in (*SYSTEM_PORTS, *(MONITORING_PORTS if self.has("prometheus") else ())):
            check_port_free("127.0.0.1", port)
        self.run("make up").checked()
        if self.has("prometheus"):
            with self.checkout.with_name("prometheus.log").open("wb") as log:
                self._monitoring = subprocess.Popen(
                    ["make", "monitoring"],
                    cwd=self.checkout,
                    env={**self.environment, "MONITORING_FACTOR": f"{factor:g}"},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        wait_until("the first release", lambda: self.request("/api/model/current").is_success)

    def stop(self) -> None:
        """End everything that was started, also after a failure."""
        self.run("make down")
        self.end_restarted_edges()
        if self._monitoring is not None:
            os.killpg(self._monitoring.pid, signal.SIGTERM)
            self._monitoring.wait(STOP_S)
            self._monitoring = None

    def end_restarted_edges(self) -> None:
        """End the edges that a drill restarted: ``make down`` does not end them."""
        for file in (self.home / "run").glob("edge-*.pid"):
            self.run(f"kill {file.read_text().strip()}")
            file.unlink()

    def has(self, program: str) -> bool:
        """Whether the program is on the system's ``PATH``."""
        return shutil.which(program, path=self.environment["PATH"]) is not None


def sample_image() -> bytes:
    """An encoded test image of the default data set."""
    source = open_source(DataConfig())
    return source.read(source.test[0])


def accepts_connections(url: str) -> bool:
    """Whether a server accepts connections at the URL."""
    try:
        httpx.get(url, timeout=10)
    except httpx.TransportError:
        return False
    return True


def responds(url: str) -> bool:
    """Whether a GET succeeds."""
    return httpx.get(url, timeout=10).is_success


def _infers(base: str, image: bytes) -> bool:
    return httpx.post(f"{base}/infer", content=image, timeout=30).is_success


def query(expression: str) -> list[dict[str, Any]]:
    """The instant vector of a PromQL expression.

    Raises:
        httpx.HTTPError: Prometheus does not respond, or not successfully.
    """
    response = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}, timeout=10, trust_env=False)
    vector: list[dict[str, Any]] = response.raise_for_status().json()["data"]["result"]
    return vector


def _serves(base: str, version: str, variant: str) -> bool:
    model = httpx.get(f"{base}/health/detailed", timeout=10).json()["model"] or {}
    # Training may have released a later version in the meantime.
    return model.get("variant") == variant and _numbers(model["version"]) >= _numbers(version)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]

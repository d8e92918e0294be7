"""A real system on the real ports, and an operator who types commands into bash and looks at what they did."""

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
PROMETHEUS = "http://127.0.0.1:9090"
SYSTEM_PORTS = (8000, 8081, 8082, 8083, 8084, 8085)
MONITORING_PORTS = (9090, 9093)
PATIENCE_S = 180.0
COMMAND_S = 240.0
STOP_S = 30.0
LOOK_S = 0.1

# Little work a round, and noise whose random walk leads nowhere: it is about commands, not about accuracy.
SETTINGS = {
    "FEDVIT_DATA__PARTITION__CLIENTS": "12",
    "FEDVIT_DATA__PARTITION__SCHEME": "iid",
    "FEDVIT_TRAINING__ROUNDS": "1000",
    "FEDVIT_PRIVACY__NOISE_MULTIPLIER": "100",
    "FEDVIT_RELEASE__EVERY_ROUNDS": "10",
    "FEDVIT_RELEASE__MAX_ACCURACY_DROP": "1",
    "FEDVIT_RELEASE__MIN_AGREEMENT": "0.5",
    "FEDVIT_RELEASE__MIN_CANARY_AGREEMENT": "0.5",
    "FEDVIT_RAY__DASHBOARD": "false",
}
_CALL = re.compile(r"^#http (\d{3}) (\S+) (\S+)$", re.MULTILINE)
_OTHERS = ("FEDVIT_", "RAY_", "PROMETHEUS_", "MONITORING_", "MAKE", "MFLAGS")


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request that a command made."""

    status: int
    method: str
    url: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did, as the operator sees it."""

    command: str
    exit_status: int
    out: str
    err: str
    calls: tuple[Call, ...]

    def told(self) -> str:
        """All of it, for a failure's message."""
        calls = "".join(f"\n  {call.method} {call.url} -> {call.status}" for call in self.calls)
        return f"\n$ {self.command}\nexit status {self.exit_status}{calls}\n{self.out[-3000:]}\n{self.err[-2000:]}"

    def json(self) -> Any:
        """The one JSON document that it printed."""
        return json.loads(self.out)

    @property
    def went_well(self) -> bool:
        """It ended well, and every request of it was answered well."""
        return self.exit_status == 0 and all(200 <= call.status < 300 for call in self.calls)

    def checked(self) -> Outcome:
        """Itself.

        Raises:
            DrillError: it did not go well; everything that it said is in the message.
        """
        if not self.went_well:
            raise DrillError(f"A command failed.{self.told()}")
        return self


def await_that(what: str, ask: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """The first true answer; it asks again and again.

    Raises:
        DrillError: there is none in time; the last answer is shown.
    """
    deadline_s = time.monotonic() + within_s
    last: Any = None
    while time.monotonic() < deadline_s:
        try:
            last = ask()
        except (httpx.HTTPError, ValueError, KeyError) as error:
            last = error
        else:
            if last:
                return last
        time.sleep(LOOK_S)
    raise DrillError(f"{what}: not within {within_s:g} s; at last: {last!r}")


@dataclass
class Site:
    """One system. ``checkout`` looks like the repository at ``root`` and is thrown away.

    Attributes:
        settings: variables of the operator's terminal beside :data:`SETTINGS`.
        tokens: by scope, as commands printed them.
        memory: what later steps compare with.
    """

    checkout: Path
    root: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    _monitoring: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        """Lay out the folder: everything in it is a link, so that what commands write does not go into the real one."""
        self.checkout.mkdir(parents=True)
        for entry in self.root.iterdir():
            if not entry.name.startswith((".git", "var", "fedvit-backup")):
                (self.checkout / entry.name).symlink_to(entry)
        shims = self.checkout.with_name("shims")
        shims.mkdir()
        # Every curl tells on standard error what it asked and what came back; its own output stays as it is.
        curl = shims / "curl"
        note = r"%{stderr}\n#http %{http_code} %{method} %{url_effective}\n"
        curl.write_text(f"#!/bin/sh\nexec {shutil.which('curl')} -w '{note}' \"$@\"\n")
        curl.chmod(0o755)
        outer = {k: v for k, v in os.environ.items() if not k.startswith(_OTHERS)}
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
        """The settings with which its system runs."""
        return load_settings(environ=self.environment, overrides={"home": self.home})

    # --- what the operator does --------------------------------------------------------------------------------------

    def run(self, command: str, *, endless: bool = False, within_s: float = COMMAND_S) -> Outcome:
        """Type ``command``; one that is ``endless`` is ended with Ctrl-C once it has said something.

        One that takes longer than ``within_s`` is killed.
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
                    await_that("its first line", lambda: files[0].stat().st_size or process.poll() is not None)
                    os.killpg(process.pid, signal.SIGINT)
                process.wait(within_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said, complained = (file.read_text(errors="replace") for file in files)
        calls = tuple(Call(int(status), method, url) for status, method, url in _CALL.findall(complained))
        return Outcome(command, process.returncode, said, complained, calls)

    def fedvit(self, *words: str) -> Any:
        """The JSON of a ``fedvit`` command.

        Raises:
            DrillError: it failed.
        """
        return self.run(" ".join(("fedvit", *words, "--json"))).checked().json()

    # --- what he looks at --------------------------------------------------------------------------------------------

    def ask(self, path: str, method: str = "GET", scope: str | None = None, **options: Any) -> httpx.Response:
        """The control API's answer."""
        headers = {"Authorization": f"Bearer {self.tokens[scope]}"} if scope else {}
        return httpx.request(method, CONTROL + path, headers=headers, timeout=60, **options)

    def get(self, path: str, scope: str | None = None) -> Any:
        """The JSON of a successful GET.

        Raises:
            DrillError: it was answered otherwise.
        """
        return _well(self.ask(path, scope=scope)).json()

    def post(self, path: str, scope: str | None = None, **body: Any) -> Any:
        """The JSON of a successful POST.

        Raises:
            DrillError: it was answered otherwise.
        """
        return _well(self.ask(path, "POST", scope, json=body)).json()

    def client(self, client_id: str) -> dict[str, Any]:
        """A client as the API shows it."""
        clients = self.get("/api/clients/status?limit=1000")["clients"]
        return next(client for client in clients if client["client_id"] == client_id)

    def operation(self, outcome: Outcome) -> dict[str, Any]:
        """The operation that a command began, once it has ended well.

        Raises:
            DrillError: it ended otherwise, or never.
        """
        name = outcome.json()["operation_id"]

        def ended() -> Any:
            found = self.get(f"/api/operations/{name}")
            return found if found["status"] in ("succeeded", "failed", "cancelled") else None

        operation: dict[str, Any] = await_that(f"operation {name} ends", ended)
        if operation["status"] != "succeeded":
            raise DrillError(f"Operation {name} did not succeed: {operation}")
        return operation

    def training(self, wanted: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """Training's standing once it is as ``wanted``."""

        def ask() -> Any:
            answer = self.ask("/api/training/status")
            found = answer.json()
            return found if answer.is_success and wanted(found) else None

        found: dict[str, Any] = await_that(what, ask)
        return found

    def everybody_serves(self, version: str, variant: str) -> None:
        """Return once both edges and the replicas serve it."""
        for base in (*EDGES, f"{CONTROL}/inference"):
            await_that(f"{base} serves {version} {variant}", partial(_serves, base, version, variant))

    def look_at_images(self) -> None:
        """What vehicles do all day: without an inference there is no latency to measure."""
        look = partial(httpx.post, content=an_image(), timeout=30)
        for base in (*EDGES, f"{CONTROL}/inference"):
            await_that(f"{base} answers", partial(_succeeds, look, f"{base}/infer"))

    def show_prometheus(self) -> None:
        """Look at images, and return once Prometheus has seen that."""
        self.look_at_images()
        await_that("Prometheus has scraped", _scraped)

    # --- before and after --------------------------------------------------------------------------------------------

    def start(self, factor: float = 1.0) -> None:
        """Start the system and, where it is installed, Prometheus; return when there is a first release.

        Args:
            factor: how many times as fast as in service Prometheus watches.

        Raises:
            PortInUseError: the runbook prints these ports, so no others can be used.
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
        await_that("the first release", lambda: self.ask("/api/model/current").is_success)

    def stop(self) -> None:
        """End everything that was started, also after a failure."""
        self.run("make down")
        self.end_strays()
        if self._monitoring is not None:
            os.killpg(self._monitoring.pid, signal.SIGTERM)
            self._monitoring.wait(STOP_S)
            self._monitoring = None

    def end_strays(self) -> None:
        """End the edges that somebody started by hand: no ``make down`` does."""
        for file in (self.home / "run").glob("edge-*.pid"):
            self.run(f"kill {file.read_text().strip()}")
            file.unlink()

    def has(self, program: str) -> bool:
        """Whether the operator's shell finds the program."""
        return shutil.which(program, path=self.environment["PATH"]) is not None


def an_image() -> bytes:
    """A real image, as a vehicle would show it."""
    source = open_source(DataConfig())
    return source.read(source.test[0])


def answers(url: str) -> bool:
    """Whether anybody takes a connection there."""
    try:
        httpx.get(url, timeout=10)
    except httpx.TransportError:
        return False
    return True


def succeeds(url: str) -> bool:
    """Whether a GET is answered well."""
    return _succeeds(partial(httpx.get, timeout=10), url)


def _well(answer: httpx.Response) -> httpx.Response:
    if not answer.is_success:
        request = answer.request
        raise DrillError(f"{request.method} {request.url} answered {answer.status_code}: {answer.text[:1000]}")
    return answer


def _succeeds(ask: Callable[[str], httpx.Response], url: str) -> bool:
    return ask(url).is_success


def _serves(base: str, version: str, variant: str) -> bool:
    model = httpx.get(f"{base}/health/detailed", timeout=10).json()["model"] or {}
    # Training may have released a later version meanwhile.
    return model.get("variant") == variant and _numbers(model["version"]) >= _numbers(version)


def _scraped() -> bool:
    # The loss, and the images seen by both edges and by the replicas.
    query = {"query": 'count({__name__=~"fed_vit_autorl_(training_loss|inference_duration_seconds_count)"}) >= 4'}
    found = httpx.get(f"{PROMETHEUS}/api/v1/query", params=query, timeout=10).json()
    return bool(found["data"]["result"])


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]

"""The installed ``fedvit`` command as a user calls it, on a state folder and on ports of its own."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray's workers have the ports below 20000.
TEST_PORTS = (20_000, 32_000)
# A fleet small enough to start and train in seconds; the demo's own figures have a test of their own.
SMALL = {
    "data.partition.clients": "6",
    "data.partition.scheme": "iid",
    "training.rounds": "6",
    "privacy.noise_multiplier": "2.0",
    "release.every_rounds": "3",
    "ray.proxies": "1",
    "ray.dashboard": "false",
}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment; below those that the kernel gives to outgoing connections."""
    sockets = list[socket.socket]()
    try:
        while len(sockets) < count:
            each = socket.socket()
            sockets.append(each)
            try:
                each.bind(("127.0.0.1", random.randrange(*TEST_PORTS)))
            except OSError:
                sockets.pop().close()
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass
class Fedvit:
    """The ``fedvit`` command on one state folder."""

    home: Path
    settings: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        serving, edge_1, edge_2 = free_ports(3)
        self.settings = {"serving.port": str(serving), "edge.ports": f"[{edge_1}, {edge_2}]", **self.settings}

    @property
    def control(self) -> str:
        """The control API's address."""
        return f"http://127.0.0.1:{self.settings['serving.port']}"

    @property
    def edges(self) -> list[str]:
        """The edges' addresses."""
        return [f"http://127.0.0.1:{port}" for port in json.loads(self.settings["edge.ports"])]

    def command(self, *arguments: str, configured: bool = True) -> list[str]:
        """The command line of one call; ``configured`` passes the settings along."""
        line = [sys.executable, "-m", "fedvit.cli.main", *arguments, "--home", str(self.home)]
        return line + [f"--set={key}={value}" for key, value in self.settings.items()] if configured else line

    def call(
        self, *arguments: str, configured: bool = True, timeout_s: float = 400
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            self.command(*arguments, configured=configured),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment() | self.variables,
            check=False,
        )

    def json(self, *arguments: str, configured: bool = True) -> Any:
        """The JSON that a successful command prints."""
        done = self.call(*arguments, "--json", configured=configured)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


def environment() -> dict[str, str]:
    """This process's environment without anything that would configure fedvit or Ray."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("FEDVIT_", "RAY_", "PROMETHEUS_"))}

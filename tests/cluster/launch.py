"""``ray up`` on hosts of :mod:`tests.cluster.hosts`, with this repository's own local.yaml and a wheel of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import PACKAGES, Host

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "cluster_configs" / "ray" / "local.yaml"
UP_LIMIT_S = 180.0
RAY_MODULE = "ray.scripts.scripts"
RAY = f"{PACKAGES}/bin/python -m {RAY_MODULE}"


class Cluster:
    """The cluster that ``operator`` starts: the first host is its head."""

    def __init__(self, operator: Host, nodes: list[Host]) -> None:
        self.operator, self.head, self.workers = operator, nodes[0], nodes[1:]

    @property
    def shared(self) -> Path:
        """The shared folder, as this process sees it."""
        return self.operator.files.parent / "shared"

    def prepare(self) -> None:
        """Write what docs/how-to/cluster.md asks for: a wheel, a token, a configuration that names the hosts."""
        files = self.operator.files
        build_wheel(files / "dist")
        shutil.copy(ROOT / "constraints.txt", files / "constraints.txt")
        (files / "local.yaml").write_text(yaml.safe_dump(self.configuration()))
        self.checked(f"{RAY} get-auth-token --generate")

    def configuration(self) -> dict[str, Any]:
        """local.yaml, for these hosts. Nothing can be fetched there: other packages are those of this environment."""
        config: dict[str, Any] = yaml.safe_load(LOCAL.read_text())
        config["provider"] |= {"head_ip": self.head.address, "worker_ips": [host.address for host in self.workers]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/key"}
        config["setup_commands"] = [offline(command) for command in config["setup_commands"]]
        return config

    def up(self) -> str:
        """``ray up``, with the token; what it said."""
        return self.ray("up --yes --no-config-cache local.yaml", limit_s=UP_LIMIT_S)

    def down(self) -> str:
        """``ray down``."""
        return self.ray("down --yes local.yaml", limit_s=UP_LIMIT_S)

    def ray(self, command: str, limit_s: float = 60.0) -> str:
        """One command of Ray's launcher, from the operator's host."""
        return self.checked(f"RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 {RAY} {command}", limit_s)

    def on_head(self, command: str, limit_s: float = 60.0) -> str:
        """Run a command on the head as ``ray exec`` does, where fedvit and the token are found."""
        done = self.head.run("bash", "-c", f". ~/fedvit/env; {command}", limit_s=limit_s)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def checked(self, command: str, limit_s: float = 60.0) -> str:
        """Run a shell command on the operator's host; what it said."""
        done = self.operator.run("bash", "-c", command, limit_s=limit_s)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr


def build_wheel(folder: Path) -> None:
    """What ``make wheel`` does, without asking an index."""
    options = ["--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=120
    )


def offline(command: str) -> str:
    """A setup command, where it would ask an index: the same environment out of what is installed here."""
    if "-m venv" in command:
        packages = f"{PACKAGES}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        own = f"~/fedvit/venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        return f"{sys.base_prefix}/bin/python3 -m venv ~/fedvit/venv && echo {packages} > {own}/here.pth"
    if "constraints.txt" in command:
        wheel = "~/fedvit/venv/bin/pip install --quiet --no-index --no-deps --ignore-installed ~/fedvit/wheels/*.whl"
        script = f"printf '#!/bin/sh\\nexec ~/fedvit/venv/bin/python -m {RAY_MODULE} \"$@\"\\n' > ~/fedvit/venv/bin/ray"
        return f"{wheel} && {script} && chmod +x ~/fedvit/venv/bin/ray"
    return "true" if "pip install" in command else command

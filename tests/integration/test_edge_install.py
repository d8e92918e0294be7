"""What a vehicle gets: ``pip install fedvit[edge]`` into nothing, then one release folder and one image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tiny_release import MemoryFeed, png, tiny_model

from fedvit.registry.client import write_release_folder
from fedvit.wire.manifest import public_key_text

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedvit", "actors", "serve_apps", "edge_runtime")
MAX_INSTALLED_BYTES = 350 * 10**6
NOT_FOR_VEHICLES = ("torch", "ray", "timm", "opacus", "sqlalchemy", "fastapi", "onnx", "scipy", "matplotlib")

pytestmark = pytest.mark.install


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the edge extra, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = tmp_path_factory.mktemp("vehicle") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), f"{source}[edge]"], check=True)
    return environment


def clean_environment() -> dict[str, str]:
    """Without anything that would let the fresh interpreter find the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_it_is_small(installed: Path) -> None:
    (site_packages,) = installed.glob("lib/python*/site-packages")
    files = [path for path in site_packages.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    print(f"site-packages of a vehicle: {size / 1e6:.0f} MB in {len(files)} files")
    assert size < MAX_INSTALLED_BYTES


@pytest.mark.parametrize("module", NOT_FOR_VEHICLES)
def test_no_server_package_comes_along(installed: Path, tmp_path: Path, module: str) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is not None)"
    command = [str(installed / "bin" / "python"), "-c", code]
    assert subprocess.run(command, cwd=tmp_path, env=clean_environment(), check=False).returncode == 0


@contextmanager
def serving(installed: Path, folder: Path, key: str) -> Iterator[str]:
    command = [str(installed / "bin" / "fedvit-edge"), "serve", "--port", "0", "--source", str(folder)]
    command += ["--trusted-key", key, "--cache", str(folder.parent / "cache")]
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder.parent, stdout=subprocess.PIPE, stderr=log, text=True, env=clean_environment()
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), (folder.parent / "log").read_text()
        yield line.split()[-1]
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_it_serves_a_release_folder(installed: Path, tmp_path: Path) -> None:
    feed, content = MemoryFeed(), tiny_model()
    feed.offer(content, 1)
    assert feed.envelope is not None
    write_release_folder(tmp_path / "release", feed.envelope, content)
    key = public_key_text(feed.key.public_key())
    with serving(installed, tmp_path / "release", key) as url, httpx.Client(base_url=url, timeout=30) as http:
        answers = (http.post("/infer", content=png((0, 255, 0))) for _ in range(10_000))
        # The model is loaded after the port is opened; until then the answer is 503.
        answer = next(answer for answer in answers if answer.status_code != 503)
        assert answer.status_code == 200
        assert answer.json()["label"] == "green"
        assert http.get("/health").json()["status"] == "ok"

"""What must not be loaded where, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "timm", "opacus", "sqlalchemy", "matplotlib", "scipy", "dp_accounting")

LIST_LOADED = "import sys; {statement}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"

IMPORT_WHOLE_LIBRARY = (
    "import importlib, pkgutil, fedvit; "
    "[importlib.import_module(m.name) for m in pkgutil.walk_packages(fedvit.__path__, 'fedvit.') "
    "if not m.name.startswith('fedvit.store.migrations')]"
)


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LIST_LOADED.format(statement=statement)], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["fedvit", "fedvit.config", "fedvit.types", "fedvit.ports"])
def test_the_light_modules_load_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") & {*HEAVY, "numpy", "httpx"} == set()


def test_the_client_loads_nothing_of_a_server() -> None:
    loaded = loaded_by("import fedvit.client")
    assert "httpx" in loaded
    assert loaded & {*HEAVY, "numpy", "fastapi", "starlette"} == set()


def test_help_reads_no_settings_and_opens_no_connection() -> None:
    """Half a second is what a user waits for `fedvit --help` without thinking of it."""
    loaded = loaded_by("import typer.main, fedvit.cli.main; typer.main.get_command(fedvit.cli.main.app)")
    assert "rich" in loaded
    assert loaded & {*HEAVY, "numpy", "httpx", "pydantic", "yaml"} == set()


@pytest.mark.parametrize("module", ["actors.spawn", "serve_apps.control.app", "serve_apps.inference.app"])
def test_starting_and_finding_actors_loads_no_torch(module: str) -> None:
    assert loaded_by(f"import {module}") & {"torch", "timm", "opacus"} == set()


def test_the_whole_library_loads_no_ray_and_nobody_above_it() -> None:
    loaded = loaded_by(IMPORT_WHOLE_LIBRARY)
    assert "torch" in loaded, "the walk did not reach the library's heavy rooms"
    assert loaded & {"ray", "actors", "serve_apps", "edge_runtime"} == set()

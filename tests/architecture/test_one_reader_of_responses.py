"""Responses of servers are read by one function, which bounds their time and their size."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
READER = "fedvit/api/transport.py"
# Drills talk to the system that they started, and the API to itself without a network.
EXEMPT = ("fedvit/incidents/drills/", "serve_apps/control/system/in_process_client.py")
MODULES = {"requests", "urllib.request", "http.client", "aiohttp", "urllib3", "httpcore"}
CLIENTS = {"Client", "AsyncClient", "get", "post", "put", "delete", "request", "stream", "head", "options", "patch"}
READS = {"iter_bytes", "iter_raw", "iter_text", "iter_lines"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("fedvit", "edge_runtime", "serve_apps", "actors"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name != READER and not name.startswith(EXEMPT):
                yield name, ast.parse(path.read_text())


def faults(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name in MODULES)
            case ast.ImportFrom(module=module, names=names):
                yield from (f"{module}.{name.name}" for name in names if module in MODULES or name.name in MODULES)
            case ast.Attribute(value=ast.Name(id="httpx"), attr=attr) if attr in CLIENTS - {"Client"}:
                yield f"httpx.{attr}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="httpx"), attr="Client")):
                yield "httpx.Client()"
            case ast.Attribute(attr=attr) if attr in READS:
                yield attr


def test_no_other_code_reads_from_the_network() -> None:
    assert [(name, fault) for name, tree in sources() for fault in faults(tree)] == []


def test_the_reader_itself_would_be_found() -> None:
    """Else nothing above was shown."""
    assert {"urllib.request", "httpcore", "httpx.Client()", "iter_bytes"} <= set(
        faults(ast.parse((ROOT / READER).read_text()))
    )

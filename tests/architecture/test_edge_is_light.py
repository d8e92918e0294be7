"""A vehicle's process loads no server code: asked of a fresh interpreter, because this one has loaded everything."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "ray", "timm", "opacus", "sqlalchemy", "matplotlib", "scipy", "onnx", "fastapi")
SERVER_PARTS = ("actors", "serve_apps", "fedvit.store", "fedvit.models", "fedvit.training", "fedvit.config")


@pytest.mark.parametrize(
    "module",
    ["edge_runtime.__main__", "edge_runtime.server", "fedvit.registry.client", "fedvit.wire.tensors"],
)
def test_no_server_code_is_loaded(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    loaded = set(json.loads(result.stdout))
    assert module in loaded
    assert loaded.isdisjoint(HEAVY + SERVER_PARTS)


def test_the_trainer_loads_training_and_neither_ray_nor_what_runs_on_it() -> None:
    code = "import json, sys, edge_runtime.training.vehicle; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    loaded = set(json.loads(result.stdout))
    assert "torch" in loaded
    assert loaded.isdisjoint({"ray", "fastapi", "actors", "serve_apps"})

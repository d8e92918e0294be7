"""The system left running, and every way to talk to it."""

from __future__ import annotations

import io
import ssl
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from certificate import self_signed
from command import Fedvit
from trained_home import plain_tar

from fedvit.config import DataConfig
from fedvit.data.sources import open_source

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(fedvit: Fedvit) -> Iterator[None]:
    """A Ray cluster that runs already and that the system joins; every other test's system starts its own."""
    import ray

    context = ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    fedvit.settings["ray.address"] = context.address_info["address"]
    fedvit.variables["RAY_AUTH_MODE"] = "token"
    yield
    ray.shutdown()


def check_only_the_cluster_is_left() -> None:
    import ray

    assert ray.is_initialized()
    assert [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith("fedvit")] == []


@pytest.fixture
def http(fedvit: Fedvit) -> Iterator[httpx.Client]:
    """A caller with a token, of a system that speaks TLS and demands tokens."""
    certificate = self_signed(fedvit.home.parent)
    fedvit.settings |= {
        "access.mode": "tokens",
        "access.tls_cert": str(certificate),
        "access.tls_key": str(certificate.with_suffix(".key")),
    }
    token = fedvit.json("token", "create", "operator", "--scope", "admin", configured=False)["token"]
    fedvit.variables["FEDVIT_TOKEN"] = token
    trust = ssl.create_default_context(cafile=certificate)
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}, verify=trust, timeout=30) as client:
        yield client


@pytest.mark.usefixtures("cluster")
def test_up_joins_serves_trains_answers_and_down_stops(fedvit: Fedvit, http: httpx.Client) -> None:
    check_what_cannot_be_placed_is_named(fedvit)
    places = fedvit.json("up")
    control = places["control"]
    assert control == fedvit.control.replace("http:", "https:")
    assert http.get(f"{control}/api/model/current", headers={"Authorization": "Bearer none"}).status_code == 401
    assert [places["edge-1"], places["edge-2"]] == fedvit.edges
    assert fedvit.json("up") == places
    assert fedvit.json("training", "run")["status"] == "completed"

    source = open_source(DataConfig())
    image = source.read(source.test[0])
    version = http.get(f"{control}/api/model/current").json()["version"]
    assert version == "v1.1.6"
    answers = []
    for base in (places["inference"], *fedvit.edges):
        await_version(http, base, version)
        answer = http.post(f"{base}/infer", content=image).json()
        assert answer["model_version"] == version
        assert answer["label"] in source.classes
        answers.append(answer["class_index"])
        metrics = http.get(f"{base}/metrics").text
        assert f'fed_vit_autorl_inference_duration_seconds_count{{model_version="{version}"}}' in metrics
        assert http.post(f"{base}/infer", content=b"no image").status_code == 422
    assert len(set(answers)) == 1

    metrics = http.get(f"{control}/metrics").text
    assert "fed_vit_autorl_training_loss " in metrics
    assert "fed_vit_autorl_inference_duration_seconds_bucket" in metrics
    assert "fed_vit_autorl_training_rounds_total 6.0" in metrics

    status = fedvit.json("status", configured=False)
    assert (status["system"], status["training"], status["release"]) == ("ok", "completed", version)
    assert fedvit.call("health-check", configured=False).returncode == 0
    check_backup(fedvit)
    assert fedvit.json("diagnostics", configured=False)["status"]["release"] == version

    assert fedvit.json("down", configured=False) == {"stopped": True}
    check_only_the_cluster_is_left()
    # The cluster's Serve stays: others may use it.
    assert http.get(f"{control}/healthz").status_code == 404
    for edge in fedvit.edges:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{edge}/health")
    assert fedvit.json("down", configured=False) == {"stopped": False}
    assert fedvit.json("status", configured=False)["release"] == version
    assert fedvit.call("health-check", configured=False).returncode == 2


def check_what_cannot_be_placed_is_named(fedvit: Fedvit) -> None:
    greedy = Fedvit(fedvit.home, fedvit.settings | {"ray.actor_cpus": "50"}, fedvit.variables)
    done = greedy.call("up")
    assert done.returncode == 2
    assert "fedvit-accountant" in done.stderr
    assert "50 CPU" in done.stderr
    assert "Traceback" not in done.stderr


def await_version(http: httpx.Client, base: str, version: str) -> None:
    """Return once the target serves the version; it looks every second."""
    for _ in range(600):
        result = http.get(f"{base}/health/detailed").json()
        if (result["model"] or {}).get("version") == version:
            return
        time.sleep(0.1)
    raise AssertionError(f"{base} still says {result}")


def check_backup(fedvit: Fedvit) -> None:
    """A backup of the running system holds the whole state."""
    folder = fedvit.home.parent / "backups"
    result = fedvit.json("backup", str(folder), configured=False)
    payload = plain_tar(Path(result["archive"]), fedvit.home / "keys" / "backup.key")
    with tarfile.open(fileobj=io.BytesIO(payload)) as archive:
        names = archive.getnames()
    assert {"state.db", "checksums.json"} <= set(names)
    assert not any(name.startswith("keys/") for name in names)
    assert sum(name.startswith("blobs/") for name in names) >= 6

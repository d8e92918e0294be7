"""The files in cluster_configs/, against the schemas of the tools that read them and against each other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from actors.placement import STORE_HERE, STORE_LABEL
from tests.custom_resources import PodMonitor, kuberay_faults, needs_crds, pod_faults

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
RAY_FILES = ("local", "aws", "gcp")
LABELS = f"--labels={STORE_LABEL}={STORE_HERE}"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONFIGS / path).read_text())
    return content


@pytest.fixture(autouse=True)
def _in_a_prepared_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's launcher looks for what file_mounts names: the wheel, the constraints and the token."""
    for name in ("dist/fedvit.whl", "constraints.txt", ".ray/auth_token", ".ssh/fedvit"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("name", RAY_FILES)
def test_the_file_is_what_the_template_and_its_part_give(name: str) -> None:
    rendered = runpy.run_path(str(CONFIGS / "ray" / "render.py"))["rendered"]
    assert (CONFIGS / "ray" / f"{name}.yaml").read_text() == rendered(name)


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_accepts_the_file_with_its_defaults_filled_in(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(f"ray/{name}.yaml"))
    validate_config(config)
    assert config["max_workers"] >= 1


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_refuses_the_file_with_a_word_that_it_does_not_know(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(read(f"ray/{name}.yaml") | {"workers": 2}))


@pytest.mark.parametrize("name", RAY_FILES)
def test_every_node_gets_the_token_and_speaks_with_it_and_the_head_alone_bears_the_store(name: str) -> None:
    config = read(f"ray/{name}.yaml")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    heads, workers = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    for command in (command for command in (*heads, *workers) if "ray " in command and "grep" not in command):
        assert command.startswith(". ~/fedvit/env;")
    assert LABELS in " ".join(heads)
    assert STORE_LABEL not in " ".join(workers)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_in_a_cloud_gpus_come_when_asked_for_and_proxies_are_on_spot_machines(name: str) -> None:
    types = read(f"ray/{name}.yaml")["available_node_types"]
    assert types["silos-gpu"]["min_workers"] == 0
    spot = json.dumps(types["proxies-spot"]["node_config"])
    assert re.search(r'"spot"|"SPOT"', spot)
    assert not re.search(r'"spot"|"SPOT"', json.dumps(types["head"]))


def test_serve_accepts_its_files_and_finds_what_they_import() -> None:
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    inside = yaml.safe_load(read("kuberay/rayservice.yaml")["spec"]["serveConfigV2"])
    for config in (read("serve/inference.yaml"), inside):
        for application in ServeDeploySchema.model_validate(config).applications:
            builder = import_attr(application.import_path)
            (arguments,) = [kind for name, kind in builder.__annotations__.items() if name == "args"]
            kind = getattr(__import__(builder.__module__, fromlist=[arguments]), arguments)
            assert kind.model_validate(application.args).control_url.startswith("http")


def containers() -> list[dict[str, Any]]:
    """Every container of every pod that the Ray resources describe."""
    return [container for group in groups() for container in group["template"]["spec"]["containers"]]


KUBERAY = ("raycluster", "rayservice")


def changed(name: str, path: str, value: Any) -> dict[str, Any]:
    """The resource with another value at one place."""
    resource = read(f"kuberay/{name}.yaml")
    *way, last = path.split("/")
    place: Any = resource
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    place[last] = value
    return resource


@needs_crds
@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_accepts_its_resources(name: str) -> None:
    resource = read(f"kuberay/{name}.yaml")
    assert resource["kind"].lower() == name
    assert kuberay_faults(resource) == []


@needs_crds
@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("raycluster", "spec/workerGroupSpecs/0/maxReplica", 4),
        ("raycluster", "spec/workerGroupSpecs/0/maxReplicas", "8"),
        ("raycluster", "spec/headGroupSpec/rayStartParams/dashboard-port", 8265),
        ("raycluster", "spec/headGroupSpec/template/spec/containers/0/volumeMount", []),
        ("raycluster", "spec/headGroupSpec/template/spec/containers/0/image", 1),
        ("raycluster", "apiVersion", "ray.io/v1beta2"),
        ("rayservice", "spec/rayClusterConfig/headGroupSpec/replicas", 1),
        ("rayservice", "spec/serveConfigV2", {"applications": []}),
    ],
)
def test_kuberay_refuses_an_unknown_word_and_a_value_of_another_type(name: str, path: str, value: Any) -> None:
    (fault,) = kuberay_faults(changed(name, path, value))
    assert path.rpartition("/")[2] in fault


def groups() -> list[dict[str, Any]]:
    """The head and worker groups of all Ray resources."""
    specs = [read("kuberay/raycluster.yaml")["spec"], read("kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]]
    return [group for spec in specs for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", ()))]


def test_kubernetes_accepts_the_pods_of_every_group() -> None:
    assert [pod_faults(group["template"]) for group in groups()] == [[]] * len(groups())
    group = changed("raycluster", "spec/headGroupSpec/template/spec/containers/0/image", 1)["spec"]["headGroupSpec"]
    assert pod_faults(group["template"]) != []


def test_every_worker_group_has_a_range_of_replicas() -> None:
    workers = [group for group in groups() if "groupName" in group]
    assert workers
    for group in workers:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_prometheus_operator_accepts_the_pod_monitor() -> None:
    assert PodMonitor.model_validate(read("kuberay/podmonitor.yaml")).kind == "PodMonitor"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/podMetricsEndpoints/0/interval", "15 s"),
        ("spec/podMetricsEndpoints/1/authorization/credentials/name", None),
        ("spec/podMetricsEndpoints/0/ports", "metrics"),
    ],
)
def test_a_wrong_pod_monitor_is_refused(path: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        PodMonitor.model_validate(changed("podmonitor", path, value))
    assert refused.value.errors()[0]["loc"][-1] == path.rpartition("/")[2]


def test_every_pod_speaks_with_the_token_phones_nobody_and_mounts_what_it_has() -> None:
    assert len(containers()) == 4
    for container in containers():
        results = {each["name"]: each for each in container["env"]}
        assert results["RAY_AUTH_MODE"]["value"] == "token"
        assert results["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "ray-token"
        assert results["RAY_USAGE_STATS_ENABLED"]["value"] == "0"
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_the_head_pod_alone_bears_the_store_and_the_pod_monitor_finds_the_ports() -> None:
    spec = read("kuberay/raycluster.yaml")["spec"]
    assert spec["headGroupSpec"]["labels"] == {STORE_LABEL: STORE_HERE}
    assert all("labels" not in group for group in spec["workerGroupSpecs"])
    monitor = read("kuberay/podmonitor.yaml")["spec"]
    labels = spec["headGroupSpec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert {end["port"] for end in monitor["podMetricsEndpoints"]} <= {port["name"] for port in head["ports"]}


def test_the_network_policy_is_one_and_selects_every_pod() -> None:
    policy = read("kuberay/networkpolicy.yaml")
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    (selector,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert len(groups()) == 4
    for group in groups():
        assert group["template"]["metadata"]["labels"][selector["key"]] in selector["values"]
    open_to_all = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert open_to_all == [[{"port": 8000}]]


def test_compose_has_the_runbooks_names() -> None:
    compose = read("docker/compose.yaml")
    assert {"fed-server", "fed-edge"} <= set(compose["services"])
    assert compose["services"]["fed-server"]["container_name"] == "fed-server"
    assert compose["volumes"]["fed-vit-data"]["name"] == "fed-vit-data"
    # `scale fed-edge=5` needs a service without a name and a port of its own.
    assert not {"container_name", "ports"} & compose["services"]["fed-edge"].keys()


def test_in_compose_every_vehicle_has_an_identity_of_its_own() -> None:
    compose = read("docker/compose.yaml")
    vehicles = {name: service for name, service in compose["services"].items() if name.startswith("vehicle-")}
    assert len(vehicles) == 2
    options = {
        name: dict(word.removeprefix("--").split("=", 1) for word in service["command"][1:])
        for name, service in (*vehicles.items(), ("fed-edge", compose["services"]["fed-edge"]))
    }
    for name, service in vehicles.items():
        assert options[name]["device-id"] == name
        assert service["secrets"] == [f"{name}.token"]
        assert options[name]["source-token-file"] == f"/run/secrets/{name}.token"
        assert f"{name}:/data" in service["volumes"]
    # What the edges send to the server is not what callers send to them.
    tokens = [each["source-token-file"] for each in options.values()] + [options["fed-edge"]["token-file"]]
    files = [secret["file"] for secret in compose["secrets"].values()]
    assert (len(set(tokens)), len(set(files))) == (4, len(files))


def test_the_compose_specification_accepts_the_file() -> None:
    result = importlib.util.find_spec("check_jsonschema")
    if result is None or result.origin is None:
        pytest.skip("check-jsonschema, which carries the Compose specification, is missing")
    vendored = Path(result.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text())
    jsonschema.validate(read("docker/compose.yaml"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read("docker/compose.yaml") | {"servics": {}}, schema)


def test_compose_builds_stages_that_the_dockerfile_has() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (CONFIGS / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    targets = [service["build"]["target"] for service in read("docker/compose.yaml")["services"].values()]
    assert set(targets) < set(stages)


def test_the_server_in_a_container_may_listen_as_compose_configures_it() -> None:
    from fedvit.access.identity import check_exposure
    from fedvit.settings import load_settings

    result = read("docker/compose.yaml")["services"]["fed-server"]["environment"]
    settings = load_settings(environ=result)
    check_exposure(settings)
    assert settings.edge.ports == ()


@needs_systemd
@pytest.mark.parametrize("unit", sorted(path.name for path in (CONFIGS / "systemd").glob("*.service")))
def test_systemd_accepts_the_unit(unit: str, tmp_path: Path) -> None:
    # It looks for the program too, which is not installed there.
    text = re.sub(r"/opt/fedvit/venv/bin/\S+", shutil.which("true") or "true", (CONFIGS / "systemd" / unit).read_text())
    (tmp_path / unit).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert unit not in done.stderr, done.stderr

"""Custom resources against the schemas of their operators, strictly: a server drops a word that it does not know.

KubeRay's CustomResourceDefinitions are in no package that tests could install. The environment variable
``KUBERAY_CRDS`` names a folder with them (helm-chart/kuberay-operator/crds of ray-project/kuberay). A PodMonitor is
held to the fields that our file uses, after https://prometheus-operator.dev/docs/api-reference/api/.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import kubernetes_validate as kubernetes
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

needs_crds = pytest.mark.skipif(
    not os.environ.get("KUBERAY_CRDS"), reason="KUBERAY_CRDS names no folder with KubeRay's CustomResourceDefinitions"
)


def kuberay_faults(resource: dict[str, Any]) -> list[str]:
    """What KubeRay's own definition of the resource's kind has against it: places and messages."""
    try:
        schema = _schemas()[resource["kind"], resource["apiVersion"]]
    except KeyError:
        return [f"apiVersion: there is no {resource['kind']} in {resource['apiVersion']}"]
    faults = jsonschema.Draft202012Validator(schema).iter_errors(resource)
    return [f"{'/'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in faults]


def pod_faults(template: dict[str, Any]) -> list[str]:
    """What Kubernetes has against the template of a pod."""
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    try:
        kubernetes.validate(pod, kubernetes.latest_version(), strict=True)
    except kubernetes.ValidationError as error:
        return [error.message]
    return []


@cache
def _schemas() -> dict[tuple[str, str], dict[str, Any]]:
    return {key: schema for path in Path(os.environ["KUBERAY_CRDS"]).glob("*.yaml") for key, schema in _read(path)}


def _read(path: Path) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    spec = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
    for version in spec["versions"]:
        schema = _strict(version["schema"]["openAPIV3Schema"])
        yield (spec["names"]["kind"], f"{spec['group']}/{version['name']}"), schema


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema that refuses unknown words, as ``--validate=strict`` does."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        result["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


Duration = Annotated[str, Field(pattern=r"^([0-9]+y)?([0-9]+w)?([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$")]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Fields):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
    labels: dict[str, str]


class _SecretKey(_Fields):
    name: str
    key: str


class _Authorization(_Fields):
    credentials: _SecretKey


class _Endpoint(_Fields):
    port: str
    path: str = "/metrics"
    interval: Duration
    authorization: _Authorization | None = None


class _Selector(_Fields):
    matchLabels: dict[str, str]


class _PodMonitorSpec(_Fields):
    selector: _Selector
    podMetricsEndpoints: list[_Endpoint]


class PodMonitor(_Fields):
    """A PodMonitor as our file writes it."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: _Metadata
    spec: _PodMonitorSpec

"""What our custom resources may say: fields of the operators' published references, with their types.

The schemas themselves are in no package that tests could install, and an operator silently drops a word that it does
not know. Here are the fields that our files use; any other word is refused, and so is a value of another type. Pods
are judged by Kubernetes' own schema.

KubeRay 1.7, ``ray.io/v1``: https://docs.ray.io/en/master/kuberay/references/api.html. Prometheus operator,
``monitoring.coreos.com/v1``: https://prometheus-operator.dev/docs/api-reference/api/.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import kubernetes_validate as kubernetes
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

Words = dict[str, str]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Duration = Annotated[str, Field(pattern=r"^([0-9]+y)?([0-9]+w)?([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$")]


def _judged(pod: dict[str, Any]) -> dict[str, Any]:
    """The template of a pod, unless Kubernetes would refuse it."""
    try:
        kubernetes.validate({"apiVersion": "v1", "kind": "Pod", **pod}, kubernetes.latest_version(), strict=True)
    except kubernetes.ValidationError as error:
        raise ValueError(error.message) from error
    return pod


Pod = Annotated[dict[str, Any], AfterValidator(_judged)]


class Fields(BaseModel):
    """Nothing but the fields that are named, of just these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Fields):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
    labels: Words


class HeadGroup(Fields):
    template: Pod
    rayStartParams: Words
    labels: Words = {}


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: Count
    minReplicas: Count
    maxReplicas: Count


class RayClusterSpec(Fields):
    rayVersion: str
    enableInTreeAutoscaling: bool = False
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class RayCluster(Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayServiceSpec(Fields):
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec


class RayService(Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class SecretKey(Fields):
    name: str
    key: str


class Authorization(Fields):
    credentials: SecretKey


class Endpoint(Fields):
    port: str
    path: str = "/metrics"
    interval: Duration
    authorization: Authorization | None = None


class Selector(Fields):
    matchLabels: Words


class PodMonitorSpec(Fields):
    selector: Selector
    podMetricsEndpoints: list[Endpoint]


class PodMonitor(Fields):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


RESOURCE: TypeAdapter[RayCluster | RayService | PodMonitor] = TypeAdapter(
    Annotated[RayCluster | RayService | PodMonitor, Field(discriminator="kind")]
)

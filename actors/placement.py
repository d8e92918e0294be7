"""Placement of a system's parts on the nodes of a cluster.

Processes that open the store run on the node with the store's label. The store is a SQLite file whose write-ahead log
uses memory shared by the processes of one machine, so that all of them have to be on one node, on whatever disk the
folder lies. Client proxies are spread over all nodes. They do not open the store, but read keys and client state from
the state folder, so that every node has to see the same folder.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from fedvit.errors import PlacementError

STORE_LABEL = "fedvit.io/store"
STORE_HERE = "here"
_MARKER = Path("run") / "same-folder"


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster: what placement needs to know of it."""

    node_id: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_store(self) -> bool:
        """Whether it has the label of the node where the store may be opened."""
        return self.labels.get(STORE_LABEL) == STORE_HERE


def store_selector(nodes: Sequence[Node], here: str) -> dict[str, str]:
    """The label selector of processes that open the store; empty on a cluster of one node without the label.

    Args:
        nodes: the living nodes.
        here: id of the node of this process, which opens the store itself.

    Raises:
        PlacementError: with several nodes, not exactly one has the label, or this process runs on another one.
    """
    labelled = [node for node in nodes if node.has_store]
    if len(nodes) == 1 and not labelled:
        return {}
    label = f"{STORE_LABEL}={STORE_HERE}"
    if len(labelled) != 1:
        named = ", ".join(node.name for node in labelled) or "none"
        raise PlacementError(
            f"The store is a SQLite file, which processes of one node only may open; of the cluster's {len(nodes)} "
            f"nodes {named} {'have' if len(labelled) > 1 else 'has'} the label {label}.",
            cure=f"Start one node, on whose disk the state folder lies, with `ray start --labels={label}`.",
        )
    if labelled[0].node_id != here:
        raise PlacementError(
            f"The store may be opened on {labelled[0].name} alone, and this process runs on another node.",
            cure=f"Run the command on {labelled[0].name}: `ray exec` does.",
        )
    return {STORE_LABEL: STORE_HERE}


@dataclass(frozen=True, slots=True)
class NodeProbe:
    """What one node finds at the paths that a client proxy reads. ``marker``: see :func:`write_marker`."""

    marker: str | None
    missing: tuple[str, ...]
    version: str


def write_marker(home: Path) -> str:
    """Write a random word into the state folder; a node that reads the same word sees the same folder."""
    marker = secrets.token_hex(8)
    path = home / _MARKER
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(marker)
    return marker


def probe_node(home: Path, paths: Sequence[str]) -> NodeProbe:
    """Look at the state folder and ``paths`` on this machine."""
    marker = home / _MARKER
    missing = tuple(path for path in paths if not Path(path).exists())
    return NodeProbe(marker.read_text() if marker.exists() else None, missing, version("fedvit"))


def check_probes(probes: Mapping[str, NodeProbe | None], marker: str, home: Path, version: str) -> None:
    """Make sure that client proxies can work on every node.

    Args:
        probes: by node name; None of a node that did not answer.

    Raises:
        PlacementError: each node that cannot is named, with the reason.
    """
    faults = [f"{name} {fault}" for name, probe in probes.items() if (fault := _fault(probe, marker, home, version))]
    if faults:
        raise PlacementError(
            f"Client proxies cannot run on every node: {'; '.join(faults)}.",
            cure="Mount the folder there under the same path (docs/how-to/cluster.md), or take the node out.",
        )


def _fault(probe: NodeProbe | None, marker: str, home: Path, version: str) -> str | None:
    if probe is None:
        return "does not answer"
    if probe.version != version:
        return f"has fedvit {probe.version} instead of {version}"
    if probe.marker != marker:
        return f"does not see the state folder {home}"
    if probe.missing:
        return f"does not see {', '.join(probe.missing)}"
    return None

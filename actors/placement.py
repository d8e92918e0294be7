"""Where parts of a system may run: whoever opens the store on the node that bears its label, proxies spread over all.

The store is a SQLite file. Its write-ahead log lies in memory that one machine shares, so all who open it have to be on
one node, on whatever disk the folder lies. Proxies open no store; of the state folder they read keys and what clients
keep between rounds, so that each node has to see the very same folder.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedvit.errors import PlacementError

STORE_LABEL = "fedvit.io/store"
STORE_HERE = "here"
_SIGN = Path("run") / "same-folder"


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster, as much as placement needs of it."""

    node_id: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def bears_store(self) -> bool:
        """Whether the store may be opened there."""
        return self.labels.get(STORE_LABEL) == STORE_HERE


def store_selector(nodes: Sequence[Node], here: str) -> dict[str, str]:
    """The label selector for whoever opens the store; empty on a cluster of one node without the label.

    Args:
        nodes: those alive.
        here: id of the node that this process, which opens the store itself, runs on.

    Raises:
        PlacementError: with several nodes, not exactly one bears the label, or this process runs on another one.
    """
    bearers = [node for node in nodes if node.bears_store]
    if len(nodes) == 1 and not bearers:
        return {}
    label = f"{STORE_LABEL}={STORE_HERE}"
    if len(bearers) != 1:
        named = ", ".join(node.name for node in bearers) or "none"
        raise PlacementError(
            f"The store is a SQLite file, which processes of one node only may open; of the cluster's {len(nodes)} "
            f"nodes {named} {'bear' if len(bearers) > 1 else 'bears'} the label {label}.",
            cure=f"Start one node, on whose disk the state folder lies, with `ray start --labels={label}`.",
        )
    if bearers[0].node_id != here:
        raise PlacementError(
            f"The store may be opened on {bearers[0].name} alone, and this process runs on another node.",
            cure=f"Run the command on {bearers[0].name}: `ray exec` does.",
        )
    return {STORE_LABEL: STORE_HERE}


@dataclass(frozen=True, slots=True)
class Sight:
    """What one node sees of the paths that a proxy reads."""

    sign: str | None
    missing: tuple[str, ...]
    version: str


def leave_sign(home: Path) -> str:
    """Write a word into the state folder by which every node can tell that it sees this very folder."""
    sign = secrets.token_hex(8)
    path = home / _SIGN
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sign)
    return sign


def look(home: Path, paths: Sequence[str]) -> Sight:
    """What this machine sees."""
    from importlib.metadata import version

    sign = home / _SIGN
    missing = tuple(path for path in paths if not Path(path).exists())
    return Sight(sign.read_text() if sign.exists() else None, missing, version("fedvit"))


def fault_of(sight: Sight | None, sign: str, home: Path, version: str) -> str | None:
    """What keeps a node from training; None where nothing does. ``sight`` None: it did not answer."""
    if sight is None:
        return "does not answer"
    if sight.version != version:
        return f"has fedvit {sight.version} instead of {version}"
    if sight.sign != sign:
        return f"does not see the state folder {home}"
    if sight.missing:
        return f"does not see {', '.join(sight.missing)}"
    return None


def check_sights(sights: Mapping[str, Sight | None], sign: str, home: Path, version: str) -> None:
    """Make sure that proxies can work on every node.

    Args:
        sights: what each node saw, by its name.

    Raises:
        PlacementError: each node that cannot is named, with the reason.
    """
    faults = [f"{name} {fault}" for name, sight in sights.items() if (fault := fault_of(sight, sign, home, version))]
    if faults:
        raise PlacementError(
            f"Client proxies cannot run on every node: {'; '.join(faults)}.",
            cure="Mount the folder there under the same path (docs/cluster.md), or take the node out.",
        )

"""The client proxy actor: hosts clients and trains them.

The client host and torch are loaded in the actor's own process, not in those that start or find the actor.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from actors.handles import forwards
from fedvit.config import Settings
from fedvit.errors import PlacementError
from fedvit.ports import ClientHostPort
from fedvit.settings import settings_from_json


@forwards(ClientHostPort, "_warm_host")
class ClientProxy:
    """Runs a :class:`fedvit.ports.ClientHostPort`; weights are read from the object store without a copy."""

    def __init__(self, settings_json: str) -> None:
        self._settings = settings_from_json(settings_json)
        self._host: ClientHostPort | None = None

    def prepare(self) -> int:
        """Build the model and open the data; return the process id.

        Raises:
            PlacementError: this node does not see the state folder.
            DataError, ModelError: the settings name something that cannot be used.
        """
        self._warm_host()
        return os.getpid()

    def ping(self) -> None:
        """Answer, also during training: this method has its own concurrency group, :data:`actors.handles.PING`."""

    def _warm_host(self) -> ClientHostPort:
        # At each call: a restarted actor is not prepared again.
        if self._host is None:
            _check_key(self._settings.home)
            self._host = _host_of(self._settings)
        return self._host


def _host_of(settings: Settings) -> ClientHostPort:
    if settings.drill.faults:
        from fedvit.tools.simulation.rehearsal import rehearsed_host

        return rehearsed_host(settings)
    if settings.training.ranks > 1:
        from actors.silo import silo_host

        return silo_host(settings)
    from fedvit.clients.workload import client_host

    return client_host(settings)


def _check_key(home: Path) -> None:
    """Refuse a node that joined later, or lost the folder: with another key a repeated call would draw other noise."""
    if not (home / "keys" / "root.key").exists():
        raise PlacementError(
            f"The node {socket.gethostname()} does not see the state folder {home}.",
            cure="Mount it there under the same path (docs/how-to/cluster.md), or take the node out.",
        )

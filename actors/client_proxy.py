"""The client proxy: the actor behind which clients do their learning.

What it hosts, and torch, is loaded by the actor itself, not by whoever starts it or looks for it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from fedvit.config import Settings
from fedvit.errors import PlacementError
from fedvit.ports import ClientHostPort
from fedvit.settings import settings_from_json
from fedvit.types import PartialUpdate, TrainTask, Weights
from fedvit.wire.histograms import ClientHistogram, HistogramRequest


class ClientProxy:
    """Hosts many virtual clients on one warm model; weights are read from the object store without a copy."""

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
        """Answer, also while it trains: this method runs in the concurrency group :data:`actors.handles.PING`."""

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> PartialUpdate:
        """Train these clients; one message back. Repeating the call repeats the very same update."""
        return self._warm_host().train(task, weights, client_ids)

    def histograms(self, order: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        """ClientHistogram these clients' data; repeating the call repeats the very same histograms."""
        return self._warm_host().histograms(order, client_ids)

    def _warm_host(self) -> ClientHostPort:
        # Asked at each call: a restarted actor has not been prepared again.
        if self._host is None:
            _check_key(self._settings.home)
            self._host = _host_of(self._settings)
        return self._host


def _host_of(settings: Settings) -> ClientHostPort:
    if settings.rehearsal.faults:
        from fedvit.tools.simulation.rehearsal import rehearsed_host

        return rehearsed_host(settings)
    if settings.training.ranks > 1:
        from actors.silo import SiloHost

        return SiloHost(settings)
    from fedvit.clients.workload import client_host

    return client_host(settings)


def _check_key(home: Path) -> None:
    """Of a node that came later, or lost the folder: with a key of its own, no repetition would find its noise."""
    if not (home / "keys" / "root.key").exists():
        raise PlacementError(
            f"The node {socket.gethostname()} does not see the state folder {home}.",
            cure="Mount it there under the same path (docs/cluster.md), or take the node out.",
        )

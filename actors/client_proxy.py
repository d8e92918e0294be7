"""The client proxy: the actor behind which clients do their learning."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from fedvit.config import settings_from_json
from fedvit.training.host import VirtualClientHost
from fedvit.types import PartialUpdate, TrainTask, Weights


class ClientProxy:
    """Hosts many virtual clients on one warm model; weights are read from the object store without a copy."""

    def __init__(self, settings_json: str) -> None:
        self._settings = settings_from_json(settings_json)
        self._host: VirtualClientHost | None = None
        torch.set_num_threads(self._settings.ray.threads_per_proxy)

    def prepare(self) -> int:
        """Build the model and open the data; return the process id.

        Raises:
            DataError, ModelError: the settings name something that cannot be used.
        """
        if self._host is None:
            self._host = VirtualClientHost(self._settings)
        return os.getpid()

    def ping(self) -> None:
        """Answer, also while it trains: this method runs in the concurrency group :data:`actors.handles.PING`."""

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> PartialUpdate:
        """Train these clients; one message back. Repeating the call repeats the very same update."""
        if self._host is None:
            # A restarted actor has not been prepared again.
            self._host = VirtualClientHost(self._settings)
        return self._host.train(task, weights, client_ids)

"""The client proxy: the actor behind which clients do their learning.

torch is loaded by the actor itself, not by whoever starts it or looks for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedvit.config import settings_from_json
from fedvit.types import PartialUpdate, TrainTask, Weights

if TYPE_CHECKING:
    from fedvit.training.host import VirtualClientHost


class ClientProxy:
    """Hosts many virtual clients on one warm model; weights are read from the object store without a copy."""

    def __init__(self, settings_json: str) -> None:
        self._settings = settings_from_json(settings_json)
        self._host: VirtualClientHost | None = None

    def prepare(self) -> int:
        """Build the model and open the data; return the process id.

        Raises:
            DataError, ModelError: the settings name something that cannot be used.
        """
        self._warm_host()
        return os.getpid()

    def ping(self) -> None:
        """Answer, also while it trains: this method runs in the concurrency group :data:`actors.handles.PING`."""

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> PartialUpdate:
        """Train these clients; one message back. Repeating the call repeats the very same update."""
        return self._warm_host().train(task, weights, client_ids)

    def _warm_host(self) -> VirtualClientHost:
        # Asked at each call: a restarted actor has not been prepared again.
        if self._host is None:
            import torch

            from fedvit.training.host import VirtualClientHost

            torch.set_num_threads(self._settings.ray.threads_per_proxy)
            self._host = VirtualClientHost(self._settings)
        return self._host

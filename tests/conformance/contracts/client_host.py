"""The promises of the client host port."""

from __future__ import annotations

import numpy as np
import pytest

from fedvit.errors import IntegrityError
from fedvit.ports import ClientHostPort
from fedvit.types import TrainTask, Weights
from fedvit.updates import ClientUpdate, PartialSum, UpdateBundle, UpdateMessage
from fedvit.wire.histograms import HistogramRequest, HistogramSpec

REQUEST = HistogramRequest("run-conformance", 1, 1.0, "record", HistogramSpec({"brightness": (0.5,)}, 2))


def arrays(message: UpdateMessage) -> list[bytes]:
    """The exact values of a message."""
    if isinstance(message, UpdateBundle):
        return [content for part in message.parts for content in arrays(part)]
    assert isinstance(message, ClientUpdate | PartialSum)
    return [np.asarray(message.weighted_sum[name]).tobytes() for name in sorted(message.weighted_sum)]


class ClientHostContract:
    """Needs the fixtures ``host``, ``weights`` and ``task``, which is for these weights."""

    clients: tuple[str, ...]

    def test_there_is_an_outcome_for_each_client(self, host: ClientHostPort, task: TrainTask, weights: Weights) -> None:
        message = host.train(task, weights, self.clients)
        assert message.round_index == task.round_index
        assert {outcome.client_id: outcome.error for outcome in message.outcomes} == dict.fromkeys(self.clients)
        assert arrays(message)

    def test_a_repeated_call_gives_the_same_message(
        self, host: ClientHostPort, task: TrainTask, weights: Weights
    ) -> None:
        first, again = (host.train(task, weights, self.clients) for _ in range(2))
        assert again.outcomes == first.outcomes
        assert arrays(again) == arrays(first)

    def test_a_client_that_fails_is_an_outcome_with_an_error(
        self, host: ClientHostPort, task: TrainTask, weights: Weights
    ) -> None:
        message = host.train(task, weights, [*self.clients, "no-such-client"])
        failed = {outcome.client_id for outcome in message.outcomes if outcome.error is not None}
        assert failed == {"no-such-client"}

    def test_weights_of_another_task_are_refused(self, host: ClientHostPort, task: TrainTask, weights: Weights) -> None:
        other = {name: array + np.float32(1) for name, array in weights.items()}
        with pytest.raises(IntegrityError):
            host.train(task, other, self.clients)

    def test_repeated_histograms_are_the_same(self, host: ClientHostPort) -> None:
        first, again = (host.histograms(REQUEST, [*self.clients, "no-such-client"]) for _ in range(2))
        assert again == first
        assert {histogram.client_id for histogram in first} <= set(self.clients)

"""Encoder of a client's update for transport, with error feedback if the encoding drops values."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.client_state import ClientState
from fedvit.errors import UpdateRejectedError
from fedvit.privacy import mechanism
from fedvit.privacy.randomness import SecretStream, derive_secret, output_id
from fedvit.types import Encoding, TrainTask
from fedvit.updates import ClientAnswer, ClientFailures, ClientUpdate, EncodedUpdate
from fedvit.wire.updates import encode_smaller


class UpdateEncoder:
    """Encodes updates as bytes. It is post-processing of noised values, with random rounding of its own.

    A repeated round gives the same bytes: the rounding is derived from the id of the mechanism output and from the
    noised update itself, so no two updates share it. Values that top-k dropped are added to the client's next round.

    Args:
        home: the state folder, which stores the dropped values.
        root_secret: the random rounding is derived from it.
        top_k_fraction: the fraction of all values that top-k sends.
    """

    def __init__(self, home: Path, root_secret: bytes, top_k_fraction: float) -> None:
        self._dropped = ClientState(home, "dropped")
        self._root_secret, self._fraction = root_secret, top_k_fraction

    def encode(
        self, task: TrainTask, answer: ClientAnswer, encoding: Encoding, validator: UpdateValidator
    ) -> EncodedUpdate:
        """One client's encoded answer; as float32 if validation would reject the smaller encoding."""
        if isinstance(answer, ClientFailures):
            return self._encoded(task, answer, encoding)
        try:
            if encoding is Encoding.TOP_K:
                return self._with_feedback(task, answer, validator)
            encoded = self._encoded(task, answer, encoding)
            _decoded(encoded, validator)
            return encoded
        except UpdateRejectedError:
            return self._encoded(task, answer, Encoding.FLOAT32)

    def state_digest(self, task: TrainTask, client_id: str) -> str:
        """The SHA-256, hex, of the dropped values that top-k adds to the client's update in this round."""
        return self._dropped.digest(task.run_id, task.round_index, client_id)

    def _with_feedback(self, task: TrainTask, update: ClientUpdate, validator: UpdateValidator) -> EncodedUpdate:
        client_id, weight = update.outcome.client_id, update.total_weight
        dropped, _ = self._dropped.load(task.run_id, task.round_index, client_id)
        whole = {n: np.asarray(a + weight * dropped.get(n, 0.0)) for n, a in update.weighted_sum.items()}
        encoded = self._encoded(task, replace(update, weighted_sum=whole), Encoding.TOP_K)
        sent = _decoded(encoded, validator).weighted_sum
        remaining = {name: np.asarray((array - sent[name]) / weight, np.float32) for name, array in whole.items()}
        self._dropped.save(task.run_id, task.round_index, client_id, remaining)
        return encoded

    def _encoded(self, task: TrainTask, answer: ClientAnswer, encoding: Encoding) -> EncodedUpdate:
        (outcome,) = answer.outcomes

        @cache
        def coins() -> SecretStream:
            # Made only if something is rounded: the hash of an update takes as long as its encoding.
            update = mechanism.digest(answer.weighted_sum) if isinstance(answer, ClientUpdate) else ""
            secret = derive_secret(self._root_secret, f"{outcome.client_id}/rounding/{update}")
            output = output_id(task, outcome.client_id, outcome.num_examples)
            return SecretStream(secret, "rounding", {"release": output, "encoding": encoding.value})

        content = encode_smaller(answer, encoding, lambda count: coins().uniform(count), self._fraction)
        return EncodedUpdate(answer.round_index, outcome, content)


def _decoded(encoded: EncodedUpdate, validator: UpdateValidator) -> ClientUpdate:
    """The update as the receiver will decode it; raises UpdateRejectedError if the receiver will reject it."""
    update = validator.decoded(encoded)
    if isinstance(update, ClientFailures):
        raise UpdateRejectedError("The update would be read as a failure.")
    if fault := validator.fault_of(update) or validator.shape_fault_of(update):
        raise UpdateRejectedError(f"The update would be refused: {fault}.")
    return update

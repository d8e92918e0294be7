"""One client's update on its way: in a smaller form, with error feedback where that form drops something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.client_state import ClientState
from fedvit.errors import UpdateRejectedError
from fedvit.privacy.outputs import output_id
from fedvit.privacy.randomness import SecretStream
from fedvit.privacy.secrets import derive_secret
from fedvit.types import Encoding, TrainTask
from fedvit.updates import ClientAnswer, ClientFailures, ClientUpdate, EncodedUpdate
from fedvit.wire.updates import encode_smaller

_Arrays = Mapping[str, npt.NDArray[np.floating]]


class UpdateEncoder:
    """Turns updates into bytes. What it does to them is post-processing of what was noised, by coins of its own.

    A repeated round repeats its bytes: coins are bound to the release, and what top-k dropped is read as the first
    attempt read it.

    Args:
        home: where what was dropped waits for the client's next round.
        root_secret: coins are derived from it.
        top_k_fraction: of all values.
    """

    def __init__(self, home: Path, root_secret: bytes, top_k_fraction: float) -> None:
        self._dropped = ClientState(home, "dropped")
        self._root_secret, self._fraction = root_secret, top_k_fraction

    def encoded(
        self, task: TrainTask, own: ClientAnswer, encoding: Encoding, validator: UpdateValidator
    ) -> EncodedUpdate:
        """One client's answer as it travels; as float32 if validation would reject the smaller form."""
        if isinstance(own, ClientFailures):
            return _carried(own, self._bytes(task, own, encoding))
        try:
            if encoding is Encoding.TOP_K:
                return self._with_feedback(task, own, validator)
            sent = _carried(own, self._bytes(task, own, encoding))
            _decoded(sent, validator)
            return sent
        except UpdateRejectedError:
            return _carried(own, self._bytes(task, own, Encoding.FLOAT32))

    def _with_feedback(self, task: TrainTask, own: ClientUpdate, validator: UpdateValidator) -> EncodedUpdate:
        outcome = own.outcome
        dropped, _ = self._dropped.before(task.run_id, task.round_index, outcome.client_id)
        whole = {n: np.asarray(a + own.total_weight * dropped.get(n, 0.0)) for n, a in own.weighted_sum.items()}
        content = self._bytes(task, replace(own, weighted_sum=whole), Encoding.TOP_K)
        sent = _carried(own, content)
        decoded = _decoded(sent, validator)
        left = _difference(whole, decoded.weighted_sum, own.total_weight)
        self._dropped.leave(task.run_id, task.round_index, outcome.client_id, left)
        return sent

    def _bytes(self, task: TrainTask, own: ClientAnswer, encoding: Encoding) -> bytes:
        (outcome,) = own.outcomes
        secret = derive_secret(self._root_secret, f"{outcome.client_id}/rounding")
        release = output_id(task, outcome.client_id, outcome.num_examples)
        coins = SecretStream(secret, "rounding", {"release": release, "encoding": encoding.value})
        return encode_smaller(own, encoding, coins.uniform, self._fraction)


def _carried(own: ClientAnswer, content: bytes) -> EncodedUpdate:
    (outcome,) = own.outcomes
    return EncodedUpdate(own.round_index, outcome, content)


def _decoded(sent: EncodedUpdate, validator: UpdateValidator) -> ClientUpdate:
    """The update as the receiver will read it.

    Raises:
        UpdateRejectedError: the receiver will reject it.
    """
    update = validator.decoded(sent)
    if isinstance(update, ClientFailures):
        raise UpdateRejectedError("The update would be read as a failure.")
    if fault := validator.fault_of(update):
        raise UpdateRejectedError(f"The update would be refused: {fault}.")
    return update


def _difference(whole: _Arrays, sent: _Arrays, weight: float) -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.asarray((array - sent[name]) / weight, np.float32) for name, array in whole.items()}

"""The identity of what one client releases in one round. Imports no torch: the accountant's side reads it."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from fedvit.types import TrainTask


def release_id(task: TrainTask, client_id: str, num_examples: int) -> str:
    """SHA-256, hex, of everything that determines the released value: the task, the client and its number of examples.

    A retry has the same identity, draws the same noise and is charged once; anything else is another release.
    """
    facts = dataclasses.asdict(task)
    if facts["privacy_unit"] == "record":
        # A round that was charged before there was another unit must be the same release after it.
        del facts["privacy_unit"]
    identity = {"task": facts, "client_id": client_id, "num_examples": num_examples}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

"""Identity of a client's mechanism output in one round. Imports no torch, because the accountant uses it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import lru_cache

from fedvit.types import TrainTask


def output_id(task: TrainTask, client_id: str, num_examples: int) -> str:
    """SHA-256, hex, of all that determines the output: the task, the client and its number of examples.

    A retry has the same identity, draws the same noise and is charged once; anything else is another output.
    """
    # Canonical JSON with sorted keys; the task is encoded once for a cohort.
    whose = f'"client_id":{json.dumps(client_id)},"num_examples":{num_examples:d}'
    return hashlib.sha256(f'{{{whose},"task":{_canonical(task)}}}'.encode()).hexdigest()


@lru_cache(maxsize=8)
def _canonical(task: TrainTask) -> str:
    facts = dataclasses.asdict(task)
    if facts["privacy_unit"] == "record":
        # Outputs that were charged before privacy_unit existed keep their identity.
        del facts["privacy_unit"]
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)

"""The identity of a mechanism output: everything counts, and the accountant can compute it without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from fedvit.privacy.randomness import output_id
from fedvit.types import TrainTask

TASK = TrainTask("run-1", 3, "base", "data", 1.5, 0.5, 1.0, 1, 0.1)
CHANGES: dict[str, Any] = {
    "privacy_unit": "client",
    "context_digest": "other",
    "run_id": "run-2",
    "round_index": 4,
    "base_digest": "other",
    "data_digest": "other",
    "noise_multiplier": 1.6,
    "sampling_prob": 0.4,
    "l2_clip_norm": 1.1,
    "local_steps": 2,
    "learning_rate": 0.2,
    "noise_at": "server",
    "attempt": 1,
    "participants": 10,
    "sum_weight": 400.0,
}


def test_the_same_release_has_the_same_identity() -> None:
    assert output_id(TASK, "car-1", 40) == output_id(dataclasses.replace(TASK), "car-1", 40)
    assert len(bytes.fromhex(output_id(TASK, "car-1", 40))) == 32


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainTask)])
def test_every_field_of_the_task_counts(name: str) -> None:
    assert output_id(dataclasses.replace(TASK, **{name: CHANGES[name]}), "car-1", 40) != output_id(TASK, "car-1", 40)


def test_fields_that_are_newer_than_a_run_leave_its_outputs_alone() -> None:
    assert output_id(TASK, "car-1", 40) == "13cc91e4a25f0a56959699763facdaa378b2346a99fa9d63caf4e23df38ac641"


def test_the_client_and_its_number_of_examples_count() -> None:
    assert len({output_id(TASK, "car-1", 40), output_id(TASK, "car-2", 40), output_id(TASK, "car-1", 41)}) == 3


def test_a_task_that_is_no_number_has_no_identity() -> None:
    with pytest.raises(ValueError):
        output_id(dataclasses.replace(TASK, learning_rate=float("nan")), "car-1", 40)


def test_the_module_loads_no_torch() -> None:
    program = "import sys, fedvit.privacy.randomness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""Small models of timm's families on the whole path, and the table of all of them, which a command generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.model_families import (
    CLIENTS,
    FAMILIES,
    RESULTS,
    ROUNDS,
    page,
    run_first_that_trains,
    write_images,
)

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "model", ["aimv2_large_patch14_224", "vit_small_patch16_rope_mixed_224", "vit_base_patch16_siglip_224"]
)
def test_a_family_is_trained_exported_and_served(tmp_path: Path, model: str) -> None:
    (family,) = (one for one in FAMILIES if one.model == model)
    result = run_first_that_trains(family, write_images(tmp_path / "images"), tmp_path)
    assert result.trainable == "all"
    assert result.updates == ROUNDS * CLIENTS
    assert result.epsilon > 0
    assert result.agreement == 1.0


def test_the_table_holds_every_family_and_is_what_the_results_say() -> None:
    found = json.loads(RESULTS.read_text())
    assert RESULTS.with_suffix(".md").read_text() == page(found)
    assert [(one["family"], one["model"]) for one in found["results"]] == [(one.name, one.model) for one in FAMILIES]
    assert len({one.name for one in FAMILIES}) == len(FAMILIES) >= 18
    for one in found["results"]:
        assert one["updates"] == ROUNDS * CLIENTS
        assert one["agreement"] == 1.0

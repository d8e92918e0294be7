"""``fedvit privacy noise``: where noise is added, whom that trusts, and the parameters of secure aggregation."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from typer.testing import CliRunner

from fedvit.cli.main import app

UNITS = {
    "record": ("privacy.privacy_unit=record", "training.local_steps=1"),
    "client": ("privacy.privacy_unit=client", "training.cohort.max_participations=5"),
}
OF_COHORT = ("--clients", "30", "--images", "1200", "--parameters", "50000")


def outlook(*assignments: str, of: tuple[str, ...] = OF_COHORT, status: int = 0) -> Any:
    sets = [word for one in ("privacy.noise_multiplier=1.5", *assignments) for word in ("--set", one)]
    done = CliRunner().invoke(app, ["privacy", "noise", *of, "--json", *sets])
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(("unit", "place", "factor"), [("record", "client", math.sqrt(30)), ("client", "server", 1.0)])
def test_by_default_the_unit_decides_where_noise_is_added(unit: str, place: str, factor: float) -> None:
    shown = outlook(*UNITS[unit])
    assert (shown["privacy_unit"], shown["noise_at"]) == (unit, place)
    assert shown["noise_over_central"] == pytest.approx(factor)
    assert "ring_bits" not in shown


@pytest.mark.parametrize("unit", ["record", "client"])
def test_distributed_noise_shows_what_the_bounds_give(unit: str) -> None:
    distributed = *UNITS[unit], "privacy.noise_at=distributed"
    shown = outlook(*distributed, "secure_aggregation.min_survivors=27", "secure_aggregation.max_colluding=2")
    assert (shown["min_survivors"], shown["honest_survivors"]) == (27, 25)
    # Sized for 25, and all 30 add their shares; rounding costs 2% of the variance at most.
    assert 1 <= shown["noise_over_central"] / math.sqrt(30 / 25) < math.sqrt(1.025)
    assert (shown["neighbours"] + 1) / 2 < shown["threshold"] <= shown["neighbours"] + 1 <= 30
    assert 8 < shown["ring_bits"] <= 20
    assert shown["ring_bytes"] < 1.2 * shown["float32_bytes"]


def test_what_is_not_possible_is_refused_with_the_width_needed() -> None:
    distributed = *UNITS["record"], "privacy.noise_at=distributed"
    needed = outlook(*distributed)["ring_bits"]
    refused = outlook(*distributed, f"secure_aggregation.bits={needed - 2}", status=2)
    assert str(needed - 1) in json.dumps(refused) or str(needed) in json.dumps(refused)
    outlook(*distributed, "secure_aggregation.min_survivors=31", status=2)

"""``fedvit simulate`` on real images and a real, tiny model: curves side by side, one report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from fedvit.cli.main import app
from fedvit.cli.research import planned_runs
from fedvit.errors import ConfigError, FedvitError
from fedvit.tools.sweep.outcome import TrialOutcome

torch.set_num_threads(1)


@pytest.fixture
def config(tmp_path: Path, images: Path) -> Path:
    """Six clients with red and green images, an untrained stem, a head to train."""
    tree: dict[str, Any] = {
        "home": str(tmp_path / "var"),
        "data": {
            "source": "folder",
            "path": images.name,
            "image_size": 32,
            "partition": {"scheme": "iid", "clients": 6, "min_examples": 2},
        },
        "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
        "training": {"rounds": 4, "local_steps": 2, "learning_rate": 1.0},
        "privacy": {"sampling_prob": 1.0},
        "simulation": {"private": False, "target_accuracy": 0.9},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def simulate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_curves_side_by_side_end_in_one_report_that_says_what_is_not_real(config: Path, tmp_path: Path) -> None:
    shown = simulate("-c", str(config), "--vary", "simulation.mode=synchronous,asynchronous", "--seeds", "2", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"run 4/4 .*accuracy [01]\.\d{3}, .* \d:\d\d:\d\d left \d\d:\d\d", shown.stderr)
    summary = json.loads(shown.stdout)
    report = tmp_path / "var" / "simulation"
    assert json.loads((report / "summary.json").read_text()) == summary
    assert [(run["name"], run["seed"]) for run in summary["runs"]] == [
        (f"mode={mode}", seed) for mode in ("synchronous", "asynchronous") for seed in (0, 1)
    ]
    assert summary["private"] is False
    for run in summary["runs"]:
        assert run["epsilon"] is None
        assert run["accuracy"] > 0.8
        assert sum(run["outcomes"].values()) >= run["curve"][-1]["updates"]
    page = (report / "index.html").read_text()
    assert "Not private: clients trained by plain SGD" in page
    for mode in ("synchronous", "asynchronous"):
        assert f'id="accuracy-series-mode={mode}-1"' in page
    # The state of a real run is not begun.
    assert [path.name for path in (tmp_path / "var").iterdir()] == ["simulation"]


def test_a_private_simulation_is_noised_and_shows_what_it_cost(config: Path, tmp_path: Path) -> None:
    arguments = [
        "--set",
        "simulation.private=true",
        "--set",
        "privacy.noise_multiplier=1.0",
        "--to",
        str(tmp_path / "to"),
    ]
    shown = simulate("-c", str(config), *arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "not private" not in shown.stdout.lower()
    (run,) = json.loads((tmp_path / "to" / "summary.json").read_text())["runs"]
    assert run["epsilon"] > 1
    assert "Not private" not in (tmp_path / "to" / "index.html").read_text()


def test_every_combination_is_planned_under_a_name_of_its_own(config: Path) -> None:
    vary = ["training.aggregation=fedavg,median", "simulation.faults=[[], [{share: 0.2, kinds: [nan]}]]"]
    planned = list(planned_runs([config], None, (), vary, 1))
    assert [name for name, _ in planned] == [
        f"aggregation={rule} faults={faults}"
        for rule in ("fedavg", "median")
        for faults in ("[]", "[{kinds: [nan], share: 0.2}]")
    ]
    assert [s.training.aggregation for _, s in planned] == ["fedavg", "fedavg", "median", "median"]
    assert [len(s.simulation.faults) for _, s in planned] == [0, 1, 0, 1]
    other = config.with_name("other.yaml")
    other.write_text(config.read_text())
    assert [name for name, _ in planned_runs([config, other], None, (), (), 1)] == ["toy", "other"]


class StoppedSystem:
    """Writes one trial and then fails, as when a worker dies."""

    def sweep(self, folder: Path, on_trial: Callable[[TrialOutcome], None]) -> None:
        outcome = TrialOutcome(
            self.first, {"learning_rate": 1.0}, 0, "completed", score=0.5, standard_error=0.1, epsilon=1.0
        )
        path = folder / "trials" / f"{self.first}.json"
        path.write_text(json.dumps(outcome.to_json()))
        on_trial(outcome)
        raise FedvitError("2 trials broke off.")

    first = ""


def test_a_sweep_that_breaks_off_still_writes_the_page_of_what_is_finished(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, rates = StoppedSystem(), "sweep.parameters={learning_rate: [1.0, 2.0, 3.0]}"
    monkeypatch.setattr("fedvit.cli.research.find_system", lambda _: system)
    arguments = ["sweep", "-c", str(config), "--set", rates, "--to", str(tmp_path / "sweep")]
    planned = CliRunner().invoke(app, [*arguments, "--plan", "--json"])
    system.first = json.loads(planned.stdout)["trials"][0]["trial_id"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert re.search(r"trial 1/3 .*completed, accuracy 0\.500 +\d:\d\d:\d\d left", done.stderr)
    # The folder was new: there is nothing to take from anybody.
    assert "Other users" not in done.stderr
    assert (tmp_path / "sweep").stat().st_mode & 0o077 == 0
    page = (tmp_path / "sweep" / "index.html").read_text()
    assert system.first in page


def test_a_sweep_with_an_unknown_rule_begins_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedvit.cli.research.find_system", lambda _: pytest.fail("started"))
    rules = "sweep.parameters={aggregation: [fedavg, fedadm]}"
    for more in ([], ["--plan"]):
        done = CliRunner().invoke(app, ["sweep", "-c", str(config), "--set", rules, *more])
        assert done.exit_code == 2
    assert not (tmp_path / "var" / "sweep").exists()


@pytest.mark.parametrize("vary", ["training.rounds", "training.rounds=", "training.rounds=[1"])
def test_a_setting_without_values_is_refused_by_name(config: Path, vary: str) -> None:
    with pytest.raises(ConfigError) as error:
        list(planned_runs([config], None, (), [vary], 1))
    assert repr(vary) in error.value.message


WORKLOAD = "workload.clients_class=workload_clients:PullingClients"


def test_a_workload_is_not_simulated_under_its_name(config: Path, tmp_path: Path) -> None:
    shown = simulate("-c", str(config), "--set", WORKLOAD, "--json")
    assert shown.exit_code == 2
    assert json.loads(shown.stdout)["error"] == "invalid-config"
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize("command", [("sweep",), ("data", "inspect"), ("finetune",)])
def test_no_other_program_ignores_a_workload(command: tuple[str, ...], config: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, [*command, "-c", str(config), "--set", WORKLOAD, "--json"])
    assert shown.exit_code == 2
    assert json.loads(shown.stdout)["error"] == "invalid-config"
    assert not (tmp_path / "var").exists()

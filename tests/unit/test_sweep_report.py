"""``fedvit sweep`` as far as it goes without Ray: its report, its choice as a file, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet
from typer.testing import CliRunner, Result

from fedvit.cli.main import app
from fedvit.config import Settings
from fedvit.rounds.steering import aggregation_settings, begin_in_initial_mode, change_aggregation_settings
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.tools.report.sweep import write_report
from fedvit.tools.sweep.outcome import TrialOutcome
from fedvit.tools.sweep.space import TrialPlan, plan_sweep

TREE: dict[str, Any] = {
    "training": {"rounds": 6, "aggregation": "fedbuff"},
    "privacy": {"target_epsilon": 20},
    "simulation": {"mode": "asynchronous", "buffer_size": 7},
    "sweep": {
        "parameters": {"noise_multiplier": [1.0, 2.0], "staleness_tolerance": [0, 4], "trainable": ["head", "all"]},
        "first_rung": 2,
    },
}


def outcome_of(plan: TrialPlan, index: int) -> TrialOutcome:
    early = index == 3
    score = 0.9 - 0.1 * (plan.parameters["noise_multiplier"] - 1) + 0.001 * index
    return TrialOutcome(
        plan.trial_id,
        plan.parameters,
        0,
        "stopped_early" if early else "completed",
        "behind <those> as private" if early else None,
        epsilon=None if early else plan.epsilon,
        planned_epsilon=plan.epsilon,
        score=score,
        standard_error=0.01,
        rounds=2 if early else 6,
        hours=1.0 + plan.parameters["staleness_tolerance"],
        curve=[(0.5, 1, 0.5), (1.0, 2, score)],
        staleness={"0": 30, "1": 10},
    )


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(environ={}, overrides=TREE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "of" / "eight"


@pytest.fixture(scope="module")
def written(folder: Path, settings: Settings) -> dict[str, Any]:
    plans = plan_sweep(settings)
    outcomes = [outcome_of(plan, index) for index, plan in enumerate(plans)]
    return write_report(folder, settings, plans, outcomes)


def test_the_page_has_every_trial_the_charts_and_the_price(written: dict[str, Any], folder: Path) -> None:
    page = (folder / "index.html").read_text()
    for one in written["trials"]:
        assert page.count(f"parallel-series-{one['trial_id']}") == 1
    for part in ('id="pareto-series-front"', 'id="pareto-series-chosen"', 'id="heat-', 'class="right"'):
        assert part in page
    # The cell of the trial that was stopped early, and no other one.
    assert len(re.findall(r">0\.90[23]\*<", page)) == 1
    assert "behind &lt;those&gt; as private" in page
    assert "NaN" not in page
    assert f"{written['cost']['with_sweep']:.3f}" in page
    assert "fedvit run --config" in page
    assert json.loads((folder / "summary.json").read_text()) == written


def test_the_parquet_has_a_row_a_trial_with_its_parameters(written: dict[str, Any], folder: Path) -> None:
    rows = parquet.read_table(folder / "trials.parquet").to_pylist()
    assert len(rows) == 8
    assert [row["param.trainable"] for row in rows[:2]] == ["head", "all"]
    assert {row["param.noise_multiplier"] for row in rows} == {1.0, 2.0}
    assert rows[0]["curve"][1]["round_index"] == 2
    assert rows[0]["mean_staleness"] == 0.25
    assert [row["trial_id"] for row in rows if row["chosen"]] == written["chosen"]["trial_ids"]
    assert {row["trial_id"] for row in rows if row["pareto"]} == {
        trial_id for one in written["pareto_front"] for trial_id in one["trial_ids"]
    }


def test_the_chosen_one_is_a_file_that_a_real_run_takes(written: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    # It is the best by far more than its error, and the fastest of three that are as good.
    assert written["chosen"]["parameters"] == {"noise_multiplier": 1.0, "staleness_tolerance": 0, "trainable": "all"}
    chosen = load_settings(folder / "best.yaml", environ={})
    assert (chosen.privacy.noise_multiplier, chosen.model.trainable) == (1.0, "all")
    assert chosen.training.rounds == 6
    with Store.open(tmp_path / "run") as store:
        begun = begin_in_initial_mode(store, chosen)
        assert (begun.mode, begun.buffer_size, begun.staleness_tolerance) == ("asynchronous", 7, 0)
        change_aggregation_settings(store, lambda now: type(now)(now.revision, "synchronous"))
        # What an operator has set since then stays.
        begin_in_initial_mode(store, chosen)
        assert aggregation_settings(store).mode == "synchronous"


def test_where_a_run_begins_makes_it_no_other_run(settings: Settings) -> None:
    from fedvit.settings import changed_settings

    other = changed_settings(settings, {"training.initial_mode.mode": "asynchronous"})
    assert other.training_digest() == settings.training_digest()


def test_nothing_within_the_budget_is_nothing_chosen(tmp_path: Path, settings: Settings) -> None:
    tight = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"target_epsilon": 0.5})})
    plans = plan_sweep(settings)
    summary = write_report(tmp_path / "s", tight, plans, [outcome_of(p, i) for i, p in enumerate(plans)])
    assert summary["chosen"] is None
    assert not (tmp_path / "s" / "best.yaml").exists()
    assert "no trial ran to its end within the budget" in (tmp_path / "s" / "index.html").read_text()


def test_trials_that_all_failed_make_a_page_all_the_same(tmp_path: Path, settings: Settings) -> None:
    plans = plan_sweep(settings)
    failed = [TrialOutcome(p.trial_id, p.parameters, 0, "failed", "no room") for p in plans]
    summary = write_report(tmp_path / "s", settings, plans, failed)
    assert (summary["chosen"], summary["pareto_front"]) == (None, [])
    assert "no room" in (tmp_path / "s" / "index.html").read_text()


def invoked(tmp_path: Path, *arguments: str, **changes: Any) -> Result:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**TREE, "home": str(tmp_path / "var"), **changes}))
    return CliRunner().invoke(app, ["sweep", "--config", str(path), *arguments])


def test_the_plan_is_shown_and_nothing_is_begun(tmp_path: Path) -> None:
    shown = invoked(tmp_path, "--plan", "--json")
    assert shown.exit_code == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert len(result["trials"]) == 8
    assert result["rungs"] == [2]
    assert result["trials"][0]["planned_epsilon"] > result["trials"][-1]["planned_epsilon"]
    assert "Compared after 2 rounds" in invoked(tmp_path, "--plan").stdout
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {}}, "sweep.parameters is empty"),
        ({"sweep": {"parameters": {"noise": [1.0]}}}, "sweep.parameters.noise is no parameter"),
        ({"sweep": {"parameters": {"noise_multiplier": [0]}}}, "stays within no budget"),
        ({"sweep": {"parameters": {"local_steps": [1]}, "first_rung": 9}}, "sweep.first_rung is 9"),
        ({"sweep": {"parameters": {"local_steps": [1]}, "concurrent_trials": 4000}}, "no room for 4000 trials"),
        ({"sweep": {"parameters": {"local_steps": [1]}, "rungs": 3}}, "'sweep.rungs' is no setting"),
        ({"data": {"source": "folder", "path": "/nowhere"}}, "/nowhere"),
        ({"workload": {"clients_class": "my:Clients"}}, "workload.clients_class"),
    ],
)
def test_bad_input_is_refused_by_name_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    # Ray would be started here, and is never.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    refused = invoked(tmp_path, **changes)
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert "Traceback" not in refused.output
    left = {path.name for path in (tmp_path / "var").rglob("*") if path.is_file()}
    assert left <= {"sweep.json", "system.lock", "root.key"}


def test_a_folder_of_another_sweep_is_left_alone(tmp_path: Path, settings: Settings) -> None:
    from fedvit.tools.sweep.journal import Journal

    with Journal(tmp_path / "to").working(settings):
        pass
    before = (tmp_path / "to" / "sweep.json").read_bytes()
    refused = invoked(tmp_path, "--to", str(tmp_path / "to"), privacy={"target_epsilon": 3})
    assert refused.exit_code == 2
    assert "holds a sweep with other settings" in refused.stderr
    assert (tmp_path / "to" / "sweep.json").read_bytes() == before

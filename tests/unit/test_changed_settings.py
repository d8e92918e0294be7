"""`fedvit run` and `fedvit up` with other settings than those of the state folder or of the system that runs on it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trained_home import remaining, trained

from fedvit.cli.options import Options
from fedvit.cli.state import settings_in_force
from fedvit.config import Settings
from fedvit.errors import ConfigError, ConflictError
from fedvit.ports import SystemUrls
from fedvit.settings import load_settings
from fedvit.store.records import RoundCommit
from fedvit.store.store import Store
from fedvit.tools.report.measure import measure
from fedvit.types import Cohort, RunStatus
from serve_apps.startup.checks import IMAGE_SIZE, check_budget, check_training

URLS = SystemUrls("http://127.0.0.1:9", "http://127.0.0.1:9/inference", ())


def settings_of(home: Path, **overrides: Any) -> Settings:
    return load_settings(environ={}, overrides={"home": home, **overrides})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home whose run-0001 is released, with its report."""
    home = trained(tmp_path / "home", rounds=3)
    (home / "report").mkdir()
    (home / "report" / "summary.json").write_text("of run-0001")
    return home


def begin_another(home: Path, status: RunStatus, reason: str, *, refusal: str | None = None) -> None:
    with Store.open(home) as store:
        store.runs.set_status("run-0001", RunStatus.COMPLETED, None)
        run = store.runs.create(rounds_total=5, noise_multiplier=4.0, config={}, config_digest="x", data_digest="")
        if refusal:
            store.rounds.open(run.run_id, 1, Cohort(1, ("a",)))
            digests = (store.blobs.put(content) for content in (b"other weights", b"frozen"))
            version = store.rounds.commit(run.run_id, 1, RoundCommit(*digests, 0.5, 1.0, 0.5, {}, {}, (), 1.0))
            store.versions.refuse(version.version, refusal)
        store.runs.set_status(run.run_id, status, reason)


@pytest.mark.parametrize(
    ("status", "reason", "refusal"),
    [
        (RunStatus.BUDGET_EXHAUSTED, "The round would raise epsilon to 9.", None),
        (RunStatus.COMPLETED, "All rounds are done.", "Its accuracy is below the gate."),
    ],
)
def test_the_release_of_another_run_is_not_reported(
    home: Path, status: RunStatus, reason: str, refusal: str | None
) -> None:
    begin_another(home, status, reason, refusal=refusal)
    with pytest.raises(ConflictError) as refused:
        measure(settings_of(home), URLS, {}, run_id="run-0002", quiet=True)
    for part in ("run-0002", "run-0001", reason, refusal or ""):
        assert part in refused.value.message
    assert [path.name for path in (home / "report").iterdir()] == ["summary.json"]
    assert (home / "report" / "summary.json").read_text() == "of run-0001"


def test_a_budget_below_what_was_spent_is_refused(home: Path) -> None:
    spent = 8.0 - remaining(home)
    with pytest.raises(ConfigError) as refused:
        check_budget(settings_of(home, privacy={"target_epsilon": spent * 0.9}))
    assert f"{spent:.4f}" in refused.value.message
    check_budget(settings_of(home, privacy={"target_epsilon": spent}))
    check_budget(settings_of(home.parent / "new", privacy={"target_epsilon": 0.01}))


def test_a_delta_at_which_more_was_spent_than_the_budget_is_refused(home: Path) -> None:
    spent = 8.0 - remaining(home)
    with pytest.raises(ConfigError):
        check_budget(settings_of(home, privacy={"target_epsilon": spent, "target_delta": 1e-9}))


def test_another_size_of_the_images_is_refused(home: Path, images: Path) -> None:
    with Store.open(home) as store:
        store.metadata.set(IMAGE_SIZE, 96)
    data = {"source": "folder", "path": images, "image_size": 64, "partition": {"clients": 2, "scheme": "iid"}}
    with pytest.raises(ConfigError) as refused:
        check_training(settings_of(home, data=data), lambda _: None)
    assert "96" in refused.value.message


# --- a system that runs already --------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Settings]:
    """The settings of a system that runs on ``tmp_path``."""
    settings = settings_of(tmp_path, training={"rounds": 7})
    facts = {"pid": 1, "control": "http://c", "inference": "http://i", "edges": [], "dashboard": None}
    (tmp_path / "run").mkdir()
    announced = {**facts, "settings": settings.model_dump(mode="json")}
    (tmp_path / "run" / "system.json").write_text(json.dumps(announced))
    with (tmp_path / "system.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield settings


def test_without_settings_those_of_the_running_system_hold(running: Settings) -> None:
    assert settings_in_force(Options(home=running.home)) == running
    same = Options(home=running.home, assignments=["training.rounds=7"])
    assert settings_in_force(same) == running


@pytest.mark.parametrize("assignment", ["training.rounds=5", "data.partition.clients=3", "release.every_rounds=2"])
def test_other_settings_than_those_of_the_running_system_are_refused(running: Settings, assignment: str) -> None:
    options = Options(home=running.home, assignments=["training.rounds=7", assignment])
    with pytest.raises(ConflictError) as refused:
        settings_in_force(options)
    key, _, value = assignment.partition("=")
    assert key in refused.value.message
    assert f"{value} here" in refused.value.message

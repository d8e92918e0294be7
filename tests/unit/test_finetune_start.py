"""Fine-tuning jobs: what is refused before the start, placement of ranks, errors of ranks, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from typer.testing import CliRunner

from actors.trainer import check_room, training_error
from fedvit.cli import training as command
from fedvit.cli.main import app
from fedvit.config import FinetuneConfig, Settings
from fedvit.errors import DataError, FedvitError, PlacementError
from fedvit.ports import FinetuneReport
from fedvit.store.locks import system_lock
from fedvit.store.store import Store


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four training pictures and one test picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 4), ("test", 1)):
        for level, name in ((60, "dark"), (200, "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((32, 32, 3), level + number, np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def refusal(home: Path, pictures: Path, *more: str) -> str:
    """Standard error of a job that is refused as a wrong usage."""
    settings = [
        "data.source=folder",
        "data.image_size=32",
        "model.pretrained=false",
        "privacy.noise_multiplier=1.0",
        *more,
    ]
    options = [option for one in settings for option in ("--set", one)]
    result = CliRunner().invoke(app, ["finetune", "--home", str(home), "--data", str(pictures), *options])
    assert result.exit_code == 2, result.output
    return result.stderr


def test_a_state_folder_of_other_data_is_refused(tmp_path: Path, pictures: Path) -> None:
    with Store.open(tmp_path) as store:
        store.metadata.bind_fleet(data_digest="d" * 64, partition={}, classes=["dark", "light"])
    assert f"belongs to data {'d' * 12}, and folder is" in refusal(tmp_path, pictures)


def test_a_state_folder_on_which_a_system_runs_is_refused(tmp_path: Path, pictures: Path) -> None:
    with system_lock(tmp_path):
        assert "Another fedvit is using the state folder" in refusal(tmp_path, pictures)


def test_a_delta_that_promises_nothing_is_refused(tmp_path: Path, pictures: Path) -> None:
    assert "with n = 8 units" in refusal(tmp_path, pictures, "privacy.target_delta=0.2")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (FinetuneConfig(ranks=4, cpus_per_rank=0.5), "no room for fedvit-rank-3: each asks for 0.5 CPU, and 1.9"),
        (FinetuneConfig(ranks=2, device="cuda"), "no room for fedvit-rank-1: each asks for 1 GPU, and 1 are free"),
        (FinetuneConfig(ranks=9, min_ranks=5), "no room for fedvit-rank-3, fedvit-rank-4: "),
    ],
)
def test_ranks_without_room_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch, config: FinetuneConfig, named: str
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.9, "GPU": 1.0})
    with pytest.raises(PlacementError) as error:
        check_room(config)
    assert named in error.value.message


def test_fewer_ranks_than_wanted_are_enough_where_the_settings_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    assert check_room(FinetuneConfig(ranks=9, min_ranks=2, cpus_per_rank=0.3)) == 3
    assert check_room(FinetuneConfig(ranks=2, min_ranks=1, cpus_per_rank=0.3)) == 2


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (WorkerGroupError("", {1: DataError("x.png cannot be read.")}), DataError, "x.png cannot be read"),
        (WorkerGroupError("", {0: ValueError("of a rank")}), PlacementError, "The ranks of a-job failed: of a rank"),
        (ControllerError(TimeoutError("no place")), PlacementError, "The ranks of a-job failed: no place"),
    ],
)
def test_a_failed_job_says_what_ailed_it(error: TrainingFailedError, kind: type[FedvitError], message: str) -> None:
    with pytest.raises(kind) as raised:
        raise training_error(error, "a-job")
    assert message in raised.value.message


@pytest.mark.parametrize(("stopped", "status"), [(None, 0), ("The budget is spent.", 1)])
def test_the_report_is_one_json_document_and_the_status_says_whether_all_steps_were_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped: str | None, status: int
) -> None:
    numbers = (0.9, 0.1, {"dark": 1.0}, 1.0, 2.0, 3.0, 1e-5, 4.0)
    report = FinetuneReport("finetune-1", 4, 8, 2, "a processor", 10.0, *numbers, weights="w", stopped=stopped)
    started: list[Settings] = []

    class System:
        def __init__(self, settings: Settings) -> None:
            started.append(settings)

        def finetune(self, on_step: object) -> FinetuneReport:
            return report

    monkeypatch.setattr(command, "find_system", System)
    result = CliRunner().invoke(app, ["finetune", "--home", str(tmp_path), "--ranks", "2", "--json"])
    assert result.exit_code == status, result.output
    assert json.loads(result.stdout)["images_per_s"] == 10.0
    assert started[0].finetune.ranks == 2
    shown = CliRunner().invoke(app, ["finetune", "--home", str(tmp_path), "--ranks", "2"])
    assert "Weights: w" in shown.stdout

"""A fine-tuning job: charged before it steps, resumed as if nothing had happened, the same on any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from raises import raises_naming

from fedvit.config import Settings
from fedvit.data.sources import open_source
from fedvit.errors import BudgetExhaustedError, ConfigError, IntegrityError
from fedvit.finetune.checkpoint import HEADER, Checkpoint
from fedvit.finetune.job import Finetuning, Outcome, plan_of, with_noise
from fedvit.finetune.ranks import Ranks
from fedvit.models.build import build_model
from fedvit.models.trainable import trainable_weights
from fedvit.ports import POPULATION, Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.ranks import on_ranks
from fedvit.types import Weights

torch.set_num_threads(1)

SIGMA, STEPS, RANGE = 3.0, 6, 2
# Weights are drawn from torch's one generator: ranks that are threads have to build their models one after another.
BUILDING = threading.Lock()
Files = Mapping[str, bytes]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight training and two test pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(1)
    for split, count in (("train", 8), ("test", 2)):
        for level, name in ((60, "dark"), (200, "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(level - 50, level + 50, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def settings_of(home: Path, pictures: Path, privacy: dict[str, Any] | None = None, **finetune: Any) -> Settings:
    overrides = {
        "home": home,
        "data": {"source": "folder", "path": pictures, "image_size": 32},
        "model": {"pretrained": False, "hybrid": {"width": 16, "heads": 2}},
        "privacy": {"noise_multiplier": SIGMA, "target_delta": 1e-3, "target_epsilon": 30, **(privacy or {})},
        "training": {"physical_batch_size": 3},
        "finetune": {"steps": STEPS, "checkpoint_every_steps": RANGE, **finetune},
    }
    return load_settings(environ={}, overrides=overrides)


class Job:
    """A job on a state folder: its real ledger, its saved checkpoints, in order."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.checkpoints = settings, list[Files]()
        self.charged: list[tuple[int, int]] = []

    def run(self, ranks: Ranks | None = None, checkpoint: Files | None = None, fail_at: int | None = None) -> Outcome:
        """To its end, or to a save that fails: then the range's steps were taken and its checkpoint is lost."""

        def save(step: int, files: Files) -> None:
            if step == fail_at:
                raise ConnectionError("killed")
            if files:
                self.checkpoints.append(files)

        with Store.open(self.settings.home) as store:
            accountant = PrivacyAccountant(store, self.settings)

            def charge(charges: Sequence[Charge]) -> None:
                self.charged.append((charges[0].round_index, len(self.checkpoints)))
                accountant.write(charges)

            with BUILDING:
                job = Finetuning(self.settings, ranks or Ranks(), charge=charge, save=save)
            return job.run(checkpoint)

    def weights(self) -> Weights:
        plan = plan_for(self.settings)
        return Checkpoint.from_files(self.checkpoints[-1], plan.digest).weights

    def ledger(self) -> list[Charge]:
        with Store.open(self.settings.home) as store:
            return [entry.charge for entry in store.ledger.entries()]


def plan_for(settings: Settings) -> Any:
    source = open_source(settings.data)
    model = build_model(settings.model, len(source.classes), settings.data.image_size)
    return plan_of(settings, source, trainable_weights(model))


Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path, pictures: Path) -> Iterator[Make]:
    """Jobs on one state folder after another, all with the same secret key."""

    def build(name: str, **options: Any) -> Job:
        home = tmp_path / name
        (home / "keys").mkdir(parents=True)
        (home / "keys" / "root.key").write_bytes(bytes(range(32)))
        return Job(settings_of(home, pictures, **options))

    return build


def relative(weights: Weights, truth: Weights) -> float:
    def flat(arrays: Weights) -> Any:
        return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])

    return float(np.linalg.norm(flat(weights) - flat(truth)) / np.linalg.norm(flat(truth)))


def test_every_range_is_charged_once_to_everybody_and_before_it_is_taken(make: Make) -> None:
    job = make("home")
    outcome = job.run()
    # One more checkpoint is there each time that a charge is written.
    assert job.charged == [(0, 0), (2, 1), (4, 2)]
    assert [(c.unit_id, c.steps, c.sampling_prob, c.noise_multiplier) for c in job.ledger()] == 3 * [
        (POPULATION, RANGE, 0.5, SIGMA)
    ]
    with Store.open(job.settings.home) as store:
        spent = PrivacyAccountant(store, job.settings).budget().epsilon_spent
    assert spent == pytest.approx(epsilon_pld({PoissonGaussian(SIGMA, 0.5): STEPS}, 1e-3))
    assert outcome.steps == STEPS
    assert outcome.evaluation is not None
    assert outcome.evaluation.num_examples == 4


@pytest.mark.parametrize("optimizer", [{"momentum": 0.9}, {"optimizer": "adam", "learning_rate": 0.01}])
def test_a_job_that_lost_a_range_repeats_it_to_the_bit_and_pays_nothing_more(
    make: Make, optimizer: dict[str, Any]
) -> None:
    whole, broken = make("whole", **optimizer), make("broken", **optimizer)
    whole.run()
    with pytest.raises(ConnectionError):
        broken.run(fail_at=4)
    assert len(broken.ledger()) == 2
    broken.run(checkpoint=broken.checkpoints[-1])
    assert broken.checkpoints[-1] == whole.checkpoints[-1]
    assert broken.ledger() == whole.ledger()


def test_a_job_that_begins_on_two_ranks_and_ends_on_one_is_the_same_job(make: Make) -> None:
    # Small steps: on a large one the noise lifts rounding far above where it began.
    whole, elastic = make("whole", learning_rate=0.2), make("elastic", learning_rate=0.2)
    whole.run()
    elastic_settings = elastic.settings
    elastic.settings = elastic_settings.model_copy(
        update={"finetune": elastic_settings.finetune.model_copy(update={"steps": 4, "ranks": 2})}
    )
    on_ranks(2, elastic.run)
    assert len(elastic.checkpoints) == 2
    elastic.settings = elastic_settings
    elastic.run(checkpoint=elastic.checkpoints[-1])
    assert relative(elastic.weights(), whole.weights()) < 1e-5
    assert elastic.ledger() == whole.ledger()


def test_without_budget_all_ranks_end_before_the_range_and_rank_0_says_why(make: Make) -> None:
    two = epsilon_pld({PoissonGaussian(SIGMA, 0.5): 2 * RANGE}, 1e-3)
    job = make("home", privacy={"target_epsilon": two + 1e-6})
    first, second = on_ranks(2, job.run)
    assert isinstance(first.error, BudgetExhaustedError)
    assert second.error is not None
    assert first.steps == second.steps == 4
    assert len(job.checkpoints) == len(job.ledger()) == 2


def test_a_finished_job_has_nothing_left_to_take_or_to_pay(make: Make) -> None:
    job = make("home")
    job.run()
    again = job.run(checkpoint=job.checkpoints[-1])
    assert (again.steps, again.images_per_s, len(job.checkpoints), len(job.ledger())) == (STEPS, None, 3, 3)


def test_a_checkpoint_of_another_job_or_a_damaged_one_is_refused(make: Make) -> None:
    job, other = make("home"), make("other", learning_rate=0.5)
    job.run()
    with pytest.raises(IntegrityError):
        other.run(checkpoint=job.checkpoints[-1])
    damaged = {**job.checkpoints[-1], HEADER: b"{"}
    with pytest.raises(IntegrityError):
        job.run(checkpoint=damaged)


def test_what_determines_a_step_makes_another_job_and_nothing_else_does(make: Make) -> None:
    settings = make("home").settings
    digest = plan_for(settings).digest

    def changed(section: str, **values: Any) -> str:
        part = getattr(settings, section).model_copy(update=values)
        return str(plan_for(settings.model_copy(update={section: part})).digest)

    assert changed("finetune", steps=100, ranks=4, checkpoint_every_steps=1) == digest
    others = [
        changed("finetune", learning_rate=1.0),
        changed("finetune", momentum=0.5),
        changed("finetune", precision="bfloat16"),
        changed("privacy", l2_clip_norm=0.5),
        changed("privacy", noise_multiplier=2.0),
        changed("privacy", sampling_prob=0.25),
        changed("model", seed=1),
    ]
    assert len({digest, *others}) == len(others) + 1


def test_a_range_of_other_length_is_another_line_of_the_ledger(make: Make) -> None:
    plan = plan_for(make("home").settings)
    lines = {plan.charge(0, 2).output_id, plan.charge(0, 3).output_id, plan.charge(1, 3).output_id}
    assert len(lines) == 3


def test_noise_is_calibrated_to_all_steps_and_only_records_are_protected(make: Make) -> None:
    settings = make("home", privacy={"noise_multiplier": None, "target_epsilon": 4.0}).settings
    sigma = with_noise(settings).privacy.noise_multiplier
    assert sigma is not None
    assert 3.9 < epsilon_pld({PoissonGaussian(sigma, 0.5): STEPS}, 1e-3) <= 4.0
    whole_clients = settings.privacy.model_copy(update={"privacy_unit": "client"})
    with raises_naming(ConfigError, "privacy.privacy_unit"):
        with_noise(settings.model_copy(update={"privacy": whole_clients}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ranks": 2, "min_ranks": 3}, ["min_ranks (3)", "ranks (2)"]),
        ({"optimizer": "adam", "momentum": 0.9}, ["momentum", "'sgd'"]),
        ({"ranks": 0}, ["finetune.ranks"]),
        ({"rank": 2}, ["'ranks'"]),
    ],
)
def test_finetune_settings_that_do_not_fit_are_named(changes: dict[str, Any], named: list[str]) -> None:
    with raises_naming(ConfigError, *named):
        load_settings(environ={}, overrides={"finetune": changes})


def test_silos_protect_records_and_are_another_run() -> None:
    cohort = {"selection": "poisson", "sampling_prob": 0.5}
    overrides = {"training": {"ranks": 2, "cohort": cohort}, "privacy": {"privacy_unit": "client"}}
    with raises_naming(ConfigError, "training.ranks", "privacy.privacy_unit"):
        load_settings(environ={}, overrides=overrides)
    one, two = (load_settings(environ={}, overrides={"training": {"ranks": ranks}}) for ranks in (1, 2))
    assert "ranks" not in one.training_identity()["training"]
    assert one.training_digest() != two.training_digest()

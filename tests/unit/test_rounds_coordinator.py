"""The coordinator over a real store and a real ledger, with a model and a fleet that need no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.config import Settings
from fedvit.ports import FleetPort
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import RunStatus, TrainingProgress
from fedvit.wire.manifest import load_or_create_signing_key, verify_manifest

TARGET = np.array([1.0, -2.0], dtype=np.float32)
CLIENTS = 4


def settings(home: Path, **training: Any) -> Settings:
    # A coarse noise multiplier given by hand: calibration has its own tests and costs seconds.
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "training": {"rounds": 4, **training},
            "privacy": {"noise_multiplier": 4.0, "sampling_prob": 0.5},
            "release": {"every_rounds": 2},
        },
    )


def coordinator(
    config: Settings,
    fleet: FleetPort | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda _: None,
) -> tuple[Coordinator, Store]:
    store = Store.open(config.home)
    store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
    store.clients.register(seeded_fleet(CLIENTS))
    loop = Coordinator(
        settings=config,
        store=store,
        accountant=PrivacyAccountant(store, config),
        fleet=fleet or FakeFleet(TARGET),
        model=PointModel(TARGET),
        on_progress=on_progress,
    )
    return loop, store


def test_a_run_trains_commits_charges_and_releases(tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    loop, store = coordinator(settings(tmp_path), on_progress=seen.append)
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 4)
    records = store.rounds.of_run(run.run_id)
    assert [r.version for r in records] == ["v1.1.1", "v1.1.2", "v1.1.3", "v1.1.4"]
    losses = [r.loss for r in records if r.loss is not None]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05
    assert len(store.ledger.entries()) == 4 * CLIENTS
    assert store.ledger.verify() == 4 * CLIENTS
    assert [r.version for r in store.releases.all()] == ["v1.1.2", "v1.1.4"]
    assert [p.rounds_done for p in seen] == sorted(p.rounds_done for p in seen)
    assert {p.phase for p in seen} >= {"charging", "training", "committing", "releasing", "resting"}


def test_a_release_is_signed_and_names_its_content(tmp_path: Path) -> None:
    loop, store = coordinator(settings(tmp_path))
    loop.run()
    release = store.releases.current()
    assert release is not None
    key = load_or_create_signing_key(tmp_path / "keys").public_key()
    manifest = verify_manifest(release.envelopes["standard"], [key])
    assert (manifest.version, manifest.round_index, manifest.classes) == ("v1.1.4", 4, ("near",))
    assert store.blobs.get(manifest.artifact_digest).startswith(b"standard")
    assert manifest.epsilon == pytest.approx(loop.progress().epsilon)


def test_epsilon_is_the_composition_of_the_committed_rounds(tmp_path: Path) -> None:
    from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld

    loop, store = coordinator(settings(tmp_path))
    run = loop.run()
    expected = [epsilon_pld({PoissonGaussian(4.0, 0.5): n}, 1e-5) for n in (1, 2, 3, 4)]
    assert [r.epsilon for r in store.rounds.of_run(run.run_id)] == pytest.approx(expected)


def test_after_a_crash_the_round_is_repeated_and_charged_once(tmp_path: Path) -> None:
    config = settings(tmp_path)
    fleet = FakeFleet(TARGET, crash_in_round=3)
    loop, store = coordinator(config, fleet)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert store.runs.latest().rounds_done == 2  # type: ignore[union-attr]
    charged = len(store.ledger.entries())
    assert charged == 3 * CLIENTS
    store.close()

    loop, store = coordinator(config, fleet)
    run = loop.run()
    assert (run.status, run.rounds_done, run.ordinal) == (RunStatus.COMPLETED, 4, 1)
    (crashed, _), (repeated, _) = [entry for entry in fleet.tasks if entry[0].round_index == 3]
    assert crashed == repeated
    assert len(store.ledger.entries()) == 4 * CLIENTS
    versions = [v.version for v in store.versions.all()]
    assert len(versions) == len(set(versions)) == 4


def test_a_crash_changes_nothing_in_the_final_weights(tmp_path: Path) -> None:
    digests = []
    for name, crash in [("calm", None), ("crash", 2)]:
        config = settings(tmp_path / name)
        fleet = FakeFleet(TARGET, crash_in_round=crash)
        loop, store = coordinator(config, fleet)
        if crash:
            with pytest.raises(KeyboardInterrupt):
                loop.run()
        loop.run()
        version = store.versions.latest()
        assert version is not None
        digests.append(version.weights_digest)
    assert digests[0] == digests[1]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    fleet = FakeFleet(TARGET)
    loop, store = coordinator(settings(tmp_path), fleet)
    loop.run()
    trained = len(fleet.tasks)
    assert loop.run().status is RunStatus.COMPLETED
    assert len(fleet.tasks) == trained
    assert len(store.releases.all()) == 2


def test_a_stop_is_continued(tmp_path: Path) -> None:
    def stop_in_round_two(progress: TrainingProgress) -> None:
        if progress.rounds_done == 1:
            loop.request_stop()

    loop, store = coordinator(settings(tmp_path), on_progress=stop_in_round_two)
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.STOPPED, 2)
    assert store.releases.current().version == "v1.1.2"  # type: ignore[union-attr]
    run = loop.run()
    assert (run.status, run.rounds_done, run.ordinal) == (RunStatus.COMPLETED, 4, 1)


def test_the_budget_ends_the_run_after_exactly_the_rounds_it_admits(tmp_path: Path) -> None:
    from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld

    admits_two = epsilon_pld({PoissonGaussian(4.0, 0.5): 2}, 1e-5) + 1e-6
    config = settings(tmp_path)
    config = config.model_copy(
        update={"privacy": config.privacy.model_copy(update={"target_epsilon": admits_two, "noise_multiplier": 4.0})}
    )
    loop, store = coordinator(config)
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.BUDGET_EXHAUSTED, 2)
    assert run.reason is not None
    assert "above the budget" in run.reason
    assert len(store.ledger.entries()) == 2 * CLIENTS
    assert store.releases.current().version == "v1.1.2"  # type: ignore[union-attr]
    report = PrivacyAccountant(store, config).budget()
    assert report.epsilon_spent <= report.target_epsilon
    assert loop.progress().epsilon == pytest.approx(report.epsilon_spent)


def test_failed_clients_are_recorded_and_the_round_goes_on(tmp_path: Path) -> None:
    loop, store = coordinator(settings(tmp_path, rounds=1), FakeFleet(TARGET, failing=["vehicle-0001"]))
    run = loop.run()
    assert run.status is RunStatus.COMPLETED
    version = store.versions.latest()
    assert version is not None
    assert version.lineage["clients"] == ["vehicle-0000", "vehicle-0002", "vehicle-0003"]
    assert store.rounds.get(run.run_id, 1).num_updates == 3


def test_when_everybody_fails_the_run_says_so_and_can_go_on(tmp_path: Path) -> None:
    everybody = [c.client_id for c in seeded_fleet(CLIENTS)]
    config = settings(tmp_path, rounds=1)
    loop, store = coordinator(config, FakeFleet(TARGET, failing=everybody))
    run = loop.run()
    assert run.status is RunStatus.FAILED
    assert run.reason == "Round 1 has 0 updates (4 clients failed, the first with: it failed); at least 1 are needed."
    assert store.versions.all() == []
    store.close()
    loop, _ = coordinator(config)
    assert loop.run().status is RunStatus.COMPLETED


def test_changed_training_settings_begin_another_run(tmp_path: Path) -> None:
    fleet = FakeFleet(TARGET, crash_in_round=2)
    loop, store = coordinator(settings(tmp_path), fleet)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    store.close()
    loop, store = coordinator(settings(tmp_path, rounds=2))
    run = loop.run()
    assert (run.ordinal, run.status) == (2, RunStatus.COMPLETED)
    assert store.runs.get("run-0001").status is RunStatus.SUPERSEDED
    assert [v.version for v in store.versions.all()] == ["v1.2.2", "v1.2.1", "v1.1.1"]
    # The budget belongs to the clients, not to the run: the first run's charges still count.
    assert len(store.ledger.entries()) == (2 + 2) * CLIENTS


def test_a_cohort_of_validated_clients_only(tmp_path: Path) -> None:
    fleet = FakeFleet(TARGET)
    config = settings(tmp_path, rounds=1, cohort={"client_selection": "validated_only"})
    loop, store = coordinator(config, fleet)
    store.clients.update("vehicle-0002", validated=False)
    loop.run()
    (_, cohort) = fleet.tasks[0]
    assert cohort.client_ids == ("vehicle-0000", "vehicle-0001", "vehicle-0003")


def test_an_announced_start_is_not_mistaken_for_the_last_end(tmp_path: Path) -> None:
    loop, _ = coordinator(settings(tmp_path, rounds=1))
    loop.run()
    assert loop.progress().status is RunStatus.COMPLETED
    assert loop.announce().status is RunStatus.RUNNING
    loop.run()
    assert loop.progress().status is RunStatus.COMPLETED

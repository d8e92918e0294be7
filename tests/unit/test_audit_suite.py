"""The audit suite on this very code, on code that is at fault, and as a command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedvit.cli.main import app
from fedvit.clients.local import LocalTrainer
from fedvit.dp.dpsgd import SecretDPOptimizer
from fedvit.errors import UsageError
from fedvit.settings import load_settings
from fedvit.tools.audit import subjects
from fedvit.tools.audit.charging import cases as charging_cases
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.one_run import CHECK as ONE_RUN
from fedvit.tools.audit.randomness import sampling_faults
from fedvit.tools.audit.records import CASES
from fedvit.tools.audit.released import CLIENT_CHECK, RECORD_CHECK, TIGHTNESS, check_step
from fedvit.tools.audit.suite import CHECKS, audit
from fedvit.types import TrainTask

torch.set_num_threads(1)

QUICK = Scope(quick=True)


@pytest.mark.parametrize("name", CHECKS)
def test_the_installed_code_passes(name: str) -> None:
    results = [timed.finding for timed in audit(QUICK, [name])]
    assert results
    assert not [finding for finding in results if not finding.passed]


def test_every_family_and_both_engines_are_looked_at() -> None:
    from fedvit.tools.audit.records import _subjects

    everything = list(_subjects(quick=False))
    assert {name for name, _, _ in everything} == {*subjects.FAMILIES, "hybrid", "patches alone"}
    assert {mode for _, mode, _ in everything} == {"all", "head", "biases", "adapters"}
    assert {engine for _, _, engine in everything} == {"Book-keeping", "Opacus"}
    assert {name for name, _, _ in _subjects(quick=True)} == {name for name, _, _ in everything}
    assert any(case.channels_last for case in CASES)
    assert any(case.bfloat16 for case in CASES)


@pytest.mark.parametrize("name", [RECORD_CHECK, CLIENT_CHECK])
@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 2.0])
def test_released_values_show_most_of_epsilon_and_not_more(name: str, noise_multiplier: float) -> None:
    (timed,) = audit(Scope(noise_multiplier=noise_multiplier, l2_clip_norm=0.3, quick=True), [name])
    claimed, bound = timed.finding.claimed_epsilon, timed.finding.lower_bound
    assert claimed is not None
    assert bound is not None
    assert TIGHTNESS * claimed <= bound <= claimed


def test_whole_trainings_and_batches_of_releases_are_of_one_distribution() -> None:
    from scipy.stats import ks_2samp

    from fedvit.tools.audit.released import _StepReleases

    releases = _StepReleases(Scope(l2_clip_norm=0.5))
    for present in (False, True):
        one_by_one, batched = releases.one_by_one(present, 0, 150), releases.batched(present, 0, 3000)
        assert ks_2samp(one_by_one, batched).pvalue > 1e-4
        assert np.mean(one_by_one) == pytest.approx(float(present), abs=0.3)


def test_canaries_in_one_run_are_seen_and_show_no_more_than_is_claimed() -> None:
    (timed,) = audit(QUICK, [ONE_RUN])
    claimed, bound = timed.finding.claimed_epsilon, timed.finding.lower_bound
    assert claimed is not None
    assert bound is not None
    assert 1.0 < bound <= claimed


def test_half_the_noise_is_found_where_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    add_noise = SecretDPOptimizer.add_noise

    def half(optimizer: SecretDPOptimizer) -> None:
        whole, optimizer.noise_multiplier = optimizer.noise_multiplier, optimizer.noise_multiplier / 2
        add_noise(optimizer)
        optimizer.noise_multiplier = whole

    monkeypatch.setattr(SecretDPOptimizer, "add_noise", half)
    (finding,) = check_step(QUICK)
    assert not finding.passed
    assert finding.lower_bound > finding.claimed_epsilon  # type: ignore[operator]


def test_no_noise_multiplier_is_shown_what_no_number_of_releases_can_show() -> None:
    (finding,) = check_step(Scope(noise_multiplier=20.0, quick=True))
    assert finding.passed
    assert "would need more releases" in finding.detail


def test_independent_coins_are_coins_and_others_are_not() -> None:
    generator = np.random.default_rng(4)
    coins = generator.random((400, 40)) < 0.3
    assert list(sampling_faults(coins, 0.3)) == []
    assert "variance" in next(sampling_faults(np.tile(np.arange(40) < 12, (400, 1)), 0.3))
    epochs = coins.copy()
    epochs[1::2] &= ~epochs[::2]
    assert list(sampling_faults(epochs, 0.3))


def test_a_label_of_no_class_fails_the_client_before_anything_is_released() -> None:
    model = subjects.linear_model(6)
    trainer = LocalTrainer(model, physical_batch_size=2)
    features, _ = subjects.ordinary_records(model, 3)
    task = TrainTask("audit", 1, "base", "data", 1.0, 1.0, 1.0, 1, 1.0)
    with pytest.raises(IndexError):
        trainer.train(task, subjects.weights_of(model), features, torch.tensor([0, 1, 9]), bytes(32), "car")


def test_the_scope_is_the_configured_mechanism() -> None:
    privacy = {"noise_multiplier": 2.5, "l2_clip_norm": 0.3, "target_delta": 1e-6}
    overrides = {"privacy": privacy, "model": {"name": "vit_tiny_patch16_224"}, "histograms": {"noise_multiplier": 3.5}}
    settings = load_settings(environ={}, overrides=overrides)
    scope = Scope.of(settings, quick=True)
    assert scope.histogram_noise_multiplier == 3.5
    assert (scope.noise_multiplier, scope.l2_clip_norm, scope.target_delta) == (2.5, 0.3, 1e-6)
    assert (scope.model.name, scope.model.pretrained) == ("vit_tiny_patch16_224", False)


def test_norms_other_than_1_are_audited_whatever_is_configured() -> None:
    for norm in (0.3, 1.0, 7.0):
        norms = [scope.l2_clip_norm for scope in Scope(l2_clip_norm=norm).at_norms()]
        assert norms[0] == norm
        assert len(set(norms)) == len(norms)
        assert min(norms) < 1 < max(norms)


def test_every_configured_mechanism_is_charged_in_some_case() -> None:
    everything = charging_cases(QUICK)
    assert {case.unit for case in everything} == {"record", "client"}
    assert {case.cohort["selection"] for case in everything} == {"all", "uniform", "poisson"}
    assert any(case.cohort.get("over_selection") for case in everything)
    assert any(case.cohort.get("min_separation") for case in everything)
    assert {name for case in everything for name in case.privacy} == {"noise", "bands", "adaptive_clip"}
    assert any(case.late for case in everything)
    assert any(case.histograms for case in everything)


def test_a_check_that_breaks_off_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_off(scope: Scope) -> Iterator[Finding]:
        yield Finding("charging", "a part", True, "well")
        raise RuntimeError("no disk")

    monkeypatch.setitem(CHECKS, "charging", breaks_off)
    results = [timed.finding for timed in audit(QUICK, ["charging"])]
    assert [finding.passed for finding in results] == [True, False]
    assert results[1].detail == "RuntimeError: no disk"


def test_an_unknown_check_is_refused_by_name() -> None:
    with pytest.raises(UsageError):
        list(audit(QUICK, ["nothing"]))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["privacy", "audit", "--quick", *arguments])


def test_the_command_prints_a_table_and_one_json_document() -> None:
    done = run("--only", "charging", "--only", "released round", "--set", "privacy.noise_multiplier=1.0", "--json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["passed"]
    assert {f["check"] for f in report["findings"]} == {"charging", "released round"}
    assert report["findings"][-1]["lower_bound"] <= report["findings"][-1]["claimed_epsilon"]
    done = run("--only", "Poisson sampling", "--set", "privacy.noise_multiplier=1.0")
    assert done.exit_code == 0
    assert "pass" in done.stdout


def test_the_command_ends_with_status_1_when_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def finds(scope: Scope) -> Iterator[Finding]:
        yield Finding("charging", "[all]", False, "a charge is missing")

    monkeypatch.setitem(CHECKS, "charging", finds)
    done = run("--only", "charging", "--set", "privacy.noise_multiplier=1.0")
    assert done.exit_code == 1
    assert "FAIL" in done.stdout


def test_the_command_refuses_a_check_that_does_not_exist() -> None:
    done = run("--only", "nothing", "--set", "privacy.noise_multiplier=1.0", "--json")
    assert done.exit_code == UsageError.exit_status
    assert json.loads(done.stdout)["error"] == UsageError.code

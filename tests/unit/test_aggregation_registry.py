"""Rules by name, their options, and a rule that somebody else wrote: the document's example is what runs here."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from fedvit.aggregation.registry import SHIPPED, check_memory, create_rule, rule_for, rule_names
from fedvit.config import TrainingConfig
from fedvit.errors import ConfigError
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel, seeded_fleet
from fedvit.types import RunStatus

DOCUMENT = Path(__file__).parents[2] / "docs/how-to/adding-a-rule.md"
TARGET = np.array([1.0, -2.0], dtype=np.float32)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str, module: str, code: str) -> None:
    """A package as pip would leave it."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fedvit.aggregation]\n{entry}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)


def block(language: str) -> str:
    result = re.search(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), flags=re.S)
    assert result
    return result.group(1)


def test_the_documents_rule_trains_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = block("toml").splitlines()[1].replace('"', "")
    install(tmp_path, monkeypatch, entry, "majority_vote", block("python"))
    settings = tmp_path / "fedvit.yaml"
    settings.write_text(block("yaml") + "  rounds: 3\nprivacy: {noise_multiplier: 4.0}\nrelease: {every_rounds: 99}\n")
    config = load_settings(settings, environ={}, overrides={"home": tmp_path / "home"})
    store = Store.open(config.home)
    store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
    store.clients.register(seeded_fleet(4))
    loop = Coordinator(
        settings=config,
        store=store,
        accountant=GenerousAccountant(store),
        fleet=FakeFleet(TARGET, rule=rule_for(config)),
        model=PointModel(TARGET),
    )
    run = loop.run()
    assert run.status is RunStatus.COMPLETED, run.reason
    version = store.versions.get("v1.1.3")
    np.testing.assert_allclose(stored_weights(store, version.weights_digest)["point"], [0.15, -0.15], rtol=1e-5)
    assert "majority_vote" in rule_names()
    assert version.lineage["rule_state"] in store.versions.blob_digests()


def test_a_shipped_rules_name_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "fedavg = thief:Thief", "thief", "raise SystemExit('loaded')")
    assert type(create_rule(TrainingConfig())) is SHIPPED["fedavg"]
    assert rule_names().count("fedavg") == 1


def test_an_entry_point_that_is_no_rule_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "odd = oddity:thing", "oddity", "thing = 3")
    with pytest.raises(ConfigError, match=r"'oddity:thing' in the group fedvit.aggregation is no aggregation rule"):
        create_rule(TrainingConfig(aggregation="odd"))


@pytest.mark.parametrize("code", ["import no_such_package", "1 / 0", "raise SystemExit(3)", "other = 3"])
def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    install(tmp_path, monkeypatch, "broken = broken_rules:Broken", "broken_rules", code)
    with pytest.raises(ConfigError) as caught:
        create_rule(TrainingConfig(aggregation="broken"))
    assert "broken_rules:Broken" in str(caught.value)


@pytest.mark.parametrize(
    ("aggregation", "options", "words"),
    [
        ("fedadm", {}, ["there is no rule 'fedadm'", "Did you mean 'fedadam'?", "geometric_median"]),
        ("fedavgm", {"momentum": 1.0}, ["'training.aggregation_options.momentum'", "less than 1", "(found 1.0)"]),
        ("fedavgm", {"momentun": 0.9}, ["'training.aggregation_options.momentun'", "Its options: momentum."]),
        ("fedavg", {"momentum": 0.9}, ["is no option of fedavg", "Its options: none."]),
        ("fedadam", {"tau": 0}, ["aggregation_options.tau'", "greater than 0"]),
        ("fedprox", {"proximal_mu": -1}, ["aggregation_options.proximal_mu'", "greater than or equal to 0"]),
        ("trimmed_mean", {"trim_fraction": 0.5}, ["aggregation_options.trim_fraction'", "less than 0.5"]),
        ("krum", {"num_byzantine": -1}, ["aggregation_options.num_byzantine'", "greater than or equal to 0"]),
        ("fedasync", {"alpha": float("nan")}, ["aggregation_options.alpha'"]),
        ("norm_bound", {"target_quantile": 1}, ["aggregation_options.target_quantile'", "less than 1"]),
    ],
)
def test_a_bad_name_or_option_is_named_with_what_is_allowed(
    aggregation: str, options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        create_rule(TrainingConfig(aggregation=aggregation, aggregation_options=options))
    for word in words:
        assert word in str(caught.value)


def test_every_shipped_rule_says_where_it_comes_from_and_works_without_options() -> None:
    for name, kind in SHIPPED.items():
        rule = create_rule(TrainingConfig(aggregation=name))
        assert rule.name == name
        assert "arXiv:" in (sys.modules[kind.__module__].__doc__ or "")
        assert "<-" in (kind.__doc__ or "")


def test_settings_that_say_nothing_new_leave_a_run_what_it_was() -> None:
    plain = load_settings(environ={})
    spelled = {
        "FEDVIT_TRAINING__VALIDATION__QUARANTINE_AFTER_REJECTIONS": "9",
        "FEDVIT_TRAINING__STALENESS__EXPONENT": "0.5",
    }
    assert load_settings(environ=spelled).training_digest() == plain.training_digest()
    assert {"aggregation_options", "staleness", "validation"}.isdisjoint(plain.training_identity()["training"])
    for key, value in (("AGGREGATION", "median"), ("STALENESS__EXPONENT", "1"), ("VALIDATION__MAX_UPDATE_NORM", "9")):
        other = load_settings(environ={f"FEDVIT_TRAINING__{key}": value})
        assert other.training_digest() != plain.training_digest()


@pytest.mark.parametrize(
    ("name", "memory", "refused"), [("median", 23, True), ("median", 24, False), ("fedavg", 1, False)]
)
def test_updates_that_do_not_fit_into_memory_are_refused_where_each_is_needed(
    name: str, memory: int, refused: bool
) -> None:
    rule = create_rule(TrainingConfig(aggregation=name))
    with pytest.raises(ConfigError) if refused else nullcontext():
        check_memory(rule, 400, 1_000_000, memory * 400 * 1_000_000)

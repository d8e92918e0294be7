"""Settings: precedence of sources, errors that name the key and what is allowed, and the reference page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fedvit.config import FaultConfig, OidcConfig, RangeConfig, Settings
from fedvit.config.privacy import AdaptiveClipConfig
from fedvit.config.reference import reference
from fedvit.config.renamed import RENAMED_KEYS
from fedvit.errors import ConfigError, FedvitError, HttpFaultError
from fedvit.settings import changed_settings, load_settings, settings_from_json, settings_to_json


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fedvit.yaml"
    path.write_text(text)
    return path


def test_no_file_is_the_demo() -> None:
    settings = load_settings(environ={})
    assert settings == Settings()
    assert settings.data.source == "traffic-lights"


def test_environment_overrides_the_file_and_options_override_both(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {rounds: 3, local_steps: 2}\nprivacy: {target_epsilon: 4}\n")
    environ = {"FEDVIT_TRAINING__ROUNDS": "5", "FEDVIT_EDGE__PORTS": "[9001, 9002]", "UNRELATED": "x"}
    settings = load_settings(path, environ=environ, overrides={"training": {"local_steps": 7}})
    assert (settings.training.rounds, settings.training.local_steps) == (5, 7)
    assert settings.privacy.target_epsilon == 4
    assert settings.edge.ports == (9001, 9002)


def test_home_comes_from_its_variable() -> None:
    assert load_settings(environ={"FEDVIT_HOME": "/srv/fedvit"}).home == Path("/srv/fedvit")


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = write(tmp_path, "data: {source: folder, path: images}\n")
    assert load_settings(path, environ={}).data.path == tmp_path / "images"


def test_settings_travel_as_json() -> None:
    settings = load_settings(environ={"FEDVIT_DATA__PATH": "/data", "FEDVIT_PRIVACY__NOISE_MULTIPLIER": "1.5"})
    assert settings_from_json(settings_to_json(settings)) == settings


def test_an_override_replaces_single_keys_of_a_mapping() -> None:
    first = load_settings(environ={"FEDVIT_TRAINING__AGGREGATION_OPTIONS": "{tau: 0.1, beta_1: 0.9}"})
    changed = changed_settings(first, {"training.aggregation_options.tau": 0.2, "training.rounds": 7})
    assert (changed.training.aggregation_options, changed.training.rounds) == ({"tau": 0.2, "beta_1": 0.9}, 7)


def test_settings_that_arrive_as_json_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = settings_to_json(Settings())
    monkeypatch.setenv("FEDVIT_TRAINING__ROUNDS", "5")
    assert (settings_from_json(text), load_settings().training.rounds) == (Settings(), 5)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"FEDVIT_TRAINING__ROUNDZ": "5"}, ["'training.roundz'", "Did you mean 'rounds'?", "local_steps"]),
        ({"FEDVIT_TRAINNG__ROUNDS": "5"}, ["'trainng'", "Did you mean 'training'?"]),
        ({"FEDVIT_PRIVACY__TARGET_DELTA": "3"}, ["'privacy.target_delta'", "less than 1", "3"]),
        ({"FEDVIT_PRIVACY__TARGET_EPSILON": "-1"}, ["'privacy.target_epsilon'", "greater than 0"]),
        ({"FEDVIT_PRIVACY__NOISE_MULTIPLIER": "0"}, ["'privacy.noise_multiplier'", "greater than or equal to 0.3"]),
        ({"FEDVIT_MODEL__TRAINABLE": "tail"}, ["'model.trainable'", "'all', 'head', 'biases' or 'adapters'", "tail"]),
        ({"FEDVIT_EDGE__PORTS": "[8081, 8081]"}, ["'edge.ports'", "the same port appears twice"]),
        ({"FEDVIT_SERVING__PORT": "70000"}, ["'serving.port'", "65535"]),
        ({"FEDVIT_MODEL__HYBRID__HEADS": "7"}, ["'model.hybrid'", "multiple of heads"]),
        ({"FEDVIT_TRAINING__COMPRESSION__ENCODINGS": "[zip]"}, ["'training.compression.encodings.0'", "'int8'"]),
        (
            {"FEDVIT_TRAINING__COMPRESSION__ENCODINGS": "[int8]", "FEDVIT_PRIVACY__PRIVACY_UNIT": "client"},
            ["training.compression.encodings may lift an update above the norm"],
        ),
        ({"FEDVIT_TRAINING__COHORT__SELECTION": "uniform"}, ["'training.cohort'", "needs a size"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ=environ)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_is_refused_by_name_with_the_new_one(old: str, new: str) -> None:
    tree: Any = None
    for key in reversed(old.split(".")):
        tree = {key: [tree | {"share": 0.1, "kinds": ["nan"]}] if key == "faults" else tree}
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={}, overrides=tree)
    place = old.replace("faults.", "faults.0.")
    assert f"'{place}' is now '{new}'." in str(caught.value)


def sections(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """``kind`` and the sections inside it, as their fields' defaults show them."""
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.default, BaseModel):
            yield from sections(type(field.default))


def test_every_setting_has_a_description() -> None:
    kinds = {*sections(Settings), AdaptiveClipConfig, OidcConfig, FaultConfig, RangeConfig}
    fields = [(f"{kind.__name__}.{name}", field) for kind in kinds for name, field in kind.model_fields.items()]
    assert [name for name, field in fields if not (field.description or "").endswith(".")] == []
    assert len(fields) > 190


def test_no_renamed_key_is_a_setting_and_every_new_one_is() -> None:
    listed = reference().partition("## Renamed keys")[0]
    assert [new for new in RENAMED_KEYS.values() if f"`{new}`" not in listed] == []
    assert [old for old in RENAMED_KEYS if f"`{old}`" in listed] == []


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs/reference/settings.md"
    assert page.read_text() == reference(), "Run: python -m fedvit.config.reference > docs/reference/settings.md"


def test_the_reference_states_type_default_and_bounds() -> None:
    assert "| `serving.port` | integer | `8000` | ≥ 1, ≤ 65535 | Port of the API. |" in reference()
    assert "| `privacy.noise_multiplier` | number or null | `null` | ≥ 0.3, ≤ 1e+06 |" in reference()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*absent\.yaml"):
        load_settings(tmp_path / "absent.yaml", environ={})


@pytest.mark.parametrize(
    ("text", "word"), [("a: [", "not valid YAML"), ("- 1\n- 2\n", "Begin with one of: home, data")]
)
def test_a_broken_file_is_explained(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        load_settings(write(tmp_path, text), environ={})


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, ""), environ={}) == Settings()


def test_the_training_identity_ignores_what_does_not_change_the_model() -> None:
    base = load_settings(environ={})
    assert load_settings(environ={"FEDVIT_SERVING__PORT": "9000"}).training_digest() == base.training_digest()
    assert load_settings(environ={"FEDVIT_TRAINING__ROUNDS": "9"}).training_digest() != base.training_digest()
    # A run from before updates could be made smaller must go on.
    assert "compression" not in base.training_identity()["training"]
    smaller = load_settings(environ={"FEDVIT_TRAINING__COMPRESSION__ENCODINGS": "[int8]"})
    assert smaller.training_digest() != base.training_digest()


def test_a_second_approver_does_not_make_another_run_of_the_same_training() -> None:
    alone, together = (
        load_settings(environ={}, overrides={"privacy": {"require_second_approver": wanted}})
        for wanted in (False, True)
    )
    assert alone.training_digest() == together.training_digest()
    # Not even the name of the setting: runs from before there was one must go on.
    assert set(alone.training_identity()["privacy"]) == {
        "privacy_unit",
        "target_epsilon",
        "target_delta",
        "noise_multiplier",
        "sampling_prob",
        "l2_clip_norm",
    }
    assert set(alone.training_identity()["training"]["cohort"]) == {
        "selection",
        "size",
        "min_clients",
        "client_selection",
    }


def test_what_protects_clients_makes_another_run() -> None:
    cohort = {"selection": "poisson", "sampling_prob": 0.5}
    digests = {
        load_settings(
            environ={}, overrides={"training": {"cohort": cohort}, "privacy": {"privacy_unit": "client", **privacy}}
        ).training_digest()
        for privacy in ({}, {"adaptive_clip": {}}, {"adaptive_clip": {"target_quantile": 0.4}}, {"l2_clip_norm": 2.0})
    }
    assert len(digests) == 4


def test_errors_survive_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("Wrong.", cure="Do it right.", key="a.b")))
    assert isinstance(error, ConfigError)
    assert (str(error), error.details) == ("Wrong. Do it right.", {"key": "a.b"})


def test_every_error_has_its_own_code_and_status() -> None:
    def family(kind: type[FedvitError]) -> list[type[FedvitError]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in family(sub))]

    # HttpFaultError only groups its subclasses.
    codes = [(kind.code, kind.http_status) for kind in family(FedvitError) if kind is not HttpFaultError]
    assert len(set(codes)) == len(codes)

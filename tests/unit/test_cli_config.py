"""``fedvit config show``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedvit.cli.main import app
from fedvit.settings import load_settings


def test_what_is_in_force_is_shown_and_can_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVIT_TRAINING__ROUNDS", "5")
    shown = CliRunner().invoke(app, ["config", "show", "--set", "serving.port=8123"])
    assert shown.exit_code == 0
    path = tmp_path / "settings.yaml"
    path.write_text(shown.stdout)
    settings = load_settings(path, environ={})
    assert (settings.training.rounds, settings.serving.port) == (5, 8123)
    as_json = CliRunner().invoke(app, ["config", "show", "--set", "serving.port=8123", "--json"])
    assert json.loads(as_json.stdout) == yaml.safe_load(shown.stdout)


def test_a_wrong_setting_is_one_sentence() -> None:
    shown = CliRunner().invoke(app, ["config", "show", "--set", "training.rouns=5"])
    assert shown.exit_code == 2
    assert "Did you mean 'rounds'?" in shown.stderr

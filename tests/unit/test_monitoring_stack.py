"""Configuration of Prometheus and Alertmanager: targets, tokens, times, and clear errors where they cannot start."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fedvit.access.identity import Scope
from fedvit.access.tokens import verify_token
from fedvit.cli.main import app
from fedvit.config import Settings
from fedvit.errors import ConfigError, PortInUseError, UnauthorizedError
from fedvit.metrics.alert_rules import LEAST_SCRAPE_INTERVAL_S
from fedvit.metrics.targets import EDGES, SERVER, Target, link_targets, targets_file, write_targets
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.tools.monitoring_stack import MonitoringStack, monitoring_tokens, run_monitoring, write_configs
from fedvit.types import Client, ClientKind, utc_now

ROOT = Path(__file__).parents[2]
STACK = MonitoringStack(configs=ROOT / "cluster_configs" / "monitoring")


def settings_of(home: Path, **overrides: Any) -> Settings:
    return load_settings(environ={}, overrides={"home": home, **overrides})


def written(settings: Settings, stack: MonitoringStack, *tokens: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = write_configs(settings, stack, *(tokens or (None, None)))
    check_configs(folder)
    prometheus, alertmanager = (
        yaml.safe_load((folder / f"{name}.yml").read_text()) for name in ("prometheus", "alertmanager")
    )
    return prometheus, alertmanager


def check_configs(folder: Path) -> None:
    """What the programs themselves say of their configuration, where they are installed."""
    for program, words in (("promtool", "check config prometheus.yml"), ("amtool", "check-config alertmanager.yml")):
        if shutil.which(program):
            done = subprocess.run([program, *words.split()], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def job(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(job for job in config["scrape_configs"] if job["job_name"] == name)


def test_targets_are_found_in_the_state_folder_and_nothing_listens_elsewhere(tmp_path: Path) -> None:
    prometheus, alertmanager = written(settings_of(tmp_path), STACK)
    files = [
        file for job in prometheus["scrape_configs"] for sd in job.get("file_sd_configs", ()) for file in sd["files"]
    ]
    assert files == [str(targets_file(tmp_path, group)) for group in ("server", "edges", "vehicles", "ray")]
    hook = alertmanager["receivers"][0]["webhook_configs"][0]
    assert hook["url"] == "http://127.0.0.1:8000/api/incidents/alerts"
    assert hook["send_resolved"] is True
    assert STACK.prometheus == "127.0.0.1:9090"
    assert STACK.alertmanager == "127.0.0.1:9093"


def test_a_server_that_was_never_started_is_a_target_already(tmp_path: Path) -> None:
    written(settings_of(tmp_path, serving={"port": 8123}), STACK)
    assert json.loads(targets_file(tmp_path, SERVER).read_text()) == [{"targets": ["127.0.0.1:8123"], "labels": {}}]


def test_a_drill_is_scraped_more_often(tmp_path: Path) -> None:
    usual, _ = written(settings_of(tmp_path), STACK)
    drill, quick = written(settings_of(tmp_path), MonitoringStack(factor=12, configs=STACK.configs))
    assert usual["global"]["scrape_interval"] == "5000ms"
    assert set(drill["global"].values()) == {f"{LEAST_SCRAPE_INTERVAL_S * 1000:.0f}ms"}
    assert quick["route"]["group_wait"] == "1s"
    rules = yaml.safe_load((tmp_path / "monitoring" / "rules.yml").read_text())
    assert rules["groups"][0]["rules"][0]["for"] == "5s"


def test_with_tokens_each_gets_its_own_and_with_tls_the_certificate(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    access = {"mode": "tokens", "tls_cert": str(certificate), "tls_key": str(key)}
    settings = settings_of(tmp_path / "home", access=access)
    with Store.open(settings.home) as store:
        with monitoring_tokens(settings) as tokens:
            prometheus, alertmanager = written(settings, STACK, *tokens)
            assert all(path is not None and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tokens)
            texts = [path.read_text() for path in tokens if path is not None]
            held = [verify_token(store, text, utc_now()).scopes for text in texts]
            assert held == [{Scope.VIEWER}, {Scope.ALERTS}]
        server = job(prometheus, "fed-server")
        assert server["authorization"] == {"credentials_file": str(tokens[0])}
        assert server["tls_config"] == {"ca_file": str(certificate)}
        hook = alertmanager["receivers"][0]["webhook_configs"][0]
        assert hook["url"].startswith("https://")
        assert hook["http_config"]["authorization"] == {"credentials_file": str(tokens[1])}
        assert "authorization" not in job(prometheus, "fed-edge")
        for text in texts:
            with pytest.raises(UnauthorizedError):
                verify_token(store, text, utc_now())
    assert not any(path.exists() for path in tokens if path is not None)


def test_targets_are_replaced_at_once_and_only_where_they_changed(tmp_path: Path) -> None:
    path = targets_file(tmp_path, EDGES)
    write_targets(tmp_path, EDGES, [Target("127.0.0.1:8081", {"device": "edge-1"})])
    assert json.loads(path.read_text()) == [{"targets": ["127.0.0.1:8081"], "labels": {"device": "edge-1"}}]
    before = path.stat().st_ino
    write_targets(tmp_path, EDGES, [Target("127.0.0.1:8081", {"device": "edge-1"})])
    assert path.stat().st_ino == before
    write_targets(tmp_path, EDGES, [])
    assert json.loads(path.read_text()) == []
    assert [file.name for file in path.parent.iterdir()] == ["edges.json"]


def test_a_list_that_somebody_else_keeps_is_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    theirs.write_text("[]")
    for _ in range(2):
        link_targets(tmp_path, "ray", theirs)
    theirs.write_text('[{"targets": ["10.0.0.1:1"], "labels": {}}]')
    assert targets_file(tmp_path, "ray").read_text() == theirs.read_text()
    write_targets(tmp_path, "ray", [])
    assert theirs.read_text() != "[]"


def test_the_store_tells_which_vehicles_have_an_address(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        capabilities: dict[str, dict[str, Any]] = {
            "truck-1": {"metrics": "10.0.0.7:8081"},
            "truck-2": {"metrics": {"host": "x"}},
            "truck-3": {"camera": "front"},
            "truck-4": {"metrics": "10.0.0.8:8081"},
        }
        store.clients.register(
            Client(name, ClientKind.REMOTE, 0, capabilities=said) for name, said in capabilities.items()
        )
        store.clients.update("truck-4", active=False)
        assert store.clients.metrics_addresses() == {"truck-1": "10.0.0.7:8081"}


def test_a_missing_program_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["monitoring", "run", "--home", str(tmp_path)])
    assert result.exit_code == 2
    assert "prometheus is missing" in result.output
    assert "apt-get install prometheus prometheus-alertmanager" in result.output.replace("\n", " ")


def test_a_port_that_is_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prometheus", "alertmanager"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = MonitoringStack(prometheus_port=port, configs=STACK.configs)
        with pytest.raises(PortInUseError) as error, run_monitoring(settings_of(tmp_path / "home"), stack):
            pytest.fail("started")
    assert str(port) in str(error.value)


def test_outside_a_checkout_there_is_nothing_to_run_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_configs(settings_of(tmp_path), MonitoringStack(configs=tmp_path), None, None)

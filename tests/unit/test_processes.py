"""Processes that fail at their start: the reason is in the error, and their output is kept."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedvit.cli.main import app
from fedvit.cli.supervisor import spawn_supervisor, supervisor_log
from fedvit.errors import FedvitError, PlacementError
from fedvit.processes import last_error, ray_log_files, record_ray_logs
from fedvit.settings import load_settings
from serve_apps.startup.serving import start_edge

OWN = """
def fit():
    raise RuntimeError("no camera\\nat /dev/video0")
fit()
"""


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that child processes import from."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder


def test_why_a_detached_start_failed_is_in_the_error_and_in_the_log(tmp_path: Path, importable: Path) -> None:
    (importable / "broken_clients.py").write_text(OWN)
    workload = {"clients_class": "broken_clients:Clients"}
    settings = load_settings(environ={}, overrides={"home": tmp_path / "home", "workload": workload})
    with pytest.raises(FedvitError) as failed:
        spawn_supervisor(settings, lambda _: None)
    assert "RuntimeError: no camera" in failed.value.message
    log = supervisor_log(settings)
    assert str(log) in (failed.value.cure or "")
    assert "line 3, in fit" in log.read_text()


def test_a_detached_start_that_is_killed_names_the_signal(tmp_path: Path, importable: Path) -> None:
    (importable / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(FedvitError) as failed:
        spawn_supervisor(load_settings(environ={}, overrides={"home": tmp_path / "home"}), lambda _: None)
    assert "signal 9 (Killed)" in failed.value.message


def test_why_an_edge_ended_at_its_start_is_in_the_error(tmp_path: Path, importable: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "edge-1.log").write_text("ValueError: of an earlier start\n")
    (importable / "sitecustomize.py").write_text("import os; os.write(2, b'no room\\n'); os._exit(3)")
    with ExitStack() as stack, pytest.raises(PlacementError) as failed:
        start_edge(load_settings(environ={}, overrides={"home": tmp_path}), stack, "http://127.0.0.1:9", 0, None)
    assert "status 3: no room" in failed.value.message


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", ""),
        ("a warning\nthe reason.\n", "the reason"),
        ("Traceback (most recent call last):\n  File\nKeyError: 'w'\nmore of it\n", "KeyError: 'w'"),
    ],
)
def test_the_last_error_of_an_output(output: str, expected: str) -> None:
    assert last_error(output) == expected


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    """Logs of Ray: of one session each for the homes ``ours`` and ``other``, and of one that both joined."""
    for session, jobs in (("first", ["01000000"]), ("second", ["01000000"]), ("joined", ["05000000", "06000000"])):
        logs = tmp_path / session
        (logs / "serve").mkdir(parents=True)
        for job in jobs:
            (logs / f"worker-abc-{job}-77.err").write_text(f"an actor of {session} {job}\n")
            (logs / f"worker-def-{job}-78.err").touch()
        (logs / "serve" / "replica_control_control_x.log").write_text(f"a replica of {session}\n")
        (logs / "serve" / "replica_chat_model_y.log").write_text("an application of somebody else\n")
    return tmp_path


def test_logs_are_those_of_the_system_on_the_home(sessions: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record_ray_logs(sessions / "ours", sessions / "first", "01000000")
    record_ray_logs(sessions / "other", sessions / "second", "01000000")
    assert CliRunner().invoke(app, ["logs", "--home", str(sessions / "ours")]).exit_code == 0
    shown = capfd.readouterr().out
    assert "an actor of first" in shown
    assert "a replica of first" in shown
    assert "second" not in shown
    assert "somebody else" not in shown


def test_logs_in_a_joined_cluster_are_those_of_the_own_job(sessions: Path) -> None:
    record_ray_logs(sessions / "ours", sessions / "joined", "05000000")
    names = [path.name for path in ray_log_files(sessions / "ours")]
    assert names == ["worker-abc-05000000-77.err", "replica_control_control_x.log"]


def test_without_a_start_there_are_no_logs(tmp_path: Path) -> None:
    assert ray_log_files(tmp_path) == []
    assert CliRunner().invoke(app, ["logs", "--home", str(tmp_path)]).exit_code == 2

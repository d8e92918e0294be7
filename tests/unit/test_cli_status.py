"""What the command line says of a system before its first release and after a failure, and how it prints."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_client import URL, Through
from control_system import TARGET, WAIT_S, HeldFleet, System
from rich.console import Console
from typer.testing import CliRunner, Result

from fedvit.cli import api_session
from fedvit.cli.main import app
from fedvit.cli.output import progress_bar, show_fields, show_rows
from fedvit.data.sources import open_source
from fedvit.errors import ConfigError, DataError, NoReleaseError
from fedvit.settings import load_settings
from fedvit.testing.doubles import FakeFleet, PointModel
from fedvit.tools.report.probe import Target

Announce = Callable[[FakeFleet], System]


@pytest.fixture
def announce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Announce]:
    """Builds a system with this fleet that looks as if `fedvit up` had left it running."""
    with ExitStack() as stack:

        def build(fleet: FakeFleet) -> System:
            home = tmp_path / "home"
            system = stack.enter_context(closing(System(home, PointModel(TARGET), fleet, {}, 8.0)))
            monkeypatch.setattr(api_session, "TRANSPORT", Through(system.http))
            (home / "run").mkdir()
            facts = {"pid": 1, "control": URL, "inference": "http://127.0.0.1:9", "edges": [], "dashboard": None}
            (home / "run" / "system.json").write_text(json.dumps(facts))
            fcntl.flock(stack.enter_context((home / "system.lock").open("w")), fcntl.LOCK_EX)
            return system

        yield build


@pytest.fixture
def held(announce: Announce, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """A system that trains its first round, with an inference application that has no model yet."""
    fleet = HeldFleet()
    system = announce(fleet)
    document = {"type": "/problems/no-model", "title": "No model", "status": 503, "detail": "There is no model."}
    monkeypatch.setattr(Target, "health", lambda *_, **__: httpx.Response(503, json=document))
    system.http.post("/api/training/start")
    assert fleet.begun.wait(WAIT_S)
    yield system
    fleet.let.set()


def fedvit(home: Path, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--home", str(home)])


# --- before the first release ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("held")
def test_parts_that_wait_for_the_first_release_are_no_fault(tmp_path: Path) -> None:
    shown = fedvit(tmp_path / "home", "health-check", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout) == {"control": "ok", "inference": "Waiting for the first release, round 1 of 4."}


def test_a_model_that_is_being_trained_is_waited_for(held: System, tmp_path: Path) -> None:
    for path in ("/api/model/current", "/api/model/info", "/api/model/release"):
        assert "round 1 of 4" in held.http.get(path).json()["detail"]
    shown = fedvit(tmp_path / "home", "model", "current", "--json")
    assert json.loads(shown.stdout)["error"] == NoReleaseError.code
    assert "round 1 of 4" in json.loads(shown.stdout)["message"]
    assert "round 1 of 4" in fedvit(tmp_path / "home", "model", "export", str(tmp_path / "to")).stderr


def test_a_part_without_a_model_is_a_fault_where_nothing_trains(
    announce: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = announce(FakeFleet(TARGET))
    monkeypatch.setattr(Target, "health", lambda *_, **__: httpx.Response(503, json={"type": "/problems/no-model"}))
    assert fedvit(tmp_path / "home", "health-check").exit_code == 1
    assert "training start" in system.http.get("/api/model/current").json()["cure"]


# --- after a failure -------------------------------------------------------------------------------------------------


class BrokenFleet(FakeFleet):
    """Fails with a fault of the program when it is to train."""

    def train(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no camera")


def test_the_status_of_a_failed_run_says_why_and_what_it_spent(announce: Announce, tmp_path: Path) -> None:
    system = announce(BrokenFleet(TARGET)).trained()
    running = json.loads(fedvit(tmp_path / "home", "status", "--json").stdout)
    (tmp_path / "home" / "run" / "system.json").unlink()
    stored = json.loads(fedvit(tmp_path / "home", "status", "--json").stdout)
    for facts in (running, stored):
        assert facts["training"] == "failed"
        assert "RuntimeError: no camera" in facts["reason"]
        assert facts["epsilon_spent"] > 0
        assert (facts["rounds_done"], facts["rounds_total"]) == (0, 4)
    assert "no camera" in system.http.get("/api/model/current").json()["detail"]


def test_a_failed_run_ends_the_command_with_what_it_spent(announce: Announce, tmp_path: Path) -> None:
    announce(BrokenFleet(TARGET))
    shown = fedvit(tmp_path / "home", "run")
    assert shown.exit_code == 1
    assert re.search(r"0 of 4 rounds, with epsilon 0\.\d{3} spent.*no camera", " ".join(shown.stderr.split()))


def test_an_unforeseen_fault_names_its_request(announce: Announce, monkeypatch: pytest.MonkeyPatch) -> None:
    system = announce(FakeFleet(TARGET))

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("w")

    monkeypatch.setattr(system.store.versions, "all", broken)
    answer = system.http.get("/api/model/versions", headers={"X-Request-ID": "request-77"})
    assert answer.status_code == 500
    assert "request-77" in answer.json()["cure"]
    shown = CliRunner().invoke(app, ["model", "list", "--url", URL])
    assert re.search(r"KeyError.*request_id [0-9a-f]{32}", shown.stderr)


# --- file names of other encodings -----------------------------------------------------------------------------------

LATIN1 = os.fsdecode(b"stra\xdfe")


def test_a_file_name_that_is_no_utf8_is_named(images: Path) -> None:
    path = images / "train" / "red"
    (path / "0.png").rename(path / f"{LATIN1}.png")
    settings = load_settings(environ={}, overrides={"data": {"source": "folder", "path": images}})
    with pytest.raises(DataError) as refused:
        open_source(settings.data)
    assert r"train/red/stra\xdfe.png" in refused.value.message


@pytest.mark.parametrize("key", ["home", "data.path", "model.checkpoint", "access.tls_cert"])
def test_a_path_in_the_settings_that_is_no_utf8_is_refused(tmp_path: Path, key: str) -> None:
    tree: Any = str(tmp_path / LATIN1)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    with pytest.raises(ConfigError) as refused:
        load_settings(environ={}, overrides=tree)
    assert f"'{key}'" in refused.value.message
    str(refused.value).encode()


# --- how values are printed ------------------------------------------------------------------------------------------


def printed(show: Callable[..., None], value: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    show(value, to=console)
    output = console.file
    assert isinstance(output, io.StringIO)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_fields_are_readable_and_what_is_copied_stays_in_one_piece() -> None:
    path = "/srv/" + "state-folder/" * 8 + "keys/backup.key"
    lines = printed(
        show_fields,
        {
            "epsilon": 1.23456789,
            "accuracy": None,
            "parts": {"store": "ok", "nested": {"share": 0.123456}},
            "at": "2026-11-30T21:03:57.844538Z",
            "path": path,
            "message": "many words " * 20 + path,
        },
    )
    text = "\n".join(lines)
    assert text.count(path) == 2
    assert not any(wrong in text for wrong in ("{", "None", "1.23456", "0.123456", "…"))
    assert "2026-11-30 21:03" in text
    assert all(len(line) <= 80 for line in lines if path not in line)


@pytest.mark.parametrize("columns", [2, 6, 12])
def test_a_table_of_any_width_breaks_no_word(columns: int) -> None:
    row = {f"column_{i}": f"identifier-{i:012d}" for i in range(columns)} | {"message": "several words " * 6}
    text = "\n".join(printed(show_rows, [row, row]))
    for i in range(columns):
        assert text.count(f"identifier-{i:012d}") == 2
    assert "…" not in text


def test_diagnostics_are_readable_and_quote_logs_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "supervisor.log").write_text("first [bold]line[/]\n  {'indented': None}\n")
    text = fedvit(tmp_path, "diagnostics").stdout
    quoted = " first [bold]line[/]\n   {'indented': None}\n"
    assert quoted in text
    head = text.replace(quoted, "")
    assert not any(wrong in head for wrong in ("{", "[", "None"))
    assert re.search(r"^ torch +\d", head, re.MULTILINE)
    facts = json.loads(fedvit(tmp_path, "diagnostics", "--json").stdout)
    assert facts["logs"] == {"supervisor.log": ["first [bold]line[/]", "  {'indented': None}"]}
    assert facts["memory_bytes"] > 10**6


def test_progress_keeps_its_times_where_the_text_is_long() -> None:
    console = Console(file=io.StringIO(), width=80)
    with progress_bar(console, quiet=False) as update:
        update(description="trial 12/12", total=12, completed=6, text="many words " * 20)
    output = console.file
    assert isinstance(output, io.StringIO)
    assert re.search(r"^trial 12/12 .*many words .* 0:00:\d\d left [-:\d]{5}$", output.getvalue().strip())


# --- what settings name ----------------------------------------------------------------------------------------------


def test_a_module_in_the_working_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("Lights = 3")
    script = Path(sys.executable).with_name("fedvit")
    done = subprocess.run(
        [script, "data", "inspect", "--set", "data.source=mine.Lights"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "'mine.Lights' is no class" in done.stderr


def test_contacts_are_settings(tmp_path: Path) -> None:
    assert fedvit(tmp_path, "incident", "contacts").exit_code == 2
    config = tmp_path / "site.yaml"
    config.write_text("incidents: {contacts: {privacy officer: 'A. Lovelace, +44 20 0'}}")
    shown = fedvit(tmp_path, "incident", "contacts", "--config", str(config))
    assert shown.exit_code == 0
    assert "A. Lovelace, +44 20 0" in shown.stdout

"""Every command that a drill follows is one of the runbook's, and only one; found without running any."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest
from raises import raises_naming

from fedvit.errors import ConfigError, DrillError, NotFoundError
from fedvit.incidents.drills.drill import PROGRAMS, runbook_command
from fedvit.incidents.drills.engine import check_checkout, what_is_missing
from fedvit.incidents.drills.scenarios import ALL, SHORT, drills_named
from fedvit.incidents.drills.system import DrillSystem
from fedvit.metrics.alert_rules import RULES, alerts, read_groups

ROOT = Path(__file__).parents[2]
MODULES = [importlib.import_module(drill.stages[0].play.__module__) for drill in ALL]


def followed(module: ModuleType) -> list[tuple[str, str]]:
    """Section and pattern of every command that a drill follows."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    wanted = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in ("follow", "look")]
    return [tuple(eval(ast.unparse(word), vars(module)) for word in call.args[:2]) for call in wanted]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> DrillSystem:
    return DrillSystem(tmp_path_factory.mktemp("site") / "checkout", ROOT)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_each_command_is_in_the_runbook_once(module: ModuleType, system: DrillSystem) -> None:
    calls = followed(module)
    assert len(calls) >= 3
    for section, pattern in calls:
        text = runbook_command(system, section, pattern)
        assert text
        assert not text.startswith(("docker", "kubectl", "ssh")), text


@pytest.mark.parametrize(("section", "pattern", "count"), [("3. Edge", "-X BREW", 0), ("3. Edge", "curl", 7)])
def test_a_command_that_is_not_there_or_not_the_only_one_is_an_error(
    system: DrillSystem, section: str, pattern: str, count: int
) -> None:
    with raises_naming(DrillError, str(count), section):
        runbook_command(system, section, pattern)


def test_every_drill_waits_for_an_alert_that_there_is() -> None:
    known = {alert.name for alert in alerts(read_groups(ROOT / RULES))}
    assert {stage.alert.name for drill in ALL for stage in drill.stages} <= known


def test_there_are_eight_and_ci_runs_at_least_four_on_one_system() -> None:
    assert len(ALL) == len({drill.name for drill in ALL}) == 8
    short = drills_named(["short"])
    assert {drill.name for drill in short} == set(SHORT)
    assert len(short) >= 4
    assert all(not drill.settings for drill in short)
    assert drills_named(["all"]) == list(ALL)
    assert drills_named(["partition", "short", "partition"]) == [
        drill for drill in ALL if drill.name in {*SHORT, "partition"}
    ]
    with raises_naming(NotFoundError, "fire"):
        drills_named(["fire"])


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    check_checkout(ROOT)
    with raises_naming(ConfigError, "docs/runbook.md"):
        check_checkout(tmp_path)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in PROGRAMS:
        program = tmp_path / name
        program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    by_name = {drill.name: drill for drill in ALL}
    assert what_is_missing(by_name["server-down"]) is None
    assert what_is_missing(by_name["partition"]) == "ip and ping not installed"
    (tmp_path / "prometheus").unlink()
    assert what_is_missing(by_name["server-down"]) == "prometheus not installed"

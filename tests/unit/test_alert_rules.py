"""The alert rules: each fires, does not fire just below and clears; its words are the runbook's; so are drills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fedvit.cli.main import app
from fedvit.errors import ConfigError
from fedvit.metrics import alert_rules
from fedvit.metrics.catalogue import CATALOGUE

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster_configs" / "monitoring"
GROUPS = alert_rules.read_groups(MONITORING / "rules")
ALERTS = list(alert_rules.alerts(GROUPS))
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: install prometheus")


def promtool(*words: str | Path) -> None:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("tests", sorted((MONITORING / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_rules_do_what_their_tests_say(tests: Path) -> None:
    promtool("test", "rules", tests)


def test_every_alert_has_its_three_tests() -> None:
    files = [yaml.safe_load(path.read_text()) for path in (MONITORING / "tests").glob("*.yml")]
    names = {test["name"] for file in files for test in file["tests"]}
    always = {"Watchdog"}
    for alert in ALERTS:
        wanted = ("fires",) if alert.name in always else ("fires", "does not fire just below", "clears")
        assert {f"{alert.name} {what}" for what in wanted} <= names


def test_the_issues_alerts_are_there_with_their_thresholds_and_times() -> None:
    rules = {alert.name: (alert.condition, alert.waits) for alert in ALERTS}
    for name, (condition, waits) in {
        "ServiceDown": ('up{job="fed-server"} == 0', "1m"),
        "HighTrainingLoss": ("fed_vit_autorl_training_loss > 2.0", "15m"),
        "EdgeDeviceOffline": ('up{job="fed-edge"} == 0', "2m"),
        "PrivacyBudgetExhausted": ("fed_vit_autorl_privacy_epsilon_remaining < 0.1", "1m"),
        "NetworkPartition": ("fed_vit_autorl_connected_clients / fed_vit_autorl_total_clients < 0.5", "2m"),
        "LowDataQuality": ("fed_vit_autorl_data_quality_score < 0.7", "10m"),
        "DataDrift": ("fed_vit_autorl_data_drift_score > 0.5", "10m"),
    }.items():
        assert rules[name] == (condition, waits)
    latency, waits = rules["EdgeHighInferenceLatency"]
    assert re.fullmatch(r"histogram_quantile\(0\.95, sum by .*\( rate\(\S+\[5m\]\)\)\) > 0\.1", latency)
    assert waits == "5m"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_what_an_alert_tells_is_in_the_runbook(alert: alert_rules.AlertRule) -> None:
    within = re.search(rf"- \*\*{alert.severity}\*\*: .*?(\d+ \w+)\)?$", RUNBOOK, re.MULTILINE)
    assert within is not None, alert.severity
    assert within[1] == alert.respond_within
    path, _, anchor = alert.runbook_url.partition("#")
    assert path == "docs/runbook.md"
    assert anchor in {anchor_of(line) for line in re.findall(r"^#+ (.*)$", RUNBOOK, re.MULTILINE)}
    row = next(row for row in RUNBOOK.splitlines() if row.startswith("| `") and f"`{alert.name}`" in row)
    assert f"(#{anchor})" in row
    assert alert.severity in row


def anchor_of(heading: str) -> str:
    """How a heading is linked to."""
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


def test_rules_ask_for_metrics_that_exist() -> None:
    known = {metric.full_name + end for metric in CATALOGUE for end in ("", "_bucket", "_count", "_sum")}
    asked = {name for alert in ALERTS for name in re.findall(r"fed_vit_autorl_\w+", alert.condition)}
    assert len(asked) > 10
    assert asked <= known


# --- the drill profile -----------------------------------------------------------------------------------------------


def flat(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def test_a_factor_divides_what_is_waited_for_and_looked_back_on_and_nothing_else() -> None:
    long, short = flat(GROUPS), flat(alert_rules.shortened(GROUPS, 12))
    assert short["HighTrainingLoss"]["for"] == "75s"
    assert short["ServiceDown"]["for"] == "5s"
    assert short["ServiceDown"]["keep_firing_for"] == "15s"
    assert "[25s]" in short["EdgeHighInferenceLatency"]["expr"]
    assert "[150s] offset 150s" in short["ModelConvergenceStalled"]["expr"]
    assert "[30m]" in short["InferenceAvailabilitySlowBurn"]["expr"]
    for name, rule in long.items():
        same = {key: value for key, value in rule.items() if key not in ("for", "keep_firing_for", "expr")}
        assert same.items() <= short[name].items()
        time = r"(\[|offset )\d+\w+"
        assert re.sub(time, "", rule["expr"]) == re.sub(time, "", short[name]["expr"])


def test_no_factor_shortens_more_than_scrapes_allow() -> None:
    interval_s = alert_rules.scrape_interval_s(1_000_000)
    assert interval_s == alert_rules.LEAST_SCRAPE_INTERVAL_S
    for name, rule in flat(alert_rules.shortened(GROUPS, 1_000_000)).items():
        ranges = re.findall(r"\[(\d+)s\]", rule["expr"])
        assert len(ranges) == len(re.findall(r"\[", rule["expr"])), name
        assert all(int(seconds) == alert_rules.SAMPLES_A_RANGE * interval_s for seconds in ranges)
        assert rule.get("for", f"{interval_s:g}s") == f"{interval_s:g}s"


def test_what_the_incident_logs_own_server_tells_outlasts_a_try_of_its_webhook() -> None:
    route = yaml.safe_load((ROOT / "cluster_configs/monitoring/alertmanager.yml").read_text())["route"]
    short = flat(alert_rules.shortened(GROUPS, 1_000_000))["ServiceDown"]["keep_firing_for"]
    assert int(short.removesuffix("s")) > int(route["group_interval"].removesuffix("s"))


def test_one_changes_nothing_and_less_is_refused() -> None:
    assert flat(alert_rules.shortened(GROUPS, 1)) == flat(GROUPS)
    for factor in (0.5, 0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError):
            alert_rules.shortened(GROUPS, factor)


@needs_promtool
def test_the_drill_profile_is_printed_and_promtool_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = CliRunner().invoke(app, ["monitoring", "rules", "--factor", "12"])
    assert printed.exit_code == 0, printed.output
    (tmp_path / "rules.yml").write_text(printed.stdout)
    promtool("check", "rules", tmp_path / "rules.yml")
    assert flat(yaml.safe_load(printed.stdout)["groups"]) == flat(alert_rules.shortened(GROUPS, 12))


def test_outside_a_checkout_there_are_no_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["monitoring", "rules"])
    assert refused.exit_code == 2
    assert "There are no alert rules" in refused.output

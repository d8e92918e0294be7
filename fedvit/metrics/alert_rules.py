"""Prometheus alert rules: reading, shortening for drills, and a Markdown table.

For a drill, waiting times (``for``, ``keep_firing_for``), ranges and offsets are divided by one factor. Thresholds
stay, counts among them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedvit.errors import ConfigError

RULES = Path("cluster_configs") / "monitoring" / "rules"
SCRAPE_INTERVAL_S = 5.0
# Shorter intervals would load the machine, and end before the control API has asked its components for their health.
LEAST_SCRAPE_INTERVAL_S = 3.0
# rate() needs two samples, and one scrape may fail.
SAMPLES_A_RANGE = 4
LEAST_KEPT_S = 15
"""More than Alertmanager's ``group_interval``: a webhook that recovers is tried again before the alert ends."""
_UNITS_S = {"h": 3600, "m": 60, "s": 1}
_RANGE = re.compile(r"(?<=\[)\d+[smh](?=\])")
_OFFSET = re.compile(r"(?<=\boffset )\d+[smh]\b")


@dataclass(frozen=True, slots=True)
class AlertRule:
    """One alert rule. ``waits`` is Prometheus' ``for``, the time that its condition must hold; "" for none."""

    name: str
    severity: str
    condition: str
    waits: str
    summary: str
    respond_within: str
    runbook_url: str


def read_groups(folder: Path) -> list[dict[str, Any]]:
    """Groups of all rule files in the folder.

    Raises:
        ConfigError: there are no files, or one cannot be read.
    """
    try:
        files = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yml"))]
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"The alert rules in {folder} cannot be read: {error}.") from None
    if not files:
        raise ConfigError(f"There are no alert rules in {folder}.", cure="Run it in the checkout's folder.")
    return [group for file in files for group in file["groups"]]


def scrape_interval_s(factor: float) -> float:
    """Scrape interval of a drill that is ``factor`` times as fast, in seconds."""
    return max(LEAST_SCRAPE_INTERVAL_S, SCRAPE_INTERVAL_S / factor)


def shortened(groups: Sequence[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """The rules ``factor`` times as fast, within what the scrape interval allows.

    Raises:
        ConfigError: the factor is below 1.
    """
    if not factor >= 1:
        raise ConfigError(f"A factor of {factor:g} makes no rule faster.", cure="Give 1, or more.")
    return [{**group, "rules": [_shortened(rule, factor) for rule in group["rules"]]} for group in groups]


def alerts(groups: Sequence[dict[str, Any]]) -> Iterator[AlertRule]:
    """The alert rules of the groups."""
    for rule in (rule for group in groups for rule in group["rules"] if "alert" in rule):
        annotations = {name: rule["annotations"][name] for name in ("summary", "respond_within", "runbook_url")}
        condition, waits = " ".join(rule["expr"].split()), str(rule.get("for", ""))
        yield AlertRule(rule["alert"], rule["labels"]["severity"], condition, waits, **annotations)


def markdown(groups: Sequence[dict[str, Any]]) -> str:
    """docs/reference/alerts.md: one row for each alert."""
    lines = [
        "# Alerts",
        "",
        "Generated from `cluster_configs/monitoring/rules` by `fedvit monitoring rules --table`.",
        "",
        "| alert | severity | holds for | respond within | condition | runbook |",
        "|---|---|---|---|---|---|",
    ]
    for alert in alerts(groups):
        link = "../" + alert.runbook_url.removeprefix("docs/")
        condition = alert.condition.replace("|", "\\|")
        lines.append(
            f"| `{alert.name}` | {alert.severity} | {alert.waits or '–'} | {alert.respond_within} | `{condition}` "
            f"| [section]({link}) |"
        )
    return "\n".join(lines) + "\n"


def _shortened(rule: dict[str, Any], factor: float) -> dict[str, Any]:
    interval_s = math.ceil(scrape_interval_s(factor))

    def shorter(text: str, least_s: int) -> str:
        long_s = int(text[:-1]) * _UNITS_S[text[-1]]
        seconds = min(long_s, max(round(long_s / factor), least_s))
        unit = next(unit for unit, length_s in _UNITS_S.items() if seconds % length_s == 0)
        return f"{seconds // _UNITS_S[unit]}{unit}"

    expr = _RANGE.sub(lambda match: shorter(match[0], SAMPLES_A_RANGE * interval_s), rule["expr"])
    expr = _OFFSET.sub(lambda match: shorter(match[0], interval_s), expr)
    least_s = {"for": interval_s, "keep_firing_for": LEAST_KEPT_S}
    waits = {name: shorter(rule[name], least) for name, least in least_s.items() if name in rule}
    return {**rule, "expr": expr, **waits}

"""Every command of docs/runbook.md, as printed, against a running system; what each one changed is looked at."""

from __future__ import annotations

import re

import pytest
from drill import RUNBOOK, CommandResult, Drill
from effects import check_effect, remember, values_of
from placeholders import PLACEHOLDERS, SHELL, Placeholder

from fedvit.incidents.drills.runbook import Command, commands, equivalents

pytestmark = [pytest.mark.ray, pytest.mark.drill]

# What ends the system comes at the end, whatever its place in the text.
LAST = ("Complete System Shutdown", "Restore from Backup")
TEXT = RUNBOOK.read_text()
FOUND = commands(TEXT)
ORDER = sorted(FOUND, key=lambda command: LAST.index(command.heading) + 1 if command.heading in LAST else 0)
ROWS = equivalents(TEXT)
PROGRAMS = ("jq", "curl", "ping", "traceroute", "ps", "free")


def name_of(command: Command) -> str:
    """How a test, and the list at the end, call a command."""
    first, *more = command.text.splitlines()
    url = re.search(r'http://localhost:([^"\s]+)', command.text)
    shown = f"{first.split()[0]} {url[1]}" if url and first.startswith("curl") else first + (" …" if more else "")
    return f"{command.line}: {shown}"


@pytest.mark.parametrize("command", ORDER, ids=name_of)
def test_command(command: Command, drill: Drill, report: dict[str, str]) -> None:
    name = name_of(command)
    report[name] = "FAILED"
    text, fate = command.text, "run"
    if command.docker_only:
        row = next(row for row in ROWS if row.translate(text) is not None)
        if row.section:
            report[name] = f"mapped to the commands of {row.section}"
            return
        text = row.translate(text) or ""
        fate = f"mapped to {text.splitlines()[0]}"
    reason = why_not(text, drill)
    if reason:
        report[name] = f"skipped: {reason}"
        pytest.skip(reason)
    play(text, drill)
    report[name] = fate


def why_not(text: str, drill: Drill) -> str | None:
    """Why a command cannot be run on this machine."""
    if ":9090/" in text and not drill.has("prometheus"):
        return "prometheus is not installed"
    words = set(re.findall(r"[\w-]+", text))
    missing = [program for program in PROGRAMS if program in words and not drill.has(program)]
    return f"{' and '.join(missing)} not installed" if missing else None


def play(text: str, drill: Drill) -> None:
    """Run a command: first with its placeholders, each of which must be refused, then filled."""
    for placeholder in PLACEHOLDERS:
        filled = text.replace(placeholder.text, placeholder.value(drill)) if placeholder.text in text else text
        if filled != text and placeholder.refusals:
            check_refused(drill.run(text), placeholder)
        text = filled
    remember(drill, text)
    outcome = drill.run(text, endless=text.startswith("ping") and "-c" not in text.split())
    check_succeeded(outcome)
    check_effect(drill, outcome)


def check_refused(outcome: CommandResult, placeholder: Placeholder) -> None:
    """The operator forgot to fill it in, and is told so."""
    if SHELL in placeholder.refusals:
        assert outcome.exit_status != 0, outcome.describe()
        # What follows an angle bracket in the middle of a line is taken for a file, and there is none.
        assert re.search("syntax error|No such file", outcome.err), outcome.describe()
        return
    assert outcome.calls, outcome.describe()
    assert outcome.calls[0].status in placeholder.refusals, outcome.describe()
    problem = values_of(outcome.out)[0]
    assert problem["status"] == outcome.calls[0].status, outcome.describe()
    assert problem["detail"], outcome.describe()
    assert problem[placeholder.help_in], outcome.describe()


def check_succeeded(outcome: CommandResult) -> None:
    """It ended well, every request of it was answered well, and what jq printed is JSON with nothing missing."""
    assert outcome.exit_status == 0, outcome.describe()
    assert all(200 <= call.status < 300 for call in outcome.calls), outcome.describe()
    assert "curl" not in outcome.command.split() or outcome.calls, outcome.describe()
    if re.search(r"\| jq\b", outcome.command):
        # A loop prints titles of its own.
        values = values_of(re.sub(r"^=== .* ===$", "", outcome.out, flags=re.MULTILINE))
        assert values, outcome.describe()
        assert None not in values, outcome.describe()
    if ":9090/" in outcome.command:
        assert outcome.json()["data"]["result"], outcome.describe()


def test_every_command_is_run_or_mapped_or_skipped_for_a_reason(report: dict[str, str]) -> None:
    names = [name_of(command) for command in FOUND]
    assert len(set(names)) == len(names)
    kinds = {
        kind: [name for name, fate in report.items() if fate.startswith(kind)]
        for kind in ("run", "mapped", "skipped: ", "FAILED")
    }
    assert kinds["FAILED"] == []
    assert sum(map(len, kinds.values())) == len(FOUND)
    assert set(report) == set(names)

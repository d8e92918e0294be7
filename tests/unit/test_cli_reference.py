"""``fedvit --help``, ``fedvit --version`` and the generated reference of the command line."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.testing import CliRunner

from fedvit.cli.main import PANELS, app
from fedvit.cli.options import SHARED
from fedvit.cli.reference import PAGE, markdown

ROOT = Path(__file__).parents[2]

# `fedvit up` in prose, $(BIN)/fedvit up in a script, and fedvit up as a line of a code block.
MENTION = re.compile(r"(?:`|bin/|BIN\)/)fedvit ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?")
LINE = re.compile(r"^ *fedvit ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", re.MULTILINE)
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SOURCES = (
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    "docs",
    "examples",
    "cluster_configs",
    "fedvit",
    "serve_apps",
    "actors",
)


def mentions() -> Iterator[tuple[str, str, str]]:
    """Every mention of a command: file, command, and the word after it."""
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".md", ".py", ".yml", ".yaml", ".service") or file.name == "Makefile":
                text = file.read_text()
                lines = LINE.findall("\n".join(BLOCK.findall(text)))
                for command, word in MENTION.findall(text) + lines:
                    yield str(file.relative_to(ROOT)), command, word


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_reference_is_current() -> None:
    assert (ROOT / PAGE).read_text() == markdown(), "write it anew: python -m fedvit.cli.reference"


def test_the_reference_has_every_command_with_its_options() -> None:
    page = markdown()
    for group, commands in (("clients", ("list", "validate")), ("privacy", ("show", "audit")), ("token", ("create",))):
        listed = help_of(group)
        for command in commands:
            assert command in listed
            section = page.split(f"#### `fedvit {group} {command}", 1)[1].split("\n#", 1)[0]
            for option in (word for word in help_of(group, command).split() if word.startswith("--")):
                assert option == "--help" or option.strip("[].,()") in section, (group, command, option)


def test_the_help_groups_commands_by_task() -> None:
    shown = help_of()
    for panel, commands in PANELS.items():
        assert panel in shown
        assert all(command in shown for command in commands)


def test_shared_options_are_the_same_everywhere() -> None:
    assert len(SHARED) == 8
    for words in (["status"], ["clients", "list"], ["privacy", "show"], ["audit-log", "verify"], ["down"]):
        assert "State folder (default: FEDVIT_HOME, or ./var)." in help_of(*words)


def test_the_version_is_that_of_the_installed_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"fedvit {importlib.metadata.version('fedvit')}\n")


def test_every_command_that_the_project_mentions_exists() -> None:
    commands = {name: entry for entries in PANELS.values() for name, entry in entries.items()}
    results = list(mentions())
    assert len(results) > 80
    for file, command, word in results:
        assert command in commands, (file, command)
        entry = commands[command]
        if isinstance(entry, typer.Typer) and word:
            names = {each.name or getattr(each.callback, "__name__", "") for each in entry.registered_commands}
            assert word in names, (file, command, word)

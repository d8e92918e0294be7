"""The code blocks of the documentation, in the order of a page, and what is done with each in one folder."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from fedvit.config import Settings
from fedvit.incidents.drills.runbook import commands
from fedvit.settings import load_settings

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")
# Programs that are not ours; they are not run here.
OTHERS = {"git", "cd", "cp", "rm", "cat", "curl", "pip", "nft", "export", "grafana"}
# Files that a reader brings, or that an earlier command writes.
_GIVEN = re.compile(r"GTSRB\.zip|/srv/.*|path/.*|photos/|release/.*|var-sweep/.*|truck-7\.token|owner.*|policy\..*")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the name of the file that it is, if it is one."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name in the comment of its first line."""
        named = _FILE.match(self.text)
        return named[1] if named else None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    return [Block(language, text) for language, text in _FENCE.findall(page.read_text())]


def shell_commands(block: Block) -> list[list[str]]:
    """The commands of a bash block, as words; continued lines are joined, variables before a command are left out."""
    lines = []
    for command in commands(f"```bash\n{block.text}```\n"):
        for part in command.text.replace("\\\n", " ").split("\n")[0].split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            lines.append(words)
    return lines


def parse(app: typer.Typer, words: list[str]) -> None:
    """Parse the arguments of one of our programs, and run nothing.

    Raises:
        click.UsageError: there is no such command, option or value.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context(words[0], words[1:])
    while getattr(command, "commands", None):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def missing_files(words: list[str], folder: Path) -> list[str]:
    """The files after --config and --data that are neither in the folder nor in the repository nor the reader's own."""
    named = [value for option, value in itertools.pairwise(words) if option in ("--config", "--data")]
    return [
        name for name in named if not ((folder / name).exists() or (ROOT / name).exists() or _GIVEN.fullmatch(name))
    ]


def check_data(block: Block, folder: Path) -> None:
    """Parse a block of YAML or TOML; settings are checked as such, and entry points have to exist in the folder."""
    if block.language == "toml":
        for names in tomllib.loads(block.text)["project"]["entry-points"].values():
            for place in names.values():
                module, _, attribute = place.partition(":")
                assert f"class {attribute}(" in (folder / f"{module}.py").read_text()
        return
    tree = yaml.safe_load(block.text)
    if set(tree) <= set(Settings.model_fields):
        load_settings(environ={}, overrides=tree)


def play(page: Path, folder: Path, run: Callable[[list[str]], None], names: dict[str, Any]) -> Iterator[str]:
    """Do what a reader does with each block of a page, in order, in one folder; yields each language.

    Args:
        run: called with each command of our programs.
        names: what Python blocks that are no file see.
    """
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        if block.language == "python":
            exec(compile(block.text, str(page), "exec"), dict(names))
        elif block.language in ("yaml", "toml"):
            check_data(block, folder)
        elif block.language == "bash":
            for words in shell_commands(block):
                run(words)
        yield block.language

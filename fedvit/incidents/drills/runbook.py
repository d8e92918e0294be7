"""Parser of the runbook: the commands of its ``bash`` fences, and the table of equivalents of Docker commands.

Paths are relative to the checkout.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

RUNBOOK = Path("docs") / "runbook.md"
TABLE_HEAD = "| docker command | equivalent here |"
ANYTHING = "…"
DOCKER_ONLY = re.compile(r"(docker|docker-compose|kubectl|ssh)\b")
# "1. Stop all training immediately": an instruction for people between the commands.
_FOR_PEOPLE = re.compile(r"\d+\. ")


@dataclass(frozen=True, slots=True)
class Command:
    """A command as printed, including continuation lines, loops and quoted lines."""

    text: str
    heading: str
    line: int

    @property
    def docker_only(self) -> bool:
        """Whether it needs Docker, Kubernetes or another machine."""
        return DOCKER_ONLY.match(self.text) is not None


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a fence that is no command: ``kind`` is comment, blank or people."""

    text: str
    kind: str


def fences(markdown: str, language: str = "bash") -> Iterator[tuple[str, int, list[str]]]:
    """Each fence of a language: the heading above it, the number of its first line, its lines."""
    heading, begun = "", 0
    lines: list[str] | None = None
    for number, line in enumerate(markdown.splitlines(), start=1):
        if begun:
            if line.startswith("```"):
                if lines is not None:
                    yield heading, begun, lines
                begun, lines = 0, None
            elif lines is not None:
                lines.append(line)
        elif line.startswith("```"):
            begun, lines = number + 1, [] if line.strip() == f"```{language}" else None
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def parts(markdown: str) -> Iterator[Command | Line]:
    """All commands and other lines of the fences, in order.

    Raises:
        ValueError: a fence ends in the middle of a command.
    """
    for heading, first, lines in fences(markdown):
        open_lines: list[str] = []
        for number, line in enumerate(lines, start=first):
            kind = None if open_lines else _no_command(line)
            if kind is not None:
                yield Line(line, kind)
                continue
            open_lines.append(line)
            if _is_whole("\n".join(open_lines)):
                yield Command("\n".join(open_lines), heading, number - len(open_lines) + 1)
                open_lines = []
        if open_lines:
            raise ValueError(f"the fence at line {first} ends inside the command {open_lines[0]!r}")


@lru_cache(maxsize=2)
def commands(markdown: str) -> tuple[Command, ...]:
    """Every command, in order."""
    # Cached: bash is called for each line.
    return tuple(part for part in parts(markdown) if isinstance(part, Command))


def _no_command(line: str) -> str | None:
    if not line.strip():
        return "blank"
    if line.lstrip().startswith("#"):
        return "comment"
    return "people" if _FOR_PEOPLE.match(line) else None


def _is_whole(text: str) -> bool:
    """Whether bash does not wait for more lines; text that bash rejects is complete, too."""
    if text.endswith("\\"):
        return False
    result = subprocess.run(
        ["bash", "-n"], input=text, capture_output=True, text=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    )
    return "unexpected EOF" not in result.stderr and "unexpected end of file" not in result.stderr


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A row of the table. ``section`` names the heading whose commands are the equivalent."""

    docker: str
    here: str | None
    section: str | None

    def translate(self, text: str) -> str | None:
        """The equivalent of ``text``; "" if the section contains it, None if the row is about another command."""
        pattern = "(.*)".join(map(re.escape, self.docker.split(ANYTHING)))
        match = re.fullmatch(pattern, text, re.DOTALL)
        if match is None:
            return None
        return (self.here or "").replace(ANYTHING, match.group(match.lastindex or 0))


def equivalents(markdown: str) -> list[Equivalent]:
    """The rows of the table."""
    lines = iter(markdown.splitlines())
    while next(lines) != TABLE_HEAD:
        pass
    next(lines)
    return [_row(line) for line in iter(lambda: next(lines), "")]


def _row(line: str) -> Equivalent:
    docker, here = (cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1])
    link = re.fullmatch(r"\[(.+)\]\(#.+\)", here)
    return Equivalent(docker.strip("`"), None if link else here.strip("`"), link[1] if link else None)

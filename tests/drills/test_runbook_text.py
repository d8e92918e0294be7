"""What the runbook says, without running it: nothing of the original is lost, every Docker command is mapped."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from drill import RUNBOOK

from fedvit.incidents.drills.runbook import Command, commands, equivalents, fences, parts

ORIGINAL = Path(os.environ.get("RUNBOOK_ORIGINAL") or RUNBOOK.parents[2] / "shared" / "runbook.md")

SAMPLE = """# A
```bash
# a comment
free -h

1. Tell people
curl -X POST "http://localhost/x" \\
  -d '{
    "a": [1]
  }'
for d in a b; do
  # inside
  echo "$d"
done
docker exec s python -c "
# it's python
print('x')
"
ping <ip>
```
```json
{"no": "command"}
```
"""


def test_each_way_to_write_a_command_is_one_command() -> None:
    results = list(parts(SAMPLE))
    assert [part.text.splitlines()[0] for part in results if isinstance(part, Command)] == [
        "free -h",
        'curl -X POST "http://localhost/x" \\',
        "for d in a b; do",
        'docker exec s python -c "',
        "ping <ip>",
    ]
    assert [part.kind for part in results if not isinstance(part, Command)] == ["comment", "blank", "people"]
    assert (commands(SAMPLE)[0].heading, commands(SAMPLE)[0].line) == ("A", 4)


def test_a_command_that_does_not_end_is_an_error() -> None:
    with pytest.raises(ValueError):
        commands("```bash\necho 'open\n```\n")


def test_no_line_of_a_fence_is_lost() -> None:
    text = RUNBOOK.read_text()
    assert "\n".join(part.text for part in parts(text)) == "\n".join(
        line for _, _, lines in fences(text) for line in lines
    )
    languages = set(re.findall(r"^```(\S+)$", text, re.MULTILINE))
    assert languages == {"bash", "markdown"}


def test_every_docker_command_has_one_row_and_every_row_is_used() -> None:
    text = RUNBOOK.read_text()
    rows, result = equivalents(text), [command for command in commands(text) if command.docker_only]
    first = [next((row for row in rows if row.translate(c.text) is not None), None) for c in result]
    assert [c.text for c, row in zip(result, first, strict=True) if row is None] == []
    assert [row.docker for row in rows if row not in first] == []
    headings = {command.heading for command in commands(text)}
    assert {row.section for row in rows if row.section} <= headings


def before(text: str, command: Command) -> str:
    """What stands between the fence before that of a command and its own; the fence before is included."""
    lines = text.splitlines()
    first = max(start for _, start, _ in fences(text) if start <= command.line)
    above = [start for _, start, _ in fences(text) if start < first]
    return "\n".join(lines[(max(above) if above else 0) : first - 1])


def test_what_to_type_here_stands_before_each_docker_command() -> None:
    text = RUNBOOK.read_text()
    rows = equivalents(text)
    missing = []
    for command in (command for command in commands(text) if command.docker_only):
        row = next(row for row in rows if row.translate(command.text) is not None)
        here = row.section or (row.translate(command.text) or "")
        # A command of several lines is named by its beginning.
        wanted = "python -c" if here.startswith("python -c") else here
        if wanted not in " ".join(before(text, command).split()):
            missing.append(command.text)
    assert missing == []


@pytest.mark.parametrize("page", sorted(RUNBOOK.parent.rglob("*.md")), ids=lambda page: page.name)
def test_pages_that_debians_packages_lack_are_not_named(page: Path) -> None:
    urls = re.findall(r"localhost:(9090|9093)(/[\w/.-]*)?", page.read_text())
    served = ("/api/", "/metrics", "/-/")
    assert [f"{port}{path}" for port, path in urls if path and not path.startswith(served)] == []


def test_every_command_of_the_original_is_in_ours_in_its_order() -> None:
    if not ORIGINAL.exists():
        pytest.skip(f"the original runbook is not at {ORIGINAL} (set RUNBOOK_ORIGINAL)")
    theirs, ours = commands(ORIGINAL.read_text()), commands(RUNBOOK.read_text())
    assert len(theirs) > 40
    rest = iter(command.text for command in ours)
    lost = [command.text for command in theirs if not any(text == command.text for text in rest)]
    assert lost == []


def test_nothing_else_of_the_originals_fences_is_lost() -> None:
    if not ORIGINAL.exists():
        pytest.skip(f"the original runbook is not at {ORIGINAL} (set RUNBOOK_ORIGINAL)")
    ours = RUNBOOK.read_text()
    for language in ("bash", "markdown"):
        for _, _, lines in fences(ORIGINAL.read_text(), language):
            assert f"```{language}\n" + "\n".join(lines) + "\n```" in ours

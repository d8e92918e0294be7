"""The README and the tutorial, typed from top to bottom in a fresh clone; ``make test-readme``.

It takes the standard ports, installs everything from the package index, and runs the demonstration.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks

pytestmark = [pytest.mark.ray, pytest.mark.campaign, pytest.mark.timeout(7200)]

# What a reader would have to ask about: boxes and warnings of libraries, errors, Python's and JSON's own notation.
# The boxes of `--help` have titles.
UNEXPLAINED = re.compile(r"Traceback|Warning:|╭─ Error|╭──|Error:|\bNone\b|\{'|^\{$", re.MULTILINE)
# What `make` would pass on to the one that a reader types.
MAKE = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ARGS")


def script(page: Path) -> str:
    """All commands of a page as one script that ends at the first that fails."""
    text = "\n".join(block.text for block in blocks(page) if block.language == "bash")
    text = text.replace("<this repository>", str(ROOT))
    # The tests of the clone are not the subject, and this is one of them.
    text = re.sub(r"^make test$", "make test ARGS='-q tests/unit/test_cli_config.py'", text, flags=re.MULTILINE)
    return f"set -euo pipefail\n{text}\n"


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/first-federation.md"])
def test_a_page_works_as_it_is_printed(page: str, tmp_path: Path) -> None:
    text = script(ROOT / page)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FEDVIT_", "RAY_", "PYTHON", *MAKE))
    }
    log = tmp_path / "log"
    with log.open("w") as output:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path,
            env={**environment, "COLUMNS": "80"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    try:
        printed = log.read_text()
        assert done.returncode == 0, printed[-4000:]
        assert UNEXPLAINED.findall(printed) == [], printed
    finally:
        subprocess.run(["bash", "-c", "cd fedvit && .venv/bin/fedvit down"], cwd=tmp_path, check=False)

"""A campaign whose tests are all skipped says so in its last line, and fails in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SKIPPED = """
import pytest
@pytest.mark.skip(reason="sshd, rsync not installed")
def test_two_hosts(): pass
"""


@pytest.mark.parametrize(
    ("more", "ci", "status", "last"),
    [
        ("", "", 0, "Not run: 1 tests. sshd, rsync not installed"),
        ("", "true", 1, "Not run: 1 tests. sshd, rsync not installed"),
        ("def test_other(): pass", "true", 0, "1 passed, 1 skipped"),
    ],
)
def test_the_last_line_says_what_was_not_run(tmp_path: Path, more: str, ci: str, status: int, last: str) -> None:
    (tmp_path / "test_campaign.py").write_text(SKIPPED + more)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", ".", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert last in done.stdout.splitlines()[-1]

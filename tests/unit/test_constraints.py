"""The versions that are installed, and the hashes of their files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Some machines take them from another index, whose files have other hashes.
WITHOUT_HASHES = {"torch", "torchvision"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(text: str) -> dict[str, str]:
    return {normalized(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def test_every_version_but_torchs_has_hashes_that_make_setup_demands() -> None:
    pinned = versions((ROOT / "constraints.txt").read_text())
    hashed = (ROOT / "constraints-hashes.txt").read_text()
    assert versions(hashed) == {name: version for name, version in pinned.items() if name not in WITHOUT_HASHES}
    for requirement in hashed.split("\n\n")[-1].replace("\\\n", " ").splitlines()[1:]:
        assert re.fullmatch(r"[\w.-]+==\S+( +--hash=sha256:[0-9a-f]{64})+ *", requirement), requirement[:60]
    assert "--require-hashes --requirement constraints-hashes.txt" in (ROOT / "Makefile").read_text()

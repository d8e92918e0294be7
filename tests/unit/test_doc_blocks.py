"""Every code block of the README and of docs/, in order, in one folder a page.

Python runs, settings are loaded, our commands are parsed, and those that need no system of their own run against one
in this process. ``make drill`` runs the runbook; ``make test-readme`` types the README and the tutorial.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control_client import Through
from doc_blocks import OTHERS, ROOT, blocks, missing_files, parse, play, shell_commands
from test_workload import HostedFleet
from typer.testing import CliRunner

import fedvit.client
from edge_runtime.__main__ import app as edge
from fedvit.cli import api_session
from fedvit.cli.main import app
from fedvit.clients.workload import WorkloadModel, load_workload
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import GenerousAccountant
from fedvit.types import RunStatus
from fedvit.wire.tensors import decode_weights

PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if blocks(page) and page.name != "runbook.md"
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# These run for real here; the others start a system, or need data or a vehicle that the page does not bring.
RUN = re.compile(r"fedvit (--help|status|privacy show|token create|audit-log show|incident list)\b(?!.*--home).*")


@pytest.fixture
def system(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A control API with a trained model that the commands and the Python blocks reach."""
    system = make().trained()
    transport = Through(system.http)
    monkeypatch.setattr(api_session, "TRANSPORT", transport)
    monkeypatch.setenv("FEDVIT_URL", "http://testserver")
    monkeypatch.setenv("FEDVIT_HOME", str(tmp_path / "home"))
    client = fedvit.client.FedvitClient
    monkeypatch.setattr(
        fedvit.client,
        "FedvitClient",
        lambda url, *more, **options: client(url, *more, **{"transport": transport, **options}),
    )
    return system


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_work_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)

    def run(words: list[str]) -> None:
        if words[0] == "make":
            assert words[1] in TARGETS, words
        elif words[0] in ("fedvit", "fedvit-edge"):
            # What the shell would redirect.
            words = words[: words.index(">")] if ">" in words else words
            assert missing_files(words, folder) == []
            if words[-1] != "--help":
                parse(app if words[0] == "fedvit" else edge, words)
            if RUN.match(" ".join(words)):
                shown = CliRunner().invoke(app, words[1:])
                assert shown.exit_code == 0, (words, shown.output)
        else:
            assert words[0] in OTHERS, words

    assert list(play(page, folder, run, {"__name__": "block"}))


def test_the_clients_of_your_own_learn_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/how-to/own-clients.md"
    for block in blocks(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_clients", raising=False)
    privacy = {"privacy_unit": "client", "noise_multiplier": 1.0}
    overrides = {"home": tmp_path / "home", "training": {"rounds": 2}, "privacy": privacy}
    settings = load_settings(tmp_path / "own.yaml", environ={}, overrides=overrides)
    model = WorkloadModel(settings)
    with Store.open(settings.home) as store:
        store.clients.register(load_workload(settings).registered())
        loop = Coordinator(
            settings=settings,
            store=store,
            accountant=GenerousAccountant(store),
            fleet=HostedFleet(settings),
            model=model,
        )
        run = loop.run()
        assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 2), run.reason
        trained = decode_weights(store.blobs.get(store.versions.latest(run.run_id).weights_digest), max_bytes=2**20)
    assert np.abs(trained["w"]).max() > 0


def test_every_bash_block_has_a_command() -> None:
    assert all(shell_commands(block) for page in PAGES for block in blocks(page) if block.language == "bash")

"""``fedvit token`` and ``fedvit audit-log`` on a real state folder."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedvit.access.tokens import verify_token
from fedvit.cli.main import app
from fedvit.store.store import Store
from fedvit.types import utc_now


def fedvit(home: Path, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--home", str(home)])


def test_a_token_is_printed_once_listed_without_its_secret_and_revoked(tmp_path: Path) -> None:
    text = fedvit(tmp_path, "token", "create", "Ana", "--scope", "viewer", "--scope", "releases").stdout.strip()
    with Store.open(tmp_path) as store:
        assert verify_token(store, text, utc_now()).actor.endswith(":Ana")
    listed = fedvit(tmp_path, "token", "list", "--json").stdout
    (facts,) = json.loads(listed)
    assert (facts["scopes"], facts["revoked_at"]) == (["releases", "viewer"], None)
    assert text.split("_", 2)[-1] not in listed
    assert fedvit(tmp_path, "token", "revoke", facts["token_id"]).exit_code == 0
    assert json.loads(fedvit(tmp_path, "token", "list", "--json").stdout)[0]["revoked_at"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("token", "create", "Ana", "--scope", "root"), "No scope is called 'root'"),
        (("token", "create", "edges", "--scope", "device"), "has to name its client"),
        (("token", "create", "<b>", "--scope", "admin"), "'<b>' is no name for a token"),
        (("token", "revoke", "nobody"), "no fedvit state"),
        (("audit-log", "verify"), "no fedvit state"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    result = fedvit(tmp_path, *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_the_trail_shows_who_made_tokens_and_whether_it_was_touched(tmp_path: Path) -> None:
    created = json.loads(fedvit(tmp_path, "token", "create", "Ana", "--scope", "admin", "--json").stdout)
    fedvit(tmp_path, "token", "revoke", created["token_id"])
    shown = fedvit(tmp_path, "audit-log", "show", "--json").stdout
    assert [line["action"] for line in json.loads(shown)] == ["CLI token create", "CLI token revoke"]
    assert created["token"].split("_", 2)[-1] not in shown
    assert json.loads(fedvit(tmp_path, "audit-log", "verify", "--json").stdout) == {"ok": True, "lines": 2}
    with closing(sqlite3.connect(tmp_path / "state.db")) as connection:
        connection.execute("UPDATE audit SET actor = 'nobody' WHERE sequence = 1")
        connection.commit()
    broken = fedvit(tmp_path, "audit-log", "verify")
    assert broken.exit_code == 1
    assert "sequence 1" in broken.stderr


def test_a_token_for_one_vehicle_comes_with_its_way_into_the_mailbox(tmp_path: Path) -> None:
    words = ("token", "create", "truck", "--scope", "device", "--client", "truck-1", "--json")
    created = json.loads(fedvit(tmp_path, *words).stdout)
    assert created["client_id"] == "truck-1"
    assert created["mailbox"]["url"] == str(tmp_path / "mailbox")
    assert len(bytes.fromhex(created["mailbox"]["key"])) == 32
    assert json.loads(fedvit(tmp_path, *words).stdout)["mailbox"] == created["mailbox"]
    assert created["mailbox"]["key"] not in fedvit(tmp_path, "audit-log", "show", "--json").stdout
    assert fedvit(tmp_path, "token", "create", "x", "--scope", "admin", "--client", "truck-1").exit_code == 2

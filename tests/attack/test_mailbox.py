"""Attacks by messages in the mailbox: they cannot stop it, nor fill it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_yard import Yard

from fedvit.operations.mailbox import REASONS, Mailbox
from fedvit.types import RunStatus, utc_now
from fedvit.wire.folders import open_folder
from fedvit.wire.mailbox import MAX_MESSAGE_BYTES, Message, MessageKind, new_message_id, sign_message
from fedvit.wire.untrusted import MAX_REASON
from tests.attack.table import AttackTable

TRUCK = "truck-0"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Yard, Mailbox]]:
    yard = Yard(tmp_path)
    mailbox = Mailbox(yard.settings, yard.store)
    mailbox.enable()
    yield yard, mailbox
    yard.store.close()


def test_messages_cannot_stop_or_fill_the_mailbox(
    site: tuple[Yard, Mailbox], full: bool, attack_table: AttackTable
) -> None:
    yard, mailbox = site
    folder, count, root = open_folder(mailbox.url), 2_000 if full else REASONS + 30, Path(mailbox.url)
    run_ids: list[Any] = ["run-0001", "../../x", "\ud800"]
    rounds: list[Any] = [10**400, 2**63, -1, "1", None, {"a": 1}]

    def put(path: str, content: bytes) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)

    for number in range(count):
        body = {"run_id": run_ids[number % 3], "round_index": rounds[number % 6], "sha256": "0" * 64}
        message = Message(TRUCK, new_message_id(utc_now()), MessageKind.UPDATE, body)
        put(message.path, sign_message(message, mailbox.key_of(TRUCK)))
        put(message.path.replace(".json", ".safetensors"), bytes(2 * MAX_MESSAGE_BYTES))
        put(f"inbox/nobody-{number % 7}/{new_message_id(utc_now())}.json", bytes(2 * MAX_MESSAGE_BYTES))
        put(f"inbox/{TRUCK}/stray-{number}", bytes(2 * MAX_MESSAGE_BYTES))
    for _ in range(2 * count):
        mailbox.take()
        if not mailbox.state().pending and not folder.files(f"inbox/{TRUCK}"):
            break
    state = mailbox.state()
    assert (state.pending, state.delivered, state.rejected) == (0, 0, 2 * count)
    kept = [path for path in root.rglob("*") if path.is_file() and path.name != ".about"]
    assert len(kept) <= 2 * REASONS
    assert all(path.suffix == ".reason" and path.stat().st_size <= MAX_REASON + 1 for path in kept)
    yard.act = lambda: yard.do_duty(TRUCK)
    assert yard.run() is RunStatus.COMPLETED
    achieved = (
        f"{3 * count} messages and files: {len(kept)} reasons kept, {sum(p.stat().st_size for p in kept):,} bytes"
    )
    attack_table.add(
        "mailbox", "hostile messages, signed and not", achieved=achieved, bound=f"{REASONS} reasons of each client"
    )

"""A server with a mailbox, and two vehicles that may leave messages in it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from fedvit.config import Settings
from fedvit.operations.mailbox import Mailbox
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock
from fedvit.types import Client, ClientKind
from fedvit.wire.folders import Folder, open_folder
from fedvit.wire.mailbox import Message, MessageKind, new_message_id, sign_message


class MailboxSite:
    """A state folder with two trucks and its mailbox."""

    def __init__(self, home: Path, url: str | None = None) -> None:
        self.settings: Settings = load_settings(environ={}, overrides={"home": home, "fleet": {"mailbox_url": url}})
        self.store = Store.open(home)
        self.store.clients.register([Client(f"truck-{i}", ClientKind.REMOTE, 10) for i in (1, 2)])
        self.clock = ManualClock()
        self.mailbox = Mailbox(self.settings, self.store, self.clock)
        self.folder: Folder = open_folder(self.mailbox.url)

    def message(self, client_id: str = "truck-1", kind: str = "heartbeat", ago_s: float = 0) -> Message:
        message_id = new_message_id(self.clock.now() - timedelta(seconds=ago_s))
        return Message(client_id, message_id, MessageKind(kind), {"status": "ok"})

    def put(self, message: Message, key_of: str | None = None, at: str | None = None) -> Message:
        content = sign_message(message, self.mailbox.key_of(key_of or message.client_id))
        self.folder.write(at or message.path, content)
        return message

    def counts(self) -> tuple[int, int, int]:
        state = self.mailbox.state()
        return state.pending, state.delivered, state.rejected

    def reasons(self) -> list[str]:
        root = Path(self.mailbox.url) / "rejected"
        return sorted(path.read_text() for path in root.rglob("*.reason"))

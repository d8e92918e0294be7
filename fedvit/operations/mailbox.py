"""The server's side of the mailbox: a second way for vehicles that cannot reach the API.

A vehicle leaves a message in ``inbox/``. While the channel is enabled, a good one is taken and moved to ``delivered/``;
a bad one to ``rejected/``, with a file beside it that says why. An update goes the way of one that was uploaded, with
the same verdict; its weights are not kept here. What an earlier release kept in ``waiting/`` is taken like that, too.

Who may write into the mailbox can fill it or take files away, and no more: a message counts only under its client's
key, under its own name, once, and for a day.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from fedvit.api.clients import ReceiptStatus
from fedvit.config import Settings
from fedvit.errors import DataError, FedvitError, IntegrityError, MailboxError, NotFoundError, StateError
from fedvit.privacy.secrets import derive_secret, load_or_create_root_secret
from fedvit.rounds.remote import Receipt, RemoteWork
from fedvit.store.store import Store
from fedvit.types import CLIENT_ID, utc_now
from fedvit.wire.folders import Folder, open_folder
from fedvit.wire.mailbox import (
    INBOX,
    MAX_MESSAGE_BYTES,
    Message,
    MessageKind,
    UpdateNote,
    is_message_id,
    sent_at,
    unseal,
)

DELIVERED, REJECTED, WAITING = "delivered", "rejected", "waiting"
# Later a message is refused as too old; until then its id is remembered, so that it counts once.
WINDOW = timedelta(days=1)
# How far a vehicle's clock may be ahead.
AHEAD = timedelta(minutes=5)
PER_CLIENT, PER_PASS = 20, 2_000
_KEY = "mailbox"


@dataclass(frozen=True, slots=True)
class MailboxState:
    """How the channel stands. ``pending`` includes ``not_yet_taken``, the updates that an earlier release kept."""

    enabled: bool
    url: str
    enabled_at: datetime | None
    pending: int
    not_yet_taken: int
    delivered: int
    rejected: int


@dataclass(slots=True)
class _Pass:
    """What one look into the inbox found."""

    seen: dict[str, datetime] = field(default_factory=dict)
    moves: list[tuple[str, str]] = field(default_factory=list)
    removals: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    delivered: int = 0


def mailbox_url(settings: Settings) -> str:
    """Where the mailbox is, as a vehicle is told."""
    return settings.fleet.mailbox_url or str((settings.home / "mailbox").resolve())


class Mailbox:
    """The mailbox of a state folder. One process at a time may :meth:`take`; the rest may be several."""

    def __init__(self, settings: Settings, store: Store, now: Callable[[], datetime] = utc_now) -> None:
        self.url = mailbox_url(settings)
        self._store, self._now = store, now
        self._home = settings.home
        self._work = RemoteWork(settings, store)
        self._max_update_bytes = settings.training.validation.max_update_bytes
        self._opened: Folder | None = None

    def key_of(self, client_id: str) -> bytes:
        """The key under which this client seals its messages."""
        return derive_secret(self._root_key, client_id)

    @cached_property
    def _root_key(self) -> bytes:
        # A key of its own between the root and the clients': their training keys are derived from the root by name.
        return derive_secret(load_or_create_root_secret(self._home), "mailbox")

    def enabled(self) -> bool:
        """Whether messages are taken."""
        return self.standing()[0]

    def standing(self) -> tuple[bool, int]:
        """Whether messages are taken and how many were, without looking into the mailbox."""
        facts = self._facts()
        return facts["enabled"], facts["delivered"]

    def enable(self) -> MailboxState:
        """Begin to take messages; harmless when done twice.

        Raises:
            MailboxError: the mailbox cannot be written to.
            ConfigError: ``fleet.mailbox_url`` needs a package that is missing.
        """
        try:
            for name in (INBOX, DELIVERED, REJECTED, WAITING):
                self._folder.write(f"{name}/.about", b"fedvit mailbox\n")
        except OSError as error:
            raise _unreachable(self.url, error) from error
        with self._store.transaction() as transaction:
            facts = _read(transaction.metadata.get(_KEY))
            if not facts["enabled"]:
                facts |= {"enabled": True, "enabled_at": self._now().isoformat()}
                transaction.metadata.set(_KEY, facts)
        return self.state()

    def disable(self) -> MailboxState:
        """Take no more messages; what is in the mailbox stays there. Harmless when done twice."""
        with self._store.transaction() as transaction:
            facts = _read(transaction.metadata.get(_KEY))
            transaction.metadata.set(_KEY, {**facts, "enabled": False, "enabled_at": None})
        return self.state()

    def state(self) -> MailboxState:
        """How the channel stands.

        Raises:
            MailboxError: the mailbox cannot be read.
            ConfigError: ``fleet.mailbox_url`` needs a package that is missing.
        """
        facts = self._facts()
        try:
            inbox, waiting = self._count(INBOX), self._count(WAITING)
        except OSError as error:
            raise _unreachable(self.url, error) from error
        since = facts["enabled_at"]
        return MailboxState(
            enabled=facts["enabled"],
            url=self.url,
            enabled_at=datetime.fromisoformat(since) if since else None,
            pending=inbox + waiting,
            not_yet_taken=waiting,
            delivered=facts["delivered"],
            rejected=facts["rejected"],
        )

    def take(self) -> int:
        """Take what is in the inbox, if the channel is enabled; return how many messages were delivered.

        One look takes a bounded number of each client, so that none can keep the others waiting.

        Raises:
            MailboxError: the mailbox cannot be used.
        """
        if not self.enabled():
            return 0
        try:
            return self._take()
        except OSError as error:
            raise _unreachable(self.url, error) from error

    @property
    def _folder(self) -> Folder:
        if self._opened is None:
            self._opened = open_folder(self.url)
        return self._opened

    def _take(self) -> int:
        found = _Pass()
        for client, name in self._arrived(WAITING):
            self._look_again(client, name, found)
        for client, name in self._arrived(INBOX):
            self._look(client, name, found)
        # Told to the store first: a message moved and then forgotten would be lost; one told twice does no harm.
        self._store.clients.set_last_seen(found.seen)
        for path, target in found.moves:
            if target in found.reasons:
                self._folder.write(f"{target}.reason", found.reasons[target].encode())
            self._folder.move(path, target)
        for path in found.removals:
            self._folder.remove(path)
        if found.moves:
            self._count_up(found)
        for client in found.seen:
            self._forget_old(client)
        return found.delivered

    def _arrived(self, place: str) -> Iterator[tuple[str, str]]:
        left = PER_PASS
        for client in self._folder.folders(place):
            names = [name for name in self._folder.files(f"{place}/{client}") if name.endswith(".json")]
            for name in names[: min(PER_CLIENT, left)]:
                left -= 1
                yield client, name.removesuffix(".json")

    def _look(self, client: str, name: str, found: _Pass) -> None:
        path = f"{INBOX}/{client}/{name}.json"
        try:
            message = self._verified(client, name)
        except FedvitError as error:
            self._reject(path, client, name, f"{error}", found)
            return
        # Names sort by time, so the last one is the newest.
        found.seen[client] = min(message.sent_at, self._now())
        if message.kind is MessageKind.UPDATE:
            self._deliver(INBOX, message, found)
            return
        found.moves.append((path, f"{DELIVERED}/{client}/{name}.json"))
        found.delivered += 1

    def _look_again(self, client: str, name: str, found: _Pass) -> None:
        """At what was verified when it came, whenever that was."""
        path = f"{WAITING}/{client}/{name}.json"
        try:
            message = unseal(self._folder.read(path, MAX_MESSAGE_BYTES), self.key_of(client), client, name)
        except FedvitError as error:
            self._reject(path, client, name, f"{error}", found)
            return
        self._deliver(WAITING, message, found)

    def _deliver(self, place: str, message: Message, found: _Pass) -> None:
        """Hand an update on, and say what became of it."""
        path = f"{place}/{message.client_id}/{message.message_id}"
        found.removals.append(f"{path}.safetensors")
        try:
            receipt = self._received(f"{path}.safetensors", message)
        except FedvitError as error:
            self._reject(f"{path}.json", message.client_id, message.message_id, f"{error}", found)
            return
        if receipt.status not in (ReceiptStatus.RECEIVED, ReceiptStatus.ACCEPTED):
            reason = f"The update is {receipt.status.value}: {receipt.reason}."
            self._reject(f"{path}.json", message.client_id, message.message_id, reason, found)
            return
        found.moves.append((f"{path}.json", f"{DELIVERED}/{message.client_id}/{message.message_id}.json"))
        found.delivered += 1

    def _received(self, path: str, message: Message) -> Receipt:
        """What becomes of the update beside a message.

        Raises:
            FedvitError: there is none, or it is not the one that was sealed.
        """
        try:
            told = UpdateNote.of(message)
        except (KeyError, TypeError, ValueError):
            raise DataError("The message does not say which round its update is for.") from None
        content = self._folder.read(path, self._max_update_bytes)
        if hashlib.sha256(content).hexdigest() != told.sha256:
            raise IntegrityError("The update is not the one that the message was sealed for.")
        return self._work.receive(message.client_id, told.run_id, told.round_index, content)

    @staticmethod
    def _reject(path: str, client: str, name: str, reason: str, found: _Pass) -> None:
        target = f"{REJECTED}/{_safe(client, _is_client_id)}/{_safe(name, is_message_id)}.json"
        found.moves.append((path, target))
        found.reasons[target] = f"{reason}\n"

    def _verified(self, client: str, name: str) -> Message:
        """The message in a file of the inbox.

        Raises:
            FedvitError: it is not to be taken; the message says why.
        """
        if not _is_client_id(client) or not is_message_id(name):
            raise NotFoundError("No client, or no message, is called so.")
        self._store.clients.get(client)
        now, at = self._now(), sent_at(name)
        if not now - WINDOW <= at <= now + AHEAD:
            raise StateError(f"The message was sent at {at.isoformat()} and arrived at {now.isoformat()}.")
        message = unseal(
            self._folder.read(f"{INBOX}/{client}/{name}.json", MAX_MESSAGE_BYTES), self.key_of(client), client, name
        )
        if any(f"{name}.json" in self._folder.files(f"{place}/{client}") for place in (DELIVERED, WAITING)):
            raise StateError("The message was taken before.")
        return message

    def _forget_old(self, client: str) -> None:
        for name in self._folder.files(f"{DELIVERED}/{client}"):
            name = name.removesuffix(".json")
            if is_message_id(name) and sent_at(name) < self._now() - WINDOW:
                self._folder.remove(f"{DELIVERED}/{client}/{name}.json")

    def _count(self, place: str) -> int:
        clients = self._folder.folders(place)
        return sum(name.endswith(".json") for client in clients for name in self._folder.files(f"{place}/{client}"))

    def _count_up(self, found: _Pass) -> None:
        with self._store.transaction() as transaction:
            facts = _read(transaction.metadata.get(_KEY))
            delivered, rejected = facts["delivered"] + found.delivered, facts["rejected"] + len(found.reasons)
            transaction.metadata.set(_KEY, {**facts, "delivered": delivered, "rejected": rejected})

    def _facts(self) -> dict[str, Any]:
        return _read(self._store.metadata.get(_KEY))


def _read(found: Any) -> dict[str, Any]:
    return {"enabled": False, "enabled_at": None, "delivered": 0, "rejected": 0} | (found or {})


def _is_client_id(text: str) -> bool:
    return re.fullmatch(CLIENT_ID, text) is not None


def _safe(name: str, good: Callable[[str], bool]) -> str:
    """The name, or where it may be none that a file should have, its hash."""
    return name if good(name) else hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]


def _unreachable(url: str, error: OSError) -> MailboxError:
    return MailboxError(f"The mailbox {url} cannot be used: {error}.", cure="Mend it, or set fleet.mailbox_url.")

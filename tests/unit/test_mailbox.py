"""The backup channel from end to end: a vehicle writes messages, the server processes the valid ones, once."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from mailbox_site import MailboxSite

from edge_runtime.heartbeat import HeartbeatChannel, HeartbeatLoop
from edge_runtime.mailbox import MailboxSender, read_mailbox_key
from fedvit.access.tokens import create_token
from fedvit.api.transport import open_http
from fedvit.errors import MailboxError, PlacementError, UsageError
from fedvit.operations.mailbox import PER_CLIENT, REASONS
from fedvit.operations.runner import PeriodicTasks
from fedvit.privacy.events import Gaussian
from fedvit.privacy.randomness import output_id
from fedvit.privacy.round_cost import charge_of
from fedvit.rounds.remote import RemoteWork
from fedvit.testing.doubles import GenerousAccountant
from fedvit.types import TrainTask, utc_now
from fedvit.wire.folders import LocalFolder
from fedvit.wire.mailbox import Message, verify_message
from fedvit.wire.tensors import encode_weights
from serve_apps.control.api import Services, create_api

WAIT_S = 20.0


@pytest.fixture
def post(tmp_path: Path) -> Iterator[MailboxSite]:
    post = MailboxSite(tmp_path / "home")
    yield post
    post.store.close()


# --- the server's side -----------------------------------------------------------------------------------------------


def test_a_message_waits_until_the_channel_is_enabled_and_tells_when_it_was_sent(post: MailboxSite) -> None:
    sent = post.put(post.message(ago_s=600))
    assert (post.mailbox.take(), post.counts()) == (0, (1, 0, 0))
    state = post.mailbox.enable()
    assert (state.enabled, state.enabled_at) == (True, post.clock.now())
    assert (post.mailbox.take(), post.counts()) == (1, (0, 1, 0))
    assert post.store.clients.get("truck-1").last_seen_at == sent.sent_at
    assert post.store.clients.get("truck-2").last_seen_at is None
    assert post.folder.files("delivered/truck-1") == [f"{sent.message_id}.json"]
    post.clock.advance(5)
    assert post.mailbox.enable().enabled_at == state.enabled_at
    off = post.mailbox.disable()
    assert (off.enabled, off.enabled_at, off.delivered) == (False, None, 1)
    post.put(post.message())
    assert (post.mailbox.take(), post.counts()) == (0, (1, 1, 0))


def test_what_is_not_good_is_rejected_with_a_reason_and_counts_nothing(post: MailboxSite) -> None:
    post.mailbox.enable()
    good = post.message("truck-2")
    post.put(post.message(), key_of="truck-2")
    post.put(post.message("nobody"))
    post.put(post.message(ago_s=86_401))
    post.put(post.message(ago_s=-301))
    post.put(good, at=f"inbox/truck-2/{post.message().message_id}.json")
    for content in (b"", b"[]", b"\xff", b'{"payload": 1, "hmac": 2}', b"[" * 5000, b"x" * 20_000):
        post.folder.write(post.message().path, content)
    post.folder.write("inbox/truck-1/evil name.json", b"{}")
    post.folder.write("inbox/~truck/x.json", b"{}")
    assert post.mailbox.take() == 0
    assert post.counts() == (0, 0, 13)
    assert [post.store.clients.get(f"truck-{i}").last_seen_at for i in (1, 2)] == [None, None]
    reasons = "".join(post.reasons())
    for words in ("not signed with the key", "no client 'nobody'", "another name", "larger than", "is called so"):
        assert words in reasons
    assert reasons.count("was sent at") == 2


def signature(payload: str, key: bytes) -> str:
    """The HMAC in a message's file, which other implementations of a vehicle have to compute, too."""
    return hmac.digest(key, b"fedvit mailbox message\0" + payload.encode(), "sha256").hex()


def test_a_signed_message_with_strange_fields_is_rejected(post: MailboxSite) -> None:
    post.mailbox.enable()
    key = post.mailbox.key_of("truck-1")
    for payload in ("7", "{}", json.dumps({"format": 1, "client_id": "truck-1", "message_id": "x", "kind": "y"})):
        envelope = {"payload": payload, "hmac": signature(payload, key)}
        post.folder.write(post.message().path, json.dumps(envelope).encode())
    unknown = post.message()
    payload = json.dumps(
        {"format": 1, "client_id": "truck-1", "message_id": unknown.message_id, "kind": "joke", "body": {}}
    )
    post.folder.write(unknown.path, json.dumps({"payload": payload, "hmac": signature(payload, key)}).encode())
    assert (post.mailbox.take(), post.counts()) == (0, (0, 0, 4))
    assert "'joke' is unknown" in "".join(post.reasons())


def test_a_replayed_message_counts_once_for_as_long_as_it_would_be_admitted(post: MailboxSite) -> None:
    post.mailbox.enable()
    sent = post.put(post.message())
    assert post.mailbox.take() == 1
    post.put(sent)
    assert (post.mailbox.take(), post.counts()) == (0, (0, 1, 1))
    assert "taken before" in post.reasons()[0]
    post.clock.advance(86_401)
    post.put(post.message())
    assert post.mailbox.take() == 1
    # Its id is forgotten, and it is too old all the same.
    assert f"{sent.message_id}.json" not in post.folder.files("delivered/truck-1")
    post.put(sent)
    assert post.mailbox.take() == 0


def note(content: bytes, **changes: Any) -> dict[str, Any]:
    return {"run_id": "run-0001", "round_index": 1, "sha256": hashlib.sha256(content).hexdigest(), **changes}


def leave_task(post: MailboxSite, client_id: str = "truck-1") -> None:
    """A task of the round that :func:`note` names, which the client has not answered."""
    base = post.store.blobs.put(encode_weights({"w": np.zeros(2, np.float32)}))
    task = TrainTask("run-0001", 1, base, "d" * 64, 4.0, 0.1, 1.0, 1, 0.1)
    of: Any = {"run_id": "run-0001", "round_index": 1, "unit_id": client_id, "unit": "record"}
    GenerousAccountant(post.store).charge([charge_of(Gaussian(4.0), output_id=output_id(task, client_id, 10), **of)])
    assert RemoteWork(post.settings, post.store).leave(task, post.store.clients.get(client_id))


@pytest.mark.parametrize("place", ["inbox", "waiting"])
@pytest.mark.parametrize(
    ("body", "words", "asked"),
    [
        (note(b"weights"), "rejected: round 1 of run-0001 did not ask it", False),
        (note(b"weights"), "refused: The update is not safetensors", True),
        (note(b"others"), "not the one that the message was signed for", True),
        (note(b"weights", round_index="1"), "does not say which round", True),
        # More than a database can hold.
        (note(b"weights", round_index=2**64), "does not say which round", True),
        (note(b"weights", run_id="../../run-0001"), "does not say which round", True),
        ({}, "does not say which round", True),
        (None, "There is no file", True),
    ],
)
def test_an_update_that_nobody_can_use_is_rejected_in_words(
    post: MailboxSite, place: str, body: dict[str, Any] | None, words: str, asked: bool
) -> None:
    post.mailbox.enable()
    if asked:
        leave_task(post)
    update = replace(post.message(kind="update"), body=note(b"weights") if body is None else body)
    at = update.path.replace("inbox", place)
    if body is not None:
        post.folder.write(at.replace(".json", ".safetensors"), b"weights")
    post.put(update, at=at)
    assert post.mailbox.take() == 0
    state = post.mailbox.state()
    assert (state.pending, state.not_yet_taken, state.delivered, state.rejected) == (0, 0, 0, 1)
    assert words in post.reasons()[0]
    assert post.folder.files("waiting/truck-1") == post.folder.files("inbox/truck-1") == []
    result = update.sent_at if place == "inbox" else None
    assert post.store.clients.get("truck-1").last_seen_at == result


def test_links_lead_nowhere(post: MailboxSite, tmp_path: Path) -> None:
    post.mailbox.enable()
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    inbox = Path(post.mailbox.url) / "inbox"
    (inbox / "truck-1").mkdir()
    (inbox / f"{post.message().path.removeprefix('inbox/')}").symlink_to(secret)
    (inbox / "truck-2").symlink_to(tmp_path)
    os.mkfifo(inbox / post.message().path.removeprefix("inbox/"))
    assert post.mailbox.take() == 0
    assert secret.read_text() == "secret"
    assert "secret" not in "".join(post.reasons())
    assert post.counts()[2] == 2


def test_of_rejected_messages_the_latest_reasons_are_kept_and_nothing_else(post: MailboxSite) -> None:
    post.mailbox.enable()
    ids = []
    for number in range(REASONS + 5):
        post.clock.advance(0.01)
        ids.append(post.put(post.message(), key_of="truck-2").message_id)
        if number % 10 == 0:
            post.folder.write(post.message(f"nobody-{number}").path, bytes(50_000))
            post.mailbox.take()
    while post.counts()[0]:
        post.mailbox.take()
    assert post.folder.files("rejected/truck-1") == [f"{name}.reason" for name in ids[5:]]
    assert post.folder.folders("rejected") == ["_unregistered", "truck-1"]
    assert {path.suffix for path in Path(post.mailbox.url, "rejected").rglob("*.*") if path.is_file()} <= {
        ".reason",
        ".about",
        "",
    }


def test_a_client_has_no_more_messages_in_a_day_than_it_can_need(tmp_path: Path) -> None:
    post = MailboxSite(tmp_path / "home")
    post.mailbox.enable()
    most = 2 * 24 * 60 + 1000
    folder = Path(post.mailbox.url, "delivered", "truck-1")
    folder.mkdir(parents=True)
    for _ in range(most - 1):
        (folder / f"{post.message().message_id}.json").touch()
    post.put(post.message("truck-2"))
    for _ in range(2):
        post.put(post.message())
    assert (post.mailbox.take(), post.counts()) == (2, (0, 2, 1))
    assert len(post.folder.files("delivered/truck-1")) == most
    post.clock.advance(86_401)
    # The messages of the day before are forgotten with the first that comes.
    post.put(post.message("truck-2"))
    assert post.mailbox.take() == 1
    post.store.close()


def test_files_that_belong_to_no_message_are_removed(post: MailboxSite) -> None:
    post.mailbox.enable()
    fresh, stale = post.message(), post.message(ago_s=86_401)
    names = ["stray", "x.safetensors", f"{stale.message_id}.safetensors", f"{fresh.message_id}.safetensors"]
    for name in names:
        post.folder.write(f"inbox/truck-1/{name}", b"weights")
    assert post.mailbox.take() == 0
    # The message of this one may still come.
    assert post.folder.files("inbox/truck-1") == names[3:]


def test_one_unusable_path_and_one_fault_keep_no_other_message_back(
    post: MailboxSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    post.mailbox.enable()
    blocked, faulty, other = post.put(post.message()), post.put(post.message()), post.put(post.message("truck-2"))
    place = Path(post.mailbox.url, "delivered", "truck-1", f"{blocked.message_id}.json")
    place.mkdir(parents=True)
    Path(post.mailbox.url, "inbox", "truck-2", f"{other.message_id}.safetensors").mkdir()

    def verified(content: bytes, key: bytes, client_id: str, message_id: str) -> Message:
        if message_id == faulty.message_id:
            raise ZeroDivisionError
        return verify_message(content, key, client_id, message_id)

    monkeypatch.setattr("fedvit.operations.mailbox.verify_message", verified)
    with pytest.raises(MailboxError):
        post.mailbox.take()
    assert post.folder.files("delivered/truck-2") == [f"{other.message_id}.json"]
    assert post.folder.files("rejected/truck-1") == [f"{faulty.message_id}.reason"]
    assert "ZeroDivisionError" in post.reasons()[0]
    place.rmdir()
    assert (post.mailbox.take(), post.counts()[0]) == (1, 0)


def test_a_linked_folder_of_the_mailbox_is_not_entered(post: MailboxSite, tmp_path: Path) -> None:
    post.mailbox.enable()
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    (tmp_path / "elsewhere" / "run" / "system.json").write_text("{}")
    inbox = Path(post.mailbox.url, "inbox")
    (inbox / ".about").unlink()
    inbox.rmdir()
    inbox.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MailboxError):
        post.mailbox.take()
    assert (tmp_path / "elsewhere" / "run" / "system.json").read_text() == "{}"


def test_one_look_takes_a_bounded_number_of_each_client(post: MailboxSite) -> None:
    post.mailbox.enable()
    for _ in range(PER_CLIENT + 3):
        post.put(post.message())
    late = post.put(post.message("truck-2"))
    assert post.mailbox.take() == PER_CLIENT + 1
    assert post.store.clients.get("truck-2").last_seen_at == late.sent_at
    assert (post.mailbox.take(), post.counts()[0]) == (3, 0)


def test_a_mailbox_in_an_object_store_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    post = MailboxSite(tmp_path / "home", f"memory://box-{os.getpid()}")
    try:
        post.mailbox.enable()
        sent = post.put(post.message())
        post.put(post.message(), key_of="truck-2")
        assert (post.mailbox.take(), post.counts()) == (1, (0, 1, 1))
        assert post.folder.files("delivered/truck-1") == [f"{sent.message_id}.json"]
        post.put(sent)
        assert post.mailbox.take() == 0
    finally:
        post.store.close()


def test_periodic_tasks_continue_after_an_error() -> None:
    errors, succeeded = [OSError("gone")], threading.Event()

    def task() -> None:
        if errors:
            raise errors.pop()
        succeeded.set()

    tasks = PeriodicTasks(0.01, task)
    tasks.start()
    assert succeeded.wait(WAIT_S)
    tasks.close()


# --- the API ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def http(post: MailboxSite) -> TestClient:
    def nobody() -> Any:
        raise PlacementError("It is restarting.")

    return TestClient(create_api(Services(post.settings, post.store, nobody, nobody)))


def test_the_channel_is_opened_and_closed_and_vehicles_are_informed(post: MailboxSite, http: TestClient) -> None:
    def enabled() -> bool:
        return bool(http.post("/api/clients/truck-1/heartbeat", json={}).json()["backup_channel"])

    assert (enabled(), http.get("/api/communication/backup").json()["enabled"]) == (False, False)
    opened = http.post("/api/communication/enable-backup").json()
    assert (opened["enabled"], opened["url"], opened["pending"]) == (True, post.mailbox.url, 0)
    assert enabled() is True
    post.put(post.message())
    assert http.get("/api/clients/connectivity").json()["backup_channel"] == {
        "enabled": True,
        "pending": 1,
        "delivered": 0,
    }
    post.mailbox.take()
    assert http.get("/api/communication/backup").json()["delivered"] == 1
    assert http.post("/api/communication/disable-backup").json()["enabled"] is False
    assert enabled() is False
    lines = [line.facts for line in post.store.audit.entries()]
    assert [(line.before["enabled"], line.after["enabled"]) for line in lines] == [(False, True), (True, False)]


def test_a_vehicle_gets_its_own_key_and_nobody_else_does(post: MailboxSite, http: TestClient) -> None:
    def mailbox_for(scope: str, client_id: str | None) -> Any:
        token = create_token(post.store, "x", [scope], now=utc_now(), client_id=client_id).text
        headers = {"Authorization": f"Bearer {token}"}
        return http.post("/api/clients/truck-1/heartbeat", json={}, headers=headers).json()["mailbox"]

    assert mailbox_for("device", "truck-1") == {"url": post.mailbox.url, "key": post.mailbox.key_of("truck-1").hex()}
    assert mailbox_for("operator", None) is None
    assert http.post("/api/clients/truck-1/heartbeat", json={}).json()["mailbox"] is None
    assert post.mailbox.key_of("truck-1") != post.mailbox.key_of("truck-2")


def test_a_mailbox_that_cannot_be_used_is_said_and_hides_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    post = MailboxSite(tmp_path / "home", str(tmp_path / "file" / "box"))

    def nobody() -> Any:
        raise PlacementError("It is restarting.")

    http = TestClient(create_api(Services(post.settings, post.store, nobody, nobody)))
    answer = http.post("/api/communication/enable-backup")
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/mailbox-unreachable")
    assert post.mailbox.enabled() is False
    result = http.get("/api/clients/connectivity")
    assert (result.status_code, result.json()["backup_channel"]["pending"]) == (200, None)
    with pytest.raises(MailboxError):
        post.mailbox.state()
    post.store.close()


# --- the vehicle's side ----------------------------------------------------------------------------------------------


class Outage(httpx.BaseTransport):
    """Answers with these statuses one after another; 0 is no answer."""

    def __init__(self, *statuses: int) -> None:
        self._statuses = list(statuses)
        self.bodies: list[Any] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.read()))
        status = self._statuses.pop(0)
        if not status:
            raise httpx.ConnectError("no route")
        return httpx.Response(status, json={"interval_s": 7})


def test_a_vehicle_that_gets_no_answer_leaves_one_heartbeat_in_the_mailbox(post: MailboxSite) -> None:
    post.mailbox.enable()
    sender = MailboxSender(post.folder, "truck-1", post.mailbox.key_of("truck-1"), post.clock)
    line = Outage(200, 0, 503, 404)
    body = {"status": "ok", "model_version": "v1.1.2"}
    loop = HeartbeatLoop(
        open_http("http://control:8000/", timeout_s=1, transport=line), "truck-1", lambda: body, sender
    )
    assert loop.beat() is HeartbeatChannel.API
    assert (loop.interval_s, post.counts()[0]) == (7, 0)
    assert loop.beat() is HeartbeatChannel.MAILBOX
    post.clock.advance(7)
    assert loop.beat() is HeartbeatChannel.MAILBOX
    assert post.counts()[0] == 1
    assert (post.mailbox.take(), post.store.clients.get("truck-1").last_seen_at) != (0, None)
    assert abs(post.store.clients.get("truck-1").last_seen_at - post.clock.now()) < timedelta(seconds=1)  # type: ignore[operator]
    assert (loop.beat(), line.bodies) == (HeartbeatChannel.API, [body] * 4)
    assert post.counts() == (0, 1, 0)


def test_what_cannot_be_left_now_is_left_later(post: MailboxSite, tmp_path: Path) -> None:
    in_the_way = tmp_path / "box"
    in_the_way.write_text("not a folder")
    sender = MailboxSender(LocalFolder(in_the_way), "truck-1", post.mailbox.key_of("truck-1"))
    assert [sender.heartbeat({}), sender.heartbeat({})] == [False, False]
    in_the_way.unlink()
    assert sender.heartbeat({}) is True
    (left,) = (in_the_way / "inbox" / "truck-1").iterdir()
    assert left.suffix == ".json"


@pytest.mark.parametrize("text", ["", "zz", "ab" * 31, "é"])
def test_a_key_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(UsageError):
        read_mailbox_key(path)
    path.write_text("ab" * 32 + "\n")
    assert read_mailbox_key(path) == bytes.fromhex("ab" * 32)

"""The audit trail's chain and the idempotency keys, as the store keeps them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedvit.errors import ConflictError, IntegrityError
from fedvit.ports import Charge
from fedvit.store.records import AuditFacts, RequestKey, StoredResponse
from fedvit.store.store import Store

NOW = datetime(2030, 5, 1, 12, 0, tzinfo=UTC)
FACTS = AuditFacts(
    actor="token:1:Ana",
    scopes=("operator",),
    source="127.0.0.1",
    request_id="r-1",
    action="POST /api/training/stop",
    params={"body": {"n": 0.1, "é": [None, True]}},
    before={"status": "running"},
    after=None,
    status=202,
)
KEY = RequestKey("token:1:Ana", "POST /a", "k", "a" * 64)
ANSWER = StoredResponse(201, '{"x":1}', "application/json")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        yield opened


def tamper(store: Store, statement: str) -> None:
    with closing(sqlite3.connect(store.home / "state.db")) as connection:
        connection.execute(statement)
        connection.commit()


def test_lines_come_back_as_written_in_order_and_in_pages(store: Store) -> None:
    written = [replace(FACTS, request_id=f"r-{i}") for i in range(1, 6)]
    assert [store.audit.append(facts) for facts in written] == [1, 2, 3, 4, 5]
    assert [entry.facts for entry in store.audit.entries()] == written
    assert [entry.sequence for entry in store.audit.entries(after=3)] == [4, 5]
    assert [entry.sequence for entry in store.audit.entries(limit=2)] == [1, 2]
    assert [entry.sequence for entry in store.audit.latest(2)] == [4, 5]
    assert store.audit.verify() == 5


@pytest.mark.parametrize(
    ("statement", "sequence"),
    [
        ("UPDATE audit SET actor = 'token:2:Ben' WHERE sequence = 2", 2),
        ("UPDATE audit SET status = 200 WHERE sequence = 3", 3),
        ("UPDATE audit SET after = '{}' WHERE sequence = 1", 1),
        ("UPDATE audit SET params = '{}' WHERE sequence = 3", 3),
        ("DELETE FROM audit WHERE sequence = 2", 2),
        ("DELETE FROM audit WHERE sequence = 4", 4),
        ("DELETE FROM audit", 1),
        ("DELETE FROM meta WHERE key = 'audit_head'", 1),
    ],
)
def test_tampering_is_found_and_named(store: Store, statement: str, sequence: int) -> None:
    for _ in range(4):
        store.audit.append(FACTS)
    tamper(store, statement)
    with pytest.raises(IntegrityError) as broken:
        store.audit.verify()
    assert broken.value.details["sequence"] == sequence


def test_a_trail_with_its_end_cut_off_is_not_continued(store: Store) -> None:
    store.audit.append(FACTS)
    store.audit.append(FACTS)
    tamper(store, "DELETE FROM audit WHERE sequence = 2")
    with pytest.raises(IntegrityError) as broken:
        store.audit.append(FACTS)
    assert broken.value.details["sequence"] == 2


def test_trail_and_ledger_are_two_chains(store: Store) -> None:
    store.audit.append(FACTS)
    store.ledger.append([Charge("run-0001", 1, "u", "r", 1.0, 0.5, 1)])
    store.audit.append(FACTS)
    assert (store.audit.verify(), store.ledger.verify()) == (2, 1)


def test_a_repeated_request_gets_its_answer_again(store: Store) -> None:
    assert store.idempotency.begin(KEY, NOW) is None
    store.idempotency.finish(KEY, ANSWER)
    assert store.idempotency.begin(KEY, NOW + timedelta(hours=23)) == ANSWER


def test_a_request_under_way_is_not_begun_twice(store: Store) -> None:
    store.idempotency.begin(KEY, NOW)
    with pytest.raises(ConflictError) as under_way:
        store.idempotency.begin(KEY, NOW + timedelta(minutes=9))
    assert under_way.value.details == {"retry_after_s": 1}
    # Its process died: it may be tried again.
    assert store.idempotency.begin(KEY, NOW + timedelta(minutes=11)) is None


def test_one_key_stands_for_one_request(store: Store) -> None:
    store.idempotency.begin(KEY, NOW)
    store.idempotency.finish(KEY, ANSWER)
    with pytest.raises(ConflictError) as other:
        store.idempotency.begin(replace(KEY, request_hash="b" * 64), NOW)
    assert other.value.details == {}


@pytest.mark.parametrize("change", [{"actor": "token:2:Ben"}, {"route": "POST /b"}, {"key": "l"}])
def test_keys_of_others_are_others(store: Store, change: dict[str, str]) -> None:
    store.idempotency.begin(KEY, NOW)
    store.idempotency.finish(KEY, ANSWER)
    assert store.idempotency.begin(replace(KEY, **change), NOW) is None


def test_a_forgotten_request_and_an_old_one_begin_anew(store: Store) -> None:
    store.idempotency.begin(KEY, NOW)
    store.idempotency.finish(KEY, None)
    assert store.idempotency.begin(KEY, NOW) is None
    store.idempotency.finish(KEY, ANSWER)
    assert store.idempotency.begin(KEY, NOW + timedelta(hours=25)) is None


def test_of_an_actor_with_many_keys_only_the_newest_are_kept(store: Store) -> None:
    keys = [replace(KEY, key=f"k-{i}") for i in range(6)]
    other = replace(KEY, actor="token:2:Ben")
    store.idempotency.begin(other, NOW)
    store.idempotency.finish(other, ANSWER)
    for seconds, key in enumerate(keys):
        assert store.idempotency.begin(key, NOW + timedelta(seconds=seconds), keep=2) is None
        store.idempotency.finish(key, replace(ANSWER, body=key.key))
    later = NOW + timedelta(minutes=1)
    assert [store.idempotency.begin(key, later) and "kept" for key in keys] == [None] * 3 + ["kept"] * 3
    assert store.idempotency.begin(other, later) == ANSWER

"""The privacy ledger: each charge exactly once, nothing without the check, no line changed unnoticed."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.errors import BudgetExhaustedError, ConflictError, IntegrityError, LedgerFrozenError
from fedvit.ports import POPULATION, Charge
from fedvit.store.store import Store
from fedvit.types import LedgerFreeze, utc_now


def charges(round_index: int, units: int = 3) -> list[Charge]:
    return [Charge("run-0001", round_index, f"u{i}", f"{round_index:032x}{i:032x}", 1.56, 0.5, 1) for i in range(units)]


def refuse(_: Sequence[Charge]) -> None:
    raise BudgetExhaustedError("Nothing is left.")


def append_checked(store: Store, charges: Sequence[Charge], check: Callable[[Sequence[Charge]], None]) -> int:
    """Charge as the accountant does: what is new is checked and written in one transaction."""
    with store.transaction() as transaction:
        new = transaction.ledger.not_yet_written(charges)
        if new:
            check(new)
        return transaction.ledger.append(new)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        yield store


def tamper(store: Store, *statements: str) -> None:
    with closing(sqlite3.connect(store.home / "state.db")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def test_charges_are_written_in_order_and_chained(store: Store) -> None:
    assert store.ledger.append(charges(1)) == 3
    assert store.ledger.append(charges(2)) == 3
    entries = store.ledger.entries()
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry.charge for entry in entries] == charges(1) + charges(2)
    assert all(entry.at.tzinfo is not None for entry in entries)
    assert store.ledger.verify() == 6


def test_the_chain_continues_after_reopening(tmp_path: Path) -> None:
    for round_index in range(1, 4):
        with Store.open(tmp_path) as store:
            store.ledger.append(charges(round_index))
            assert store.ledger.verify() == 3 * round_index


def test_a_charge_is_written_once_and_only_new_ones_are_checked(store: Store) -> None:
    store.ledger.append(charges(1, units=2))
    seen: list[Charge] = []
    assert append_checked(store, charges(1, units=4) + charges(1, units=4), seen.extend) == 2
    assert seen == charges(1, units=4)[2:]
    assert [entry.charge for entry in store.ledger.entries()] == charges(1, units=4)


def test_a_retry_needs_no_budget(store: Store) -> None:
    store.ledger.append(charges(1))
    assert append_checked(store, charges(1), refuse) == 0
    assert append_checked(store, [], refuse) == 0
    assert store.ledger.verify() == 3


def test_a_refused_charge_writes_nothing_at_all(store: Store) -> None:
    store.ledger.append(charges(1))
    before = store.ledger.entries()
    with pytest.raises(BudgetExhaustedError):
        append_checked(store, charges(2), refuse)
    assert store.ledger.entries() == before
    assert store.ledger.verify() == 3
    assert store.ledger.append(charges(2)) == 3


def test_the_check_may_read_the_store(store: Store) -> None:
    store.ledger.append(charges(1))
    results: list[int] = []
    append_checked(store, charges(2), lambda _: results.append(len(store.ledger.entries())))
    assert results == [3]


@pytest.mark.parametrize("change", [{"steps": 2}, {"noise_multiplier": 0.1}, {"sampling_prob": 1.0}])
def test_one_release_cannot_cost_two_things(store: Store, change: dict[str, Any]) -> None:
    store.ledger.append(charges(1))
    other = [*charges(2), replace(charges(1)[0], **change)]
    with pytest.raises(ConflictError):
        store.ledger.append(other)
    assert store.ledger.verify() == 3


def test_numbers_of_other_types_are_hashed_as_they_are_stored(store: Store) -> None:
    numbers: dict[str, Any] = {"noise_multiplier": np.float32(1.56), "sampling_prob": 1, "steps": np.int64(2)}
    odd = [replace(charges(1)[0], **numbers)]
    store.ledger.append(odd)
    assert append_checked(store, odd, refuse) == 0
    assert store.ledger.verify() == 1


def test_a_charge_that_is_no_number_is_refused(store: Store) -> None:
    with pytest.raises(ValueError):
        store.ledger.append([replace(charges(1)[0], noise_multiplier=float("nan"))])
    assert store.ledger.entries() == []


def test_history_is_paged_and_dated(store: Store) -> None:
    for round_index in (1, 2, 3):
        store.ledger.append(charges(round_index))
    entries = store.ledger.entries()
    assert store.ledger.entries(limit=2) == entries[:2]
    assert store.ledger.entries(after=4, limit=2) == entries[4:6]
    assert store.ledger.entries(since=entries[3].at) == [entry for entry in entries if entry.at >= entries[3].at]
    assert store.ledger.entries(since=entries[-1].at + timedelta(microseconds=1)) == []


@pytest.mark.parametrize(
    ("statements", "sequence"),
    [
        (["UPDATE privacy_ledger SET steps = 0 WHERE sequence = 4"], 4),
        (["UPDATE privacy_ledger SET noise_multiplier = 99 WHERE sequence = 2"], 2),
        (["UPDATE privacy_ledger SET at = '2020-01-01 00:00:00.000000' WHERE sequence = 5"], 5),
        (["UPDATE privacy_ledger SET hash = prev_hash WHERE sequence = 3"], 3),
        (["UPDATE privacy_ledger SET prev_hash = hash WHERE sequence = 3"], 3),
        (["DELETE FROM privacy_ledger WHERE sequence = 1"], 1),
        (["DELETE FROM privacy_ledger WHERE sequence = 3"], 3),
        (["DELETE FROM privacy_ledger WHERE sequence >= 5"], 5),
        (["DELETE FROM privacy_ledger"], 1),
        (["DELETE FROM meta"], 1),
        (
            [
                "CREATE TEMP TABLE forged AS SELECT * FROM privacy_ledger WHERE sequence = 6",
                "UPDATE forged SET sequence = 7, output_id = 'forged', prev_hash = hash",
                "INSERT INTO privacy_ledger SELECT * FROM forged",
            ],
            7,
        ),
    ],
)
def test_tampering_is_found_and_named(store: Store, statements: list[str], sequence: int) -> None:
    store.ledger.append(charges(1) + charges(2))
    tamper(store, *statements)
    with pytest.raises(IntegrityError) as caught:
        store.ledger.verify()
    assert caught.value.details == {"sequence": sequence}


def test_a_ledger_with_its_end_cut_off_is_not_continued(store: Store) -> None:
    store.ledger.append(charges(1))
    tamper(store, "DELETE FROM privacy_ledger WHERE sequence = 3")
    with pytest.raises(IntegrityError) as broken:
        store.ledger.append(charges(2))
    assert broken.value.details["sequence"] == 3
    assert len(store.ledger.entries()) == 2


def test_a_round_of_ten_thousand_units_is_one_append(store: Store) -> None:
    many = charges(1, units=10_000)
    assert store.ledger.append(many) == 10_000
    assert append_checked(store, many, refuse) == 0
    assert store.ledger.verify() == 10_000


def freeze(incident_id: str) -> LedgerFreeze:
    return LedgerFreeze(incident_id, "images leaked", "token:a:Ana", utc_now())


def test_a_frozen_ledger_takes_no_charge_until_it_is_thawed(store: Store) -> None:
    store.ledger.append(charges(1))
    wish = freeze("PB-1")
    assert store.ledger.freeze(wish) == wish
    with pytest.raises(LedgerFrozenError) as frozen:
        store.ledger.append(charges(2))
    assert frozen.value.details["incident_id"] == "PB-1"
    with pytest.raises(LedgerFrozenError) as frozen:
        store.ledger.check_not_frozen()
    assert frozen.value.details["incident_id"] == "PB-1"
    assert store.ledger.append(charges(1)) == 0
    assert store.ledger.unfreeze("PB-1") is None
    assert store.ledger.current_freeze() is None
    assert store.ledger.unfreeze("PB-1") is None
    store.ledger.check_not_frozen()
    assert store.ledger.append(charges(2)) == 3


def test_each_incident_lifts_its_own_freeze_only(store: Store) -> None:
    first, second = freeze("PB-1"), freeze("PB-2")
    store.ledger.freeze(first)
    assert store.ledger.freeze(second) == first
    assert store.ledger.freeze(freeze("PB-1")) == first
    with pytest.raises(ConflictError):
        store.ledger.unfreeze("PB-3")
    assert store.ledger.unfreeze("PB-1") == second
    with pytest.raises(LedgerFrozenError) as frozen:
        store.ledger.append(charges(1))
    assert frozen.value.details["incident_id"] == "PB-2"
    assert store.ledger.unfreeze("PB-2") is None
    assert store.ledger.append(charges(1)) == 3


def test_the_lines_are_dumped_as_stored_also_when_the_chain_is_broken(store: Store) -> None:
    store.ledger.append(charges(1))
    tamper(store, "UPDATE privacy_ledger SET steps = 0 WHERE sequence = 2")
    lines = list(store.ledger.lines())
    assert [(line["sequence"], line["steps"] == 0) for line in lines] == [(1, False), (2, True), (3, False)]
    assert lines[1]["prev_hash"] == lines[0]["hash"]


EVENT = '{"kind":"gaussian","noise_multiplier":2.0}'


def test_a_charge_of_any_event_is_kept_and_chained_among_others(store: Store) -> None:
    of_everybody = Charge("run-0001", 2, POPULATION, "r", 2.0, 1.0, 1, "client", EVENT)
    both = [*charges(1), of_everybody, *charges(3)]
    assert store.ledger.append(both) == 7
    assert [entry.charge for entry in store.ledger.entries()] == both
    assert store.ledger.verify() == 7
    with pytest.raises(ConflictError):
        store.ledger.append([replace(of_everybody, event=None)])


@pytest.mark.parametrize("change", ["event = NULL", "event = '{}'", "privacy_unit = 'record'"])
def test_what_was_done_to_whom_cannot_be_changed_unnoticed(store: Store, change: str) -> None:
    store.ledger.append([Charge("run-0001", 1, "a", "r", 2.0, 1.0, 1, "client", EVENT), *charges(2)])
    tamper(store, f"UPDATE privacy_ledger SET {change} WHERE sequence = 1")
    with pytest.raises(IntegrityError) as broken:
        store.ledger.verify()
    assert broken.value.details["sequence"] == 1


def test_a_line_from_before_there_were_events_has_the_hash_that_it_always_had(store: Store) -> None:
    store.ledger.append([Charge("run-0001", 1, "a", "r", 1.5, 0.5, 1)])
    (line,) = store.ledger.lines()
    content = (
        f'{{"at":"{line["at"]}","noise_multiplier":1.5,"output_id":"r","round_index":1,"run_id":"run-0001",'
        '"sampling_prob":0.5,"sequence":1,"steps":1,"unit_id":"a"}'
    )
    assert line["hash"] == hashlib.sha256(("0" * 64 + content).encode()).hexdigest()


def test_engagements_count_charged_rounds_once_and_only_earlier_ones(store: Store) -> None:
    for round_index in (1, 2, 4):
        store.ledger.append(charges(round_index, units=2))
    store.ledger.append([replace(charges(4)[0], output_id="another attempt")])
    assert store.rounds.engagements("run-0001", before=4) == {"u0": (2, 2), "u1": (2, 2)}
    assert store.rounds.engagements("run-0001", before=9) == {"u0": (3, 4), "u1": (3, 4)}
    assert store.rounds.engagements("run-0002", before=9) == {}

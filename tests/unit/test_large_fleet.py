"""What a fleet of very many clients rests on: positions, counts without reading, pieces instead of copies."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvit.cohort.connectivity import connectivity
from fedvit.errors import NotFoundError
from fedvit.metrics.training import ThrottledPublisher
from fedvit.ports import ProxyReport
from fedvit.store import clients
from fedvit.store.blobs import FileBlobStore
from fedvit.store.store import Store
from fedvit.types import Client, ClientKind, utc_now
from fedvit.wire.tensors import encode_weights, encoded_pieces, weights_digest

WAIT_S = 20.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        yield store


def vehicles(first: int, last: int) -> Iterator[Client]:
    return (Client(f"v{i:05d}", ClientKind.VIRTUAL, 10) for i in range(first, last))


def test_positions_have_no_gaps_and_stay(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "BULK", 7)
    assert store.clients.register(vehicles(0, 20)) == 20
    # Known ones among them, in another order, and in more than one piece.
    assert store.clients.register([*vehicles(15, 40), *vehicles(0, 3)]) == 20
    assert store.clients.population() == 40
    assert store.clients.eligible_at(range(40)) == {i: f"v{i:05d}" for i in range(40)}


def test_virtual_clients_are_counted_and_the_others_looked_at(store: Store) -> None:
    store.clients.register(
        [*vehicles(0, 5), Client("truck", ClientKind.REMOTE, 3), Client("depot", ClientKind.SILO, 3)]
    )
    store.clients.update("v00001", active=False)
    store.clients.set_last_seen({"truck": utc_now() - timedelta(seconds=1)})
    assert store.clients.count_virtual() == 4
    assert [s.client_id for s in store.clients.last_contacts(include_virtual=False)] == ["depot", "truck"]
    assert len(store.clients.last_contacts()) == 6


def test_a_fleet_is_counted_as_it_is_when_looked_at(store: Store) -> None:
    store.clients.register([*vehicles(0, 5), Client("truck", ClientKind.REMOTE, 3)])
    store.clients.set_last_seen({"truck": utc_now()})
    proxies = ProxyReport({"a": True, "b": True})
    looked_at = connectivity(store.clients.last_contacts(), proxies, utc_now(), 60.0)
    counted = connectivity(store.clients.last_contacts(include_virtual=False), proxies, utc_now(), 60.0).with_hosted(
        store.clients.count_virtual()
    )
    assert counted == looked_at
    assert (proxies.reaches_all, replace(proxies, stranded=frozenset({"v00001"})).reaches_all) == (True, False)
    assert not ProxyReport({"a": False}).reaches_all


def test_examples_of_some_clients(store: Store) -> None:
    store.clients.register(vehicles(0, 5))
    assert store.clients.num_examples(["v00003", "nobody"]) == {"v00003": 10}


def test_a_blob_in_pieces_is_the_blob_of_the_whole(tmp_path: Path) -> None:
    blobs = FileBlobStore(tmp_path)
    pieces = [b"a" * 10, memoryview(b"b" * 100_000), b""]
    digest = blobs.put_pieces(pieces)
    assert blobs.get(digest) == b"a" * 10 + b"b" * 100_000
    assert blobs.put_pieces(pieces) == digest == blobs.put(b"a" * 10 + b"b" * 100_000)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [digest]


def test_pieces_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    blobs = FileBlobStore(tmp_path)
    with pytest.raises(TypeError):
        blobs.put_pieces([b"a", "no bytes"])  # type: ignore[list-item]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(NotFoundError):
        blobs.get(hashlib.sha256(b"a").hexdigest())


NAMES = st.text(min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(shapes=st.dictionaries(NAMES, SHAPES, max_size=4))
def test_weights_in_pieces_are_what_safetensors_writes(shapes: dict[str, list[int]]) -> None:
    weights = {name: np.full(shape, len(name), np.float32) for name, shape in shapes.items()}
    whole = encode_weights(weights)
    assert b"".join(encoded_pieces(weights)) == whole
    assert weights_digest(weights) == hashlib.sha256(whole).hexdigest()


def test_the_digest_refuses_what_is_no_float32() -> None:
    with pytest.raises(ValueError, match="float64"):
        weights_digest({"w": np.zeros(2)})


def test_the_newest_value_is_told_and_older_ones_may_be_left_out() -> None:
    result, begun, go_on = list[int](), threading.Event(), threading.Event()

    def tell(value: int) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        result.append(value)

    latest = ThrottledPublisher(tell, interval_s=0.0)
    latest(1)
    assert begun.wait(WAIT_S)
    for value in range(2, 10):
        latest(value)
    go_on.set()
    latest.close()
    assert result == [1, 9]


def test_a_fault_in_telling_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    results = list[int]()

    def tell(value: int) -> None:
        results.append(value)
        if value == 1:
            raise RuntimeError("nobody there")

    latest = ThrottledPublisher(tell, interval_s=0.0)
    latest(1)
    while not results:
        pass
    latest(2)
    latest.close()
    assert results == [1, 2]
    assert "nobody there" in caplog.text

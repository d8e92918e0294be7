"""What a workload returns and changes: order in memory, changes in place, counts, ids and evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_workload import settings, task_for
from workload_clients import ProtectingClients

from fedvit.clients.workload import WorkloadHost, WorkloadModel
from fedvit.config import Settings
from fedvit.errors import DataError, WorkloadError
from fedvit.exact_sums import subtract
from fedvit.store.store import Store
from fedvit.types import Client, ClientKind, Evaluation, TrainTask, Weights
from fedvit.updates import PartialSum

V = tuple(f"vehicle-{i:02d}" for i in range(3))
SHAPE = (40, 50)


class _Clients(ProtectingClients):
    """Returns what a test sets."""

    result: Any = None
    initial: Any = None
    listed: Any = ()
    evaluation: Any = None

    def initial_weights(self) -> Weights:
        return super().initial_weights() if self.initial is None else self.initial

    def clients(self) -> Iterable[tuple[str, int]]:
        return self.listed or super().clients()

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        return super().fit(client_id, weights, task, seed) if self.result is None else self.result(client_id, weights)

    def evaluate(self, weights: Weights) -> Evaluation:
        return self.evaluation(weights) if callable(self.evaluation) else self.evaluation


def train(
    config: Settings, clients: _Clients, base: Weights, sizes: dict[str, int] | None = None
) -> tuple[PartialSum, dict[str, str | None]]:
    message = WorkloadHost(config, clients).train(task_for(base), base, V, None, sizes)
    assert isinstance(message, PartialSum)
    return message, {o.client_id: o.error for o in message.outcomes}


def model_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **returned: Any) -> WorkloadModel:
    for name, value in returned.items():
        monkeypatch.setattr(_Clients, name, value)
    return WorkloadModel(settings(tmp_path, f"{__name__}:_Clients"))


# --- order in memory -------------------------------------------------------------------------------------------------


def test_weights_of_any_order_in_memory_train_alike(tmp_path: Path) -> None:
    config = settings(tmp_path)
    body = np.arange(2000, dtype=np.float32).reshape(SHAPE)
    sums = []
    for order in (body, np.asfortranarray(body), np.ascontiguousarray(body[::-1])[::-1]):
        clients = _Clients(config)
        clients.result = lambda _, weights: ({name: array + 1 for name, array in weights.items()}, 10)
        base = {"body": order, "head": np.zeros(3, np.float32), "scale": np.zeros((), np.float32)}
        sums.append(train(config, clients, base)[0].weighted_sum["body"])
    for total in sums:
        np.testing.assert_array_equal(total, np.full(SHAPE, 30.0))


def test_a_difference_is_not_written_to_a_copy_of_its_target() -> None:
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="C-contiguous"):
        subtract(ones, ones, out=np.empty((2, 3), np.float32, order="F"))


def test_initial_weights_are_stored_in_one_order_and_byte_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = np.arange(6, dtype=">f4").reshape(2, 3)
    initial = model_of(tmp_path, monkeypatch, initial={"body": body.T}).initial_weights()["body"]
    assert (initial.flags.c_contiguous, initial.dtype) == (True, np.dtype(np.float32))
    np.testing.assert_array_equal(initial, [[0, 3], [1, 4], [2, 5]])


# --- changes in place ------------------------------------------------------------------------------------------------


def test_a_client_that_trains_in_place_changes_nobody_s_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def in_place(_: str, weights: Weights) -> tuple[Weights, int]:
        for array in weights.values():
            torch.from_numpy(array).add_(1.0)
        return weights, 10

    config = settings(tmp_path)
    clients = _Clients(config)
    clients.result = in_place
    base = clients.initial_weights()
    message, errors = train(config, clients, base)
    assert set(errors.values()) == {None}
    np.testing.assert_array_equal(message.weighted_sum["body"], np.full(SHAPE, 30.0))
    assert not any(array.any() for array in base.values())


@pytest.mark.parametrize("kept_as", ["array", "view", "tensor"])
def test_what_a_client_keeps_of_its_weights_stays_as_it_is(tmp_path: Path, kept_as: str) -> None:
    torch = pytest.importorskip("torch")
    forms = {"array": lambda array: array, "view": lambda array: array[1:], "tensor": torch.from_numpy}
    kept = list[Any]()

    def keep(client_id: str, weights: Weights) -> tuple[Weights, int]:
        own = weights["body"]
        own[...] = len(kept)
        kept.append(forms[kept_as](own))
        return {"body": own.copy()}, 10

    config = settings(tmp_path)
    clients = _Clients(config)
    clients.result = keep
    train(config, clients, clients.initial_weights())
    assert [float(own.max()) for own in kept] == [0.0, 1.0, 2.0]
    assert [float(own.min()) for own in kept] == [0.0, 1.0, 2.0]


def test_an_evaluation_that_changes_its_weights_does_not_change_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(weights: Weights) -> None:
        for array in weights.values():
            array += np.float32(7)

    kept = {"body": np.zeros(3, np.float32)}
    model = model_of(tmp_path, monkeypatch, initial=kept, evaluation=staticmethod(spoil))
    weights = model.initial_weights()
    model.evaluate(weights)
    kept["body"] += 1
    assert not weights["body"].any()


# --- counts ----------------------------------------------------------------------------------------------------------


def test_a_client_with_more_examples_than_registered_is_rejected_alone(tmp_path: Path) -> None:
    config = settings(tmp_path)
    clients = _Clients(config)
    clients.result = lambda client_id, weights: (weights, 11 if client_id == V[1] else 10)
    message, errors = train(config, clients, clients.initial_weights(), dict.fromkeys(V, 10))
    assert [client_id for client_id, error in errors.items() if error] == [V[1]]
    assert message.total_weight == 20
    assert [o.counted_against_client for o in message.outcomes] == [False, True, False]


def test_a_client_without_examples_today_is_not_counted_against(tmp_path: Path) -> None:
    config = settings(tmp_path)
    clients = _Clients(config)
    clients.result = lambda client_id, weights: (weights, 0 if client_id == V[1] else 10)
    message, errors = train(config, clients, clients.initial_weights())
    assert [client_id for client_id, error in errors.items() if error] == [V[1]]
    assert not any(o.counted_against_client for o in message.outcomes)


@pytest.mark.parametrize("count", [np.int64(10), np.uint8(10), np.array(10), np.array([10])])
def test_a_number_of_examples_may_be_a_numpy_scalar(tmp_path: Path, count: Any) -> None:
    config = settings(tmp_path)
    clients = _Clients(config)
    clients.result = lambda _, weights: (weights, count)
    message, errors = train(config, clients, clients.initial_weights())
    assert set(errors.values()) == {None}
    assert {type(o.num_examples) for o in message.outcomes} == {int}


@pytest.mark.parametrize(
    "result", [None, {"a": 1, "b": 2}, ({}, "10"), ({}, 2.5), ({}, -1), ({}, True), ([np.zeros(3)], 10), ({}, 10, 1)]
)
def test_a_result_of_another_form_is_a_fault_of_the_code_not_of_the_client(tmp_path: Path, result: Any) -> None:
    config = settings(tmp_path)
    clients = _Clients(config)
    clients.result = lambda *_: result
    message, errors = train(config, clients, clients.initial_weights())
    assert all(errors.values())
    assert not any(o.counted_against_client for o in message.outcomes)


# --- ids and evaluations ---------------------------------------------------------------------------------------------


def test_ids_and_counts_of_numpy_are_registered_as_text_and_integers(tmp_path: Path) -> None:
    clients = _Clients(settings(tmp_path))
    clients.listed = [(np.str_("a"), np.int64(7)), ["b", np.uint16(8)]]
    with Store.open(tmp_path) as store:
        store.clients.register(clients.registered())
        assert [(c.client_id, c.num_examples) for c in store.clients.all()] == [("a", 7), ("b", 8)]
        assert store.clients.count_units() == (2, 15)


@pytest.mark.parametrize("entry", ["ab", 3, ("a",), (7, 7), ("a/b", 7), ("*", 7), ("a\n", 7), ("a", 7.5), ("a", -1)])
def test_what_is_no_client_is_refused_and_nothing_is_registered(tmp_path: Path, entry: Any) -> None:
    clients = _Clients(settings(tmp_path))
    clients.listed = [("good", 7), entry]
    with Store.open(tmp_path) as store:
        with pytest.raises(WorkloadError):
            store.clients.register(clients.registered())
        assert store.clients.population() == 0


def test_two_clients_of_one_id_are_refused(tmp_path: Path) -> None:
    clients = _Clients(settings(tmp_path))
    clients.listed = [("a", 7), ("b", 7), ("a", 8)]
    with Store.open(tmp_path) as store:
        with pytest.raises(WorkloadError):
            store.clients.register(clients.registered())
        assert store.clients.population() == 0


def test_a_count_that_is_no_integer_is_refused_by_the_store_itself(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.clients.register([Client("a", ClientKind.VIRTUAL, np.int64(7))])  # type: ignore[arg-type]
        assert store.clients.get("a").num_examples == 7
        for wrong in (2.5, "7", True, None):
            with pytest.raises(DataError):
                store.clients.register([replace(store.clients.get("a"), num_examples=wrong)])


@pytest.mark.parametrize(
    "initial",
    [
        {},
        [np.zeros(3)],
        {"@a": np.zeros(3)},
        {"": np.zeros(3)},
        {3: np.zeros(3)},
        {"a": "text"},
        {"a": np.array([np.nan])},
        {"a": np.array([1e300])},
        {"a": np.zeros(3, complex)},
        {"a": [[1.0], [1.0, 2.0]]},
    ],
)
def test_initial_weights_that_no_run_can_start_from_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, initial: Any
) -> None:
    with pytest.raises(WorkloadError):
        model_of(tmp_path, monkeypatch, initial=initial)


def test_an_evaluation_of_numpy_scalars_becomes_one_of_python_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = Evaluation(np.float32(0.5), np.float64(1), {"a": np.float16(0.5)}, np.eye(2, dtype=np.int64), 2)
    result = model_of(tmp_path, monkeypatch, evaluation=staticmethod(lambda _: given)).evaluate({})
    assert result == Evaluation(0.5, 1.0, {"a": 0.5}, ((1, 0), (0, 1)), 2)
    assert isinstance(result, Evaluation)
    assert [type(v) for v in (result.loss, result.accuracy, result.answers()[0])] == [float, float, int]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "low"},
        {"accuracy": 1.5},
        {"accuracy": float("nan")},
        {"recall_by_class": {"a": -0.1}},
        {"recall_by_class": [0.5]},
        {"confusion": ((1, 2),)},
        {"confusion": ((0.5,),)},
        {"num_examples": -1},
    ],
)
def test_an_evaluation_with_a_value_out_of_range_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    given = replace(Evaluation(0.5, 0.5, {"a": 0.5}, ((1,),), 1), **changes)
    model = model_of(tmp_path, monkeypatch, evaluation=staticmethod(lambda _: given))
    with pytest.raises(WorkloadError):
        model.evaluate({})

"""The promises of the aggregator port."""

from __future__ import annotations

import uuid

import pytest

from fedvit.errors import ConflictError, NotFoundError
from fedvit.ports import AggregatorPort
from fedvit.types import RunStatus, Variant

WAIT_S = 60.0
RETRAIN = {"strategy": "full_retrain"}


class AggregatorContract:
    """Needs the fixture ``aggregator`` of a system whose run has two rounds. One system may serve all tests."""

    def test_a_run_goes_to_its_end(self, aggregator: AggregatorPort) -> None:
        begun = aggregator.start_training()
        assert begun.rounds_total == 2
        ended = aggregator.wait(WAIT_S)
        assert (ended.status, ended.rounds_done, ended.message) == (RunStatus.COMPLETED, 2, None)
        assert aggregator.progress() == ended

    def test_stopping_is_harmless_at_rest(self, aggregator: AggregatorPort) -> None:
        before = aggregator.wait(WAIT_S)
        assert aggregator.stop_training() == before

    def test_the_proxies_answer(self, aggregator: AggregatorPort) -> None:
        assert aggregator.proxies_alive().reaches_all

    def test_an_equal_key_returns_the_same_operation(self, aggregator: AggregatorPort) -> None:
        key = uuid.uuid4().hex
        first = aggregator.submit("retrain", RETRAIN, call_key=key)
        again = aggregator.submit("retrain", RETRAIN, call_key=key)
        assert again.operation_id == first.operation_id
        with pytest.raises(ConflictError):
            aggregator.submit("restart", {}, call_key=key)
        aggregator.cancel_operation(first.operation_id)
        other = aggregator.submit("retrain", RETRAIN)
        assert other.operation_id != first.operation_id
        assert aggregator.cancel_operation(other.operation_id).operation_id == other.operation_id
        aggregator.wait(WAIT_S)

    def test_unknown_operations_are_not_found(self, aggregator: AggregatorPort) -> None:
        with pytest.raises(NotFoundError):
            aggregator.submit("dance", {})
        with pytest.raises(NotFoundError):
            aggregator.cancel_operation("op-unknown")

    def test_versions_that_cannot_serve_are_refused(self, aggregator: AggregatorPort) -> None:
        with pytest.raises(NotFoundError):
            aggregator.rollback("v9.9.9")
        with pytest.raises(ConflictError):
            aggregator.switch_variant(Variant.EDGE_OPTIMIZED)

    def test_waiting_for_a_shutdown_ends_after_the_time_limit(self, aggregator: AggregatorPort) -> None:
        assert aggregator.await_shutdown(0.05) is None

    # The last one: it ends the system.
    def test_after_a_shutdown_nothing_starts(self, aggregator: AggregatorPort) -> None:
        aggregator.submit("shutdown", {"mode": "graceful", "save_state": False})
        assert aggregator.await_shutdown(WAIT_S) == "graceful"
        with pytest.raises(ConflictError):
            aggregator.start_training()

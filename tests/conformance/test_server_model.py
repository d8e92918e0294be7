"""The server model port: the Vision Transformer, a workload, the simulated server, and the shipped double."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.clients.workload import WorkloadModel
from fedvit.errors import FedvitError
from fedvit.evaluation.server_model import ServerModel
from fedvit.ports import ServerModelPort
from fedvit.settings import load_settings
from fedvit.testing.doubles import PointModel
from fedvit.tools.simulation.server import SimulatedServer
from fedvit.types import Variant

TARGET = np.ones(2, np.float32)


class ServerModelContract:
    """Needs the fixture ``model``."""

    def test_a_run_begins_with_the_same_weights_each_time(self, model: ServerModelPort) -> None:
        first, again = model.initial_weights(), model.initial_weights()
        assert first
        assert {array.dtype for array in first.values()} == {np.dtype(np.float32)}
        assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in again.items()}

    def test_no_weight_is_both_trainable_and_frozen(self, model: ServerModelPort) -> None:
        assert not model.frozen_weights().keys() & model.initial_weights().keys()

    def test_an_evaluation_is_on_held_out_data(self, model: ServerModelPort) -> None:
        evaluation = model.evaluate(model.initial_weights())
        assert evaluation is not None
        assert 0 <= evaluation.accuracy <= 1
        assert np.isfinite(evaluation.loss)
        assert evaluation.num_examples > 0

    def test_the_directions_of_the_head_are_orthonormal_and_repeat(self, model: ServerModelPort) -> None:
        weights = model.initial_weights()
        first, again = (model.head_basis(weights, 2) for _ in range(2))
        if first is None or again is None:
            assert first is again is None
            return
        assert model.head is not None
        assert first.shape == (2, weights[model.head].shape[1])
        np.testing.assert_allclose(first @ first.T, np.eye(2), atol=1e-5)
        np.testing.assert_array_equal(first, again)
        assert model.head_basis(weights, weights[model.head].shape[1]) is None

    def test_an_exported_model_can_be_benchmarked(self, model: ServerModelPort) -> None:
        if not model.exports:
            with pytest.raises(FedvitError):
                model.export(model.initial_weights(), Variant.STANDARD)
            with pytest.raises(FedvitError):
                model.benchmark(b"")
            return
        export = model.export(model.initial_weights(), Variant.STANDARD)
        assert export.content
        assert (0 <= export.accuracy <= 1, 0 <= export.agreement <= 1) == (True, True)
        benchmark = model.benchmark(export.content, 2)
        assert len(benchmark.predicted) == 2
        assert 0 < benchmark.p50_ms <= benchmark.p95_ms

    def test_the_histogram_specification_fits_the_limits(self, model: ServerModelPort) -> None:
        spec = model.histogram_spec()
        assert spec is None or spec.cells > 0


class TestServerModel(ServerModelContract):
    @pytest.fixture
    def model(self, tmp_path: Path, images: Path) -> ServerModelPort:
        overrides: dict[str, Any] = {
            "home": tmp_path / "var",
            "data": {"source": "folder", "path": images, "image_size": 32},
            "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
        }
        return ServerModel(load_settings(environ={}, overrides=overrides))

    def test_held_out_images_show_the_directions_of_the_head(self, model: ServerModelPort) -> None:
        # So that the test of the directions above has some.
        assert model.head_basis(model.initial_weights(), 2) is not None


class TestWorkloadModel(ServerModelContract):
    @pytest.fixture
    def model(self, tmp_path: Path) -> ServerModelPort:
        overrides: dict[str, Any] = {
            "home": tmp_path,
            "workload": {"clients_class": "workload_clients:PullingClients"},
            "privacy": {"privacy_unit": "client"},
            "training": {"cohort": {"selection": "poisson", "sampling_prob": 0.5}},
        }
        return WorkloadModel(load_settings(environ={}, overrides=overrides))


class TestSimulatedServer(ServerModelContract):
    @pytest.fixture
    def model(self) -> ServerModelPort:
        return SimulatedServer(PointModel(TARGET), lambda: 0.0, 60.0, lambda _: None)


class TestPointModel(ServerModelContract):
    @pytest.fixture
    def model(self) -> ServerModelPort:
        return PointModel(TARGET)

"""The aggregator port in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contracts.aggregator import AggregatorContract

from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.ports import AggregatorPort
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel, seeded_fleet

TARGET = np.ones(2, np.float32)


class TestLocalAggregator(AggregatorContract):
    @pytest.fixture
    def aggregator(self, tmp_path: Path) -> Iterator[AggregatorPort]:
        overrides = {"home": tmp_path, "training": {"rounds": 2}, "privacy": {"noise_multiplier": 4.0}}
        settings = load_settings(environ={}, overrides=overrides)
        with Store.open(tmp_path) as store:
            store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
            store.clients.register(seeded_fleet(4))
            local = LocalAggregator(
                settings=settings,
                store=store,
                accountant=GenerousAccountant(store),
                fleet=FakeFleet(TARGET),
                model=PointModel(TARGET),
            )
            local.resume()
            yield local
            local.close()

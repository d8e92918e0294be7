"""Custom workloads: hosted like the Vision Transformer's clients, and refused if they are not usable."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raises import raises_naming
from workload_clients import ProtectingClients

from fedvit.clients.workload import (
    VirtualClients,
    WorkloadHost,
    WorkloadModel,
    client_host,
    load_workload,
    server_model,
)
from fedvit.config import Settings
from fedvit.errors import ConfigError, IntegrityError, ModelError
from fedvit.privacy.mechanism import fault_of
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant
from fedvit.types import RunStatus, TrainTask, Variant, Weights
from fedvit.updates import PartialSum, UpdateMessage
from fedvit.wire.tensors import encode_weights
from serve_apps.startup.checks import check_training

V = [f"vehicle-{i:02d}" for i in range(6)]


def settings(
    home: Path, kind: str = "workload_clients:ProtectingClients", unit: str = "record", **more: Any
) -> Settings:
    options = more.pop("options", {})
    cohort = {"selection": "poisson", "sampling_prob": 0.5} if unit == "client" else {}
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "workload": {"clients_class": kind, "options": options},
            "training": {"rounds": 3, "cohort": cohort, **more},
            "privacy": {"noise_multiplier": 4.0, "privacy_unit": unit},
            "release": {"every_rounds": 2},
        },
    )


def test_a_start_removes_what_a_killed_server_left_among_the_blobs(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        digest = store.blobs.put(b"a blob")
    left = tmp_path / "blobs" / "sha256" / digest[:2] / ".tmp-0123456789abcdef"
    left.write_bytes(b"half of a blob")
    write_state = check_training(settings(tmp_path), print)
    assert left.exists()
    write_state()
    assert not left.exists()
    with Store.open(tmp_path) as store:
        assert store.blobs.get(digest) == b"a blob"


def task_for(base: Weights, **changes: Any) -> TrainTask:
    digest = hashlib.sha256(encode_weights(base)).hexdigest()
    return replace(TrainTask("run-0001", 1, digest, "d" * 64, 1.0, 0.5, 1.0, 1, 1.0), **changes)


def base_of(config: Settings) -> Weights:
    return load_workload(config).initial_weights()


def total(message: PartialSum) -> dict[str, Any]:
    return {name: array / message.total_weight for name, array in message.weighted_sum.items()}


class _Observed(ProtectingClients):
    """Remembers the seed of each client; returns fixed weights, if there are some."""

    def __init__(self, config: Settings, returned: Weights | None = None) -> None:
        super().__init__(config)
        self.seeds, self._returned = dict[str, int](), returned

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        self.seeds[client_id] = seed
        return super().fit(client_id, weights, task, seed) if self._returned is None else (self._returned, 10)


def test_a_client_s_weights_become_an_update_weighed_by_its_examples(tmp_path: Path) -> None:
    config = settings(tmp_path)
    base = {name: array + np.float32(1) for name, array in base_of(config).items()}
    clients = _Observed(config)
    message = WorkloadHost(config, clients).train(task_for(base), base, V)
    assert message.total_weight == sum(range(10, 16))
    seeds = dict(clients.seeds)
    assert len(set(seeds.values())) == len(V)
    for name, array in total(message).items():
        parts = [
            (n, clients.fit(c, base, task_for(base), seeds[c])[0][name] - base[name]) for c, n in clients.clients()
        ]
        np.testing.assert_allclose(array, sum(n * part for n, part in parts) / message.total_weight, atol=1e-6)


def test_a_repeated_round_repeats_the_message_and_another_round_does_not(tmp_path: Path) -> None:
    config = settings(tmp_path)
    base = base_of(config)
    first, again = (WorkloadHost(config).train(task_for(base), base, V) for _ in range(2))
    other = WorkloadHost(config).train(task_for(base, round_index=2), base, V)
    for name, array in first.weighted_sum.items():
        assert array.tobytes() == again.weighted_sum[name].tobytes()
        assert array.tobytes() != other.weighted_sum[name].tobytes()


def test_a_failed_client_does_not_affect_the_others(tmp_path: Path) -> None:
    config = settings(tmp_path, options={"failing": [V[1]]})
    base = base_of(config)
    message = WorkloadHost(config).train(task_for(base), base, V)
    assert {o.client_id: o.error for o in message.outcomes if o.error} == {V[1]: "RuntimeError: no data today"}
    assert message.total_weight == sum(range(10, 16)) - 11


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        ({"body": np.zeros((40, 50), np.float32)}, "'head' is amiss"),
        ({"body": np.zeros(3), "head": np.zeros(3), "scale": np.zeros(())}, "with the shape [3]"),
        ({"body": np.full((40, 50), np.nan), "head": np.zeros(3), "scale": np.zeros(())}, "not finite"),
    ],
)
def test_a_result_that_is_no_update_is_rejected(tmp_path: Path, returned: dict[str, Any], fault: str) -> None:
    config = settings(tmp_path)
    base, host = base_of(config), WorkloadHost(config, _Observed(config, returned))
    message = host.train(task_for(base), base, V[:1])
    (outcome,) = message.outcomes
    assert outcome.counted_against_client
    assert fault in str(outcome.error)
    assert message.total_weight == 0


def test_where_clients_are_the_unit_the_host_clips_each_of_them(tmp_path: Path) -> None:
    config = settings(tmp_path, "workload_clients:PullingClients", unit="client")
    base = base_of(config)
    message = WorkloadHost(config).train(task_for(base, privacy_unit="client", l2_clip_norm=1e-3), base, V)
    assert (message.total_weight, message.within_clip) == (6.0, 0)
    assert fault_of(message, 1e-3) is None


def test_rules_that_look_at_single_updates_get_them(tmp_path: Path) -> None:
    config = settings(tmp_path, aggregation="median")
    base = base_of(config)
    message = WorkloadHost(config).train(task_for(base), base, V)
    assert [part.total_weight for part in message.parts] == [1.0] * 6
    apart = [part.weighted_sum["body"] for part in message.parts]
    assert len({array.tobytes() for array in apart}) == 6


def test_weights_that_the_task_was_not_made_for_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    base = base_of(config)
    with pytest.raises(IntegrityError):
        WorkloadHost(config).train(task_for(base), {name: array + 1 for name, array in base.items()}, V)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"kind": "workload_clients:PullingClients"}, ["PullingClients", "protects_records"]),
        ({"kind": "workload_clients:Nobody"}, ["workload_clients:Nobody"]),
        ({"kind": "nowhere.at_all:Nobody"}, ["nowhere.at_all:Nobody"]),
        ({"kind": "workload_clients:SHAPES"}, ["workload_clients:SHAPES", "VirtualClients"]),
        ({"aggregation": "fedprox"}, ["fedprox"]),
    ],
)
def test_an_unusable_workload_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], names: list[str]
) -> None:
    with raises_naming(ConfigError, *names):
        client_host(settings(tmp_path, **changes))


def test_a_run_of_a_workload_is_committed_evaluated_now_and_then_and_not_released(tmp_path: Path) -> None:
    config = settings(tmp_path, evaluate_every_rounds=3)
    config = config.model_copy(update={"training": config.training.model_copy(update={"rounds": 5})})
    with Store.open(tmp_path) as store:
        store.clients.register(load_workload(config).registered())
        loop = Coordinator(
            settings=config,
            store=store,
            accountant=GenerousAccountant(store),
            fleet=HostedFleet(config),
            model=server_model(config),
        )
        run = loop.run()
        assert run.status is RunStatus.COMPLETED
        losses = [record.loss is not None for record in store.rounds.of_run(run.run_id)]
        # Every third, those that might have been released, and the last.
        assert losses == [False, True, True, True, True]
        assert store.releases.all() == []
        assert store.versions.get("v1.1.2").refusal == "Its model has no export."
        assert "held_out_answers" not in store.versions.get("v1.1.1").lineage


class HostedFleet(FakeFleet):
    """One host instead of made-up answers."""

    def __init__(self, config: Settings) -> None:
        super().__init__(np.zeros(1, np.float32), groups=1)
        self._host = WorkloadHost(config)

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        return self._host.train(task, weights, client_ids)


def test_a_workload_s_model_has_no_export(tmp_path: Path) -> None:
    model = WorkloadModel(settings(tmp_path))
    assert model.frozen_weights() == {}
    with pytest.raises(ModelError):
        model.export(model.initial_weights(), Variant.STANDARD)
    with pytest.raises(ModelError):
        model.benchmark(b"")


def test_a_class_without_an_evaluation_says_nothing(tmp_path: Path) -> None:
    assert VirtualClients.evaluate(load_workload(settings(tmp_path)), {}) is None


def test_a_workload_that_needs_no_torch_loads_none() -> None:
    code = "import sys; import fedvit.clients.workload, actors.client_proxy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_workload_is_another_run_and_none_changes_nothing(tmp_path: Path) -> None:
    plain = load_settings(environ={}, overrides={"home": tmp_path})
    assert "workload" not in plain.training_identity()
    own = settings(tmp_path, options={"clients": 3})
    assert own.training_identity()["workload"]["options"] == {"clients": 3}
    assert "evaluate_every_rounds" not in own.training_identity()["training"]

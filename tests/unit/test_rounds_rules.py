"""Aggregation rules and update validation in the real loop: rule state, rejected updates, quarantine, combinations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.aggregation.registry import rule_for
from fedvit.config import Settings
from fedvit.errors import ConfigError, ConflictError
from fedvit.privacy import mechanism
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import RunRequest, change_aggregation_settings
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel, seeded_fleet
from fedvit.types import Cohort, Run, RunStatus, TrainTask, Weights
from fedvit.updates import ClientUpdate, UpdateMessage
from fedvit.wire.tensors import decode_rule_state

TARGET = np.array([1.0, -2.0], dtype=np.float32)
V = [f"vehicle-{i:04d}" for i in range(12)]
BAD = V[1]


class Training:
    """A run of a few clients behind two proxies, or as many as are asked for."""

    def __init__(
        self,
        home: Path,
        aggregation: str = "fedavg",
        *,
        clients: int = 6,
        groups: int = 2,
        rounds: int = 3,
        **more: Any,
    ) -> None:
        privacy = more.pop("privacy", {})
        self.settings: Settings = load_settings(
            environ={},
            overrides={
                "home": home,
                "training": {"rounds": rounds, "aggregation": aggregation, **more},
                "privacy": {"noise_multiplier": 4.0, **privacy},
                "release": {"every_rounds": 1000, "max_accuracy_drop": 1.0},
            },
        )
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(clients))
        self.fleet = FakeFleet(TARGET, groups=groups, rule=rule_for(self.settings))
        self.on_progress: Callable[[Any], object] = lambda _: None
        self.process()

    def process(self) -> None:
        """Another process takes over."""
        self.loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=GenerousAccountant(self.store),
            fleet=self.fleet,
            model=PointModel(TARGET),
            on_progress=lambda progress: self.on_progress(progress),
        )

    def run(self) -> Run:
        return self.loop.run()

    def version(self, round_index: int) -> Any:
        return self.store.versions.get(f"v1.1.{round_index}")

    def aggregation(self, round_index: int) -> dict[str, Any]:
        return dict(self.version(round_index).lineage.get("aggregation", {}))

    def point(self, round_index: int) -> Any:
        return stored_weights(self.store, self.version(round_index).weights_digest)["point"]


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["fedavgm", "fedadam", "scaffold", "norm_bound"])
def test_a_crash_changes_no_bit_of_weights_or_of_what_the_rule_remembers(tmp_path: Path, aggregation: str) -> None:
    results = []
    for name, crash in [("calm", None), ("crash", 3)]:
        training = Training(tmp_path / name, aggregation)
        training.fleet.crash_in_round = crash
        if crash:
            with pytest.raises(KeyboardInterrupt):
                training.run()
            training.process()
        assert training.run().status is RunStatus.COMPLETED
        versions = [training.version(n) for n in (1, 2, 3)]
        results.append([(version.weights_digest, version.lineage["rule_state"]) for version in versions])
        # A backup has to have them.
        assert {state for _, state in results[-1]} <= training.store.versions.blob_digests()
    assert results[0] == results[1]
    assert len(set(results[0])) == 3


def test_momentum_is_carried_from_round_to_round_by_hand(tmp_path: Path) -> None:
    training = Training(tmp_path, "fedavgm", aggregation_options={"momentum": 0.5}, rounds=2)
    training.run()
    # Shares of the way: 0.5; then v = 0.5 * 0.5 + 0.25.
    np.testing.assert_allclose(training.point(2), (0.5 + 0.5) * TARGET, rtol=1e-6)
    state = decode_rule_state(training.store.blobs.get(training.version(2).lineage["rule_state"]))
    np.testing.assert_allclose(state["v/point"], 0.5 * TARGET, rtol=1e-6)


def test_a_rule_without_memory_leaves_no_trace_of_one(tmp_path: Path) -> None:
    training = Training(tmp_path, rounds=1)
    training.run()
    assert "rule_state" not in training.version(1).lineage


def test_broadcast_state_belongs_to_the_identity_of_an_output(tmp_path: Path) -> None:
    training = Training(tmp_path, "scaffold", rounds=2)
    training.run()
    first, second = (task for task, _ in training.fleet.tasks)
    # FakeFleet compares the digest with what it received; here: it is not that of the weights alone.
    assert first.base_digest != training.version(1).lineage["parent_weights_digest"]
    assert second.base_digest != training.version(1).weights_digest


# --- single updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["krum", "multi_krum", "median", "trimmed_mean", "geometric_median", "bulyan"])
def test_a_fifth_of_the_clients_is_malicious_and_the_run_converges(tmp_path: Path, aggregation: str) -> None:
    options = {"num_byzantine": 2} if "krum" in aggregation or aggregation == "bulyan" else {}
    training = Training(tmp_path, aggregation, clients=12, aggregation_options=options, rounds=2)
    for malicious in V[:2]:
        training.fleet.tamper[malicious] = lambda update: scaled(update, -10.0)
    assert training.run().status is RunStatus.COMPLETED
    np.testing.assert_allclose(training.point(2), 0.75 * TARGET, rtol=1e-5)


def test_fedavg_does_not_converge_with_the_same_clients(tmp_path: Path) -> None:
    training = Training(tmp_path, clients=12, rounds=2)
    for malicious in V[:2]:
        training.fleet.tamper[malicious] = lambda update: scaled(update, -10.0)
    training.run()
    assert np.linalg.norm(training.point(2) - TARGET) > 1.5 * np.linalg.norm(TARGET)


def test_a_proxy_that_sums_where_single_updates_are_needed_is_refused(tmp_path: Path) -> None:
    training = Training(tmp_path, "median", rounds=1)
    training.fleet.rule = None
    run = training.run()
    assert run.status is RunStatus.FAILED
    assert "it sums 3 clients, and the rule takes single updates" in str(run.reason)


@pytest.mark.parametrize("aggregation", ["fedbuff", "fedasync", "norm_bound"])
def test_an_asynchronous_buffer_holds_exactly_k_however_many_a_message_brings(tmp_path: Path, aggregation: str) -> None:
    training = Training(tmp_path, aggregation, rounds=6)
    change_aggregation_settings(training.store, lambda now: replace(now, mode="asynchronous", buffer_size=2))
    assert training.run().status is RunStatus.COMPLETED
    sizes = [record.num_updates for record in training.store.rounds.of_run("run-0001")]
    assert sizes[:-1] == [2] * 5
    # The last round takes all that are left, so that every charge was for something.
    assert sum(sizes) == len(training.store.ledger.entries())
    clients = [training.version(n).lineage["clients"] for n in range(1, 7)]
    assert all(len(set(buffer)) == len(buffer) for buffer in clients)
    charged = Counter(entry.charge.unit_id for entry in training.store.ledger.entries())
    assert Counter(client for buffer in clients for client in buffer) == charged
    assert any(staleness for n in range(1, 7) for staleness in training.aggregation(n)["staleness"].values())


def test_fedasync_mixes_towards_where_an_old_update_began(tmp_path: Path) -> None:
    training = Training(tmp_path, "fedasync", clients=2, groups=2, rounds=2, aggregation_options={"alpha": 0.5})
    change_aggregation_settings(training.store, lambda now: replace(now, mode="asynchronous", buffer_size=1))
    training.run()
    # Both see the origin and come to half the way. The first is mixed in by a half, then the second, one version old,
    # by 0.5 * 2^-0.5, and the first again, which saw 0.25 and came to 0.625.
    assert training.aggregation(2)["staleness"] == {V[0]: 1, V[1]: 0}
    share = 0.25
    share += 0.5 * 2**-0.5 * (0.5 - share)
    share += 0.5 * (0.625 - share)
    np.testing.assert_allclose(training.point(2), share * TARGET, rtol=1e-6)


# --- validation and admission ----------------------------------------------------------------------------------------


def scaled(update: ClientUpdate, factor: float) -> ClientUpdate:
    return replace(update, weighted_sum={n: factor * a for n, a in update.weighted_sum.items()})


def with_point(point: Any) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(update, weighted_sum={"point": point})


FAULTS: dict[str, tuple[Callable[[ClientUpdate], ClientUpdate], str]] = {
    "nan": (with_point(np.array([1.0, np.nan])), "'point' holds a value that is not finite"),
    "infinite": (with_point(np.array([np.inf, 0.0])), "'point' holds a value that is not finite"),
    "huge": (lambda u: scaled(u, 1e9), "its norm is 1.11803e+09; at most 5 is allowed"),
    "overflowing": (lambda u: scaled(u, 1e200), "its norm is inf; at most 5 is allowed"),
    "nameless": (lambda u: replace(u, weighted_sum={}), "it lacks the parameter 'point'"),
    "strange": (
        lambda u: replace(u, weighted_sum={**u.weighted_sum, "x": np.zeros(1)}),
        "it holds 'x', which is no parameter of this model",
    ),
    "misshapen": (with_point(np.zeros((2, 1))), "'point' has the shape [2, 1], not [2]"),
    "mistyped": (with_point(np.zeros(2, dtype=np.int64)), "its parameter 'point' is int64"),
    "heavy": (lambda u: replace(u, total_weight=1000.0), "its weight is 1000, and that of its 1 clients is 1"),
}


def test_bad_updates_are_outcomes_with_their_reasons_and_the_round_goes_on(tmp_path: Path) -> None:
    training = Training(tmp_path, "fedbuff", clients=12, rounds=1, validation={"max_update_norm": 5.0})
    wrong = dict(zip(V, FAULTS.values(), strict=False))
    training.fleet.tamper = {client_id: tamper for client_id, (tamper, _) in wrong.items()}
    assert training.run().status is RunStatus.COMPLETED
    assert training.version(1).lineage["clients"] == V[len(FAULTS) :]
    assert training.aggregation(1)["refused"].keys() == wrong.keys()
    for client_id, (_, reason) in wrong.items():
        result = training.aggregation(1)["refused"][client_id]
        assert result.startswith("its update is refused: ")
        assert reason in result
        assert training.store.rounds.participation()[client_id].failures == 1
    np.testing.assert_allclose(training.point(1), 0.5 * TARGET)


def test_an_invalid_partial_sum_is_rejected_and_counted_against_no_client(tmp_path: Path) -> None:
    training = Training(tmp_path, rounds=4, validation={"quarantine_after_rejections": 1})
    training.fleet.tamper[BAD] = with_point(np.array([np.nan, 0.0]))
    assert training.run().status is RunStatus.COMPLETED
    assert training.version(4).lineage["clients"] == [V[0], V[2], V[4]]
    assert training.store.clients.quarantined() == []


def test_more_examples_than_registered_are_rejected(tmp_path: Path) -> None:
    training = Training(tmp_path, rounds=1, groups=6)

    def claim(update: ClientUpdate) -> ClientUpdate:
        return replace(scaled(update, 1e5), outcome=replace(update.outcome, num_examples=10**6), total_weight=1e6)

    training.fleet.tamper[BAD] = claim
    training.run()
    assert "claims 1000000 examples, and is registered with" in training.aggregation(1)["refused"][BAD]
    np.testing.assert_allclose(training.point(1), 0.5 * TARGET)


class Duplicating(FakeFleet):
    """Sends more messages beside the true answers."""

    def __init__(self, more: Callable[[TrainTask, UpdateMessage], list[UpdateMessage]], **options: Any) -> None:
        super().__init__(TARGET, **options)
        self._more = more

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        for answer in super().train(task, weights, cohort, timeout_s=timeout_s):
            yield answer
            if answer is not None and answer.outcomes[0].client_id == BAD:
                yield from self._more(task, answer)


def test_duplicates_unexpected_clients_and_future_rounds_are_rejected_by_name(tmp_path: Path) -> None:
    sent: list[UpdateMessage] = []

    def more(task: TrainTask, answer: UpdateMessage) -> list[UpdateMessage]:
        sent.append(answer)
        (own,) = answer.outcomes
        unexpected = replace(answer, outcomes=(replace(own, client_id="nobody"),))
        future = replace(answer, round_index=task.round_index + 5, outcomes=(replace(own, client_id=V[3]),))
        return [sent[0], scaled(answer, 3.0), unexpected, *([future] if task.round_index == 2 else [])]

    training = Training(tmp_path, rounds=2, groups=6)
    training.fleet = Duplicating(more, groups=6)
    training.process()
    assert training.run().status is RunStatus.COMPLETED
    for index, started in ((1, 1), (2, 2)):
        rejected = training.aggregation(index)["unexpected"]
        assert rejected[BAD] == f"it has answered already; its answer to round {started} changes nothing"
        assert rejected["nobody"] == f"it was not asked in round {started}"
        np.testing.assert_allclose(training.point(index), (1 - 0.5**index) * TARGET)
        assert training.version(index).lineage["clients"] == V[:6]
    assert training.aggregation(2)["unexpected"][V[3]] == "it answers round 7, which has not begun"


def test_an_answer_repeated_after_its_round_counts_no_second_time(tmp_path: Path) -> None:
    first: list[UpdateMessage] = []

    def more(task: TrainTask, answer: UpdateMessage) -> list[UpdateMessage]:
        first.append(answer)
        return []

    training = Training(tmp_path, rounds=2, groups=6)
    training.fleet = fleet = Duplicating(more, groups=6)
    training.process()
    again = fleet.train

    def train(task: TrainTask, *arguments: Any, **options: Any) -> Iterator[UpdateMessage | None]:
        if task.round_index == 2:
            yield first[0]
        yield from again(task, *arguments, **options)

    fleet.train = train  # type: ignore[method-assign]
    training.run()
    assert training.aggregation(2)["unexpected"] == {
        BAD: "it has answered already; its answer to round 1 changes nothing"
    }
    # Its answer to this round counts all the same.
    assert training.version(2).lineage["clients"] == V[:6]
    np.testing.assert_allclose(training.point(2), 0.75 * TARGET)


def test_after_so_many_refusals_a_client_comes_into_quarantine_and_reinstated_it_has_as_many_again(
    tmp_path: Path,
) -> None:
    training = Training(tmp_path, "median", rounds=7, validation={"quarantine_after_rejections": 2})
    training.fleet.tamper[BAD] = with_point(np.array([np.nan, 0.0]))

    def reinstate(progress: Any) -> None:
        if progress.rounds_done == 4 and training.store.clients.get(BAD).quarantined:
            training.store.clients.reinstate(BAD)

    training.on_progress = reinstate
    training.run()
    asked = [BAD in cohort.client_ids for _, cohort in training.fleet.tasks]
    assert asked == [True, True, False, False, True, True, False]
    client = training.store.clients.get(BAD)
    assert client.quarantined
    assert str(client.quarantine_reason).startswith("2 of its updates were refused; the last in round 6 of run-0001:")
    assert training.store.rounds.participation()[BAD].failures == 4


def test_a_round_tried_twice_counts_a_refusal_once_and_without_the_setting_nobody_is_kept_out(tmp_path: Path) -> None:
    training = Training(tmp_path, "median", rounds=1, validation={"quarantine_after_rejections": 2})
    training.fleet.tamper[BAD] = with_point(np.array([np.nan, 0.0]))
    committed = training.store.rounds.commit

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    training.store.rounds.commit = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        training.run()
    training.store.rounds.commit = committed  # type: ignore[method-assign]
    assert training.run().status is RunStatus.COMPLETED
    assert training.store.rounds.participation()[BAD].failures == 1
    assert training.store.clients.quarantined() == []
    lenient = Training(tmp_path / "lenient", "median", rounds=4, validation={"quarantine_after_rejections": None})
    lenient.fleet.tamper = dict(training.fleet.tamper)
    lenient.run()
    assert lenient.store.clients.quarantined() == []


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "cure"),
    [("krum", "fedavg"), ("norm_bound", "adaptive_clip"), ("scaffold", "fedadam"), ("fedbuff", "fedavg")],
)
def test_a_rule_that_does_not_go_with_client_level_privacy_is_refused_by_name(
    tmp_path: Path, aggregation: str, cure: str
) -> None:
    privacy = {"privacy_unit": "client"}
    with pytest.raises(ConfigError, match=f"'{aggregation}' does not go with privacy.privacy_unit 'client'.*{cure}"):
        Training(tmp_path, aggregation, privacy=privacy, cohort={"selection": "poisson", "sampling_prob": 0.5})


def test_server_optimisers_step_along_the_noised_mean_of_whole_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The arithmetic shows best without any noise.
    monkeypatch.setattr(mechanism, "fresh_noise", lambda stream, size: np.zeros(size))
    cohort = {"selection": "all", "max_participations": 4}
    privacy = {"privacy_unit": "client", "noise_multiplier": 4.0, "l2_clip_norm": 0.5}
    training = Training(
        tmp_path, "fedavgm", privacy=privacy, cohort=cohort, aggregation_options={"momentum": 0.5}, rounds=2
    )
    assert training.run().status is RunStatus.COMPLETED
    # Every step is clipped to 0.5: v = 0.5, then 0.25 + 0.5.
    direction = TARGET / np.linalg.norm(TARGET)
    np.testing.assert_allclose(training.point(2), (0.5 + 0.75) * direction, rtol=1e-6)


def test_secure_aggregation_will_not_go_with_single_updates() -> None:
    overrides = {"training": {"aggregation": "median"}, "privacy": {"noise_at": "distributed"}}
    config = load_settings(environ={}, overrides=overrides)
    with pytest.raises(ConfigError):
        rule_for(config)


def test_a_rule_that_needs_one_base_refuses_asynchronous_rounds_before_a_run_begins(tmp_path: Path) -> None:
    training = Training(tmp_path, "krum", aggregation_options={"num_byzantine": 1})
    change_aggregation_settings(training.store, lambda now: replace(now, mode="asynchronous"))
    for begin in (training.run, lambda: training.loop.lifecycle.check_new_run(RunRequest(0, "op", "again"))):
        with pytest.raises(ConflictError):
            begin()
    assert training.store.runs.all() == []


def test_cohorts_too_small_for_the_guarantee_are_refused_before_a_run_begins(tmp_path: Path) -> None:
    training = Training(tmp_path, "bulyan", clients=6, aggregation_options={"num_byzantine": 1})
    with pytest.raises(ConfigError):
        training.run()
    assert training.store.runs.all() == []


def test_a_round_that_loses_too_many_for_the_guarantee_says_so(tmp_path: Path) -> None:
    training = Training(tmp_path, "krum", clients=5)
    training.fleet.failing = frozenset({V[0]})
    run = training.run()
    assert run.status is RunStatus.FAILED
    assert "krum with num_byzantine 1 needs 5 updates, and has 4" in str(run.reason)

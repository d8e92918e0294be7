"""Each rule against numbers by hand, or against another way to compute them."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedvit.aggregation.registry import SHIPPED, create_rule
from fedvit.aggregation.robust import mixed
from fedvit.aggregation.rule import Fold, RoundFacts, Rule
from fedvit.aggregation.staleness import discounted, staleness_weight
from fedvit.config import StalenessConfig, TrainingConfig
from fedvit.errors import UpdateRejectedError
from fedvit.types import ClientOutcome
from fedvit.updates import ClientUpdate, PartialSum

Vector = npt.NDArray[np.float64]


def rule(name: str, options: dict[str, Any] | None = None, **training: Any) -> Rule:
    return create_rule(TrainingConfig(aggregation=name, aggregation_options=options or {}, **training))


def update(client: str, delta: Any, weight: float = 1.0, started: int = 1) -> ClientUpdate:
    """One client's, weighted."""
    array = np.asarray(delta, dtype=np.float64)
    return ClientUpdate(started, ClientOutcome(client, int(weight)), {"w": weight * array}, weight)


def updates(deltas: Any) -> list[ClientUpdate]:
    return [update(f"c{index:02d}", delta) for index, delta in enumerate(deltas)]


def at(*values: float) -> dict[str, Any]:
    return {"w": np.array(values, dtype=np.float32)}


def rounds(tested: Rule, base: dict[str, Any], deltas: list[Any]) -> Fold:
    """Round after round, one client each, what is remembered going from one to the next."""
    fold = Fold(base, {})
    for delta in deltas:
        fold = tested.fold(fold.weights, [update("c", delta)], fold.state)
    return fold


# --- averages and server optimisers ----------------------------------------------------------------------------------


def test_fedavg_weighs_by_examples_and_moves_by_the_servers_rate() -> None:
    # n = 1 moves by (4, 0), n = 3 by (0, 8): the mean is (1, 6), half of it (0.5, 3).
    fold = rule("fedavg", server_learning_rate=0.5).fold(at(1, 2), [update("a", [4, 0], 1), update("b", [0, 8], 3)], {})
    np.testing.assert_allclose(fold.weights["w"], [1.5, 5.0])
    assert (fold.weights["w"].dtype, fold.state) == (np.float32, {})


def test_fedavgm_by_hand() -> None:
    # v: 4, 0.5 * 4 + 2 = 4, 0.5 * 4 - 6 = -4; w: 1 + 4 + 4 - 4.
    fold = rounds(rule("fedavgm", {"momentum": 0.5}), at(1), [[4.0], [2.0], [-6.0]])
    assert (fold.weights["w"].tolist(), fold.state["v/w"].tolist()) == ([5.0], [-4.0])


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_optimisers_against_the_papers_formula_one_number_at_a_time(name: str) -> None:
    beta_1, beta_2, tau, eta = 0.8, 0.95, 0.01, 0.3
    draw = np.random.default_rng(1)
    deltas = draw.normal(size=(6, 3)) * [0.01, 1.0, 30.0]
    expected = []
    for column in deltas.T:
        w, m, v = 2.0, 0.0, tau**2
        for d in column:
            m = beta_1 * m + (1 - beta_1) * d
            if name == "fedadam":
                v = beta_2 * v + (1 - beta_2) * d**2
            elif name == "fedadagrad":
                v = v + d**2
            else:
                v = v - (1 - beta_2) * d**2 * (1 if v > d**2 else -1)
            w += eta * m / (v**0.5 + tau)
        expected.append(w)
    decay = {} if name == "fedadagrad" else {"beta_2": beta_2}
    tested = rule(name, {"beta_1": beta_1, "tau": tau, **decay}, server_learning_rate=eta)
    np.testing.assert_allclose(rounds(tested, at(2, 2, 2), list(deltas)).weights["w"], expected, rtol=2e-6)


def test_fedbuff_gives_every_client_one_voice_and_does_not_divide_by_the_discount() -> None:
    stale = discounted(update("b", [8.0], started=1), 3)
    fold = rule("fedbuff").fold(at(0), [update("a", [4.0], started=4), stale], {}, RoundFacts(round_index=4))
    # (1 * 4 + 0.5 * 8) / 2
    assert fold.weights["w"].tolist() == [4.0]


def test_fedasync_mixes_models_and_an_old_one_from_where_it_began() -> None:
    weight = {0: 1.0, 3: 0.5}
    facts = RoundFacts(4, start={4: at(10.0), 1: at(2.0)}.__getitem__, staleness_weight=weight.__getitem__)
    fresh, stale = update("a", [6.0], started=4), discounted(update("b", [4.0], started=1), 3)
    fold = rule("fedasync", {"alpha": 0.5}).fold(at(10), [fresh, stale], {}, facts)
    # a: 0.5 * 10 + 0.5 * 16 = 13; b has come to 2 + 4 = 6: 0.75 * 13 + 0.25 * 6.
    np.testing.assert_allclose(fold.weights["w"], [11.25])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (StalenessConfig(weight="constant"), [1, 1, 1, 1]),
        (StalenessConfig(), [1, 2**-0.5, 3**-0.5, 6**-0.5]),
        (StalenessConfig(exponent=2.0), [1, 1 / 4, 1 / 9, 1 / 36]),
        (StalenessConfig(weight="hinge", hinge_from=2, hinge_slope=3.0), [1, 1, 1, 1 / 10]),
    ],
)
def test_staleness_weights_and_a_fresh_update_counts_one(config: StalenessConfig, expected: list[float]) -> None:
    assert [staleness_weight(s, config) for s in (0, 1, 2, 5)] == pytest.approx(expected)
    with pytest.raises(ValueError):
        staleness_weight(-1, config)


# --- client halves ---------------------------------------------------------------------------------------------------


def locally(tested: Rule, base: float, optimum: float, steps: int, lr: float, broadcast: Any, client_state: Any) -> Any:
    """Gradient descent on (w - optimum)^2 / 2, corrected by the rule; the update and the new client state."""
    start, w = at(base), np.float64(base)
    correction = tested.client.before_training(start, broadcast, client_state)
    for _ in range(steps):
        gradient = w - optimum
        if correction is not None:
            gradient += correction.pull * (w - correction.anchor["w"][0]) if correction.anchor else 0.0
            gradient += correction.shift["w"][0] if correction.shift else 0.0
        w = w - lr * gradient
    delta = {"w": np.array([w - base], dtype=np.float32)}
    return delta, tested.client.after_training(delta, broadcast, client_state)


def test_fedprox_rests_between_the_round_s_start_and_the_client_s_optimum() -> None:
    tested = rule("fedprox", {"proximal_mu": 3.0})
    delta, client_state = locally(tested, 0.0, 8.0, 200, 0.1, {}, {})
    # The minimum of (w - 8)^2 / 2 + 3 w^2 / 2.
    np.testing.assert_allclose(delta["w"], [2.0], rtol=1e-5)
    assert client_state == {}


def test_scaffold_s_first_two_rounds_by_hand() -> None:
    # One local step of rate 0.5 on optima 4 and 0, from w = 0; K lr = 0.5, N = 4.
    tested = rule("scaffold", local_steps=1, learning_rate=0.5)
    broadcast = tested.broadcast(at(0), {})
    assert broadcast["@c/w"].tolist() == [0.0]
    (first, state_a), (second, state_b) = (locally(tested, 0.0, o, 1, 0.5, broadcast, {}) for o in (4.0, 0.0))
    assert (first["w"].tolist(), second["w"].tolist()) == ([2.0], [0.0])
    # c_k <- c_k - c - delta / (K lr): each client's own gradient at w.
    assert (state_a["w"].tolist(), state_b["w"].tolist()) == ([-4.0], [0.0])
    fold = tested.fold(at(0), [update("a", first["w"]), update("b", second["w"])], {}, RoundFacts(population=4))
    assert fold.weights["w"].tolist() == [1.0]
    # c <- 0 + 2/4 * mean(-4, 0)
    assert fold.state["c/w"].tolist() == [-1.0]
    broadcast = tested.broadcast(fold.weights, fold.state)
    third, state_a = locally(tested, 1.0, 4.0, 1, 0.5, broadcast, state_a)
    # The gradient at 1 is -3; corrected by c - c_k = 3 it is 0.
    assert (third["w"].tolist(), state_a["w"].tolist()) == ([0.0], [-3.0])


def test_scaffold_reaches_the_common_optimum_where_fedavg_does_not() -> None:
    # Curvatures 1 and 10, optima 0 and 1: the sum is least at 10 / 11. Many local steps pull FedAvg towards the middle.
    def distance(name: str) -> float:
        tested = rule(name, local_steps=10, learning_rate=0.05)
        fold, client_state = Fold(at(0.5), {}), [{}, {}]
        for _ in range(150):
            broadcast, sent = tested.broadcast(fold.weights, fold.state), []
            for k, (curvature, optimum) in enumerate([(1.0, 0.0), (10.0, 1.0)]):
                correction = tested.client.before_training(fold.weights, broadcast, client_state[k])
                w = start = float(fold.weights["w"][0])
                for _ in range(10):
                    result = None if correction is None else correction.shift
                    shift = 0.0 if result is None else float(result["w"][0])
                    w -= 0.05 * (curvature * (w - optimum) + shift)
                delta = {"w": np.array([w - start], dtype=np.float32)}
                client_state[k] = dict(tested.client.after_training(delta, broadcast, client_state[k]))
                sent.append(update(str(k), delta["w"]))
            fold = tested.fold(fold.weights, sent, fold.state, RoundFacts(population=2))
        return abs(float(fold.weights["w"][0]) - 10 / 11)

    assert distance("scaffold") < 1e-4
    assert distance("fedavg") > 0.05


# --- robust rules ----------------------------------------------------------------------------------------------------


def krum_order(deltas: Vector, byzantine: int) -> list[int]:
    """Another way to Krum's order: from Gram matrices, without loops."""
    gram = deltas @ deltas.T
    distances = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    nearest = len(deltas) - byzantine - 2
    scores = [np.sort(np.delete(row, i))[:nearest].sum() for i, row in enumerate(distances)]
    return [int(i) for i in np.argsort(scores)]


CLOUD = np.random.default_rng(5).normal(size=(15, 4))


def centre(name: str, options: dict[str, Any], deltas: Any = CLOUD) -> Vector:
    deltas = np.asarray(deltas)
    result = rule(name, options).fold({"w": np.zeros(deltas.shape[1], np.float32)}, updates(deltas), {}).weights["w"]
    return np.asarray(result, dtype=np.float64)


def test_median_and_trimmed_mean_by_hand() -> None:
    deltas = [[1, 50], [2, -9], [3, 1], [4, 2], [100, 3]]
    assert centre("median", {}, deltas).tolist() == [3.0, 2.0]
    # One of five goes at either end: (2 + 3 + 4) / 3 and (1 + 2 + 3) / 3.
    assert centre("trimmed_mean", {"trim_fraction": 0.2}, deltas).tolist() == [3.0, 2.0]
    assert centre("trimmed_mean", {"trim_fraction": 0.0}, deltas).tolist() == pytest.approx([22.0, 9.4])


def test_krum_and_multi_krum_against_gram_matrices() -> None:
    order = krum_order(CLOUD, 3)
    np.testing.assert_allclose(centre("krum", {"num_byzantine": 3}), CLOUD[order[0]], rtol=1e-6)
    np.testing.assert_allclose(centre("multi_krum", {"num_byzantine": 3}), CLOUD[order[:10]].mean(0), rtol=1e-5)
    selected = centre("multi_krum", {"num_byzantine": 3, "num_selected": 4})
    np.testing.assert_allclose(selected, CLOUD[order[:4]].mean(0), rtol=1e-5)


def test_bulyan_against_its_definition_spelled_out() -> None:
    left, selected = list(range(15)), []
    for _ in range(15 - 2 * 3):
        best = left[krum_order(CLOUD[left], 3)[0]] if len(left) > 6 else None
        if best is None:
            # No more than f + 2 neighbours are left: the nearest one decides.
            apart = [min(np.linalg.norm(CLOUD[i] - CLOUD[j]) for j in left if j != i) for i in left]
            best = left[int(np.argmin(apart))]
        selected.append(best)
        left.remove(best)
    expected = []
    for column in CLOUD[selected].T:
        middle = np.median(column)
        expected.append(np.mean(sorted(column, key=lambda value, middle=middle: abs(value - middle))[:3]))
    np.testing.assert_allclose(centre("bulyan", {"num_byzantine": 3}), expected, rtol=1e-5)


def test_the_geometric_median_is_where_distances_are_least() -> None:
    # Of three points with angles below 120 degrees: Fermat's point, from which all sides look 120 degrees wide.
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    np.testing.assert_allclose(centre("geometric_median", {}, triangle), triangle.mean(0), atol=1e-5)
    result = centre("geometric_median", {"max_iterations": 2000, "tolerance": 1e-9})
    towards = CLOUD - result
    pull = (towards / np.linalg.norm(towards, axis=1)[:, None]).sum(0)
    assert np.linalg.norm(pull) < 1e-3


def test_mixing_replaces_every_update_by_the_mean_of_its_neighbours_by_hand() -> None:
    deltas = [[0.0], [1.0], [2.0], [10.0], [100.0]]
    # With f = 2, each becomes the mean of the three nearest: 1, 1, 1, (1 + 2 + 10) / 3 and (2 + 10 + 100) / 3.
    assert mixed(np.array(deltas), 2).ravel().tolist() == pytest.approx([1, 1, 1, 13 / 3, 112 / 3])
    assert centre("median", {"mixing": 2}, deltas).tolist() == [1.0]
    trimmed = centre("trimmed_mean", {"trim_fraction": 0.2, "mixing": 2}, deltas)
    assert trimmed.tolist() == pytest.approx([(1 + 1 + 13 / 3) / 3])
    # Of two that are as near, the first counts; nobody is left out where f is 0.
    assert mixed(np.array([[0.0], [1.0], [2.0]]), 1).ravel().tolist() == [0.5, 0.5, 1.5]
    assert mixed(CLOUD, 0) == pytest.approx(np.tile(CLOUD.mean(axis=0), (15, 1)))
    with pytest.raises(UpdateRejectedError):
        centre("median", {"mixing": 3}, deltas)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "geometric_median"])
def test_mixing_costs_less_than_looking_at_unlike_clients_one_by_one(name: str) -> None:
    """Honest clients that differ in a few coordinates each, and a fifth that sends ten times the opposite."""
    draw = np.random.default_rng(3)
    honest = np.where(draw.random((24, 200)) < 0.2, draw.normal(2.0, 1.0, (24, 200)), 0.0)
    lies = -10 * np.where(draw.random((6, 200)) < 0.2, draw.normal(2.0, 1.0, (6, 200)), 0.0)
    deltas, truth = np.concatenate([honest, lies]), honest.mean(axis=0)
    plain, mixing = (float(np.linalg.norm(centre(name, o, deltas) - truth)) for o in ({}, {"mixing": 6}))
    assert mixing < 0.5 * plain


def test_norm_bounding_clips_and_its_bound_follows_the_quantile_by_hand() -> None:
    tested = rule("norm_bound", {"target_quantile": 0.5, "adaptation_rate": 1.0})
    fold = tested.fold(at(0, 0), updates([[3, 4], [0, 10], [0.6, 0.8]]), {})
    # Norms 5, 10, 1: the median is 5, within it are two of three.
    np.testing.assert_allclose(fold.weights["w"], [3.6 / 3, (4 + 5 + 0.8) / 3], rtol=1e-6)
    assert float(fold.state["bound"]) == pytest.approx(5 * np.exp(-(2 / 3 - 1 / 2)))
    bound = {"bound": np.asarray(64.0)}
    for _ in range(60):
        bound = dict(tested.fold(at(0), updates([[1], [2], [3], [4], [1000]]), bound).state)
    assert 2 <= float(bound["bound"]) <= 4


ROBUST: dict[str, dict[str, Any]] = {
    "median": {},
    "trimmed_mean": {"trim_fraction": 0.2},
    "krum": {"num_byzantine": 4},
    "multi_krum": {"num_byzantine": 4},
    "bulyan": {"num_byzantine": 4},
    "geometric_median": {},
    "norm_bound": {},
}


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("attack", [-1.0, -10.0, 100.0])
def test_a_fifth_of_the_clients_flips_signs_or_scales(name: str, attack: float) -> None:
    draw = np.random.default_rng(7)
    honest = np.full(30, 1.0) + 0.1 * draw.normal(size=(20, 30))
    attacked = honest.copy()
    attacked[:4] *= attack
    clean = honest[4:].mean(0)
    away = np.linalg.norm(centre(name, ROBUST[name], attacked) - clean) / np.linalg.norm(clean)
    pulled = np.linalg.norm(centre("fedavg", {}, attacked) - clean) / np.linalg.norm(clean)
    # FedAvg moves by a fifth of what the attackers are away: 0.4, 2.2, 19.8. Bounded norms still have a direction.
    assert pulled > 0.35
    assert away < (0.45 if name == "norm_bound" else 0.15)
    if name != "norm_bound" or attack < -1:
        assert away < pulled


@pytest.mark.parametrize(
    ("name", "byzantine", "needed"), [("krum", 2, 7), ("multi_krum", 2, 7), ("bulyan", 2, 11), ("bulyan", 0, 3)]
)
def test_too_few_for_the_guarantee_is_refused_by_name(name: str, byzantine: int, needed: int) -> None:
    tested = rule(name, {"num_byzantine": byzantine})
    assert tested.least_updates == needed
    draw = np.random.default_rng(0).normal(size=(needed, 2))
    with pytest.raises(UpdateRejectedError, match=f"{name} with num_byzantine {byzantine} needs {needed} updates"):
        tested.fold(at(0, 0), updates(draw[1:]), {})
    assert np.isfinite(tested.fold(at(0, 0), updates(draw), {}).weights["w"]).all()


def test_multi_krum_cannot_select_more_than_are_trusted() -> None:
    with pytest.raises(UpdateRejectedError):
        centre("multi_krum", {"num_byzantine": 3, "num_selected": 12})


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_nobody_is_no_round_and_who_failed_has_no_voice(name: str) -> None:
    failed = PartialSum(1, (ClientOutcome("z", 0, "it failed"),), {}, 0.0)
    with pytest.raises(UpdateRejectedError):
        rule(name).fold(at(0), [failed], {})
    heard = updates([[1.0]] * 7)
    alone, beside = (rule(name).fold(at(0), sent, {}).weights["w"] for sent in (heard, [*heard, failed]))
    assert alone.tolist() == beside.tolist()
    assert alone[0] > 0


@pytest.mark.parametrize("name", SHIPPED)
def test_scalars_and_matrices_keep_their_shapes_and_a_fold_is_a_function(name: str) -> None:
    draw = np.random.default_rng(3)
    base = {"b": np.float32(draw.normal(size=())), "a": draw.normal(size=(2, 3)).astype(np.float32)}
    base = {n: np.asarray(a, dtype=np.float32) for n, a in base.items()}
    sent = [
        ClientUpdate(1, ClientOutcome(f"c{i}", 1), {n: draw.normal(size=a.shape) for n, a in base.items()}, 1.0)
        for i in range(9)
    ]
    tested = rule(name)
    first, again = tested.fold(base, sent, {}), rule(name).fold(base, sent, {})
    assert {n: (a.shape, a.dtype) for n, a in first.weights.items()} == {n: (a.shape, a.dtype) for n, a in base.items()}
    for one, other in itertools.chain(
        zip(first.weights.values(), again.weights.values(), strict=True),
        zip(first.state.values(), again.state.values(), strict=True),
    ):
        assert one.tobytes() == other.tobytes()
        assert np.isfinite(one).all()
    assert all(array.dtype == np.float64 for array in first.state.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    from fedvit.rounds.update_admission import RoundUpdates

    draw = np.random.default_rng(11)
    sent = updates(draw.normal(size=(9, 40)) * 10.0 ** draw.integers(-6, 6, size=(9, 1)))
    seen = set()
    for seed in range(10):
        random.Random(seed).shuffle(sent)
        ordered = RoundUpdates(1, "synchronous", tuple(sent)).updates()
        fold = rule(name).fold({"w": np.zeros(40, np.float32)}, ordered, {})
        seen.add(fold.weights["w"].tobytes() + b"".join(a.tobytes() for a in fold.state.values()))
    assert len(seen) == 1

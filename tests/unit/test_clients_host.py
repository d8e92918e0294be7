"""Client host: sums, failures, corrections, client state, and noise derived from base and data."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.client_state import ClientState
from fedvit.clients.host import ClientHost, vision_host
from fedvit.config import CompressionConfig, Settings
from fedvit.data.partition import VirtualFleet
from fedvit.errors import IntegrityError
from fedvit.models.build import build_model
from fedvit.models.trainable import load_trainable_weights, trainable_weights
from fedvit.privacy.mechanism import fault_of, l2_norm
from fedvit.settings import load_settings
from fedvit.types import Encoding, TrainTask, Weights
from fedvit.updates import ClientFailures, PartialSum, UpdateBundle
from fedvit.wire.tensors import decode_weights, encode_weights

torch.set_num_threads(1)

CLIENTS = ["vehicle-00", "vehicle-01", "vehicle-02"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Three clients with a handful of noisy images each, and a tiny untrained model."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 2)):
        for name in ("green", "red"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return load_settings(
        environ={},
        overrides={
            "home": tmp_path / "var",
            "data": {
                "source": "folder",
                "path": tmp_path / "images",
                "image_size": 32,
                "partition": {"scheme": "iid", "clients": 3, "min_examples": 2},
            },
            "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
        },
    )


def base_of(settings: Settings) -> Weights:
    return trainable_weights(build_model(settings.model, 2, settings.data.image_size))


def task_for(base: Weights, *, noise_multiplier: float = 1.0) -> TrainTask:
    return TrainTask(
        run_id="run-0001",
        round_index=1,
        base_digest=hashlib.sha256(encode_weights(base)).hexdigest(),
        data_digest="d" * 64,
        noise_multiplier=noise_multiplier,
        sampling_prob=0.5,
        l2_clip_norm=1.0,
        local_steps=1,
        learning_rate=1.0,
    )


def test_one_message_holds_what_the_clients_would_send_alone(settings: Settings) -> None:
    host, base = vision_host(settings), base_of(settings)
    together = host.train(task_for(base), base, CLIENTS)
    alone = [host.train(task_for(base), base, [client]) for client in CLIENTS]
    assert together.total_weight == sum(a.total_weight for a in alone) == 18
    for name, array in together.weighted_sum.items():
        np.testing.assert_array_equal(array, sum(a.weighted_sum[name] for a in alone))
    assert [o.client_id for o in together.outcomes] == CLIENTS


def test_a_restarted_host_repeats_the_release_bit_for_bit(settings: Settings) -> None:
    base = base_of(settings)
    first, second = (vision_host(settings).train(task_for(base), base, CLIENTS) for _ in range(2))
    for name, array in first.weighted_sum.items():
        np.testing.assert_array_equal(array, second.weighted_sum[name])


def test_weights_that_the_noise_was_not_made_for_are_refused(settings: Settings) -> None:
    host, base = vision_host(settings), base_of(settings)
    other = {name: array + 1 for name, array in base.items()}
    with pytest.raises(IntegrityError):
        host.train(task_for(base), other, CLIENTS)


def test_changed_data_never_gets_the_same_noise(settings: Settings) -> None:
    base = base_of(settings)
    # Clipped to almost zero, an update is noise alone.
    task = replace(task_for(base), l2_clip_norm=1e-6)
    before = vision_host(settings).train(task, base, CLIENTS[:1])
    assert settings.data.path is not None
    for path in sorted(settings.data.path.glob("train/*/*.png")):
        with Image.open(path) as image:
            changed = np.asarray(image).copy()
        changed[0, 0] ^= 1
        Image.fromarray(changed).save(path)
    after = vision_host(settings).train(task, base, CLIENTS[:1])
    noise = [np.concatenate([a.ravel() for a in update.weighted_sum.values()]) for update in (before, after)]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.5


def test_an_unreadable_client_does_not_affect_the_others(settings: Settings) -> None:
    host, base = vision_host(settings), base_of(settings)
    assert settings.data.path is not None
    records = VirtualFleet.open(settings.data).records("vehicle-01")
    broken = next(settings.data.path.rglob(Path(records[0].key).name))
    for path in settings.data.path.rglob(broken.name):
        path.write_bytes(b"no image any more")
    update = host.train(task_for(base), base, CLIENTS)
    errors = {o.client_id: o.error for o in update.outcomes}
    assert errors["vehicle-01"] is not None
    assert "decoded" in errors["vehicle-01"] or "image" in errors["vehicle-01"]
    assert update.total_weight == sum(o.num_examples for o in update.outcomes)


def test_an_unknown_client_is_an_outcome(settings: Settings) -> None:
    host, base = vision_host(settings), base_of(settings)
    update = host.train(task_for(base), base, ["vehicle-00", "vehicle-99"])
    assert [o.error is None for o in update.outcomes] == [True, False]


def client_level(settings: Settings, l2_clip_norm: float) -> tuple[ClientHost, Weights, TrainTask]:
    privacy = settings.privacy.model_copy(update={"privacy_unit": "client"})
    base = base_of(settings)
    # Every record is drawn: otherwise a client without any drawn record would have an update of zero.
    task = replace(task_for(base), privacy_unit="client", sampling_prob=1.0, l2_clip_norm=l2_clip_norm)
    return vision_host(settings.model_copy(update={"privacy": privacy})), base, task


def test_whole_updates_are_clipped_one_by_one_before_they_are_summed(settings: Settings) -> None:
    host, base, task = client_level(settings, 1e-3)
    alone = [host.train(task, base, [client]) for client in CLIENTS]
    assert [l2_norm(a.weighted_sum) for a in alone] == pytest.approx([1e-3] * 3, rel=1e-9)
    together = host.train(task, base, CLIENTS)
    assert (together.total_weight, together.within_clip) == (3.0, 0)
    for name, array in together.weighted_sum.items():
        np.testing.assert_allclose(array, sum(a.weighted_sum[name] for a in alone), atol=1e-15)
    assert fault_of(together, 1e-3) is None


def test_an_update_within_the_bound_is_plain_sgd_without_noise(settings: Settings) -> None:
    host, base, task = client_level(settings, 1e6)
    update = host.train(replace(task, sampling_prob=1.0, learning_rate=0.25), base, CLIENTS[:1])
    assert update.within_clip == 1
    model = build_model(settings.model, 2, settings.data.image_size)
    data = host.data.load(CLIENTS[0])
    torch.nn.functional.cross_entropy(model.body(data.features), data.labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, array in update.weighted_sum.items():
        gradient = gradients[name]
        assert gradient is not None
        np.testing.assert_allclose(array, -0.25 * gradient.numpy(), atol=1e-6)


def test_physical_batches_change_nothing_but_rounding(settings: Settings) -> None:
    updates = []
    for size in (1, 64):
        training = settings.training.model_copy(update={"physical_batch_size": size})
        host, base, task = client_level(settings.model_copy(update={"training": training}), 1e6)
        updates.append(host.train(task, base, CLIENTS))
    for name, array in updates[0].weighted_sum.items():
        np.testing.assert_allclose(array, updates[1].weighted_sum[name], atol=1e-6)


def test_an_update_that_is_not_finite_is_an_outcome_and_adds_nothing(settings: Settings) -> None:
    host, base, task = client_level(settings, 1.0)
    host.data.load(CLIENTS[1]).features.fill_(torch.nan)
    update = host.train(replace(task, sampling_prob=1.0), base, CLIENTS)
    assert [o.error is None for o in update.outcomes] == [True, False, True]
    assert "norm" in str(update.outcomes[1].error)
    assert update.total_weight == 2.0
    assert fault_of(update, 1.0) is None


def ruled(settings: Settings, aggregation: str, **training: Any) -> Settings:
    changes = {"aggregation": aggregation, **training}
    return settings.model_copy(update={"training": settings.training.model_copy(update=changes)})


def common_noise_host(settings: Settings) -> ClientHost:
    """A host whose noise depends on neither settings nor model, to compare what rules do beside it."""
    host = vision_host(settings)
    host.context_digest = ""
    return host


def task_from(task: TrainTask, weights: Weights) -> TrainTask:
    return replace(task, base_digest=hashlib.sha256(encode_weights(weights)).hexdigest())


def test_single_updates_come_in_one_message_and_add_up_to_the_sum(settings: Settings) -> None:
    base = base_of(settings)
    summed = common_noise_host(settings).train(task_for(base), base, CLIENTS)
    message = common_noise_host(ruled(settings, "median")).train(task_for(base), base, [*CLIENTS, "vehicle-99"])
    assert isinstance(message, UpdateBundle)
    assert [o.client_id for o in message.outcomes] == [*CLIENTS, "vehicle-99"]
    assert [part.total_weight for part in message.parts[:3]] == [1.0, 1.0, 1.0]
    assert isinstance(message.parts[3], ClientFailures)
    for name, array in summed.weighted_sum.items():
        weighed = [o.num_examples * p.weighted_sum[name] for p in message.parts[:3] for o in p.outcomes]
        np.testing.assert_allclose(array, sum(weighed), rtol=1e-12)


def test_single_updates_travel_in_the_form_that_is_set_and_come_out_nearly_as_they_were(settings: Settings) -> None:
    base = base_of(settings)
    plain = common_noise_host(ruled(settings, "median")).train(task_for(base), base, CLIENTS)
    smaller = ruled(settings, "median", compression=CompressionConfig(encodings=(Encoding.INT8,)))
    message, again = (common_noise_host(smaller).train(task_for(base), base, [*CLIENTS, "vehicle-99"]) for _ in "ab")
    assert message == again
    validator = UpdateValidator.of(smaller, rule_for(smaller), base)
    for part, exact in zip(message.parts[:3], plain.parts, strict=True):
        opened = validator.decoded(part)
        assert validator.fault_of(opened) is None
        (outcome,) = opened.outcomes
        assert (outcome.encoding, outcome.sent_bytes) == ("int8", len(part.content))
        for name, array in opened.weighted_sum.items():
            largest = float(np.abs(exact.weighted_sum[name]).max())
            np.testing.assert_allclose(array, exact.weighted_sum[name], atol=largest / 100)
    assert isinstance(message.parts[3], ClientFailures)


def test_uniform_weighting_gives_every_client_weight_one(settings: Settings) -> None:
    base, scaffold = base_of(settings), ruled(settings, "scaffold")
    host = vision_host(scaffold)
    weights = {**base, **rule_for(scaffold).broadcast(base, {})}
    update = host.train(task_from(task_for(base), weights), weights, CLIENTS)
    assert [o.error for o in update.outcomes] == [None] * 3
    assert update.total_weight == 3.0
    assert update.weighted_sum.keys() == base.keys()


@pytest.mark.parametrize("unit", ["record", "client"])
def test_the_proximal_term_draws_every_step_back(settings: Settings, unit: str) -> None:
    privacy = settings.privacy.model_copy(update={"privacy_unit": unit})
    settings = settings.model_copy(update={"privacy": privacy})
    base = base_of(settings)
    task = replace(task_for(base), privacy_unit=unit, local_steps=3, learning_rate=0.5, l2_clip_norm=1e6)
    task = replace(task, sampling_prob=1.0)
    plain, corrected = (
        common_noise_host(ruled(settings, name, aggregation_options=options)).train(task, base, CLIENTS[:1])
        for name, options in (("fedavg", {}), ("fedprox", {"proximal_mu": 2.0}))
    )
    # lr * mu = 1: whatever the first two steps did is taken back; what is left is the last one, and no more.
    norms = [l2_norm(update.total()) for update in (plain, corrected)]
    assert norms[1] < norms[0]
    one = common_noise_host(ruled(settings, "fedprox", aggregation_options={"proximal_mu": 0.0}))
    for name, array in one.train(task, base, CLIENTS[:1]).total().items():
        np.testing.assert_array_equal(array, plain.total()[name])


def test_a_corrected_step_is_the_step_plus_the_correction_exactly(settings: Settings) -> None:
    base, scaffold = base_of(settings), ruled(settings, "scaffold")
    host = vision_host(scaffold)
    rest = {**base, **rule_for(scaffold).broadcast(base, {})}
    shifted = {n: a + 0.25 if n.startswith("@") else a for n, a in rest.items()}
    # Clipped to nothing and noised with nothing: two steps of rate 1 apply the correction alone, twice -0.25.
    task = replace(task_for(base, noise_multiplier=1e-9), local_steps=2, l2_clip_norm=1e-6)
    for weights, expected in ((rest, 0.0), (shifted, -0.5)):
        update = host.train(task_from(replace(task, run_id=f"run{expected}"), weights), weights, CLIENTS[:1])
        for array in update.weighted_sum.values():
            np.testing.assert_allclose(array, expected, atol=1e-4)


def test_a_control_variate_stays_with_the_client_and_a_repeated_round_reads_what_the_first_read(
    settings: Settings,
) -> None:
    scaffold = ruled(settings, "scaffold", learning_rate=1.0)
    base = base_of(settings)

    def train(round_index: int) -> PartialSum:
        # Another process each time.
        host = vision_host(scaffold)
        weights = {**base, **rule_for(scaffold).broadcast(base, {})}
        return host.train(task_from(replace(task_for(base), round_index=round_index), weights), weights, CLIENTS[:1])

    first, second, again = train(1), train(2), train(2)
    folder = settings.home / "clients" / CLIENTS[0] / "run-0001" / "scaffold"
    assert sorted(path.stem for path in folder.iterdir()) == ["00000001", "00000002"]
    for name, array in second.weighted_sum.items():
        np.testing.assert_array_equal(array, again.weighted_sum[name])
    state = decode_weights((folder / "00000001.safetensors").read_bytes(), max_bytes=10**6)
    for name, array in first.weighted_sum.items():
        # One step of rate 1 from c = 0: c_k is minus the update.
        np.testing.assert_allclose(state[name], -array, rtol=1e-6)


def test_noise_is_not_repeated_after_the_client_state_is_lost(settings: Settings) -> None:
    scaffold = ruled(settings, "scaffold")
    base = base_of(settings)
    host = vision_host(scaffold)
    weights = {**base, **rule_for(scaffold).broadcast(base, {})}
    task = task_from(replace(task_for(base), l2_clip_norm=1e-6), weights)
    host.train(task, weights, CLIENTS[:1])
    second = replace(task, round_index=2)
    with_it = host.train(second, weights, CLIENTS[:1])
    path = settings.home / "clients" / CLIENTS[0] / "run-0001" / "scaffold" / "00000001.safetensors"
    before = decode_weights(path.read_bytes(), max_bytes=10**6)
    path.unlink()
    without = host.train(second, weights, CLIENTS[:1])
    # Without the correction (minus c_k), only the clipped gradient and the noise remain.
    noise = [
        np.concatenate([(u.weighted_sum[n] - shift[n]).ravel() for n in sorted(base)])
        for u, shift in ((with_it, before), (without, {n: 0.0 * a for n, a in before.items()}))
    ]
    assert not np.array_equal(*noise)
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.5


def test_a_personal_model_learns_on_and_its_release_is_fedavg_s(settings: Settings) -> None:
    base = base_of(settings)
    task = replace(task_for(base), sampling_prob=1.0, local_steps=5, learning_rate=0.5)
    global_only = common_noise_host(settings).train(task, base, CLIENTS[:1])
    personal = ruled(settings, "ditto", aggregation_options={"personal_lambda": 0.0})
    host = common_noise_host(personal)
    update = host.train(task, base, CLIENTS[:1])
    for name, array in update.weighted_sum.items():
        np.testing.assert_array_equal(array, global_only.weighted_sum[name])
    data = host.data.load(CLIENTS[0])

    def loss(round_index: int) -> float:
        own, _ = ClientState(settings.home, "ditto").load("run-0001", round_index, CLIENTS[0])
        model = build_model(settings.model, 2, settings.data.image_size)
        load_trainable_weights(model, own or base)
        return float(torch.nn.functional.cross_entropy(model.body(data.features), data.labels).detach())

    host.train(replace(task, round_index=2), base, CLIENTS[:1])
    assert loss(3) < loss(2) < loss(1)


def test_a_strong_pull_keeps_the_personal_model_at_the_global_one(settings: Settings) -> None:
    base = base_of(settings)
    task = replace(task_for(base), sampling_prob=1.0, local_steps=5, learning_rate=0.01)
    away = []
    for pull in (0.0, 90.0):
        config = ruled(settings, "ditto", aggregation_options={"personal_lambda": pull})
        home = settings.home.parent / f"pull-{pull}"
        vision_host(config.model_copy(update={"home": home})).train(task, base, CLIENTS[:1])
        own, _ = ClientState(home, "ditto").load("run-0001", 2, CLIENTS[0])
        away.append(l2_norm({n: own[n] - base[n] for n in base}))
    assert 0 < away[1] < away[0] / 3


def test_an_invalid_update_does_not_affect_the_other_clients(settings: Settings) -> None:
    validation = settings.training.validation.model_copy(update={"max_update_norm": 1e-3})
    base = base_of(settings)
    bounded = vision_host(ruled(settings, "fedavg", validation=validation))
    # Every client's noise is far above the bound.
    update = bounded.train(task_for(base), base, CLIENTS)
    assert [(o.counted_against_client, "at most 0.001 is allowed" in str(o.error)) for o in update.outcomes] == [
        (True, True)
    ] * 3
    assert update.total_weight == 0.0
    host = vision_host(settings)
    host.data.load(CLIENTS[1]).features.fill_(torch.nan)
    answer = host.train(task_for(base), base, CLIENTS)
    assert all(np.isfinite(array).all() for array in answer.weighted_sum.values())


def test_a_host_with_another_model_never_draws_the_same_noise(settings: Settings) -> None:
    other = settings.model_copy(update={"model": settings.model.model_copy(update={"seed": 1})})
    base = base_of(settings)
    # A head starts at zero, so both hosts accept the task.
    assert all(np.array_equal(base[name], array) for name, array in base_of(other).items())
    task = replace(task_for(base), l2_clip_norm=1e-6)
    updates = [vision_host(each).train(task, base, CLIENTS[:1]).weighted_sum for each in (settings, other)]
    noise = [np.concatenate([update[name].ravel() for name in sorted(base)]) for update in updates]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.5


def test_a_vehicle_with_more_records_than_registered_is_rejected_alone(settings: Settings) -> None:
    base, sizes = base_of(settings), dict.fromkeys(CLIENTS, 6)
    update = vision_host(settings).train(task_for(base), base, CLIENTS, None, sizes | {CLIENTS[1]: 5})
    assert [o.client_id for o in update.outcomes if o.counted_against_client] == [CLIENTS[1]]
    assert update.total_weight == 12

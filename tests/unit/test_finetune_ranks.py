"""Several ranks take the step that one would: same records, same noise, same number of steps."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from raises import raises_naming

from fedvit.clients.local import LocalTrainer
from fedvit.errors import StateError
from fedvit.finetune.ranks import NOISE_BLOCK, RankedTrainer, RankNoise, Ranks
from fedvit.models.trainable import TrainableMode
from fedvit.models.vision import VisionModel
from fedvit.privacy.randomness import SecretStream
from fedvit.testing.ranks import on_ranks
from fedvit.tools.audit import subjects
from fedvit.types import FloatArray, TrainTask
from fedvit.wire.tensors import decode_weights, encode_weights

torch.set_num_threads(1)

SECRET = bytes(range(32))
STEPS, RECORDS = 3, 12
TASK = TrainTask("run", 1, "base", "data", 0.8, 0.5, 0.5, STEPS, 2.0)


def trained(model: VisionModel, ranks: Ranks, task: TrainTask = TASK, records: int = RECORDS) -> dict[str, FloatArray]:
    features, labels = subjects.ordinary_records(model, records)
    trainer = RankedTrainer(model, ranks, physical_batch_size=2)
    return trainer.train(task, subjects.weights_of(model), features, labels, SECRET, "depot")


def flat(delta: dict[str, FloatArray]) -> FloatArray:
    return np.concatenate([delta[name].ravel() for name in sorted(delta)])


def error(computed: FloatArray, truth: FloatArray) -> float:
    return float(np.linalg.norm(computed - truth) / np.linalg.norm(truth))


def on_threads(count: int, task: TrainTask, records: int = RECORDS, mode: TrainableMode = "all") -> list[FloatArray]:
    # Built beforehand: the weights are drawn from torch's one generator.
    models = [subjects.family("vit", mode) for _ in range(count)]
    return on_ranks(count, lambda ranks: flat(trained(models[ranks.index], ranks, task, records)))


def in_process(folder: Path, index: int, count: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=index, world_size=count)
    delta = trained(subjects.family("vit", "all"), Ranks.here())
    torch.distributed.destroy_process_group()
    (folder / f"{index}-of-{count}").write_bytes(encode_weights(delta))


def in_processes(folder: Path, count: int) -> list[FloatArray]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torch is imported once, by the server that the ranks are forked from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedvit.tools.audit.subjects", "fedvit.finetune.ranks"])
    running = [context.Process(target=in_process, args=(folder, index, count, port)) for index in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * count
    deltas = [
        decode_weights((folder / f"{index}-of-{count}").read_bytes(), max_bytes=1 << 30) for index in range(count)
    ]
    return [flat(delta) for delta in deltas]


def test_one_two_and_four_processes_make_the_same_update(tmp_path: Path) -> None:
    alone = flat(trained(subjects.family("vit", "all"), Ranks()))
    for count in (2, 4):
        deltas = in_processes(tmp_path, count)
        assert all(np.array_equal(delta, deltas[0]) for delta in deltas)
        assert error(deltas[0], alone) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_without_noise_ranks_make_the_update_of_the_trainer_without_ranks(count: int) -> None:
    model = subjects.family("vit", "all")
    task = dataclasses.replace(TASK, noise_multiplier=0.0)
    features, labels = subjects.ordinary_records(model, RECORDS)
    base = subjects.weights_of(model)
    plain = LocalTrainer(model, physical_batch_size=64).train(task, base, features, labels, SECRET, "depot")
    for delta in on_threads(count, task):
        assert error(delta, flat(plain)) < 1e-5


def test_ranks_without_a_record_take_part() -> None:
    """Two records on four ranks: at least two ranks have none in any step, and no rank waits for ever."""
    model = subjects.family("vit", "head")
    alone = flat(trained(model, Ranks(), records=2))
    for delta in on_threads(4, TASK, records=2, mode="head"):
        assert error(delta, alone) < 1e-5


def test_ranks_that_take_different_numbers_of_steps_are_refused() -> None:
    def uneven(ranks: Ranks) -> None:
        for _ in range(2 - ranks.index):
            ranks.sum(torch.zeros(1))

    with raises_naming(StateError, "Rank 0"):
        on_ranks(2, uneven)


def test_under_bfloat16_the_sum_of_ranks_keeps_the_bound() -> None:
    task = dataclasses.replace(TASK, noise_multiplier=0.0, sampling_prob=1.0, local_steps=1, learning_rate=1.0)

    def total(records: int) -> FloatArray:
        models = [subjects.family("vit", "all") for _ in range(2)]

        def work(ranks: Ranks) -> FloatArray:
            model = models[ranks.index]
            features, labels = subjects.ordinary_records(model, records)
            trainer = RankedTrainer(model, ranks, physical_batch_size=2, bfloat16=True)
            delta = trainer.train(task, subjects.weights_of(model), features, labels, SECRET, "depot")
            assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())
            return flat(delta) * records

        return on_ranks(2, work)[0]

    moved = float(np.linalg.norm(total(6) - total(5)))
    # The weights' own rounding, of 6 times a float32 that is near 1, is all that the bound leaves room for.
    assert moved == pytest.approx(TASK.l2_clip_norm, rel=2e-3)


def test_every_number_of_the_noise_comes_from_one_rank_whatever_their_number() -> None:
    size = 4 * NOISE_BLOCK + 5

    def noise(ranks: Ranks) -> FloatArray:
        drawn = RankNoise(ranks, lambda block: SecretStream(SECRET, "test", {"block": block})).normal(size, np.float32)
        return np.asarray(drawn)

    alone = noise(Ranks())
    for count in (2, 4):
        shares = [noise(Ranks(index, count)) for index in range(count)]
        assert np.array_equal(np.sum(shares, axis=0), alone)
        assert (np.count_nonzero(shares, axis=0) == 1).all()
    assert alone.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * size))
    assert abs(np.corrcoef(alone[:NOISE_BLOCK], alone[NOISE_BLOCK : 2 * NOISE_BLOCK])[0, 1]) < 5 / NOISE_BLOCK**0.5


def test_ranks_on_other_data_are_refused_by_number() -> None:
    def check(ranks: Ranks) -> None:
        what = "ours" if ranks.index != 2 else "another's"
        ranks.check_agreed("data set", hashlib.sha256(what.encode()).digest())

    with raises_naming(StateError, "Rank 2", "data set"):
        on_ranks(3, check)

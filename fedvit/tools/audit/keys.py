"""Check that secret numbers are derived from the secret key, and from everything that identifies an output."""

from __future__ import annotations

import math
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedvit.clients.host import ClientHost, vision_host
from fedvit.cohort.selection import draw_cohort
from fedvit.config import CohortConfig
from fedvit.finetune.ranks import RankedTrainer, Ranks
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.rounds.protection import FACTS
from fedvit.store.store import Store
from fedvit.tools.audit import subjects
from fedvit.tools.audit.findings import STANDSTILL, Finding, Scope
from fedvit.tools.audit.histograms import fine_spec
from fedvit.tools.audit.observe import (
    Release,
    Vector,
    drawn_batches,
    histograms_without_noise,
    released_rounds,
    released_steps,
)
from fedvit.tools.audit.pictures import Pictures, random_images
from fedvit.tools.audit.randomness import DEVIATIONS
from fedvit.tools.audit.runs import FIXED_KEY, AuditRun, Folding, client_task, run_settings, write_key, zero_updates
from fedvit.types import TrainTask, Weights
from fedvit.wire.histograms import HistogramRequest
from fedvit.wire.tensors import weights_digest

CHECK = "key derivation"
_OTHER_KEY = FIXED_KEY[::-1]
_RECORDS, _CLIENTS, _ROUNDS, _STEPS = 48, 32, 5, 8
_PIXELS, _BRIGHTNESS = 768, 8.0
_LABELS = [i % subjects.CLASSES for i in range(_RECORDS)]
_SELECTIONS: dict[str, dict[str, Any]] = {"uniform": {"size": _CLIENTS // 2}, "poisson": {"sampling_prob": 0.5}}
Numbers = Mapping[str, Vector]
"""Secret numbers as audits observe them, by their use: noise of deviation 1, or centred coins, [R, N] each."""


class _Inputs(Protocol):
    """The inputs of a use of secret numbers, other than the key."""

    def numbers(self, key: bytes) -> Numbers:
        """The numbers that follow from them and the key."""
        ...

    def variants(self) -> Iterator[tuple[str, _Inputs]]:
        """Inputs of other outputs, by what is changed."""
        ...


def check(scope: Scope) -> Iterator[Finding]:
    """The root key; then, for every use, the same key, another key, and other inputs."""
    # Keys do not depend on the noise; with little of it, counts are not cut off.
    scope = replace(scope, noise_multiplier=1.0, sampling_prob=0.5)
    yield Finding.of(CHECK, "root key", list(_root_faults()), "new for every state folder, and for its owner alone")
    steps, a_round, histogram = _Steps.of(scope), _Round(scope, client_task(scope)), _Histogram.of(scope)
    for use, numbers in (
        ("steps", steps.numbers),
        ("steps on ranks", partial(_rank_numbers, scope)),
        ("rounds of whole clients", a_round.numbers),
        ("cohorts", partial(_cohort_numbers, scope)),
        ("histograms", histogram.numbers),
    ):
        faults = list(_key_faults(numbers))
        yield Finding.of(CHECK, f"{use}, another key", faults, "repeated with the same key, unrelated with another")
    inputs: Mapping[str, _Inputs] = {
        "steps": steps,
        "rounds of whole clients": a_round,
        "cohorts": _Cohorts(),
        "histograms": histogram,
    }
    for use, as_they_are in inputs.items():
        faults = list(_variant_faults(as_they_are))
        yield Finding.of(CHECK, f"{use}, other inputs", faults, "unrelated with the same key")


def _key_faults(numbers: Callable[[bytes], Numbers]) -> Iterator[str]:
    first, again, other = numbers(FIXED_KEY), numbers(FIXED_KEY), numbers(_OTHER_KEY)
    for use in first:
        if not np.array_equal(first[use], again[use]):
            yield f"{use}: the same key and the same inputs give other numbers"
        if (fault := _related(first[use], other[use])) is not None:
            yield f"{use}: the numbers do not depend on the secret key: {fault}"


def _variant_faults(inputs: _Inputs) -> Iterator[str]:
    first = inputs.numbers(FIXED_KEY)
    for changed, variant in inputs.variants():
        numbers = variant.numbers(FIXED_KEY)
        for use in first:
            if (fault := _related(first[use], numbers[use])) is not None:
                yield f"{use}: the numbers do not depend on {changed}: {fault}"


def _related(one: Vector, other: Vector) -> str | None:
    """The relation of two draws of numbers [R, N], of which the second may have fewer rows or columns; or None."""
    rows, columns = min(len(one), len(other)), min(one.shape[1], other.shape[1])
    first, second = one[:rows, :columns].ravel(), other[:rows, :columns].ravel()
    if np.array_equal(first, second):
        return "they are equal"
    if len(first) < 100:
        return None
    correlation = float(np.corrcoef(first, second)[0, 1])
    return f"correlation {correlation:.3f}" if abs(correlation) > DEVIATIONS / math.sqrt(len(first)) else None


def _root_faults() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        home, keys = Path(folder), list[bytes]()
        for _ in range(2):
            keys.append(load_or_create_root_secret(home))
            path = home / "keys" / "root.key"
            if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
                yield f"others may read or write the key: mode {mode:04o}"
            if load_or_create_root_secret(home) != keys[-1]:
                yield "the key is another one when it is read again"
            path.unlink()
    if keys[0] == keys[1]:
        yield "two state folders at one place have the same key"
    if min(len(set(key)) for key in keys) < 8:
        yield "a key has few different bytes"


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Steps:
    """The inputs of a client's local steps."""

    host: _Host
    task: TrainTask
    base: Weights
    client_id: str = "car"

    @classmethod
    def of(cls, scope: Scope) -> _Steps:
        base = subjects.weights_of(subjects.linear_model(_PIXELS))
        task = scope.train_task(sampling_prob=scope.sampling_prob, local_steps=_STEPS)
        host = _Host(scope, Pictures.of(random_images(_RECORDS), _LABELS))
        return cls(host, replace(task, base_digest=weights_digest(base)), base)

    def numbers(self, key: bytes) -> Numbers:
        """Noise [steps, D] and coins [steps, N]."""
        with tempfile.TemporaryDirectory() as home:
            host = self.host.open(Path(home), key)
            with released_steps() as releases, drawn_batches() as batches:
                host.train(self.task, self.base, [self.client_id])
        coins = np.full((len(batches), _RECORDS), -self.task.sampling_prob)
        for row, batch in zip(coins, batches, strict=True):
            # The first pixel is the position of the record.
            row[np.rint(batch * 255 / _BRIGHTNESS).astype(np.int64)] += 1
        return {"noise": _noise(releases, self.task), "coins": coins}

    def variants(self) -> Iterator[tuple[str, _Steps]]:
        """Other inputs, by what is changed."""
        for name, task in _changed_tasks(self.task):
            yield name, replace(self, task=task)
        for name, host in self.host.variants():
            yield name, replace(self, host=host)
        base = {name: array + np.float32(1) for name, array in self.base.items()}
        task = replace(self.task, base_digest=weights_digest(base))
        yield "the weights", replace(self, base=base, task=task)
        yield "the client", replace(self, client_id="bus")
        fewer = self.host.pictures.without(_RECORDS - 1)
        yield "the number of records", replace(self, host=replace(self.host, pictures=fewer))


def _rank_numbers(scope: Scope, key: bytes) -> Numbers:
    """Noise of steps by a trainer of ranks, for which a job derives the key."""
    steps = _Steps.of(scope)
    model = subjects.linear_model(_PIXELS, _BRIGHTNESS)
    features, labels = subjects.ordinary_records(model, 4)
    trainer = RankedTrainer(model, Ranks(), physical_batch_size=_RECORDS)
    with released_steps() as releases:
        trainer.train(steps.task, steps.base, features, labels, key, "depot")
    return {"noise": _noise(releases, steps.task)}


@dataclass(frozen=True, slots=True)
class _Host:
    """What the real host of a client computes with, apart from the task.

    ``frozen`` is a number in the frozen part of the model.
    """

    scope: Scope
    pictures: Pictures
    frozen: float = 0.0
    server_learning_rate: float = 1.0

    def open(self, home: Path, key: bytes) -> ClientHost:
        """The host, which reads its key from the state folder."""
        write_key(home, key)
        training = {"physical_batch_size": _RECORDS, "learning_rate": STANDSTILL, "local_steps": _STEPS}
        settings = run_settings(
            home,
            self.scope,
            unit="record",
            cohort={"selection": "all"},
            training={**training, "server_learning_rate": self.server_learning_rate},
            data={"image_size": subjects.IMAGE_SIZE},
        )
        model = subjects.linear_model(_PIXELS, _BRIGHTNESS)
        frozen = torch.nn.Parameter(torch.tensor(self.frozen), requires_grad=False)
        model.prefix.register_parameter("frozen", frozen)
        return vision_host(settings, records=self.pictures, model=model)

    def variants(self) -> Iterator[tuple[str, _Host]]:
        """Other hosts, by what is changed."""
        yield "the images", replace(self, pictures=_with_another_image())
        yield "the labels", replace(self, pictures=Pictures.of(random_images(_RECORDS), [2, *_LABELS[1:]]))
        yield "the classes", replace(self, pictures=replace(self.pictures, classes=("one", "two", "three")))
        yield "the settings of the host", replace(self, server_learning_rate=2.0)
        yield "the frozen part of the model", replace(self, frozen=1.0)


def _with_another_image() -> Pictures:
    images = random_images(_RECORDS)
    images[1, 5, 5, 1] ^= 1
    return Pictures.of(images, _LABELS)


def _noise(releases: Sequence[Release], task: TrainTask) -> Vector:
    return np.array([release.noise for release in releases]) / (task.noise_multiplier * task.l2_clip_norm)


def _changed_tasks(task: TrainTask) -> Iterator[tuple[str, TrainTask]]:
    """The task with each of its fields changed; that of the weights goes with them, and the unit with the trainer."""
    for field in fields(task):
        value = getattr(task, field.name)
        if field.name not in ("base_digest", "privacy_unit"):
            # Half of a probability is one, and no batch is whole.
            changed = f"{value}0" if isinstance(value, str) else value / 2 if isinstance(value, float) else 2 * value
            if field.name == "noise_at":
                # Named, it is the same place in another task.
                changed = task.noise_place
            changes: dict[str, Any] = {field.name: changed or 1}
            yield field.name, replace(task, **changes)


# --- rounds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Round:
    """A round of whole clients: its task, and the sum, alike in all of its numbers, that is protected."""

    scope: Scope
    task: TrainTask
    each: float = 0.0
    within: int = 20

    def numbers(self, key: bytes) -> Numbers:
        """Noise [1, D] of the sum, and the noised share of adaptive clipping, [1, 1]."""
        clip = {"count_noise_multiplier": 2 * self.scope.noise_multiplier}
        with tempfile.TemporaryDirectory() as home:
            settings = run_settings(Path(home), self.scope, privacy={"adaptive_clip": clip})
            write_key(settings.home, key)
            with Store.open(settings.home) as store, released_rounds() as releases:
                folding = Folding(settings, store, expected=40.0)
                sums = {"point": np.full(_PIXELS, self.each)}
                facts = folding.fold(self.task, sums, clients=40, within=self.within).facts[FACTS]
        return {"noise": _noise(releases, self.task), "noise of the count": np.array([[facts["noised_share"]]])}

    def variants(self) -> Iterator[tuple[str, _Round]]:
        """Other inputs and other sums, by what is changed."""
        for name, task in _changed_tasks(self.task):
            yield name, replace(self, task=task)
        yield "the weights", replace(self, task=replace(self.task, base_digest="other"))
        yield "the sum", replace(self, each=1e-3)
        yield "the count", replace(self, within=21)


def _cohort_numbers(scope: Scope, key: bytes) -> Numbers:
    """Who took part in the rounds of real runs, [rounds, clients]."""
    uniform, poisson = ({"selection": name, **more} for name, more in _SELECTIONS.items())
    numbers = {}
    for use, unit, cohort in (("uniform cohorts", "record", uniform), ("Poisson cohorts", "client", poisson)):
        with tempfile.TemporaryDirectory() as home:
            write_key(Path(home), key)
            settings = run_settings(Path(home), scope, unit=unit, rounds=_ROUNDS, cohort=cohort)
            with AuditRun(settings, zero_updates(_CLIENTS)) as run:
                records = run.store.rounds.of_run(run.run().run_id)
        numbers[use] = np.array([np.isin(list(run.updates), record.cohort) - 0.5 for record in records])
    return numbers


@dataclass(frozen=True, slots=True)
class _Cohorts:
    """The public inputs of cohorts."""

    run_id: str = "run-0001"
    first: int = 1

    def numbers(self, key: bytes) -> Numbers:
        """Who is drawn, [rounds, clients]."""
        ids, numbers = list(zero_updates(_CLIENTS)), {}
        for selection, more in _SELECTIONS.items():
            config = CohortConfig.model_validate({"selection": selection, **more})
            rounds = range(self.first, self.first + _ROUNDS)
            drawn = [draw_cohort(config, ids, run_id=self.run_id, round_index=index, secret=key) for index in rounds]
            numbers[f"{selection} cohorts"] = np.array([np.isin(ids, cohort.client_ids) - 0.5 for cohort in drawn])
        return numbers

    def variants(self) -> Iterator[tuple[str, _Cohorts]]:
        """Other inputs, by what is changed."""
        yield "the run", replace(self, run_id="run-0002")
        yield "the round", replace(self, first=2)


# --- histograms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Histogram:
    """The inputs of a client's histogram."""

    host: _Host
    request: HistogramRequest
    client_id: str = "car"

    @classmethod
    def of(cls, scope: Scope) -> _Histogram:
        request = HistogramRequest("audit", 1, scope.histogram_noise_multiplier, "record", fine_spec())
        return cls(_Host(scope, Pictures.of(random_images(_RECORDS), _LABELS)), request)

    def numbers(self, key: bytes) -> Numbers:
        """The noise, [1, D]."""
        with tempfile.TemporaryDirectory() as home:
            host = self.host.open(Path(home), key)
            with histograms_without_noise():
                (bounded,) = host.histograms(self.request, [self.client_id])
            (noised,) = host.histograms(self.request, [self.client_id])
        noise = np.subtract(noised.counts, bounded.counts, dtype=np.float64)
        return {"noise": noise[None] / self.request.deviation}

    def variants(self) -> Iterator[tuple[str, _Histogram]]:
        """Other inputs, by what is changed."""
        request = self.request
        for name, host in self.host.variants():
            yield name, replace(self, host=host)
        yield "the context", replace(self, request=replace(request, context_digest="other"))
        yield "the run", replace(self, request=replace(request, run_id="other"))
        yield "the round", replace(self, request=replace(request, round_index=2))
        yield "the noise", replace(self, request=replace(request, noise_multiplier=2 * request.noise_multiplier))
        yield "the unit", replace(self, request=replace(request, privacy_unit="client"))
        spec = request.spec
        edges = {name: tuple(1.001 * edge for edge in edges) for name, edges in spec.edges.items()}
        yield "the edges", replace(self, request=replace(request, spec=replace(spec, edges=edges)))
        votes = tuple(-vote for vote in spec.risk_votes)
        yield "the votes", replace(self, request=replace(request, spec=replace(spec, risk_votes=votes)))
        yield "the client", replace(self, client_id="bus")

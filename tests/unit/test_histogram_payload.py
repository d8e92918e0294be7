"""What a histogram may tell: bounded counts of a fixed length, moved by one record within the sensitivity."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedvit.data.sources import open_source
from fedvit.drift.client import HistogramClient
from fedvit.drift.measures import (
    PROJECTIONS,
    ClientRecords,
    Counts,
    embeddings_of,
    filtered,
    measures,
    noised_histogram,
    spec_of,
    votes,
)
from fedvit.errors import DataError, UpdateRejectedError
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Gaussian
from fedvit.settings import load_settings
from fedvit.types import ImageArray
from fedvit.wire.histograms import (
    CELL_LIMIT,
    CLIENT_VOTES,
    MAX_CELLS,
    RECORDS,
    RISK,
    RISK_VOTES,
    HistogramRequest,
    HistogramSpec,
    checked_counts,
)

SECRET = bytes(range(32))
SIDE, CLASSES = 16, 3


def pictures(count: int, seed: int = 0, *, brightness: float = 1.0) -> ImageArray:
    draw = np.random.default_rng(seed)
    smooth = draw.uniform(40, 200, (count, 1, 1, 3)) + draw.normal(0, 25, (count, SIDE, SIDE, 3))
    return np.clip(brightness * smooth, 0, 255).astype(np.uint8)


def client_records(images: ImageArray, labels: list[int] | None = None, undecodable: int = 0) -> ClientRecords:
    payload = labels if labels is not None else [i % CLASSES for i in range(len(images) + undecodable)]
    return ClientRecords(images, filtered(images), np.array(payload, dtype=np.int64))


HELD_OUT = pictures(400, 99)
SPEC = replace(spec_of(HELD_OUT, filtered(HELD_OUT), CLASSES), risk_votes=(-RISK_VOTES, 1, RISK_VOTES))


def by_histogram(counts: Counts, spec: HistogramSpec) -> dict[str, Counts]:
    return {name: counts[part] for name, part in spec.slices.items()}


def request(noise_multiplier: float = 4.0, unit: str = "record", round_index: int = 1) -> HistogramRequest:
    return HistogramRequest("run-0001", round_index, noise_multiplier, unit, SPEC)


def test_every_record_is_counted_once_in_each_histogram() -> None:
    counts = client_records(pictures(30)).counts(SPEC)
    parts = dict(by_histogram(counts, SPEC))
    # Ten of each class.
    assert int(parts.pop(RISK)[0]) == 10 * sum(SPEC.risk_votes)
    assert len(parts) == 4 + PROJECTIONS + 2
    assert {int(part.sum()) for part in parts.values()} == {30}
    assert all((part >= 0).all() for part in parts.values())


def test_a_class_votes_for_the_risk_as_the_model_does_on_it() -> None:
    confusion = [[10, 0, 0, 0], [0, 3, 1, 0], [0, 4, 0, 4], [0, 0, 0, 0]]
    votes_of = HistogramSpec({}, 4).with_risks(confusion).risk_votes
    assert votes_of == (-RISK_VOTES, -2, RISK_VOTES, 0)
    assert HistogramSpec({}, 4, votes_of).risk({0: 5, 1: 1, 2: 2}) == -5 * RISK_VOTES - 2 + 2 * RISK_VOTES
    # Another model's classes say nothing of these.
    assert HistogramSpec({}, 3, (1, 1, 1)).with_risks(confusion).risk_votes == ()
    assert HistogramSpec({}, 3).risk({0: 100}) == 0


def test_duplicates_and_broken_records_are_told_apart_and_counted_once() -> None:
    images = pictures(6)
    twice = np.concatenate([images, images[:2]])
    parts = by_histogram(client_records(twice, undecodable=3).counts(SPEC), SPEC)
    assert parts[RECORDS].tolist() == [6, 2, 3]
    assert (parts["brightness"].sum(), parts["label"].sum()) == (8, 11)
    assert by_histogram(client_records(images[:0], undecodable=2).counts(SPEC), SPEC)[RECORDS].tolist() == [0, 0, 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["new", "duplicate", "undecodable", "extreme"])
def test_one_record_more_moves_the_counts_by_the_sensitivity_at_most(kind: str, seed: int) -> None:
    images = pictures(20, seed)
    other = {"new": pictures(1, 1000 + seed), "duplicate": images[:1], "extreme": np.full((1, SIDE, SIDE, 3), 255)}
    before = client_records(images, [0] * 20).counts(SPEC)
    if kind == "undecodable":
        after = client_records(images, [0] * 20 + [2]).counts(SPEC)
    else:
        after = client_records(np.concatenate([images, other[kind].astype(np.uint8)]), [0] * 20 + [2]).counts(SPEC)
    moved = float(np.linalg.norm(after - before))
    assert 0 < moved <= SPEC.sensitivity("record") + 1e-12
    if kind == "new":
        assert moved == pytest.approx(SPEC.sensitivity("record"))


def test_one_client_moves_the_counts_by_its_votes_however_much_it_holds() -> None:
    for count in (3, 64, 1000):
        for label in range(CLASSES):
            scaled = votes(client_records(pictures(count), [label] * count).counts(SPEC), SPEC)
            parts = dict(by_histogram(scaled, SPEC))
            assert abs(int(parts.pop(RISK)[0])) <= CLIENT_VOTES * RISK_VOTES
            assert max(int(part.sum()) for part in parts.values()) <= CLIENT_VOTES
            assert float(np.linalg.norm(scaled)) <= SPEC.sensitivity("client") + 1e-12
    assert SPEC.sensitivity("client") == CLIENT_VOTES * SPEC.sensitivity("record")


def test_the_noise_is_as_large_as_it_is_charged() -> None:
    counts = client_records(pictures(50)).counts(SPEC)
    drawn = [
        np.array(noised_histogram(request(round_index=i), "vehicle", counts, 50, SECRET).counts) - counts
        for i in range(1, 201)
    ]
    deviation = float(np.std(drawn))
    assert request().deviation == 4.0 * math.sqrt(12 + RISK_VOTES**2)
    assert deviation == pytest.approx(request().deviation, rel=0.03)
    # Independent from count to count: nothing of it averages out within one histogram.
    correlated = np.corrcoef(np.array(drawn).T) - np.eye(len(counts))
    assert float(np.abs(correlated).max()) < 0.35
    assert epsilon_pld({Gaussian(8.0): 1}, 1e-5) < 0.55


def test_a_record_is_measured_once_and_votes_by_what_the_model_errs_in_now(images: Path) -> None:
    data = load_settings(environ={}, overrides={"data": {"source": "folder", "path": images, "image_size": 16}}).data
    source, blind = open_source(data), SimpleNamespace(prefix=torch.nn.Identity())
    few = HistogramClient(blind, source, 16, lambda _: source.train[:30], SECRET)  # type: ignore[arg-type]
    by_class = [sum(record.label == c for record in source.train[:30]) for c in (0, 1)]
    for votes_of in ((4, -4), (-4, 4)):
        spec = replace(SPEC, classes=2, risk_votes=votes_of)
        counts = few.histogram(HistogramRequest("run-0001", 1, 1e-9, "record", spec), "vehicle").counts
        assert counts[-1] == by_class[0] * votes_of[0] + by_class[1] * votes_of[1] != 0
        assert sum(counts[spec.slices[RECORDS]]) == 30


def test_a_retry_repeats_the_histogram_and_nothing_else_does() -> None:
    counts = client_records(pictures(50)).counts(SPEC)
    first = noised_histogram(request(), "vehicle", counts, 50, SECRET)
    assert noised_histogram(request(), "vehicle", counts, 50, SECRET) == first
    others = [
        noised_histogram(request(round_index=2), "vehicle", counts, 50, SECRET),
        noised_histogram(request(), "another", counts, 50, SECRET),
        noised_histogram(request(), "vehicle", counts, 51, SECRET),
        noised_histogram(request(), "vehicle", counts, 50, SECRET[::-1]),
        noised_histogram(replace(request(), run_id="run-0002"), "vehicle", counts, 50, SECRET),
    ]
    assert len({histogram.counts for histogram in (first, *others)}) == 6


def test_nothing_of_an_image_or_an_embedding_can_be_read_from_a_payload() -> None:
    """Integers only, of a length and a size that hang on no record, and too few of them for any picture."""
    images = pictures(40)
    one, other = (
        noised_histogram(request(), "vehicle", client_records(i).counts(SPEC), len(i), SECRET)
        for i in (images, images[:1])
    )
    assert len(one.counts) == len(other.counts) == SPEC.cells
    assert all(type(count) is int and abs(count) <= CELL_LIMIT for count in one.counts)
    payload = asdict(one)
    assert set(payload) == {"client_id", "run_id", "round_index", "num_examples", "spec_digest", "deviation", "counts"}
    largest = 4 * MAX_CELLS
    assert 4 * SPEC.cells <= largest < 64 * 64 * 3
    # A grid of numbers, or an embedding, among the counts would be a number that counts do not reach by records.
    clean = client_records(images).counts(SPEC)
    assert int(np.abs(clean).max()) <= RISK_VOTES * len(images)
    # What the counts are made of is thrown away: other pictures of the same bins give the very same counts.
    turned = client_records(images[:, ::-1])
    same_statistics = by_histogram(turned.counts(SPEC), SPEC)
    for name in ("brightness", "contrast", "blur", "entropy", "label", RECORDS):
        assert same_statistics[name].tolist() == by_histogram(clean, SPEC)[name].tolist()


@pytest.mark.parametrize(
    "counts",
    [
        [0] * (SPEC.cells - 1),
        [0] * (SPEC.cells + 1),
        [0.5] * SPEC.cells,
        [True] * SPEC.cells,
        ["0"] * SPEC.cells,
        [CELL_LIMIT + 1] + [0] * (SPEC.cells - 1),
    ],
)
def test_what_is_no_histogram_is_refused(counts: list[object]) -> None:
    with pytest.raises(UpdateRejectedError):
        checked_counts(SPEC, counts)
    assert checked_counts(SPEC, [-3] * SPEC.cells) == (-3,) * SPEC.cells


def test_a_spec_survives_json_and_has_no_more_bins_than_may_be_sent() -> None:
    assert HistogramSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    assert HistogramRequest.from_json(json.loads(json.dumps(request().to_json()))) == request()
    assert HistogramSpec({}, 10_000).cells < MAX_CELLS
    bad: list[dict[str, object]] = [{}, {"edges": {"a": [2.0, 1.0]}, "classes": 3}]
    bad += [
        {"edges": {"a": [math.nan]}, "classes": 3},
        {"edges": {"a": list(range(MAX_CELLS))}, "classes": 3},
        {"edges": {}, "classes": 0},
    ]
    for result in [{"risk_votes": [], **each} for each in bad]:
        with pytest.raises(UpdateRejectedError):
            HistogramSpec.from_json(result)
    for votes_of in ([], [RISK_VOTES, 0, -RISK_VOTES]):
        HistogramSpec.from_json({"edges": {}, "classes": 3, "risk_votes": votes_of})
    # Whoever gave a class more weight than the noise is for would read more of it than is charged.
    for votes_of in ([0, 0], [0, 0, RISK_VOTES + 1], [0, 0, -RISK_VOTES - 1], [0, 0, "x"]):
        with pytest.raises(UpdateRejectedError):
            HistogramSpec.from_json({"edges": {}, "classes": 3, "risk_votes": votes_of})
    with pytest.raises(DataError):
        noised_histogram(request(), "vehicle", np.zeros(3, dtype=np.int64), 1, SECRET)


def test_labels_beyond_the_bins_share_them() -> None:
    spec = HistogramSpec({}, 1000)
    counts = ClientRecords(pictures(4), filtered(pictures(4)), np.array([0, 3, 4, 999])).counts(spec)
    label = by_histogram(counts, spec)["label"]
    assert (label[0], label[1], label[255], int(label.sum())) == (2, 1, 1, 4)


def test_each_statistic_moves_with_what_it_is_named_for() -> None:
    images = pictures(60)
    plain = measures(images, filtered(images))
    dark = measures(pictures(60, brightness=0.5), filtered(images))
    flat = measures((images // 4 + 96).astype(np.uint8), filtered(images))
    soft = images.astype(np.float64)
    soft[:, 1:-1, 1:-1] = (soft[:, :-2, 1:-1] + soft[:, 2:, 1:-1] + soft[:, 1:-1, :-2] + soft[:, 1:-1, 2:]) / 4
    blurred = measures(soft.astype(np.uint8), filtered(images))
    assert float(dark["brightness"].mean()) < 0.6 * float(plain["brightness"].mean())
    assert float(flat["contrast"].mean()) < 0.5 * float(plain["contrast"].mean())
    assert float(flat["entropy"].mean()) < float(plain["entropy"].mean())
    assert float(blurred["blur"].mean()) < float(plain["blur"].mean()) - 0.1


def test_embeddings_are_unit_vectors_whatever_the_stem_gives() -> None:
    draw = np.random.default_rng(3)
    for features in (draw.normal(size=(5, 40)), draw.normal(size=(5, 40, 4, 4)), np.zeros((2, 40))):
        lengths = np.linalg.norm(embeddings_of(features), axis=1)
        assert lengths == pytest.approx([1.0 if features.any() else 0.0] * len(features))
    assert filtered(pictures(0)).shape == (0, 16)

"""Check of histograms: one record, or one client, changes the counts by the sensitivity at most; noise as charged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedvit.drift.client import HistogramClient
from fedvit.tools.audit import subjects
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, Vector, histograms_without_noise
from fedvit.tools.audit.pictures import Pictures, random_images
from fedvit.tools.audit.randomness import noise_faults
from fedvit.tools.audit.records import ROUNDING
from fedvit.tools.audit.runs import FIXED_KEY
from fedvit.wire.histograms import HistogramRequest, HistogramSpec

CHECK = "histograms"
_RECORDS, _MANY, _ROUNDS = 10, 200, 3
_VOTES = (-4, 4, 4)
_RANGES = {"brightness": (0, 255), "contrast": (0, 128), "blur": (0, 5), "entropy": (0, 5)}
_RANGES |= {f"embedding_{i}": (-3, 3) for i in range(6)}


def fine_spec() -> HistogramSpec:
    """A specification with many bins, so that the noise of one histogram shows its deviation."""
    edges = {name: tuple(np.linspace(low, high, 90).tolist()) for name, (low, high) in _RANGES.items()}
    return HistogramSpec(edges, subjects.CLASSES, _VOTES)


def histogram_client(pictures: Pictures, key: bytes = FIXED_KEY) -> HistogramClient:
    """The real client with these records and a model without a frozen stem."""
    return HistogramClient(subjects.linear_model(6), pictures, subjects.IMAGE_SIZE, pictures.records, key)


def counts_of(request: HistogramRequest, pictures: Pictures, client_id: str = "car", key: bytes = FIXED_KEY) -> Vector:
    """The counts that a client releases."""
    return np.array(histogram_client(pictures, key).histogram(request, client_id).counts, np.float64)


def check(scope: Scope) -> Iterator[Finding]:
    """The counts of neighbours without noise, and the noise of several rounds and clients."""
    for unit, moves in (("record", _record_moves), ("client", _client_moves)):
        request = HistogramRequest("audit", 1, scope.histogram_noise_multiplier, unit, fine_spec())
        with histograms_without_noise():
            moved = max(moves(request)) / request.spec.sensitivity(unit)
        faults = [] if moved <= 1 + ROUNDING else [f"a {unit} moves the counts by {moved:.4f} of the sensitivity"]
        if moved < 0.9:
            faults.append(f"no {unit} moves the counts by more than {moved:.3g} sensitivities; nothing is shown")
        yield Finding.of(
            CHECK, f"with and without a {unit}", faults, f"moves by {moved:.4f} of the sensitivity at most"
        )
        releases = _releases(scope, unit)
        faults = list(noise_faults(releases, scope.histogram_noise_multiplier * request.spec.sensitivity(unit)))
        detail = f"{len(releases)} times {request.spec.cells} numbers, of the charged deviation, unrelated"
        yield Finding.of(CHECK, f"noise, unit {unit}", faults, detail)


def _record_moves(request: HistogramRequest) -> Iterator[float]:
    """With and without each record: ordinary ones, a duplicate, and one that cannot be decoded."""
    images = random_images(_RECORDS)
    images[3] = images[0]
    pictures = Pictures.of(images, [i % subjects.CLASSES for i in range(_RECORDS)]).damaged(5)
    whole = counts_of(request, pictures)
    for index in range(_RECORDS):
        yield float(np.linalg.norm(whole - counts_of(request, pictures.without(index))))


def _client_moves(request: HistogramRequest) -> Iterator[float]:
    """Clients with many records, which are all alike, and all different."""
    alike = np.repeat(random_images(1), _MANY, axis=0)
    for images in (alike, random_images(_MANY)):
        yield float(np.linalg.norm(counts_of(request, Pictures.of(images, [1] * _MANY))))


def _releases(scope: Scope, unit: str) -> list[Release]:
    pictures = Pictures.of(random_images(_RECORDS), [i % subjects.CLASSES for i in range(_RECORDS)])
    releases = []
    for index, client_id in [*((index, "car") for index in range(1, _ROUNDS + 1)), (1, "bus")]:
        request = HistogramRequest("audit", index, scope.histogram_noise_multiplier, unit, fine_spec())
        with histograms_without_noise():
            bounded = counts_of(request, pictures, client_id)
        releases.append(Release(bounded, counts_of(request, pictures, client_id) - bounded, 1.0))
    return releases

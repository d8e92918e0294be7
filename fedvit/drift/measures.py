"""Image features of a client, and its bounded and noised histogram counts.

Every record is counted once in each histogram, so adding or removing one changes one count of each by 1. The noise is
Gaussian, rounded to integers (post-processing, which costs nothing), from the client's own secret stream for this
output and these records: a retry repeats it, and no other output has the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedvit.errors import DataError
from fedvit.privacy.randomness import SecretStream
from fedvit.types import ImageArray, LabelArray
from fedvit.wire.histograms import (
    CELL_LIMIT,
    CLIENT_VOTES,
    LABEL,
    RECORDS,
    RISK,
    ClientHistogram,
    HistogramRequest,
    HistogramSpec,
)

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BINS = 8
PROJECTIONS = 6
_PUBLIC_SEED = 20240607
_LUMA = np.array([0.299, 0.587, 0.114])
_GREYS = 32
_PATCH, _FILTERS = 4, 16
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class ClientRecords:
    """A client's records as histograms count them.

    Args:
        images: the N records that can be decoded, uint8 [N, S, S, 3].
        embeddings: [N, D]; see :func:`embeddings_of`.
        labels: of all M records, those that cannot be decoded last.
    """

    images: ImageArray
    embeddings: Floats
    labels: LabelArray

    def counts(self, spec: HistogramSpec) -> Counts:
        """Records in each bin, without noise: never leaves the client."""
        measured = measures(self.images, self.embeddings)
        parts = {name: _histogram(measured[name], edges) for name, edges in spec.edges.items()}
        bins = spec.sizes[LABEL]
        parts[LABEL] = np.bincount(self.labels * bins // spec.classes, minlength=bins)
        distinct = len({hashlib.sha256(image.tobytes()).digest() for image in self.images})
        total, sound = len(self.labels), len(self.images)
        parts[RECORDS] = np.array([distinct, sound - distinct, total - sound])
        parts[RISK] = np.array([risk_of(self.labels, spec)])
        return np.concatenate([parts[name] for name in spec.sizes]).astype(np.int64)


def risk_of(labels: LabelArray, spec: HistogramSpec) -> int:
    """Risk of records with these classes [N]; see :class:`HistogramSpec`."""
    return spec.risk({int(c): int(n) for c, n in zip(*np.unique(labels, return_counts=True), strict=True)})


def spec_of(images: ImageArray, embeddings: Floats, classes: int) -> HistogramSpec:
    """Spec whose bins hold equally many of the server's held-out images, so no edge depends on a client's data."""
    quantiles = np.arange(1, BINS) / BINS
    edges = {
        # Equal edges are merged: a bin between them would always be empty.
        name: tuple(sorted({round(float(edge), 6) for edge in np.quantile(values, quantiles)}))
        for name, values in measures(images, embeddings).items()
    }
    return HistogramSpec(edges, classes)


def measures(images: ImageArray, embeddings: Floats) -> dict[str, Floats]:
    """Features by name, [N] each: statistics of grey values, and projections of the embedding.

    ``blur`` is the logarithm of the variance of the Laplacian (Pech-Pacheco et al. 2000); low means blurred.
    """
    batches: dict[str, list[Floats]] = {name: [] for name in ("brightness", "contrast", "blur", "entropy")}
    for start in range(0, len(images), _AT_ONCE):
        grey = images[start : start + _AT_ONCE] @ _LUMA
        batches["brightness"].append(grey.mean(axis=(1, 2)))
        batches["contrast"].append(grey.std(axis=(1, 2)))
        batches["blur"].append(np.log10(1 + _laplacian(grey).var(axis=(1, 2))))
        batches["entropy"].append(_entropy(grey))
    statistics = {name: np.concatenate([*parts, np.empty(0)]) for name, parts in batches.items()}
    projected = embeddings @ _projections(embeddings.shape[1])
    return {**statistics, **{f"embedding_{i}": projected[:, i] for i in range(PROJECTIONS)}}


def embeddings_of(features: npt.NDArray[np.floating]) -> Floats:
    """Unit vectors [N, D] of a frozen stem's features [N, D] or [N, D, H, W], averaged over places."""
    places = tuple(range(2, features.ndim))
    pooled = features.mean(axis=places, dtype=np.float64) if places else features.astype(np.float64)
    return _unit(pooled - pooled.mean(axis=1, keepdims=True))


def filtered(images: ImageArray) -> Floats:
    """Unit vectors [N, 16] of images uint8 [N, S, S, 3] by a fixed public filter bank; for models without stem."""
    side = images.shape[1] // _PATCH * _PATCH
    bank = np.linalg.qr(np.random.default_rng(_PUBLIC_SEED).standard_normal((_PATCH * _PATCH * 3, _FILTERS)))[0]
    cut = images[:, :side, :side].reshape(len(images), side // _PATCH, _PATCH, side // _PATCH, _PATCH, 3)
    patches = cut.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), (side // _PATCH) ** 2, len(bank)) / 255.0
    return _unit(np.abs((patches - patches.mean(axis=2, keepdims=True)) @ bank).mean(axis=1))


def noised_histogram(
    request: HistogramRequest, client_id: str, counts: Counts, num_examples: int, secret: bytes
) -> ClientHistogram:
    """Bound the counts and add noise; see :class:`fedvit.wire.histograms.HistogramRequest`.

    Args:
        secret: the client's key for these records.

    Raises:
        DataError: the number of counts is not that of the request.
    """
    spec = request.spec
    if len(counts) != spec.cells:
        raise DataError(f"{len(counts)} counts were made for a histogram of {spec.cells}.")
    by_record = request.privacy_unit == "record"
    bounded = counts if by_record else votes(counts, spec)
    # The label "release" determines the noise: changing it would change that of a retry.
    stream = SecretStream(secret, "histogram", {"release": request.output_id(client_id, num_examples)})
    noised = np.rint(bounded + request.deviation * stream.normal(len(counts))).astype(np.int64)
    noised_counts = tuple(int(count) for count in np.clip(noised, -CELL_LIMIT, CELL_LIMIT))
    size = num_examples if by_record else min(num_examples, CLIENT_VOTES)
    place = (request.run_id, request.round_index, size, spec.digest, request.deviation)
    return ClientHistogram(client_id, *place, noised_counts)


def votes(counts: Counts, spec: HistogramSpec) -> Counts:
    """Each histogram scaled to at most :data:`CLIENT_VOTES` records, rounded down, to bound its influence."""
    scaled = np.zeros_like(counts)
    for name, part in spec.slices.items():
        total = int(counts[spec.slices[LABEL] if name == RISK else part].sum())
        scaled[part] = counts[part] * CLIENT_VOTES // max(total, CLIENT_VOTES)
    return scaled


def _histogram(values: Floats, edges: Sequence[float]) -> Counts:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def _laplacian(grey: Floats) -> Floats:
    inner = -4 * grey[:, 1:-1, 1:-1]
    return inner + grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]


def _entropy(grey: Floats) -> Floats:
    """Entropy in bits, over 32 grey levels."""
    levels = np.minimum(grey * (_GREYS / 256), _GREYS - 1).astype(np.int64).reshape(len(grey), -1)
    offsets = np.arange(len(grey))[:, None] * _GREYS
    counts = np.bincount((levels + offsets).ravel(), minlength=_GREYS * len(grey)).reshape(len(grey), _GREYS)
    shares = counts / levels.shape[1]
    return np.asarray(-np.sum(shares * np.log2(np.where(shares > 0, shares, 1.0)), axis=1))


def _projections(width: int) -> Floats:
    """Fixed public projection [D, P]."""
    return np.random.default_rng(_PUBLIC_SEED).standard_normal((width, PROJECTIONS))


def _unit(vectors: Floats) -> Floats:
    lengths: Floats = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors / lengths, dtype=np.float64)

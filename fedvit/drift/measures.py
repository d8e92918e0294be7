"""The client's half of a histogram: what is measured of each image, and how the counts are bounded and noised.

Every record is counted once in each histogram, so that its coming or going moves one count of each by 1. Noise is a
Gaussian rounded to whole numbers (rounding what is noised already costs nothing) from the client's own secret stream,
bound to the very release and data: a retry repeats it, nothing else ever meets it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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
class Holding:
    """What a client holds, as a histogram counts it.

    Args:
        images: the N records that can be decoded, uint8 [N, S, S, 3].
        embeddings: of each of them, [N, D]; see :func:`embeddings_of`.
        labels: of all M records, those last that cannot be decoded.
    """

    images: ImageArray
    embeddings: Floats
    labels: LabelArray

    def counts(self, spec: HistogramSpec) -> Counts:
        """How many records fall into each bin, without any noise: for the client's own eyes."""
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
    """What records of these classes [N] come to in the risk; see :class:`HistogramSpec`."""
    return spec.risk({int(c): int(n) for c, n in zip(*np.unique(labels, return_counts=True), strict=True)})


def spec_of(images: ImageArray, embeddings: Floats, classes: int) -> HistogramSpec:
    """Histograms into whose bins the server's own held-out images fall equally often: no client's data sets an edge."""
    quantiles = np.arange(1, BINS) / BINS
    edges = {
        # Equal edges are one: a bin between them would stay empty for ever.
        name: tuple(sorted({round(float(edge), 6) for edge in np.quantile(values, quantiles)}))
        for name, values in measures(images, embeddings).items()
    }
    return HistogramSpec(edges, classes)


def measures(images: ImageArray, embeddings: Floats) -> dict[str, Floats]:
    """By feature, one number an image: statistics of its grey values, and projections of its embedding.

    ``blur`` is the logarithm of the variance of the Laplacian (Pech-Pacheco et al. 2000); low means blurred.
    """
    found: dict[str, list[Floats]] = {name: [] for name in ("brightness", "contrast", "blur", "entropy")}
    for start in range(0, len(images), _AT_ONCE):
        grey = images[start : start + _AT_ONCE] @ _LUMA
        found["brightness"].append(grey.mean(axis=(1, 2)))
        found["contrast"].append(grey.std(axis=(1, 2)))
        found["blur"].append(np.log10(1 + _laplacian(grey).var(axis=(1, 2))))
        found["entropy"].append(_entropy(grey))
    statistics = {name: np.concatenate([*parts, np.empty(0)]) for name, parts in found.items()}
    projected = embeddings @ _projections(embeddings.shape[1])
    return {**statistics, **{f"embedding_{i}": projected[:, i] for i in range(PROJECTIONS)}}


def embeddings_of(features: npt.NDArray[np.floating]) -> Floats:
    """Unit vectors [N, D] of a frozen stem's features [N, D] or [N, D, H, W]: the mean over places."""
    places = tuple(range(2, features.ndim))
    pooled = features.mean(axis=places, dtype=np.float64) if places else features.astype(np.float64)
    return _unit(pooled - pooled.mean(axis=1, keepdims=True))


def filtered(images: ImageArray) -> Floats:
    """Unit vectors [N, 16] of images uint8 [N, S, S, 3] by a fixed public bank of filters, where no stem is frozen."""
    side = images.shape[1] // _PATCH * _PATCH
    bank = np.linalg.qr(np.random.default_rng(_PUBLIC_SEED).standard_normal((_PATCH * _PATCH * 3, _FILTERS)))[0]
    cut = images[:, :side, :side].reshape(len(images), side // _PATCH, _PATCH, side // _PATCH, _PATCH, 3)
    patches = cut.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), (side // _PATCH) ** 2, len(bank)) / 255.0
    return _unit(np.abs((patches - patches.mean(axis=2, keepdims=True)) @ bank).mean(axis=1))


def sketched(
    order: HistogramRequest, client_id: str, counts: Counts, num_examples: int, secret: bytes
) -> ClientHistogram:
    """Bound the counts, add the noise, and make the message; see :class:`fedvit.wire.histograms.HistogramRequest`.

    Args:
        secret: the client's key for these very records.

    Raises:
        DataError: the counts are not those of the order.
    """
    if len(counts) != order.spec.cells:
        raise DataError(f"{len(counts)} counts were made for a histogram of {order.spec.cells}.")
    bounded = counts if order.privacy_unit == "record" else votes(counts, order.spec)
    stream = SecretStream(secret, "histogram", {"release": order.output_id(client_id, num_examples)})
    noised = np.rint(bounded + order.deviation * stream.normal(len(counts))).astype(np.int64)
    told = tuple(int(count) for count in np.clip(noised, -CELL_LIMIT, CELL_LIMIT))
    size = num_examples if order.privacy_unit == "record" else min(num_examples, CLIENT_VOTES)
    place = (order.run_id, order.round_index, size, order.spec.digest, order.deviation)
    return ClientHistogram(client_id, *place, told)


def votes(counts: Counts, spec: HistogramSpec) -> Counts:
    """Each histogram scaled to :data:`CLIENT_VOTES` records at most, rounded down: no client moves one by more."""
    scaled = np.zeros_like(counts)
    for name, part in spec.slices.items():
        total = int(counts[spec.slices[LABEL] if name == RISK else part].sum())
        scaled[part] = counts[part] * CLIENT_VOTES // max(total, CLIENT_VOTES)
    return scaled


def by_histogram(counts: Sequence[int] | Counts, spec: HistogramSpec) -> Mapping[str, Counts]:
    """The counts of each histogram, by its name."""
    whole = np.asarray(counts, dtype=np.int64)
    return {name: whole[part] for name, part in spec.slices.items()}


def _histogram(values: Floats, edges: Sequence[float]) -> Counts:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def _laplacian(grey: Floats) -> Floats:
    inner = -4 * grey[:, 1:-1, 1:-1]
    return inner + grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]


def _entropy(grey: Floats) -> Floats:
    """In bits, over 32 levels of grey."""
    levels = np.minimum(grey * (_GREYS / 256), _GREYS - 1).astype(np.int64).reshape(len(grey), -1)
    offsets = np.arange(len(grey))[:, None] * _GREYS
    counts = np.bincount((levels + offsets).ravel(), minlength=_GREYS * len(grey)).reshape(len(grey), _GREYS)
    shares = counts / levels.shape[1]
    bits: Floats = -np.sum(shares * np.log2(np.where(shares > 0, shares, 1.0)), axis=1)
    return bits


def _projections(width: int) -> Floats:
    """[D, P], the same everywhere."""
    return np.random.default_rng(_PUBLIC_SEED).standard_normal((width, PROJECTIONS))


def _unit(vectors: Floats) -> Floats:
    lengths: Floats = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors / lengths, dtype=np.float64)

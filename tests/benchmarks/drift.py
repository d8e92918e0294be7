"""Drift that comes to part of a fleet, seen through private histograms of real traffic signs.

Run by ``make bench-drift`` on the GTSRB zip that GTSRB_ZIP (or the first argument) names; writes
docs/benchmarks/drift.json, docs/benchmarks/drift_alarms.json and docs/pictures/drift.svg. BENCH_WINDOWS shortens it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq
from torch.nn import functional

from fedvit.atomic_write import write_atomically
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.data.records import load_images
from fedvit.drift.client import embedded
from fedvit.drift.comparison import Comparison, compare
from fedvit.drift.measures import measures, risk_of, spec_of
from fedvit.models.build import build_model
from fedvit.models.vision import FEATURE_BATCH, VisionModel
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.round_cost import histogram_spend, round_noise_multiplier, run_spend
from fedvit.settings import load_settings
from fedvit.tools.report.charts import BLUE, GREEN, ORANGE, PURPLE, svg_of
from fedvit.tools.report.simulation_charts import standalone
from fedvit.types import ImageArray, LabelArray
from fedvit.wire.histograms import LABEL, RECORDS, RISK, ClientHistogram, HistogramRequest, HistogramSpec
from tests.benchmarks.results import write_result
from tests.benchmarks.simulations import PICTURES, example

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS, DRIFTING = 30, 9
REFERENCE = 3
"""How many windows' records a vehicle has gathered when the model is released."""
STATIONARY = int(os.environ.get("BENCH_WINDOWS", "1000"))
WINDOWS = max(20, STATIONARY // 10)
SEVERITIES = (0.1, 0.25, 0.5, 1.0)
DROP = 0.05
EPOCHS, BATCH = 6, 128
TESTED = 1600
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def darker(images: ImageArray, severity: float) -> ImageArray:
    """Less light: at 1 a tenth of it is left."""
    return (images * (1 - 0.9 * severity)).astype(np.uint8)


def foggier(images: ImageArray, severity: float) -> ImageArray:
    """A bright veil: at 1 it hides nine tenths."""
    return (images * (1 - 0.9 * severity) + 0.9 * severity * 220.0).astype(np.uint8)


def blurred(images: ImageArray, severity: float) -> ImageArray:
    """Out of focus: at 1 by a Gaussian of three pixels."""
    return gaussian_filter(images, sigma=(0, 3.0 * severity, 3.0 * severity, 0)).astype(np.uint8)


SHIFTS: Mapping[str, Callable[[ImageArray, float], ImageArray]] = {
    "brightness": darker,
    "fog": foggier,
    "blur": blurred,
}
CLASS_MIX = "class mix"


@dataclass(frozen=True, slots=True)
class Pool:
    """One client's records as rows of bins: which bin of each histogram, [N, H], counted from the first of all."""

    bins: Counts
    labels: LabelArray


class Signs:
    """The data set dealt out by track, a model that was trained on it, and what clients' records look like in bins."""

    def __init__(self, settings: Settings) -> None:
        fleet = VirtualFleet.open(settings.data)
        self.size, self.classes = settings.data.image_size, len(fleet.source.classes)
        self.model = build_model(settings.model, self.classes, self.size)
        self._source, self._fleet = fleet.source, fleet
        self.train = load_images(fleet.source, fleet.source.train, self.size)
        self.labels = np.array([record.label for record in fleet.source.train])
        every = max(1, len(fleet.source.test) // TESTED)
        held_out = fleet.source.test[::every]
        self.test = load_images(fleet.source, held_out, self.size)
        self.test_labels = np.array([record.label for record in held_out])
        self.parts = [np.array(part) for part in fleet.parts.values()]

    @cached_property
    def spec(self) -> HistogramSpec:
        """Edges, and what the model errs in, by the held-out images, as the server makes them."""
        edges = spec_of(self.test[:1000], embedded(self.model, self.test[:1000]), self.classes)
        confusion = np.zeros((self.classes, self.classes), dtype=np.int64)
        np.add.at(confusion, (self.test_labels, answers(self, self.test)), 1)
        return edges.with_risks(confusion.tolist())

    def pool(self, client: int, change: Callable[[ImageArray], ImageArray] | None = None) -> Pool:
        """A client's records as they are, or every other one of them changed."""
        part = self.parts[client] if change is None else self.parts[client][::2]
        images, labels = self.train[part], self.labels[part]
        images = images if change is None else change(images)
        measured, parts = measures(images, embedded(self.model, images)), self.spec.slices
        bins = {name: np.searchsorted(edges, measured[name], side="right") for name, edges in self.spec.edges.items()}
        bins |= {LABEL: labels, RECORDS: np.zeros_like(labels)}
        return Pool(np.stack([parts[name].start + bins[name] for name in bins], axis=1), labels)


def fit(signs: Signs) -> None:
    """Train the body on all clients' images at once: what is measured is drift, not federated training."""
    torch.manual_seed(0)
    features, labels = _features(signs.model, signs.train), torch.from_numpy(signs.labels)
    optimizer = torch.optim.AdamW([p for p in signs.model.body.parameters() if p.requires_grad], lr=2e-3)
    signs.model.train()
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - epoch / EPOCHS)
        for batch in torch.randperm(len(labels)).split(BATCH):
            loss = functional.cross_entropy(signs.model.body(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    signs.model.eval()


def recalls(signs: Signs, images: ImageArray) -> Floats:
    """By class, the share of held-out images that are recognised; NaN where there are none."""
    right, labels = answers(signs, images) == signs.test_labels, signs.test_labels
    return np.array([right[labels == c].mean() if np.any(labels == c) else np.nan for c in range(signs.classes)])


def answers(signs: Signs, images: ImageArray) -> LabelArray:
    """The class that the model takes each image for."""
    with torch.inference_mode():
        features = _features(signs.model, images)
        result = torch.cat([signs.model.body(part).argmax(dim=1) for part in features.split(BATCH)])
    return result.numpy().astype(np.int64)


def accuracy(signs: Signs, by_class: Floats, weights: Floats | None = None) -> float:
    """Of the held-out images; with ``weights``, of so many more or fewer of each class."""
    known = np.flatnonzero(~np.isnan(by_class))
    frequent = np.bincount(signs.test_labels, minlength=signs.classes) * (1.0 if weights is None else weights)
    return float(np.average(by_class[known], weights=frequent[known]))


def tilted(by_class: Floats, tilt: float) -> Floats:
    """How much more frequent each class becomes, the more so the worse the model is at it."""
    return np.exp(tilt * (1 - np.nan_to_num(by_class, nan=1.0)))


class Fleet:
    """Draws windows of histograms: each client's records anew from its own, with the noise that is charged."""

    def __init__(self, signs: Signs, settings: Settings) -> None:
        self.spec, self._draw = signs.spec, np.random.default_rng(0)
        self.pools = [signs.pool(client) for client in range(CLIENTS)]
        self._sizes = {f"vehicle-{i:02d}": len(pool.labels) for i, pool in enumerate(self.pools)}
        self.order = HistogramRequest("run-0001", 1, settings.histograms.noise_multiplier, "record", signs.spec)

    def compared(
        self, moved: Sequence[Pool] = (), weights: Floats | None = None, reference_windows: int = REFERENCE
    ) -> Comparison:
        """A window against its reference; the first clients draw from ``moved``, or by class ``weights``."""
        reference = self._window(1, self.pools, None, reference_windows)
        result = compare(reference, self._window(11, [*moved, *self.pools[len(moved) :]], weights), self.spec)
        assert result is not None
        return result

    def _window(
        self, round_index: int, pools: Sequence[Pool], weights: Floats | None, times: int = 1
    ) -> dict[str, ClientHistogram]:
        names = [f"vehicle-{i:02d}" for i in range(len(pools))]
        results = {}
        for i, (name, pool) in enumerate(zip(names, pools, strict=True)):
            size = times * self._sizes[name]
            results[name] = self._histogram(name, round_index, pool, size, weights if i < DRIFTING else None)
        return results

    def _histogram(self, name: str, round_index: int, pool: Pool, size: int, weights: Floats | None) -> ClientHistogram:
        chances = None if weights is None else weights[pool.labels] / weights[pool.labels].sum()
        rows = self._draw.choice(len(pool.labels), size, p=chances)
        counts = np.bincount(pool.bins[rows].ravel(), minlength=self.spec.cells)
        counts[self.spec.slices[RISK]] = risk_of(pool.labels[rows], self.spec)
        # The mechanism of fedvit.drift.measures with a generator that can be seeded: a benchmark protects nobody.
        noised = np.rint(counts + self._draw.normal(0, self.order.deviation, self.spec.cells))
        results = tuple(int(count) for count in noised)
        return ClientHistogram(name, "run-0001", round_index, size, self.spec.digest, self.order.deviation, results)


@dataclass(frozen=True, slots=True)
class Curve:
    """One kind of shift: accuracy and power by severity, and the severity at which accuracy has fallen by 5 points."""

    accuracies: list[float]
    powers: list[float]
    severity: float
    power: float
    with_short_reference: float
    named: float
    others: float


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(os.cpu_count() or 1)
    settings = example("faulty", data={"partition": {"scheme": "natural", "clients": CLIENTS}})
    signs = Signs(settings)
    fit(signs)
    clean = recalls(signs, signs.test)
    print(f"accuracy {accuracy(signs, clean):.4f}", flush=True)
    fleet = Fleet(signs, settings)
    curves = {}
    for kind, change in SHIFTS.items():
        curves[kind] = _image_curve(signs, fleet, clean, change)
        print(kind, curves[kind], flush=True)
    curves[CLASS_MIX] = _mix_curve(signs, fleet, clean)
    print(CLASS_MIX, curves[CLASS_MIX], flush=True)
    alarms = [fleet.compared() for _ in range(STATIONARY)]
    write_atomically(PICTURES / "drift.svg", standalone(_chart(curves, accuracy(signs, clean))))
    _write(curves, accuracy(signs, clean), alarms, settings)


def _image_curve(signs: Signs, fleet: Fleet, clean: Floats, change: Callable[[ImageArray, float], ImageArray]) -> Curve:
    before = accuracy(signs, clean)
    accuracies = [accuracy(signs, recalls(signs, change(signs.test, severity))) for severity in SEVERITIES]
    severity = _severity_at(before, accuracies)

    def windows(at: float, reference_windows: int = REFERENCE) -> list[Comparison]:
        moved = [signs.pool(client, lambda images: change(images, at)) for client in range(DRIFTING)]
        return [fleet.compared(moved, None, reference_windows) for _ in range(WINDOWS)]

    return _curve(accuracies, severity, windows)


def _mix_curve(signs: Signs, fleet: Fleet, clean: Floats) -> Curve:
    strongest = 12.0

    def at(severity: float) -> float:
        return accuracy(signs, clean, tilted(clean, strongest * severity))

    accuracies = [at(severity) for severity in SEVERITIES]
    # Nothing need be measured for it, so it is exact: between 0 and the lowest severity the curve is far from straight.
    severity = float(brentq(lambda severity: at(severity) - at(0.0) + DROP, 0.0, 1.0))

    def windows(at: float, reference_windows: int = REFERENCE) -> list[Comparison]:
        weights = tilted(clean, strongest * at)
        return [fleet.compared((), weights, reference_windows) for _ in range(WINDOWS)]

    return _curve(accuracies, severity, windows)


def _curve(accuracies: list[float], severity: float, windows: Callable[..., list[Comparison]]) -> Curve:
    powers = [float(np.mean([item.drifting for item in windows(at)])) for at in SEVERITIES]
    there = [item for _ in range(5) for item in windows(severity)]
    moved = {f"vehicle-{i:02d}" for i in range(DRIFTING)}
    named = [len(item.drifting_clients.keys() & moved) / DRIFTING for item in there]
    others = [len(item.drifting_clients.keys() - moved) for item in there]
    power = float(np.mean([item.drifting for item in there]))
    short = float(np.mean([item.drifting for _ in range(2) for item in windows(severity, 1)]))
    return Curve(accuracies, powers, severity, power, short, float(np.mean(named)), float(np.mean(others)))


def _severity_at(before: float, accuracies: Sequence[float]) -> float:
    """Where accuracy has fallen by :data:`DROP`, on straight lines between what was measured."""
    points = [(0.0, before), *zip(SEVERITIES, accuracies, strict=True)]
    for (low, high_accuracy), (high, low_accuracy) in pairwise(points):
        if low_accuracy <= before - DROP:
            return low + (high - low) * (high_accuracy - before + DROP) / (high_accuracy - low_accuracy)
    raise SystemExit("Even the strongest shift costs less than 5 points of accuracy.")


def _features(model: VisionModel, images: ImageArray) -> torch.Tensor:
    return torch.cat([model.features(batch) for batch in torch.from_numpy(images).split(FEATURE_BATCH)])


def _chart(curves: Mapping[str, Curve], before: float) -> str:
    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharex=True)
        for (kind, curve), colour in zip(curves.items(), (ORANGE, PURPLE, BLUE, GREEN), strict=True):
            left.plot([0, *SEVERITIES], [before, *curve.accuracies], color=colour, marker="o", markersize=3)
            right.plot(
                SEVERITIES, curve.powers, color=colour, marker="o", markersize=3, label=kind, gid=f"series-{kind}"
            )
            right.plot([curve.severity], [curve.power], color=colour, marker="*", markersize=11)
            left.plot([curve.severity], [before - DROP], color=colour, marker="*", markersize=11)
        left.axhline(before - DROP, color="grey", linestyle="--", linewidth=1)
        right.axhline(0.95, color="grey", linestyle="--", linewidth=1)
        left.set_ylabel("Accuracy on shifted images")
        right.set_ylabel("Share of windows called drifting")
        for axes in (left, right):
            axes.set_ylim(0, 1.03)
            axes.set_xlabel("Severity (star: accuracy 5 points down)")
        figure.legend(loc="outside upper center", ncols=4)

    return svg_of("drift", "Accuracy and power by severity of the shift", 4.0, draw)


def _write(curves: Mapping[str, Curve], before: float, alarms: Sequence[Comparison], settings: Settings) -> None:
    figures = {
        kind: {
            "severity at -5 points": round(curve.severity, 3),
            "power there": round(curve.power, 3),
            "with a reference of one window": round(curve.with_short_reference, 3),
            "shifted clients named": round(curve.named, 2),
            "others named, of 21": round(curve.others, 3),
        }
        for kind, curve in curves.items()
    }
    power = {"power, the weakest / 0.95 demanded": round(min(c.power for c in curves.values()) / 0.95, 3)}
    write_result(
        "drift",
        title=f"Drift in {DRIFTING} of {CLIENTS} vehicles, detected through private histograms",
        what=_what(before, settings),
        command="make bench-drift",
        figures=figures,
        ratios=power,
    )
    counted = {
        "windows": len(alarms),
        "false alarms": sum(item.drifting for item in alarms),
        "by the fleet": sum(any(shift.drifts for shift in item.fleet.values()) for item in alarms),
        "by a cluster": sum(bool(item.drifting_clusters) for item in alarms),
        "by a client": sum(bool(item.drifting_clients) for item in alarms),
    }
    allowed = {"false alarms / 1 in 100 windows": round(100 * counted["false alarms"] / counted["windows"], 3)}
    write_result(
        "drift_alarms",
        title="False alarms of private histograms in stationary windows of unlike vehicles",
        what="Window and reference are drawn from each vehicle's own images (whole tracks), with new noise.",
        command="make bench-drift",
        figures={"stationary": counted},
        ratios=allowed,
    )
    print(json.dumps({"figures": figures, **power, "alarms": counted}, indent=2), flush=True)


def _what(before: float, settings: Settings) -> str:
    demo = load_settings(environ={}, overrides={})
    delta = demo.privacy.target_delta
    off = demo.model_copy(update={"histograms": demo.histograms.model_copy(update={"every_rounds": None})})
    noise, without = round_noise_multiplier(demo), round_noise_multiplier(off)
    added = epsilon_pld({**run_spend(off), **histogram_spend(demo)}, delta) - epsilon_pld(run_spend(off), delta)
    alone = epsilon_pld(histogram_spend(demo), delta)
    count = sum(histogram_spend(demo).values())
    return (
        "![Accuracy and power by severity](pictures/drift.svg)\n\n"
        f"GTSRB (reduced, 32 pixels) by track. A small ViT with an accuracy of {before:.3f} on held-out images "
        "classifies shifted images: darkened, under a bright veil, blurred, or with a larger share of the classes that "
        "it predicts badly. Power is measured at the severity at which its accuracy is 5 points lower: it is the share "
        "of windows that are reported as drifting. Each window has records drawn anew from every vehicle's own images, "
        f"and new noise of multiplier {settings.histograms.noise_multiplier:g}. The reference has the records of "
        f"{REFERENCE} windows. Ledger: the {count} histograms of the demonstration's 30 rounds add {added:.3f} to its "
        f"epsilon of {demo.privacy.target_epsilon:g} if nothing else changes (alone they cost {alone:.3f}). Kept "
        f"within that epsilon, they raise the noise multiplier of the rounds from {without:g} to {noise:g}."
    )


if __name__ == "__main__":
    main()

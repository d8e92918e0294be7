"""The report page of a run, ``index.html``: data, learning curve, privacy cost, confusion, serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvit.data.manifest import DataManifest
from fedvit.tools.report.charts import latency_chart, learning_chart, privacy_chart
from fedvit.tools.report.details import SPREAD_COLUMNS, Origin
from fedvit.tools.report.html import write_html
from fedvit.tools.report.misclassified import PAGE
from fedvit.tools.report.summary import TARGET_COLUMNS, privacy_line, summary_rows, target_rows
from fedvit.types import RoundRecord

# Beyond this many classes the matrix takes the page's width and small letters.
_MANY_CLASSES = 8
_UNITS = {
    "record": (
        "Privacy unit: one record, that is one training image. Mechanism: DP-SGD inside each client. Images are drawn "
        "by Poisson sampling, and each image's gradient is clipped to a fixed norm. {noise} The guarantee is for each "
        "single image; for everything that one vehicle recorded, or several pictures of one scene, it is weaker."
    ),
    "client": (
        "Privacy unit: one client, with everything that it recorded. Mechanism: each client's whole update is clipped. "
        "{noise}"
    ),
}
_NOISE = {
    "client": "Gaussian noise is added by each client before anything leaves it. The guarantee is against everybody.",
    "distributed": "Each client adds a share of discrete Gaussian noise, and secure aggregation shows the aggregator "
    "nothing but the sum. The guarantee is against everybody, as long as enough other clients are honest.",
    "server": "Gaussian noise is added once a round, at the aggregator, which has to be trusted with the clipped "
    "updates. The guarantee is against anybody who sees the models.",
}


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    curve: Sequence[RoundRecord],
    confusion: Sequence[Sequence[int]],
    latencies: Mapping[str, Sequence[float]],
    *,
    manifest: DataManifest,
    target_epsilon: float,
    origin: Origin | None = None,
    spread: Sequence[tuple[str, ...]] = (),
    misclassified: int | None = None,
) -> None:
    """Write the report page to ``path``, whole or not at all.

    Args:
        summary: what :func:`fedvit.tools.report.summary.build_summary` returned.
        curve: the committed rounds, in order.
        confusion: ``confusion[i][j]``: test images of class i that were predicted as class j.
        latencies: client-side latencies in seconds, by target.
        manifest: the data set; its classes label the confusion matrix.
        target_epsilon: the budget.
        origin: date, version, command and settings.
        spread: how much clients differ; see :func:`fedvit.tools.report.details.spread_rows`.
        misclassified: the number of images on the page :data:`fedvit.tools.report.misclassified.PAGE` beside this one.

    Raises:
        UsageError: matplotlib is not installed.
    """
    write_html(
        path,
        "run.html",
        title=f"fedvit: {summary['data']['name']}, model {summary['model_version']}",
        subtitle=f"{summary['rounds']} rounds of federated training; {privacy_line(summary)}.",
        figures=_figures(summary, target_epsilon),
        story=_story(summary, manifest, target_epsilon),
        digest=summary["data"]["digest"],
        learning=learning_chart(curve) if curve else None,
        privacy=privacy_chart(curve, target_epsilon) if curve else None,
        no_rounds="No round was committed.",
        many=len(manifest.classes) > _MANY_CLASSES,
        confusion=_confusion_rows(manifest, confusion),
        misclassified=misclassified,
        misclassified_page=PAGE,
        spread_columns=SPREAD_COLUMNS,
        spread=spread,
        settings=origin.settings if origin else None,
        small_class=_small_class_note(summary, manifest),
        latency=latency_chart(latencies) if latencies else None,
        target_columns=TARGET_COLUMNS,
        targets=target_rows(summary),
        facts=[*(origin.rows() if origin else ()), *summary_rows(summary)],
    )


def _figures(summary: Mapping[str, Any], target_epsilon: float) -> list[tuple[str, str]]:
    figures = [(f"{summary['test_accuracy']:.1%}", "test accuracy")]
    if summary["recall"]:
        name, recall = min(summary["recall"].items(), key=lambda item: item[1])
        figures.append((f"{recall:.1%}", f"lowest recall: {name}"))
    figures.append((f"{summary['epsilon']:.2f}", f"epsilon spent of {target_epsilon:g}"))
    return figures + [(f"{t['p95_ms']:.1f} ms", f"p95 at {name}") for name, t in summary["targets"].items()]


def _story(summary: Mapping[str, Any], manifest: DataManifest, target_epsilon: float) -> list[str]:
    unit = summary["privacy_unit"]
    duplicates = "No test image is an exact copy of a training image."
    if manifest.duplicates:
        duplicates = (
            f"{manifest.duplicates:,} test images are exact copies of training images, which flatters the accuracy."
        )
    return [
        f"A Vision Transformer was trained over {summary['rounds']} rounds on {manifest.num_train:,} images of "
        f"{len(manifest.classes)} classes ({manifest.name}) held by its clients, and is evaluated on "
        f"{manifest.num_test:,} held-out images of the server. {duplicates}",
        _UNITS[unit].format(noise=_NOISE[summary["noise_at"]]),
        f"The noise multiplier was {summary['noise_multiplier']:.4g}; the privacy ledger stands at "
        f"ε = {summary['epsilon']:.3f} of {target_epsilon:g} at δ = {summary['delta']:g}, counted for the "
        f"most exposed {unit}. Loss and accuracy are measured on the held-out images, which this guarantee "
        "does not cover.",
    ]


def _confusion_rows(manifest: DataManifest, confusion: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    shares = [
        _error_share(counts, label, column) for label, counts in enumerate(confusion) for column in range(len(counts))
    ]
    largest = max(shares, default=0.0) or 1.0
    return [
        {
            "label": label,
            "name": name,
            "train": train_count,
            "test": sum(counts),
            "recall": f"{counts[label] / sum(counts):.1%}" if any(counts) else "–",
            "cells": [
                # The square root, so that rare errors are visible beside the most frequent one.
                (count, f"{(_error_share(counts, label, column) / largest) ** 0.5:.2f}")
                for column, count in enumerate(counts)
            ],
        }
        for label, (name, counts, train_count) in enumerate(
            zip(manifest.classes, confusion, manifest.train_counts, strict=True)
        )
    ]


def _error_share(counts: Sequence[int], label: int, column: int) -> float:
    """The share of a class's test images that were predicted as another class."""
    return 0.0 if column == label or not any(counts) else counts[column] / sum(counts)


def _small_class_note(summary: Mapping[str, Any], manifest: DataManifest) -> str:
    label = min(range(len(manifest.classes)), key=lambda i: manifest.train_counts[i])
    name, test_count = manifest.classes[label], manifest.test_counts[label]
    recall = summary["recall"].get(name)
    outcome = "and no test image, so that its recall is unknown"
    if recall is not None:
        outcome = (
            f"and a recall of {recall:.1%}, which each of its {test_count:,} test images moves by "
            f"{100 / test_count:.1f} points"
        )
    return (
        "Accuracy hides small classes, so read recall by class. DP-SGD clips every image's gradient to the same norm "
        "and adds noise that is as large for a class of ten images as for one of a thousand. The class with the "
        f"fewest training images therefore suffers most; here that is {name}, with "
        f"{manifest.train_counts[label]:,} of {manifest.num_train:,} training images {outcome}."
    )

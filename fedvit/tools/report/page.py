"""One self-contained ``index.html``: what a run was, how it learned, what it cost in privacy, and how it serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fedvit.data.manifest import DataManifest
from fedvit.tools.report.charts import latency_chart, learning_chart, privacy_chart
from fedvit.tools.report.summary import TARGET_COLUMNS, privacy_line, summary_rows, target_rows, write_atomically
from fedvit.types import RoundRecord

# Beyond this many classes the matrix takes the page's width and small letters.
_MANY_CLASSES = 8
_MECHANISMS = {
    "record": (
        "Privacy unit: one record, that is one training image. Mechanism: DP-SGD inside each client. Images are drawn "
        "by Poisson sampling, each image's gradient is clipped to a fixed norm, and Gaussian noise is added before "
        "anything leaves the client. The guarantee is for each single image; for everything that one vehicle recorded, "
        "or several pictures of one scene, it is weaker."
    ),
    "client": (
        "Privacy unit: one client, with everything that it recorded. Mechanism: each client's whole update is clipped, "
        "and Gaussian noise is added once a round, at the aggregator, which has to be trusted with the "
        "clipped updates. The guarantee is against whoever sees the models."
    ),
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
) -> None:
    """Write the report page to ``path``, whole or not at all.

    Args:
        summary: what :func:`fedvit.tools.report.summary.build_summary` returned.
        curve: the committed rounds, in order.
        confusion: ``confusion[i][j]``: test images of class i that were called class j.
        latencies: client-side latencies in seconds, by target.
        manifest: the data set; its classes label the confusion matrix.
        target_epsilon: the budget.

    Raises:
        UsageError: matplotlib is not installed.
    """
    many = len(manifest.classes) > _MANY_CLASSES
    parts = {
        "title": escape(f"fedvit: {summary['data']['name']}, model {summary['model_version']}"),
        "subtitle": escape(f"{summary['rounds']} rounds of federated training; {privacy_line(summary)}."),
        "figures": _figures(summary, target_epsilon),
        "story": _story(summary, manifest, target_epsilon),
        "learning": learning_chart(curve) if curve else _missing("No round was committed."),
        "privacy": privacy_chart(curve, target_epsilon) if curve else _missing("No round was committed."),
        "confusion": _confusion_table(manifest, confusion) + _small_class_note(summary, manifest),
        "width": "wide" if many else "",
        "rest_width": "" if many else "wide",
        "latency": latency_chart(latencies) if latencies else _missing("No target was probed."),
        "targets": _target_table(summary),
        "facts": _facts(summary),
    }
    write_from_template(path, "page.html", parts)


def write_from_template(path: Path, template: str, parts: Mapping[str, str]) -> None:
    """Write a template of this package, with its ``parts`` and the house's style, to ``path``: whole or not at all."""
    folder = resources.files(__package__)
    style = folder.joinpath("style.css").read_text(encoding="utf-8")
    text = folder.joinpath(template).read_text(encoding="utf-8")
    write_atomically(path, Template(text).substitute(parts, style=style))


def _missing(sentence: str) -> str:
    return f'<p class="soft">{escape(sentence)}</p>'


def _figures(summary: Mapping[str, Any], target_epsilon: float) -> str:
    figures = [(f"{summary['test_accuracy']:.1%}", "test accuracy")]
    if summary["recall"]:
        name, recall = min(summary["recall"].items(), key=lambda item: item[1])
        figures.append((f"{recall:.1%}", f"lowest recall: {name}"))
    figures.append((f"{summary['epsilon']:.2f}", f"epsilon spent of {target_epsilon:g}"))
    figures += [(f"{t['p95_ms']:.1f} ms", f"p95 at {name}") for name, t in summary["targets"].items()]
    return "".join(
        f'<div class="card figure"><b>{escape(value)}</b><span class="soft">{escape(what)}</span></div>'
        for value, what in figures
    )


def _story(summary: Mapping[str, Any], manifest: DataManifest, target_epsilon: float) -> str:
    unit = summary["privacy_unit"]
    sentences = [
        f"A Vision Transformer was trained over {summary['rounds']} rounds on {manifest.num_train:,} images of "
        f"{len(manifest.classes)} classes ({manifest.name}) held by its clients, and is evaluated on "
        f"{manifest.num_test:,} held-out images of the server. {_duplicates(manifest)}",
        _MECHANISMS.get(unit, f"Privacy unit: one {unit}."),
        f"The noise multiplier was {summary['noise_multiplier']:.4g}; the privacy ledger stands at "
        f"ε = {summary['epsilon']:.3f} of {target_epsilon:g} at δ = {summary['delta']:g}, counted for the "
        f"most exposed {unit}. Loss and accuracy are measured on the held-out images, which this guarantee "
        "does not cover.",
    ]
    digest = f'<p class="soft">Data digest (SHA-256): <code>{escape(str(summary["data"]["digest"]))}</code></p>'
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences) + digest


def _duplicates(manifest: DataManifest) -> str:
    if not manifest.duplicates:
        return "No test image is an exact copy of a training image."
    return f"{manifest.duplicates:,} test images are exact copies of training images, which flatters the accuracy."


def _confusion_table(manifest: DataManifest, confusion: Sequence[Sequence[int]]) -> str:
    names = manifest.classes
    head = "".join(f'<th scope="col"><span class="class">{escape(name)}</span></th>' for name in names)
    rows = "".join(
        _confusion_row(i, name, row, train_count)
        for i, (name, row, train_count) in enumerate(zip(names, confusion, manifest.train_counts, strict=True))
    )
    many = ' class="many"' if len(names) > _MANY_CLASSES else ""
    return (
        f'<div class="scroll"><table id="confusion"{many}><thead>'
        f'<tr><th></th><th colspan="3"></th><th colspan="{len(names)}" class="cell">predicted as</th></tr>'
        '<tr><th scope="col">true class</th><th scope="col">train</th><th scope="col">test</th>'
        f'<th scope="col">recall</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="soft">Counts of images; a prediction is shaded by its share of the test images of its class.</p>'
    )


def _confusion_row(label: int, name: str, row: Sequence[int], train_count: int) -> str:
    total = sum(row)
    cells = "".join(_confusion_cell(count, total, j == label) for j, count in enumerate(row))
    recall = f"{row[label] / total:.1%}" if total else "–"
    facts = "".join(f"<td>{text}</td>" for text in (f"{train_count:,}", f"{total:,}", recall))
    return f'<tr><th scope="row">{escape(name)}</th>{facts}{cells}</tr>'


def _confusion_cell(count: int, total: int, correct: bool) -> str:
    kind = "cell zero" if not count else "cell right" if correct else "cell"
    share = f' style="--share:{0.75 * count / total:.2f}"' if count else ""
    return f'<td class="{kind}"{share}>{count}</td>'


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
    sentence = (
        "Accuracy hides small classes, so read recall by class: DP-SGD clips every image's gradient to the same norm "
        "and adds noise that is as large for a class of ten images as for one of a thousand, so the class with the "
        f"fewest training images is the first to drown in it; here that is {name}, with "
        f"{manifest.train_counts[label]:,} of {manifest.num_train:,} training images {outcome}."
    )
    return f"<p>{escape(sentence)}</p>"


def _facts(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(what)}</th><td>{escape(value)}</td></tr>' for what, value in summary_rows(summary)
    )
    return f'<table id="summary" class="facts"><tbody>{rows}</tbody></table>'


def _target_table(summary: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in TARGET_COLUMNS)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(figure)}</td>" for figure in figures)}</tr>'
        for name, *figures in target_rows(summary)
    )
    return (
        f'<div class="scroll"><table id="targets"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="soft">Agreement: the share of test images on which a target says what the trained model says.</p>'
    )

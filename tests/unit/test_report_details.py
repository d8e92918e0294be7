"""What a report says beside its figures, and that its charts are legible: fonts, colours, axes, shades of errors."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report_page import page_of

from fedvit.data.records import Record
from fedvit.settings import load_settings
from fedvit.tools.report import charts
from fedvit.tools.report.charts import colour_scale, learning_chart, privacy_chart, svg_of
from fedvit.tools.report.details import SPREAD_COLUMNS, Origin, spread_rows
from fedvit.tools.report.misclassified import MOST_IMAGES, write_misclassified
from fedvit.tools.report.simulation_charts import OUTCOMES
from fedvit.tools.report.sweep_charts import heat_chart, parallel_chart
from fedvit.tools.sweep.outcome import TrialOutcome
from fedvit.types import Client, ClientKind, Participation, RoundRecord

CARDS = ("#ffffff", "#1a2129")
"""The backgrounds of charts in light and in dark mode."""


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_is_visible_on_light_and_dark_pages() -> None:
    from matplotlib.colors import to_rgb

    series = [getattr(charts, name) for name in ("BLUE", "ORANGE", "GREEN", "RED", "PURPLE", "GREY")]
    scale = [colour_scale()(share) for share in np.linspace(0, 1, 64)]
    css = (Path(charts.__file__).parent / "templates" / "style.css").read_text()
    for card in CARDS:
        assert f"--card: {card}" in css
        for colour in [*map(to_rgb, [*series, *OUTCOMES.values()]), *scale]:
            # Graphics need 3:1 (WCAG 2.2, 1.4.11).
            assert contrast(colour, to_rgb(card)) >= 3, colour


def trial(index: int, score: float) -> TrialOutcome:
    parameters = {"noise_multiplier": float(index), "staleness_tolerance": index}
    return TrialOutcome(f"{index:03d}", parameters, 0, "completed", score=score, standard_error=0.01, hours=1.0 + index)


def font_sizes(svg: str) -> set[str]:
    return set(re.findall(r"<text[^>]*font-size: ([\d.]+px)", svg))


def rounds(count: int) -> list[RoundRecord]:
    return [RoundRecord("run-1", i + 1, ("c",), True, f"v{i}", 0.3, 0.9, 0.5, 30, 1.0) for i in range(count)]


def test_all_charts_have_texts_of_one_size_where_the_page_shows_them() -> None:
    trials = [trial(i, 0.5 + i / 10) for i in range(4)]
    narrow = [learning_chart(rounds(3)), heat_chart(trials, "noise_multiplier", "staleness_tolerance")]
    wide = parallel_chart(trials, ())
    for svg in (*narrow, wide):
        assert font_sizes(svg) == {"10px"}
    widths = [float(svg.split('viewBox="0 0 ')[1].split()[0]) for svg in (narrow[0], wide)]
    # Those of a card across both columns and of a card in one.
    assert widths[1] / widths[0] == pytest.approx(1162 / 555, rel=0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_axes_of_counts_have_integers_only(count: int) -> None:
    for svg in (learning_chart(rounds(count)), privacy_chart(rounds(count), 8.0)):
        axes = [re.findall(r"<text[^>]*>([^<]*)</text>", part) for part in svg.split("matplotlib.axis_")]
        (texts,) = (one for one in axes if "Round" in one)
        numbers = texts[: texts.index("Round")]
        assert numbers
        assert all(text.isdigit() for text in numbers)


def test_errors_are_shaded_relative_to_the_largest(tmp_path: Path) -> None:
    page = page_of(tmp_path, confusion=((173, 3, 5), (0, 8, 1), (3, 4, 100)))
    cells = re.findall(r'<td class="cell([a-z ]*)"( style="--share:([\d.]+)")?>(\d+)</td>', page.source)
    shaded = {int(count): float(share) for kind, _, share, count in cells if "error" in kind}
    # One of nine is the largest share; what is right is not shaded.
    assert shaded == {3: pytest.approx(0.5, abs=0.01), 5: pytest.approx(0.5, abs=0.01), 1: 1.0, 4: pytest.approx(0.58)}
    assert all(not share for kind, _, share, _ in cells if "error" not in kind)


def test_a_report_says_when_how_and_with_what_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {"home": tmp_path, "training": {"rounds": 7}, "access": {"mode": "tokens"}}
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fedvit", "run", "--set", "training.rounds=7"])
    origin = Origin.of(load_settings(environ={}, overrides=overrides))
    assert origin.settings == "training:\n  rounds: 7\n"
    origin = Origin(datetime(2026, 5, 4, 3, 2, tzinfo=UTC), "1.2.3", origin.command, origin.settings)
    clients = [Client(f"c{i}", ClientKind.VIRTUAL, 10 * i) for i in range(1, 6)]
    spread = spread_rows(clients, {"c1": Participation(8, 3), "c2": Participation(4, 0)})
    page = page_of(tmp_path, origin=origin, spread=spread, misclassified=11)
    for row in (
        ["Report written", "2026-05-04 03:02 UTC"],
        ["fedvit", "1.2.3"],
        ["Command", "fedvit run --set training.rounds=7"],
    ):
        assert row in page.rows["summary"]
    assert "rounds: 7" in page.text
    assert page.rows["spread"] == [
        list(SPREAD_COLUMNS),
        ["Training images", "10", "20", "30", "40", "50"],
        ["Rounds taken part in", "0", "0", "0", "4", "8"],
        ["Updates accepted", "0", "0", "0", "4", "5"],
        ["Updates not accepted", "0", "0", "0", "0", "3"],
    ]
    assert "misclassified.html" in page.links


@pytest.mark.parametrize(("count", "median"), [(0, None), (1, "7"), (2, "7.5")])
def test_few_clients_have_a_spread_too(count: int, median: str | None) -> None:
    rows = spread_rows([Client(f"c{i}", ClientKind.VIRTUAL, 7 + i) for i in range(count)], {})
    assert ([row[3] for row in rows] or [None])[0] == median


class Lights:
    """A data set of plain colours whose training images cannot be read."""

    name, classes = "lights", ("red", "green", "<b>")
    train = (Record("train/secret.png", 0),)

    def __init__(self, labels: Sequence[int]) -> None:
        self.test = tuple(Record(f"test/{i:03d}.png", label) for i, label in enumerate(labels))

    def read(self, record: Record) -> bytes:
        assert record in self.test
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()


def test_misclassified_test_images_are_shown_by_their_confusion(tmp_path: Path) -> None:
    labels, predictions = [0, 0, 1, 1, 2], np.array([0, 1, 0, 0, 2])
    assert write_misclassified(tmp_path / "misclassified.html", Lights(labels), predictions, "v5") == 3
    page = (tmp_path / "misclassified.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["green taken for red: 2", "red taken for green: 1"]
    assert re.findall(r'alt="(.*?)"', page) == ["test/002.png", "test/003.png", "test/001.png"]
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r'src="(.*?)"', page))


def test_a_page_of_many_or_of_no_errors(tmp_path: Path) -> None:
    path = tmp_path / "misclassified.html"
    assert write_misclassified(path, Lights([0] * 300), np.ones(300, np.int64), "v5") == 300
    assert path.read_text().count("<img") == MOST_IMAGES
    assert write_misclassified(path, Lights([2]), np.array([2]), "v5") == 0
    assert "No test image is misclassified." in path.read_text()


def test_a_chart_of_another_width_keeps_its_texts() -> None:
    sizes = [font_sizes(svg_of("c", "d", 2.0, lambda f: f.subplots().set_xlabel("x"), width_in=w)) for w in (4.0, 9.0)]
    assert sizes[0] == sizes[1] == {"10px"}

"""``summary.json`` is exact and whole; the page shows every series and loads nothing from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedvit.data.manifest import DataManifest
from fedvit.tools.report.page import write_page
from fedvit.tools.report.probe import TargetSummary
from fedvit.tools.report.summary import build_summary, summary_tables, write_summary
from fedvit.types import BudgetReport, Evaluation, RoundRecord, Run, RunStatus, utc_now

CONFUSION = ((173, 3, 5), (0, 8, 1), (3, 4, 100))
MANIFEST = DataManifest(
    "lights", ("red", "yellow", "green"), 1187, 297, (723, 35, 429), (181, 9, 107), "d1" * 32, duplicates=2
)
TARGETS = {
    "inference": TargetSummary(0.9461, 0.9966, 21.91234, 36.2, 297),
    "edge-1": TargetSummary(0.9461, 1.0, 6.7, 9.1, 297),
    "edge-2": TargetSummary(0.9428, 1.0, 6.4, 8.5, 297),
}
LATENCIES = {name: [0.004, 0.005, 0.006, 0.02] for name in TARGETS}


def round_record(index: int, accuracy: float | None = 0.9, loss: float | None = 0.3) -> RoundRecord:
    return RoundRecord("run-1", index, ("c",), True, f"v{index}", loss, accuracy, 0.5 * index, 30, 1.0)


CURVE = [round_record(i) for i in range(1, 6)]


def summary_of(manifest: DataManifest = MANIFEST, **changes: Any) -> dict[str, Any]:
    evaluation = Evaluation(0.2, 0.9461, {"red": 0.9558, "yellow": 0.8889, "green": 0.9346}, CONFUSION, 297)
    run = Run("run-1", 1, RunStatus.COMPLETED, 5, 5, 1.56, {}, "c", manifest.digest, utc_now())
    summary = build_summary(
        evaluation=evaluation,
        budget=BudgetReport("record", 8.0, 1e-5, 7.97, 8.4, 7.97, 5, 30),
        run=run,
        model_version="v5",
        manifest=manifest,
        targets=TARGETS,
        seconds={"training": 48.41239},
    )
    return {**summary, **changes}


class TestSummary:
    def test_the_object_is_exact(self) -> None:
        assert summary_of() == {
            "test_accuracy": 0.9461,
            "recall": {"red": 0.9558, "yellow": 0.8889, "green": 0.9346},
            "epsilon": 7.97,
            "delta": 1e-5,
            "privacy_unit": "record",
            "noise_at": "client",
            "noise_multiplier": 1.56,
            "run_id": "run-1",
            "rounds": 5,
            "model_version": "v5",
            "data": {"name": "lights", "digest": "d1" * 32, "num_train": 1187, "num_test": 297},
            "targets": {
                "inference": {"accuracy": 0.9461, "agreement": 0.9966, "p50_ms": 21.912, "p95_ms": 36.2},
                "edge-1": {"accuracy": 0.9461, "agreement": 1.0, "p50_ms": 6.7, "p95_ms": 9.1},
                "edge-2": {"accuracy": 0.9428, "agreement": 1.0, "p50_ms": 6.4, "p95_ms": 8.5},
            },
            "seconds": {"training": 48.412},
        }

    def test_it_is_written_as_json_into_a_new_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "report" / "summary.json"
        write_summary(path, summary_of())
        assert json.loads(path.read_text()) == summary_of()
        assert [p.name for p in path.parent.iterdir()] == ["summary.json"]

    def test_a_write_that_fails_leaves_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "summary.json"
        write_summary(path, {"old": True})

        def full_disk(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError):
            write_summary(path, summary_of())
        assert json.loads(path.read_text()) == {"old": True}
        assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]

    def test_what_json_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError):
            write_summary(tmp_path / "summary.json", summary_of(epsilon=float("nan")))
        assert not list(tmp_path.iterdir())

    def test_the_tables_show_run_and_targets(self) -> None:
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(*summary_tables(summary_of()))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        for shown in ("0.9461", "yellow 0.889", "ε = 7.970 at δ = 1e-05", "v5", "edge-2", "36.2", "0.9966"):
            assert shown in text


class Page(HTMLParser):
    """The elements of a page that the tests ask about."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.rows: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table = ""
        self._in_cell = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href", "data") and value]
        if tag == "table":
            self._table = named.get("id") or ""
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[self._table][-1][-1] += data


def page_of(
    tmp_path: Path,
    summary: dict[str, Any] | None = None,
    curve: Sequence[RoundRecord] = CURVE,
    confusion: Sequence[Sequence[int]] = CONFUSION,
    latencies: dict[str, list[float]] | None = None,
    manifest: DataManifest = MANIFEST,
    **more: Any,
) -> Page:
    write_page(
        tmp_path / "index.html",
        summary or summary_of(manifest),
        curve,
        confusion,
        LATENCIES if latencies is None else latencies,
        manifest=manifest,
        target_epsilon=8.0,
        **more,
    )
    return Page(tmp_path / "index.html")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(tmp_path_factory.mktemp("page"))


class TestPage:
    def test_every_series_is_drawn(self, page: Page) -> None:
        series = {"learning-series-accuracy", "learning-series-loss", "privacy-series-epsilon", "privacy-series-budget"}
        series |= {f"latency-series-{name}" for name in TARGETS}
        assert series <= set(page.ids)
        for label in (
            "Test accuracy",
            "Test loss",
            "Round",
            "Epsilon spent",
            "budget 8",
            "Images",
            "(ms, logarithmic)",
        ):
            assert label in page.text

    def test_a_line_has_a_point_for_each_evaluated_round(self, tmp_path: Path) -> None:
        curve = [*CURVE, round_record(6, accuracy=None, loss=None)]
        page = page_of(tmp_path, curve=curve)
        drawn = {
            name: len(re.findall(r"<use ", re.split(rf'<g id="{name}">', page.source)[1].split("</g>")[0]))
            for name in ("learning-series-accuracy", "privacy-series-epsilon")
        }
        assert drawn == {"learning-series-accuracy": 5, "privacy-series-epsilon": 6}

    def test_ids_are_unique_and_nothing_is_loaded(self, page: Page) -> None:
        assert len(page.ids) == len(set(page.ids))
        assert page.links
        assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
        assert not page.tags & {"script", "link", "iframe", "img"}
        assert "@import" not in page.source

    def test_the_confusion_matrix_has_counts_and_recall(self, page: Page) -> None:
        rows = page.rows["confusion"]
        assert rows[1] == ["true class", "train", "test", "recall", "red", "yellow", "green"]
        assert rows[2:] == [
            ["red", "723", "181", "95.6%", "173", "3", "5"],
            ["yellow", "35", "9", "88.9%", "0", "8", "1"],
            ["green", "429", "107", "93.5%", "3", "4", "100"],
        ]

    def test_it_says_what_the_run_was(self, page: Page) -> None:
        text = " ".join(page.text.split())
        assert "d1" * 32 in text
        assert "Privacy unit: one record" in text
        assert "DP-SGD inside each client" in text
        assert "ε = 7.970 of 8 at δ = 1e-05" in text
        assert "2 test images are exact copies of training images" in text

    @pytest.mark.parametrize(
        ("place", "says"), [("client", "by each client"), ("distributed", "secure aggregation"), ("server", "trusted")]
    )
    @pytest.mark.parametrize("unit", ["record", "client"])
    def test_it_says_where_the_noise_was_added(self, tmp_path: Path, unit: str, place: str, says: str) -> None:
        text = page_of(tmp_path, summary_of(privacy_unit=unit, noise_at=place)).text
        assert f"Privacy unit: one {unit}" in text
        assert says in text
        others = {"by each client", "secure aggregation", "trusted"} - {says}
        assert not [other for other in others if other in text]

    def test_it_is_honest_about_the_smallest_class(self, page: Page) -> None:
        text = " ".join(page.text.split())
        assert "here that is yellow, with 35 of 1,187 training images and a recall of 88.9%" in text
        assert "each of its 9 test images moves by 11.1 points" in text

    def test_the_tables_repeat_the_summary(self, page: Page) -> None:
        rows = page.rows
        assert ["edge-2", "0.9428", "1.0000", "6.4", "8.5"] in rows["targets"]
        assert ["Model version", "v5"] in rows["summary"]

    def test_text_is_escaped(self, tmp_path: Path) -> None:
        manifest = replace(MANIFEST, name="<script>alert(1)</script>", classes=("<b>red</b>", "$x^2$", "a&b"))
        page = page_of(
            tmp_path,
            summary_of(manifest, recall={"<b>red</b>": 0.5, "$x^2$": 0.9, "a&b": 0.8}),
            manifest=manifest,
            latencies={'<i>"$t$"</i>': [0.01, 0.02]},
        )
        assert not page.tags & {"script", "i"}
        assert page.rows["confusion"][2][0] == "<b>red</b>"
        assert "<script>alert(1)</script>" in page.text
        assert '<i>"$t$"</i>: p50' in page.text

    def test_a_class_without_test_images(self, tmp_path: Path) -> None:
        manifest = replace(MANIFEST, test_counts=(181, 0, 107))
        page = page_of(
            tmp_path,
            summary_of(manifest, recall={"red": 0.9, "green": 0.8}),
            confusion=((173, 3, 5), (0, 0, 0), (3, 4, 100)),
            manifest=manifest,
        )
        assert page.rows["confusion"][3] == ["yellow", "35", "0", "–", "0", "0", "0"]
        assert "its recall is unknown" in page.text

    def test_no_round_and_no_target(self, tmp_path: Path) -> None:
        page = page_of(tmp_path, summary_of(targets={}), curve=[], latencies={})
        assert "No round was committed." in page.text
        assert "No target was probed." in page.text

    def test_many_classes_fit_one_table(self, tmp_path: Path) -> None:
        names = tuple(f"{i:05d}" for i in range(43))
        manifest = DataManifest("gtsrb", names, 430, 86, (10,) * 43, (2,) * 43, "ab" * 32, 0)
        confusion = [[2 if i == j else 0 for j in range(43)] for i in range(43)]
        page = page_of(
            tmp_path, summary_of(manifest, recall=dict.fromkeys(names, 1.0)), CURVE, confusion, LATENCIES, manifest
        )
        assert [len(row) for row in page.rows["confusion"][1:]] == [47] * 44

    def test_the_same_run_gives_the_same_page(self, page: Page, tmp_path: Path) -> None:
        assert page_of(tmp_path).source == page.source

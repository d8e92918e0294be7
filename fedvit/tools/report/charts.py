"""Charts as SVG that uses the page's colours, so that it suits light and dark pages.

Every series carries an id, ``<chart>-series-<name>``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from fedvit.errors import UsageError
from fedvit.types import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_Floats = npt.NDArray[np.float64]
# An annotation's place: a share of the width, a value on the y axis.
_ABOVE_LINE = ("axes fraction", "data")
# Matplotlib writes literal colours; these two are replaced by those of the page.
_INK, _GRID = "#010203", "#040506"
_PAGE_COLOURS = {_INK: "currentColor", _GRID: "var(--grid)"}
# Legible on white and on near black, and distinguishable for most colour-blind readers (after Okabe & Ito).
BLUE, ORANGE, GREEN, RED = "#3a87c8", "#d07818", "#1f9e77", "#d0504c"
PURPLE, GREY = "#9a6cc4", "#8a8f98"
SCALE = (BLUE, PURPLE, ORANGE)
"""From low to high; every colour of it is visible on light and on dark pages, as the ends of most scales are not."""
WIDTH_IN, WIDE_IN = 6.4, 13.4
"""Widths of a chart in a column of the page and across both; in this ratio their texts have one size on the page."""
# The stubs of some versions list every key as a literal type, those of others do not.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedvit",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}


def learning_chart(curve: Sequence[RoundRecord]) -> str:
    """Accuracy and loss by round; rounds that were not evaluated are left out."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, name, colour in ((upper, "accuracy", BLUE), (lower, "loss", ORANGE)):
            _plot(axes, [(r.round_index, getattr(r, name)) for r in curve], name, colour)
            axes.set_ylabel(f"Test {name}")
        upper.set_ylim(0, 1.02)
        lower.set_ylim(bottom=0)
        lower.set_xlabel("Round")

    return svg_of("learning", "Test accuracy and test loss by round", 4.4, draw)


def privacy_chart(curve: Sequence[RoundRecord], target_epsilon: float) -> str:
    """Epsilon spent by round, against the budget."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _plot(axes, [(r.round_index, r.epsilon) for r in curve], "epsilon", GREEN)
        axes.axhline(target_epsilon, color=RED, linestyle="--", linewidth=1.5, gid="series-budget")
        label_place = (0.01, target_epsilon)
        axes.annotate(f"budget {target_epsilon:g}", label_place, (0, 4), _ABOVE_LINE, "offset points", color=RED)
        axes.set_ylim(0, max(target_epsilon, axes.get_ylim()[1]) * 1.08)
        axes.set_xlabel("Round")
        axes.set_ylabel("Epsilon spent (most exposed unit)")

    return svg_of("privacy", "Epsilon spent by round, against the budget", 4.4, draw)


def latency_chart(latencies_s: Mapping[str, Sequence[float]]) -> str:
    """A histogram for each target on a shared logarithmic axis in milliseconds, with median and 95th percentile."""
    times_ms = {name: np.asarray(values, dtype=np.float64) * 1e3 for name, values in latencies_s.items()}
    everything = np.concatenate(list(times_ms.values()))
    bins = np.geomspace(everything.min() / 1.15, everything.max() * 1.15, 50)

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(times_ms), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, values) in zip(rows, times_ms.items(), strict=True):
            _histogram(axes, name, values, bins)
        _millisecond_axis(rows[-1])

    return svg_of("latency", "Latency histogram of each target", 1.1 + 1.15 * len(times_ms), draw)


def _plot(axes: Axes, points: Sequence[tuple[int, float | None]], name: str, colour: str) -> None:
    known = [(x, y) for x, y in points if y is not None]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    axes.plot(xs, ys, color=colour, linewidth=2, marker="o", markersize=3.5, gid=f"series-{name}")
    whole_numbers(axes.xaxis)


def whole_numbers(axis: Axis) -> None:
    """Let an axis of counts have ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def colour_scale() -> Colormap:
    """:data:`SCALE` as a colour map."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("fedvit", SCALE)


def _histogram(axes: Axes, name: str, values_ms: _Floats, bins: _Floats) -> None:
    p50, p95 = np.percentile(values_ms, [50, 95])
    axes.hist(values_ms, bins=bins.tolist(), color=BLUE, histtype="stepfilled", gid=f"series-{name}")
    axes.axvline(float(p50), color=ORANGE, linestyle="-", linewidth=1.5)
    axes.axvline(float(p95), color=ORANGE, linestyle="--", linewidth=1.5)
    axes.set_title(f"{name}: p50 {p50:.1f} ms, p95 {p95:.1f} ms", loc="left", parse_math=False)
    axes.set_ylabel("Images")
    whole_numbers(axes.yaxis)


def _millisecond_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Latency seen by the client (ms, logarithmic); lines: p50 solid, p95 dashed")


def svg_of(
    chart: str, description: str, height_in: float, draw: Callable[[Figure], None], *, width_in: float = WIDTH_IN
) -> Markup:
    """The figure that ``draw`` draws, as an ``svg`` element whose ids begin with ``chart``."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("The report page needs matplotlib.", cure="Run: pip install 'fedvit[server]'") from None
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(buffer.getvalue(), chart, description)


def _for_the_page(document: str, chart: str, description: str) -> Markup:
    """An SVG document as an element with the page's size, colours and font, and with unique ids."""
    text = document[document.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{chart}-", text)
    for literal, page_colour in _PAGE_COLOURS.items():
        text = text.replace(literal, page_colour)
    opening, rest = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None
    return Markup(  # noqa: S704 - Matplotlib escaped its texts.
        f'<svg role="img" aria-label="{description}" {view_box[0]} xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'
    )

"""Charts of a sweep: the Pareto front, every trial across its parameters, and noise against staleness."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedvit.tools.report.charts import GREY, RED, WIDE_IN, colour_scale, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedvit.tools.sweep.outcome import Configuration, TrialOutcome


def pareto_chart(results: Sequence[Configuration], front: Sequence[Configuration], chosen: Configuration | None) -> str:
    """Score over epsilon with its standard error; colour is virtual hours.

    Configurations on the front of all three have a rim; the line is the front of epsilon and score alone.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shown = [c for c in results if math.isfinite(c.epsilon)]
        xs, ys = [c.epsilon for c in shown], [c.score.value for c in shown]
        bars = [c.score.error for c in shown]
        axes.errorbar(xs, ys, yerr=bars, fmt="none", ecolor=GREY, elinewidth=0.8, alpha=0.6, zorder=1)
        dots = axes.scatter(
            xs, ys, c=[c.hours for c in shown], cmap=colour_scale(), s=34, zorder=3, gid="series-trials"
        )
        for one in front:
            if math.isfinite(one.epsilon):
                place = ([one.epsilon], [one.score.value])
                axes.scatter(*place, s=34, facecolors="none", edgecolors=RED, linewidths=1.4, zorder=4)
        steps = _upper(front)
        axes.plot(
            *steps, color=RED, linewidth=1.5, zorder=2, gid="series-front", label="Pareto front (rims: with time)"
        )
        if chosen is not None and math.isfinite(chosen.epsilon):
            place = ([chosen.epsilon], [chosen.score.value])
            axes.scatter(
                *place, s=150, facecolors="none", edgecolors=RED, linewidths=2, zorder=4, gid="series-chosen",
                label="chosen",
            )  # fmt: skip
        figure.colorbar(dots, ax=axes, label="Virtual hours")
        axes.set_xlabel("Epsilon spent by the most exposed unit")
        axes.set_ylabel("Test accuracy")
        figure.legend(loc="outside upper center", ncols=2)

    return svg_of("pareto", "Test accuracy over epsilon, virtual hours by colour, with the Pareto front", 4.4, draw)


def _upper(front: Sequence[Configuration]) -> tuple[list[float], list[float]]:
    """The front in epsilon and accuracy, without configurations that are on it only for their time."""
    xs: list[float] = []
    ys: list[float] = []
    for one in front:
        if math.isfinite(one.epsilon) and (not ys or one.score.value > ys[-1]):
            xs.append(one.epsilon)
            ys.append(one.score.value)
    return xs, ys


def parallel_chart(outcomes: Sequence[TrialOutcome], chosen: Sequence[str]) -> str:
    """A line for each trial across its parameters, epsilon, hours and score; colour is the score.

    Trials that were stopped early are dotted.
    """
    shown = [o for o in outcomes if o.score is not None]
    columns = _columns(shown)

    def draw(figure: Figure) -> None:
        from matplotlib.colors import Normalize

        axes, scale = figure.subplots(), colour_scale()
        scores = [o.score or 0.0 for o in shown]
        norm = Normalize(min(scores), max(scores) if max(scores) > min(scores) else min(scores) + 1e-9)
        for index, one in enumerate(shown):
            heights = [places[index] for _, places, _ in columns]
            wide = 2.4 if one.trial_id in chosen else 0.8
            style = ":" if one.status == "stopped_early" else "-"
            colour = scale(norm(one.score or 0.0))
            axes.plot(heights, color=colour, linewidth=wide, linestyle=style, alpha=0.9, gid=f"series-{one.trial_id}")
        _axes_of(axes, columns)

    return svg_of(
        "parallel",
        "Every trial across its parameters, epsilon, virtual hours and accuracy",
        5.0,
        draw,
        width_in=WIDE_IN,
    )


_Column = tuple[str, list[float], list[tuple[float, str]]]


def _columns(shown: Sequence[TrialOutcome]) -> list[_Column]:
    """Name, position of each trial between 0 and 1, and labels with their positions."""
    names = list(dict.fromkeys(name for one in shown for name in one.parameters))
    columns: list[_Column] = [(name, *_placed([one.parameters.get(name) for one in shown])) for name in names]
    # The planned epsilon, because a trial that was stopped early has not spent all of it.
    spent = [one.planned_epsilon for one in shown if one.planned_epsilon is not None]
    if len(spent) == len(shown):
        columns.append(("planned epsilon", *_on_a_scale(spent)))
    columns.append(("virtual hours", *_on_a_scale([one.hours for one in shown])))
    return [*columns, ("accuracy", *_on_a_scale([one.score or 0.0 for one in shown]))]


def _on_a_scale(values: Sequence[float]) -> tuple[list[float], list[tuple[float, str]]]:
    low, span = min(values), max(values) - min(values)
    labels = [(i / 4, f"{low + span * i / 4:.3g}") for i in range(5)] if span else [(0.5, f"{low:.3g}")]
    return [(value - low) / span if span else 0.5 for value in values], labels


def _placed(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    distinct: list[Any] = sorted(set(values)) if numbers else sorted({str(v) for v in values})
    if numbers and len(distinct) > 8:
        return _on_a_scale(values)
    # Few values, or words: a position for each value.
    place = {value: i / max(1, len(distinct) - 1) for i, value in enumerate(distinct)}
    labels = [(place[value], f"{value:.4g}" if numbers else value) for value in distinct]
    return [place[v if numbers else str(v)] for v in values], labels


def _axes_of(axes: Axes, columns: Sequence[_Column]) -> None:
    for x, (_, _, labels) in enumerate(columns):
        axes.axvline(x, color=GREY, linewidth=0.8, zorder=0)
        for y, text in labels:
            axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", parse_math=False)
    axes.set_xticks(range(len(columns)), [name.replace("_", " ") for name, _, _ in columns])
    axes.set_xlim(-0.15, len(columns) - 1 + 0.35)
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


def heat_chart(outcomes: Sequence[TrialOutcome], across: str, up: str) -> str:
    """Mean score by two parameters.

    A star marks cells with trials that were stopped early, whose scores are of fewer rounds.
    """
    cells: dict[tuple[Any, Any], list[TrialOutcome]] = {}
    for one in outcomes:
        if one.score is not None:
            cells.setdefault((one.parameters[across], one.parameters[up]), []).append(one)
    xs, ys = _ordered({x for x, _ in cells}), _ordered({y for _, y in cells})

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        means = {place: statistics.fmean(o.score or 0.0 for o in cell) for place, cell in cells.items()}
        grid = [[means.get((x, y), math.nan) for x in xs] for y in ys]
        image = axes.imshow(grid, origin="lower", aspect="auto", cmap=colour_scale())
        for (x, y), cell in cells.items():
            star = "*" if any(o.status == "stopped_early" for o in cell) else ""
            axes.annotate(
                f"{means[x, y]:.3f}{star}", (xs.index(x), ys.index(y)), color="#101418", ha="center", va="center"
            )
        figure.colorbar(image, ax=axes, label="Test accuracy")
        axes.set_xticks(range(len(xs)), [f"{x}" for x in xs])
        axes.set_yticks(range(len(ys)), [f"{y}" for y in ys])
        axes.set_xlabel(across.replace("_", " "))
        axes.set_ylabel(up.replace("_", " "))
        axes.grid(visible=False)

    return svg_of("heat", f"Test accuracy by {across} and {up}", 4.4, draw)


def _ordered(values: set[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=str)


def varied(parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters of which more than one value was tried, in their order."""
    names = list(dict.fromkeys(name for one in parameters for name in one))
    return [name for name in names if len({repr(one.get(name)) for one in parameters}) > 1]

"""Charts of simulations: accuracy over virtual time, outcomes of tasks, staleness of updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedvit.tools.report.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, WIDE_IN, svg_of, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedvit.tools.simulation.run import Simulated

PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
OUTCOMES = {
    "accepted": GREEN,
    "stale": ORANGE,
    "refused": RED,
    "failed": PURPLE,
    "silent": GREY,
    "given_up": "#a8841a",
    "unused": "#7a8694",
    "in_flight": BLUE,
}
# Colours of a chart in a file of its own; legible in light and dark surroundings.
_OWN_COLOURS = "<style>svg{color:#1c2530;--grid:#dfe4ea;background:#ffffff}</style>"


def accuracy_chart(runs: Sequence[Simulated], *, target: float | None = None, log_time: bool = False) -> str:
    """Accuracy of evaluated versions by virtual hours: a colour for each name, a line for each run."""
    colours = _colours(runs)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for run in runs:
            known = [(point.hours, point.accuracy) for point in run.points if point.accuracy is not None]
            hours, accuracies = [x for x, _ in known], [y for _, y in known]
            gid = f"series-{run.name}-{run.settings.simulation.seed}"
            axes.plot(hours, accuracies, color=colours[run.name], linewidth=1.5, alpha=0.85, gid=gid)
        if target is not None:
            axes.axhline(target, color=GREY, linestyle="--", linewidth=1.2, gid="series-target")
        _dress(axes, colours, log_time)

    return svg_of("accuracy", "Test accuracy by virtual hours", 5.0, draw, width_in=WIDE_IN)


def outcomes_chart(outcomes: Mapping[str, Mapping[str, int]]) -> str:
    """A bar for each run with the shares of its tasks by outcome."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(outcomes)[::-1]
        left = dict.fromkeys(names, 0.0)
        for kind, colour in OUTCOMES.items():
            shares = {name: outcomes[name].get(kind, 0) / max(1, sum(outcomes[name].values())) for name in names}
            if any(shares.values()):
                starts = [left[name] for name in names]
                label = kind.replace("_", " ")
                axes.barh(names, [shares[name] for name in names], left=starts, color=colour, label=label, height=0.6)
            left = {name: left[name] + shares[name] for name in names}
        axes.set_xlim(0, 1)
        axes.set_xlabel("Share of tasks")
        figure.legend(loc="outside upper center", ncols=4)

    return svg_of("outcomes", "Tasks by outcome", 1.4 + 0.4 * len(outcomes), draw)


def staleness_chart(staleness: Mapping[str, Mapping[int, int]]) -> str:
    """Accepted updates by staleness in versions, a line for each name."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (name, counts) in enumerate(staleness.items()):
            late = range(max(counts, default=0) + 1)
            total = max(1, sum(counts.values()))
            shares, colour = [counts.get(s, 0) / total for s in late], PALETTE[index % len(PALETTE)]
            axes.plot(late, shares, color=colour, marker="o", markersize=3.5, label=name, gid=f"series-{name}")
        whole_numbers(axes.xaxis)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Versions committed since the one that an update started from")
        axes.set_ylabel("Share of accepted updates")
        axes.legend()

    return svg_of("staleness", "Accepted updates by staleness", 3.0, draw)


def bars_chart(accuracies: Mapping[str, Mapping[str, float]], *, reference: float | None = None) -> str:
    """A group of bars for each row, a colour for each column; ``reference`` is a line across."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        columns = list(next(iter(accuracies.values())))
        width = 0.8 / len(columns)
        for index, column in enumerate(columns):
            places = [row + (index - (len(columns) - 1) / 2) * width for row in range(len(accuracies))]
            heights = [row[column] for row in accuracies.values()]
            colour = (GREY, BLUE, ORANGE, RED, PURPLE, GREEN)[index % 6]
            axes.bar(places, heights, width=0.92 * width, color=colour, label=column)
            for place, height in zip(places, heights, strict=True):
                axes.annotate(f"{height:.2f}", (place, height), xytext=(0, 2), textcoords="offset points", ha="center")
        if reference is not None:
            axes.axhline(reference, color=GREY, linestyle="--", linewidth=1.2, gid="series-reference")
        # Names of many rows side by side need lines of their own.
        names = [name.replace(", ", ",\n").replace("_", "_\n") for name in accuracies]
        axes.set_xticks(range(len(accuracies)), names)
        axes.set_ylim(0, 1)
        axes.set_ylabel("Test accuracy")
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper center", ncols=2)

    return svg_of("bars", "Test accuracy by rule and attack", 5.0, draw, width_in=WIDE_IN)


def standalone(svg: str) -> str:
    """A chart as a file of its own, with its own colours and background."""
    opening, rest = svg.split(">", 1)
    return f"{opening}>{_OWN_COLOURS}{rest}\n"


def _dress(axes: Axes, colours: Mapping[str, str], log_time: bool) -> None:
    from matplotlib.lines import Line2D

    if log_time:
        from matplotlib.ticker import StrMethodFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_ylim(0, 1)
    axes.set_xlabel("Virtual hours" + (" (logarithmic)" if log_time else ""))
    axes.set_ylabel("Test accuracy")
    lines = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in colours.items()]
    axes.legend(handles=lines, loc="lower right")


def _colours(runs: Sequence[Simulated]) -> dict[str, str]:
    names = list(dict.fromkeys(run.name for run in runs))
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}

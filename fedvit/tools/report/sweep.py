"""Report of a sweep: ``trials.parquet``, ``summary.json``, the page ``index.html``, and the choice as ``best.yaml``."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from fedvit.atomic_write import write_atomically
from fedvit.config import Settings
from fedvit.errors import UsageError
from fedvit.tools.report.html import write_html
from fedvit.tools.report.simulation import SIMULATED_KEYS, cell, leaves_masks_out, warning_of
from fedvit.tools.report.summary import JsonObject, write_summary
from fedvit.tools.report.sweep_charts import heat_chart, parallel_chart, pareto_chart, varied
from fedvit.tools.sweep.cost import cost_sentences, sweep_cost
from fedvit.tools.sweep.outcome import Configuration, TrialOutcome, choose, configurations, pareto_front
from fedvit.tools.sweep.space import TrialPlan, rungs_of

COLUMNS = ("Trial", "Parameters", "Seed", "Rounds", "Virtual hours", "Accuracy", "Epsilon", "Versions late", "End")
_PREFERRED = ("noise_multiplier", "staleness_tolerance")


def write_report(
    folder: Path, settings: Settings, plans: Sequence[TrialPlan], outcomes: Sequence[TrialOutcome]
) -> JsonObject:
    """Write all files into ``folder``, each atomically, and return the summary.

    Raises:
        UsageError: matplotlib or pyarrow is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = configurations(outcomes)
    chosen = choose(results, settings.privacy.target_epsilon, settings.sweep.margin)
    front = pareto_front(results)
    plan = next((p for p in plans if chosen is not None and p.trial_id == chosen.trial_ids[0]), None)
    cost = sweep_cost(plans, plan.settings if plan else None)
    command = ["fedvit", "run", "--config", str(folder / "best.yaml"), "--home", str(folder / "run")]
    summary: JsonObject = {
        "planned": len(plans),
        "private": settings.simulation.private,
        "masks_left_out": any(leaves_masks_out(plan.settings) for plan in plans),
        "privacy_unit": settings.privacy.privacy_unit,
        "rungs": list(rungs_of(settings)),
        "chosen": None if chosen is None else _configuration(chosen) | {"command": shlex.join(command)},
        "pareto_front": [_configuration(one) for one in front],
        "cost": {**(asdict(cost) if cost else {}), "sentences": cost_sentences(cost, settings.privacy.privacy_unit)},
        "trials": [one.to_json() | {"mean_staleness": one.mean_staleness} for one in outcomes],
    }
    write_atomically(folder / "trials.parquet", _parquet(outcomes, front, chosen))
    if plan is not None:
        write_atomically(folder / "best.yaml", best_yaml(plan, summary["cost"]["sentences"]))
    write_summary(folder / "summary.json", summary)
    write_html(
        folder / "index.html",
        "sweep.html",
        **_page(settings, summary, outcomes, results, front, chosen),
        best_yaml=None if plan is None else best_yaml(plan, ()),
    )
    return summary


def _configuration(one: Configuration) -> JsonObject:
    return {
        "trial_ids": list(one.trial_ids),
        "parameters": dict(one.parameters),
        "text": _text(one.parameters),
        "accuracy": one.score.value,
        "standard_error": one.score.error,
        "epsilon": None if one.epsilon == float("inf") else one.epsilon,
        "hours": one.hours,
    }


def _text(parameters: Mapping[str, Any]) -> str:
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in parameters.items()}
    return ", ".join(f"{name}={value}" for name, value in values.items())


def best_yaml(plan: TrialPlan, remarks: Sequence[str]) -> str:
    """The configuration of a trial for a real run, whose rounds begin in the simulated mode."""
    simulation, own = plan.settings.simulation, plan.settings
    mode = {name: getattr(simulation, name) for name in ("mode", "buffer_size", "staleness_tolerance")}
    initial_mode = type(own.training.initial_mode)(**mode)
    path = None if own.data.path is None else own.data.path.absolute()
    real = own.model_copy(
        update={
            "training": own.training.model_copy(update={"initial_mode": initial_mode}),
            "data": own.data.model_copy(update={"path": path}),
            "secure_aggregation": own.secure_aggregation.model_copy(update={"masks": True}),
        }
    )
    sections = {"data", "model", "training", "privacy", "secure_aggregation", "release"}
    tree = real.model_dump(mode="json", include=sections, exclude_defaults=True)
    head = "".join(f"# {line}\n" for line in (f"Trial {plan.trial_id}: {_text(plan.parameters)}.", *remarks))
    return head + yaml.safe_dump(tree, sort_keys=False)


def _parquet(outcomes: Sequence[TrialOutcome], front: Sequence[Configuration], chosen: Configuration | None) -> bytes:
    """One row for each trial; each parameter has a column ``param.<name>``."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UsageError("The report needs pyarrow.", cure="Run: pip install 'fedvit[server]'") from None
    on_front = {trial_id for one in front for trial_id in one.trial_ids}
    selected = set(chosen.trial_ids) if chosen else set()
    rows = [_row(one, one.trial_id in on_front, one.trial_id in selected) for one in outcomes]
    columns = {name: _column([row.get(name) for row in rows]) for name in dict.fromkeys(n for row in rows for n in row)}
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _row(one: TrialOutcome, on_front: bool, chosen: bool) -> JsonObject:
    row = one.to_json() | {"mean_staleness": one.mean_staleness, "pareto": on_front, "chosen": chosen}
    parameters = row.pop("parameters")
    curve = [{"hours": h, "round_index": r, "accuracy": a} for h, r, a in row.pop("curve")]
    nested = {name: json.dumps(row.pop(name)) for name in ("rungs", "outcomes", "staleness")}
    own = {f"param.{name}": value for name, value in parameters.items()}
    return row | own | nested | {"curve": curve}


def _column(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        # A parameter may have numbers and words as values.
        return pa.array([None if value is None else str(value) for value in values])


def trial_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each trial, in the order of :data:`COLUMNS`."""
    return [
        (
            one["trial_id"],
            _text(one["parameters"]),
            str(one["seed"]),
            str(one["rounds"]),
            f"{one['hours']:.2f}",
            "–" if one["score"] is None else f"{one['score']:.4f} ± {one['standard_error']:.4f}",
            cell(one["epsilon"], ".3f"),
            cell(one["mean_staleness"], ".2f"),
            ": ".join(filter(None, (one["status"].replace("_", " "), one["reason"]))),
        )
        for one in summary["trials"]
    ]


def _page(
    settings: Settings,
    summary: JsonObject,
    outcomes: Sequence[TrialOutcome],
    results: Sequence[Configuration],
    front: Sequence[Configuration],
    chosen: Configuration | None,
) -> dict[str, Any]:
    trial_ids = chosen.trial_ids if chosen else ()
    scored = any(one.score is not None for one in outcomes)
    names = varied([one.parameters for one in outcomes])
    pair = _PREFERRED if set(_PREFERRED) <= set(names) else tuple(names[:2])
    show_heat = scored and len(pair) == 2
    return {
        "title": f"fedvit: a sweep of {summary['planned']} trials on {settings.data.source}",
        "subtitle": SIMULATED_KEYS,
        "warning": warning_of(summary),
        "figures": _figures(summary),
        "pareto": pareto_chart(results, front, chosen) if summary["private"] and results else None,
        "heat_title": " × ".join(pair).replace("_", " ").capitalize() if show_heat else "Two parameters",
        "heat": heat_chart(outcomes, *pair) if show_heat else None,
        "parallel": parallel_chart(outcomes, trial_ids) if scored else None,
        "chosen": summary["chosen"],
        "cost": summary["cost"]["sentences"],
        "ranking": _ranking(settings, summary["rungs"]),
        "columns": COLUMNS,
        "rows": trial_rows(summary),
        "marked": trial_ids,
    }


def _figures(summary: JsonObject) -> list[tuple[str, str]]:
    early = sum(one["status"] == "stopped_early" for one in summary["trials"])
    figures = [(str(len(summary["trials"])), "trials"), (str(early), "of them stopped early")]
    chosen = summary["chosen"]
    if chosen is not None:
        figures.append((f"{chosen['accuracy']:.1%}", "test accuracy of the chosen one"))
        if chosen["epsilon"] is not None:
            figures.append((f"{chosen['epsilon']:.2f}", "epsilon of that run alone"))
    if "with_sweep" in summary["cost"]:
        figures.append((f"{summary['cost']['with_sweep']:.1f}", "epsilon with the whole sweep"))
    return figures


def _ranking(settings: Settings, rungs: Sequence[int]) -> list[str]:
    sweep = settings.sweep
    sentences = [
        f"A trial's score is the mean test accuracy of its last {sweep.window} evaluated versions, on the server's own "
        "held-out images. Its standard error has the part of so many images and the part of the noise that every "
        "round adds.",
        f"Chosen is, within target_epsilon {settings.privacy.target_epsilon:g}, the most private configuration whose "
        f"score is not more than {sweep.margin:g} standard errors of the difference below the best: the highest of "
        "many noisy scores is so by luck as well.",
    ]
    if not rungs:
        return [*sentences, "Every trial ran to its end."]
    after, share = ", ".join(map(str, rungs)), f"1/{sweep.reduction_factor}"
    return [
        *sentences,
        f"After {after} rounds a trial went on if it was among the best {share} of those at least as private as "
        f"itself, or not clearly behind, by the same {sweep.margin:g} standard errors. "
        "Trials with less noise were never compared with it.",
    ]

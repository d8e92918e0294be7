"""The report of a sweep: ``trials.parquet`` and ``summary.json`` for a program, ``index.html`` for a reader.

And ``best.yaml``, the chosen configuration, for ``fedvit run --config``.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import yaml

from fedvit.config import Settings
from fedvit.errors import UsageError
from fedvit.store.blobs import write_atomically as write_bytes
from fedvit.tools.report.page import write_from_template
from fedvit.tools.report.simulation import NOT_PRIVATE, SIMULATED_KEYS
from fedvit.tools.report.summary import write_atomically
from fedvit.tools.report.sweep_charts import heat_chart, parallel_chart, pareto_chart, varied
from fedvit.tools.sweep.cost import cost_sentences, sweep_cost
from fedvit.tools.sweep.outcome import Candidate, TrialOutcome, candidates, choose, pareto_front
from fedvit.tools.sweep.space import TrialPlan, rungs_of

COLUMNS = ("Trial", "Parameters", "Seed", "Rounds", "Virtual hours", "Accuracy", "Epsilon", "Versions late", "End")
_PREFERRED = ("noise_multiplier", "staleness_tolerance")

JsonObject = dict[str, Any]


def write_report(
    folder: Path, settings: Settings, plans: Sequence[TrialPlan], outcomes: Sequence[TrialOutcome]
) -> JsonObject:
    """Write all of it into ``folder``, each file whole or not at all, and give back the summary.

    Raises:
        UsageError: matplotlib or pyarrow is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = candidates(outcomes)
    chosen = choose(found, settings.privacy.target_epsilon, settings.sweep.margin)
    front = pareto_front(found)
    plan = next((p for p in plans if chosen is not None and p.trial_id == chosen.trial_ids[0]), None)
    summary = _summary(folder, settings, plans, outcomes, chosen, front, plan)
    write_bytes(folder / "trials.parquet", _parquet(outcomes, front, chosen))
    if plan is not None:
        write_atomically(folder / "best.yaml", best_yaml(plan, summary["cost"]["sentences"]))
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_from_template(
        folder / "index.html", "sweep.html", _parts(settings, summary, outcomes, found, front, chosen, plan)
    )
    return summary


def _summary(
    folder: Path,
    settings: Settings,
    plans: Sequence[TrialPlan],
    outcomes: Sequence[TrialOutcome],
    chosen: Candidate | None,
    front: Sequence[Candidate],
    plan: TrialPlan | None,
) -> JsonObject:
    cost = sweep_cost(plans, plan.settings if plan else None)
    return {
        "planned": len(plans),
        "private": settings.simulation.private,
        "privacy_unit": settings.privacy.privacy_unit,
        "rungs": list(rungs_of(settings)),
        "chosen": None if chosen is None else _told(chosen) | {"command": _command(folder)},
        "pareto_front": [_told(one) for one in front],
        "cost": {**(asdict(cost) if cost else {}), "sentences": cost_sentences(cost, settings.privacy.privacy_unit)},
        "trials": [one.to_json() | {"mean_staleness": one.mean_staleness} for one in outcomes],
    }


def _told(one: Candidate) -> JsonObject:
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
    return ", ".join(f"{name}={_value(value)}" for name, value in parameters.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _command(folder: Path) -> str:
    return shlex.join(["fedvit", "run", "--config", str(folder / "best.yaml"), "--home", str(folder / "run")])


def best_yaml(plan: TrialPlan, remarks: Sequence[str]) -> str:
    """The configuration of a trial, as a real run takes it: rounds begin in the mode that was simulated."""
    simulation, own = plan.settings.simulation, plan.settings
    mode = {name: getattr(simulation, name) for name in ("mode", "buffer_size", "staleness_tolerance")}
    initial_mode = type(own.training.initial_mode)(**mode)
    path = None if own.data.path is None else own.data.path.absolute()
    real = own.model_copy(
        update={
            "training": own.training.model_copy(update={"initial_mode": initial_mode}),
            "data": own.data.model_copy(update={"path": path}),
        }
    )
    kept = {"data", "model", "training", "privacy", "release"}
    tree = real.model_dump(mode="json", include=kept, exclude_defaults=True)
    head = "".join(f"# {line}\n" for line in (f"Trial {plan.trial_id}: {_text(plan.parameters)}.", *remarks))
    return head + yaml.safe_dump(tree, sort_keys=False)


def _parquet(outcomes: Sequence[TrialOutcome], front: Sequence[Candidate], chosen: Candidate | None) -> bytes:
    """A row a trial; parameters have columns of their own, ``param.<name>``."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UsageError("The report needs pyarrow.", cure="Run: pip install 'fedvit[server]'") from None
    on_front = {trial_id for one in front for trial_id in one.trial_ids}
    taken = set(chosen.trial_ids) if chosen else set()
    rows = [_row(one, one.trial_id in on_front, one.trial_id in taken) for one in outcomes]
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
        # Numbers beside words: what a parameter may be is its user's affair.
        return pa.array([None if value is None else str(value) for value in values])


def trial_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line a trial, in the order of :data:`COLUMNS`."""
    return [
        (
            one["trial_id"],
            _text(one["parameters"]),
            str(one["seed"]),
            str(one["rounds"]),
            f"{one['hours']:.2f}",
            "–" if one["score"] is None else f"{one['score']:.4f} ± {one['standard_error']:.4f}",
            "–" if one["epsilon"] is None else f"{one['epsilon']:.3f}",
            "–" if one["mean_staleness"] is None else f"{one['mean_staleness']:.2f}",
            _end(one),
        )
        for one in summary["trials"]
    ]


def _end(one: Mapping[str, Any]) -> str:
    status = one["status"].replace("_", " ")
    return status if one["reason"] is None else f"{status}: {one['reason']}"


def _parts(
    settings: Settings,
    summary: JsonObject,
    outcomes: Sequence[TrialOutcome],
    found: Sequence[Candidate],
    front: Sequence[Candidate],
    chosen: Candidate | None,
    plan: TrialPlan | None,
) -> dict[str, str]:
    taken = chosen.trial_ids if chosen else ()
    scored = any(one.score is not None for one in outcomes)
    pareto = summary["private"] and bool(found)
    return {
        "title": escape(f"fedvit: a sweep of {summary['planned']} trials on {settings.data.source}"),
        "subtitle": escape(SIMULATED_KEYS),
        "warning": "" if summary["private"] else f'<p class="card" id="not-private"><b>{escape(NOT_PRIVATE)}</b></p>',
        "figures": _figures(summary),
        "pareto": pareto_chart(found, front, chosen) if pareto else _soft("No private trial ran to its end."),
        **_heat(outcomes),
        "parallel": parallel_chart(outcomes, taken) if scored else _soft("No trial was evaluated."),
        "chosen": _chosen(summary, plan),
        "cost": "".join(f"<p>{escape(sentence)}</p>" for sentence in summary["cost"]["sentences"]),
        "ranking": "".join(f"<p>{escape(sentence)}</p>" for sentence in _ranking(settings, summary["rungs"])),
        "trials": _table(summary, taken),
    }


def _soft(sentence: str) -> str:
    return f'<p class="soft">{escape(sentence)}</p>'


def _figures(summary: JsonObject) -> str:
    early = sum(one["status"] == "stopped_early" for one in summary["trials"])
    figures = [(str(len(summary["trials"])), "trials"), (str(early), "of them stopped early")]
    chosen = summary["chosen"]
    if chosen is not None:
        figures.append((f"{chosen['accuracy']:.1%}", "test accuracy of the chosen one"))
        if chosen["epsilon"] is not None:
            figures.append((f"{chosen['epsilon']:.2f}", "epsilon of that run alone"))
    if "with_sweep" in summary["cost"]:
        figures.append((f"{summary['cost']['with_sweep']:.1f}", "epsilon with the whole sweep"))
    return "".join(
        f'<div class="card figure"><b>{escape(value)}</b><span class="soft">{escape(what)}</span></div>'
        for value, what in figures
    )


def _heat(outcomes: Sequence[TrialOutcome]) -> dict[str, str]:
    names = varied([one.parameters for one in outcomes])
    pair = _PREFERRED if set(_PREFERRED) <= set(names) else tuple(names[:2])
    if len(pair) < 2 or not any(one.score is not None for one in outcomes):
        return {"heat_title": "Two parameters", "heat": _soft("Fewer than two parameters were varied.")}
    across, up = (escape(name.replace("_", " ")) for name in pair)
    note = _soft("Mean test accuracy; * where a trial was stopped early, and so of fewer rounds.")
    return {"heat_title": f"{across} × {up}".capitalize(), "heat": heat_chart(outcomes, *pair) + note}


def _chosen(summary: JsonObject, plan: TrialPlan | None) -> str:
    chosen = summary["chosen"]
    if chosen is None or plan is None:
        return _soft("None: no trial ran to its end within the budget.")
    text = f"{chosen['text']}: test accuracy {chosen['accuracy']:.4f} ± {chosen['standard_error']:.4f}."
    return (
        f"<p><b>{escape(text)}</b> Start it as a real run:</p><pre>{escape(chosen['command'])}</pre>"
        f"<details><summary>best.yaml</summary><pre>{escape(best_yaml(plan, ()))}</pre></details>"
    )


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
        "Trials with less noise were never held against it.",
    ]


def _table(summary: JsonObject, taken: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in COLUMNS)
    body = "".join(_table_row(name, cells, name in taken) for name, *cells in trial_rows(summary))
    return f'<div class="scroll"><table id="trials"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _table_row(name: str, cells: Sequence[str], taken: bool) -> str:
    kind = ' class="right"' if taken else ""
    return f'<tr{kind}><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'

"""``fedvit finetune``: one model on a whole data set, on several ranks."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from fedvit.cli.common import (
    ConfigOption,
    DataOption,
    HomeOption,
    JsonOption,
    SetOption,
    console,
    explained,
    find_system,
    print_json,
    settings_from,
)
from fedvit.cli.output import show_fields
from fedvit.errors import InterruptedRunError

RanksOption = Annotated[
    int | None, typer.Option("--ranks", min=1, help="So many processes train together (default: finetune.ranks).")
]


def finetune(
    config: ConfigOption = None,
    home: HomeOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the configured model on all training images of the data set, privately, on several ranks (Ray Train).

    Record-level DP-SGD, charged to the state folder's ledger before each range of steps. Run again, it goes on from its
    last checkpoint; what is charged already costs nothing more. See the section `finetune` of `fedvit config show`.
    Status 1 when the budget ended it before its last step.
    """
    with explained(as_json):
        more = [] if ranks is None else [f"finetune.ranks={ranks}"]
        settings = settings_from(config, home, data, [*(assignments or []), *more])
        # Ray prints what it thinks its user should know; where a program reads, there is one JSON document.
        aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        try:
            with aside:
                report = find_system(settings).finetune(lambda step: _tell(step, as_json))
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "Fine-tuning was interrupted.", cure="The same command goes on from its last checkpoint."
            ) from None
        facts = asdict(report)
        if as_json:
            print_json(facts)
        else:
            weights = facts.pop("weights")
            show_fields(facts)
            # Not in the table, which cuts long paths off.
            console.print(f"Weights: {weights or 'none yet'}", soft_wrap=True, markup=False, highlight=False)
    if report.stopped is not None:
        raise typer.Exit(1)


def _tell(step: str, as_json: bool) -> None:
    if not as_json:
        console.print(f"[dim]•[/] {step}")

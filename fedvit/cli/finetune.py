"""``fedvit finetune``: private fine-tuning of one model on a whole data set, on several ranks."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Annotated

import typer
from typer import Option

from fedvit.cli.options import SYSTEM, Options, local_command
from fedvit.cli.output import console, print_json, print_step, show_fields, stdout_for_json
from fedvit.cli.state import find_system
from fedvit.errors import InterruptedRunError


@local_command(options=SYSTEM)
def finetune(
    options: Options,
    ranks: Annotated[
        int | None, Option("--ranks", min=1, help="Number of training processes (default: finetune.ranks).")
    ] = None,
) -> None:
    """Train the configured model on all training images of the data set, privately, on several ranks (Ray Train).

    Record-level DP-SGD, charged to the state folder's ledger before each range of steps. A second call goes on from the
    last checkpoint; charged steps cost nothing more. See the section `finetune` of `fedvit config show`. Status 1 when
    the budget ended the job before its last step.
    """
    settings = options.settings(*([] if ranks is None else [f"finetune.ranks={ranks}"]))
    try:
        with stdout_for_json(options.as_json):
            report = find_system(settings).finetune(functools.partial(print_step, quiet=options.as_json))
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "Fine-tuning was interrupted.", cure="The same command goes on from its last checkpoint."
        ) from None
    facts = asdict(report)
    if options.as_json:
        print_json(facts)
    else:
        weights = facts.pop("weights")
        show_fields(facts)
        # Not in the table, which cuts long paths off.
        console.print(f"Weights: {weights or 'none yet'}", soft_wrap=True, markup=False, highlight=False)
    if report.stopped is not None:
        raise typer.Exit(1)

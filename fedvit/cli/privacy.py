"""``fedvit privacy``: what is spent and what is left."""

from __future__ import annotations

from dataclasses import asdict

import typer

from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, console, explained, print_json, settings_from

app = typer.Typer(help="The privacy budget and its ledger.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``privacy`` a group while it has one command."""


@app.command("show")
def show(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The budget as the ledger has it; the ledger's hash chain is verified on the way."""
    with explained(as_json):
        from rich.table import Table

        from fedvit.cli.state import open_existing_store
        from fedvit.privacy.accountant import PrivacyAccountant

        settings = settings_from(config, home)
        store = open_existing_store(settings)
        entries = store.verify_ledger()
        report = PrivacyAccountant(store, settings).budget()
        facts = {**asdict(report), "epsilon_remaining": report.epsilon_remaining, "ledger_entries": entries}
        if as_json:
            print_json(facts)
            return
        table = Table(show_header=False, box=None)
        for key, value in facts.items():
            table.add_row(
                f"[bold]{key.replace('_', ' ')}[/]", f"{value:.4g}" if isinstance(value, float) else str(value)
            )
        console.print(table)

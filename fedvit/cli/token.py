"""``fedvit token``: bearer tokens of the control API."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, console, explained, print_json, settings_from

if TYPE_CHECKING:
    from fedvit.store.store import Token

app = typer.Typer(help="Bearer tokens of the control API.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose token it is; shown in the audit trail.")],
    scopes: Annotated[
        list[str], typer.Option("--scope", help="viewer, operator, admin, emergency or device (repeatable).")
    ],
    days: Annotated[float, typer.Option("--days", help="Days until it expires; 0: never.", min=0)] = 90,
    home: HomeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it: this once, nothing keeps it."""
    with explained(as_json):
        from fedvit.access.tokens import create_token
        from fedvit.cli.state import audit_local
        from fedvit.store.store import Store
        from fedvit.types import utc_now

        # Opened, and made where missing: the first token may come before the first start.
        with Store.open(settings_from(config, home).home) as store:
            made = create_token(store, name, scopes, now=utc_now(), lifetime=timedelta(days=days) if days else None)
            audit_local(store, "CLI token create", _audited(made.token))
        if as_json:
            print_json({**_facts(made.token), "token": made.text})
        else:
            # Plain, so that a terminal's width breaks nothing and a pipe gets only the token.
            typer.echo(made.text)


@app.command("list")
def show(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Every token, without its secret."""
    with explained(as_json):
        from rich.table import Table

        from fedvit.cli.state import open_existing_store

        with open_existing_store(settings_from(config, home)) as store:
            facts = [_facts(token) for token in store.tokens()]
        if as_json:
            print_json(facts)
            return
        table = Table("token", "name", "scopes", "created", "expires", "last used", "revoked", box=None)
        for fact in facts:
            moments = (fact[f"{word}_at"] for word in ("created", "expires", "last_used", "revoked"))
            shown = (f"{moment:%Y-%m-%d %H:%M}" if moment else "–" for moment in moments)
            table.add_row(fact["token_id"], fact["name"], " ".join(fact["scopes"]), *shown)
        console.print(table)


@app.command("revoke")
def revoke(
    token_id: Annotated[str, typer.Argument(help="The 12 characters between fvt_ and the next underscore.")],
    home: HomeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a token at once."""
    with explained(as_json):
        from fedvit.cli.state import audit_local, open_existing_store
        from fedvit.types import utc_now

        with open_existing_store(settings_from(config, home)) as store:
            token = store.revoke_token(token_id, utc_now())
            audit_local(store, "CLI token revoke", _audited(token))
        if as_json:
            print_json(_facts(token))
        else:
            console.print(f"{token.token_id} ({token.name}) is revoked.", highlight=False)


def _facts(token: Token) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "name": token.name,
        "scopes": list(token.scopes),
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "last_used_at": token.last_used_at,
        "revoked_at": token.revoked_at,
    }


def _audited(token: Token) -> dict[str, Any]:
    return {"token_id": token.token_id, "name": token.name, "scopes": list(token.scopes)}

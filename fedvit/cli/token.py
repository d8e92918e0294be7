"""``fedvit token``: bearer tokens of the control API."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, console, explained, print_json, settings_from

if TYPE_CHECKING:
    from fedvit.config import Settings
    from fedvit.store.store import Store, Token

app = typer.Typer(help="Bearer tokens of the control API.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose token it is; shown in the audit trail.")],
    scopes: Annotated[
        list[str], typer.Option("--scope", help="viewer, operator, admin, emergency, device or alerts (repeatable).")
    ],
    days: Annotated[float, typer.Option("--days", help="Days until it expires; 0: never.", min=0)] = 90,
    client: Annotated[str | None, typer.Option("--client", help="Bind a device token to this one client.")] = None,
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
        settings = settings_from(config, home)
        with Store.open(settings.home) as store:
            lifetime = timedelta(days=days) if days else None
            made = create_token(store, name, scopes, now=utc_now(), lifetime=lifetime, client_id=client)
            audit_local(store, "CLI token create", _audited(made.token))
            mailbox = _mailbox(settings, store, client) if client else None
        if as_json:
            print_json({**_facts(made.token), "token": made.text, "mailbox": mailbox})
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
        table = Table("token", "name", "scopes", "client", "created", "expires", "last used", "revoked", box=None)
        for fact in facts:
            moments = (fact[f"{word}_at"] for word in ("created", "expires", "last_used", "revoked"))
            shown = (f"{moment:%Y-%m-%d %H:%M}" if moment else "–" for moment in moments)
            table.add_row(fact["token_id"], fact["name"], " ".join(fact["scopes"]), fact["client_id"] or "–", *shown)
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


def _mailbox(settings: Settings, store: Store, client_id: str) -> dict[str, str]:
    """What the vehicle needs to leave messages when it cannot reach the API."""
    from fedvit.operations.mailbox import Mailbox

    mailbox = Mailbox(settings, store)
    return {"url": mailbox.url, "key": mailbox.key_of(client_id).hex()}


def _facts(token: Token) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "name": token.name,
        "scopes": list(token.scopes),
        "client_id": token.client_id,
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "last_used_at": token.last_used_at,
        "revoked_at": token.revoked_at,
    }


def _audited(token: Token) -> dict[str, Any]:
    return {"token_id": token.token_id, "name": token.name, "scopes": list(token.scopes), "client_id": token.client_id}

"""``fedvit token | audit-log``: bearer tokens of the control API, and the trail of who changed what."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from fedvit.cli.api_session import read_api_or_store
from fedvit.cli.options import STATE_OR_API, Options, local_command
from fedvit.cli.output import print_json, show, show_text
from fedvit.cli.state import audit_local, open_existing_store

if TYPE_CHECKING:
    from fedvit.config import Settings
    from fedvit.store.records import Token
    from fedvit.store.store import Store

token = typer.Typer(help="Create, list and revoke bearer tokens of the control API.", no_args_is_help=True)
audit_log = typer.Typer(help="The audit trail of the control API and of this command line.", no_args_is_help=True)


@local_command(token, "create")
def create(
    options: Options,
    name: Annotated[str, Argument(help="The token's owner, shown in the audit trail.")],
    scopes: Annotated[
        list[str],
        Option("--scope", help="viewer, operator, admin, emergency, device, releases or alerts (repeatable)."),
    ],
    days: Annotated[float, Option("--days", help="Days until it expires; 0: never.", min=0)] = 90,
    client: Annotated[
        str | None, Option("--client", help="The client that the token of a vehicle names; --scope device needs it.")
    ] = None,
) -> None:
    """Make a token and print it, this once; it is not stored."""
    from fedvit.access.tokens import create_token
    from fedvit.store.store import Store
    from fedvit.types import utc_now

    # The state is made where it is missing: the first token may come before the first start.
    settings = options.settings()
    with Store.open(settings.home) as store:
        lifetime = timedelta(days=days) if days else None
        created = create_token(store, name, scopes, now=utc_now(), lifetime=lifetime, client_id=client)
        audit_local(store, "CLI token create", _audited(created.token))
        mailbox = _mailbox(settings, store, client) if client and "device" in scopes else None
    if options.as_json:
        print_json({**_token_facts(created.token), "token": created.text, "mailbox": mailbox})
    else:
        # Without formatting: a pipe gets only the token.
        typer.echo(created.text)


@local_command(token, "list")
def list_tokens(options: Options) -> None:
    """Every token, without its secret."""

    with open_existing_store(options.settings()) as store:
        tokens = [_token_facts(token) for token in store.tokens.all()]
    show(tokens, options.as_json)


@local_command(token, "revoke")
def revoke(
    options: Options, token_id: Annotated[str, Argument(help="The 12 characters between fvt_ and the next underscore.")]
) -> None:
    """End a token at once."""
    from fedvit.types import utc_now

    with open_existing_store(options.settings()) as store:
        revoked = store.tokens.revoke(token_id, utc_now())
        audit_local(store, "CLI token revoke", _audited(revoked))
    show_text(f"{revoked.token_id} ({revoked.name}) is revoked.", _token_facts(revoked), options.as_json)


def _mailbox(settings: Settings, store: Store, client_id: str) -> dict[str, str]:
    """Address and key of the mailbox, for the vehicle."""
    from fedvit.operations.mailbox import Mailbox

    mailbox = Mailbox(settings, store)
    return {"url": mailbox.url, "key": mailbox.key_of(client_id).hex()}


def _token_facts(token: Token) -> dict[str, Any]:
    times = {name: getattr(token, name) for name in ("created_at", "expires_at", "last_used_at", "revoked_at")}
    return {**_audited(token), **times}


def _audited(token: Token) -> dict[str, Any]:
    return {"token_id": token.token_id, "name": token.name, "scopes": list(token.scopes), "client_id": token.client_id}


@local_command(audit_log, "show", options=STATE_OR_API)
def show_log(
    options: Options,
    limit: Annotated[int, Option("--limit", min=1, help="Largest number of lines.")] = 50,
    after: Annotated[int | None, Option("--after", min=0, help="Only lines after this sequence.")] = None,
) -> None:
    """The last lines, or those after a sequence, oldest first: of the state folder, or of the system at --url."""

    def from_store(store: Store, settings: Settings) -> list[dict[str, Any]]:
        entries = store.audit.latest(limit) if after is None else store.audit.entries(after, limit)
        return [{"sequence": entry.sequence, "at": entry.at, **asdict(entry.facts)} for entry in entries]

    lines = read_api_or_store(options, lambda client: client.audit.lines(limit, after), from_store)
    show(lines, options.as_json, "sequence", "at", "actor", "source", "action", "status", "request_id")


@local_command(audit_log, "verify")
def verify(options: Options) -> None:
    """Recompute the hash chain of the trail; status 1 when a line was changed, removed or added."""

    with open_existing_store(options.settings()) as store:
        lines = store.audit.verify()
    show_text(f"The audit trail is intact: {lines} lines.", {"ok": True, "lines": lines}, options.as_json)

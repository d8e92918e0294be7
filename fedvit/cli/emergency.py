"""``fedvit emergency``: a privacy breach, and the end of one."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvit.cli.api_session import asking
from fedvit.cli.common import ConfigOption, DryRunOption, HomeOption, JsonOption, UrlOption, YesOption
from fedvit.cli.output import plain
from fedvit.errors import NotFoundError

if TYPE_CHECKING:
    from fedvit.client import FedvitClient

app = typer.Typer(help="A privacy breach, and the end of one. Needs a token of scope emergency.", no_args_is_help=True)

IncidentArgument = Annotated[str, typer.Argument(help="The incident's name, such as PB-20250131-0300.")]


class Action(StrEnum):
    """What a report of a breach may ask for."""

    STOP_TRAINING = "stop_training"
    ISOLATE_DATA = "isolate_data"
    ROLLBACK_MODEL = "rollback_model"
    FREEZE_LEDGER = "freeze_ledger"
    REVOKE_CREDENTIALS = "revoke_credentials"


UNLESS_SAID = (Action.STOP_TRAINING, Action.ISOLATE_DATA)


@app.command("status")
def status(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Whether an incident is in force, who is in quarantine, and whether training runs."""
    with asking(home, url, config, as_json) as ask:
        ask.show(_standing(ask.client))


@app.command("privacy-breach")
def privacy_breach(
    incident_id: IncidentArgument,
    clients: Annotated[
        list[str] | None, typer.Option("--client", help="A client that is affected (repeatable).")
    ] = None,
    breach_type: Annotated[str, typer.Option("--breach-type", help="What happened, in a word.")] = "data_exposure",
    actions: Annotated[
        list[Action] | None,
        typer.Option("--action", help="What is done at once (repeatable); left out, stop_training and isolate_data."),
    ] = None,
    description: Annotated[str | None, typer.Option("--description", help="What happened, in words.")] = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Contain a privacy breach, and collect the evidence; harmless when repeated.

    The ledger's freeze, the end of training, the clients' quarantine and the revocation of their tokens happen whatever
    --action says; a roll-back, to the last version that none of them contributed to, only when it is asked for.
    """
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        affected = clients or []
        breach = ask.change(
            lambda: ask.client.emergency.privacy_breach(
                incident_id,
                affected_clients=affected,
                breach_type=breach_type,
                immediate_actions=actions or UNLESS_SAID,
                description=description,
            ),
            present=lambda: {**_standing(ask.client), **_known(ask.client, affected)},
            question=f"Act on the breach {incident_id} now?",
        )
        ask.show(breach)


@app.command("stand-down")
def stand_down(
    incident_id: IncidentArgument,
    justification: Annotated[str, typer.Option("--justification", help="Why it is over.")],
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End an incident: the ledger thaws; clients stay in quarantine until each is reinstated."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        ended = ask.change(
            lambda: ask.client.emergency.stand_down(incident_id, justification),
            present=lambda: _standing(ask.client),
            question=f"Declare the incident {incident_id} over, so that the ledger may be charged again?",
        )
        ask.show(ended)


def _standing(client: FedvitClient) -> dict[str, Any]:
    return {**plain(client.emergency.status()), "training": client.training.status().status}


def _known(client: FedvitClient, names: list[str]) -> dict[str, Any]:
    known = {name: _is_known(client, name) for name in names}
    return {
        "affected": [name for name, found in known.items() if found],
        "unknown_clients": [name for name, found in known.items() if not found],
    }


def _is_known(client: FedvitClient, name: str) -> bool:
    try:
        client.clients.get(name)
    except NotFoundError:
        return False
    return True

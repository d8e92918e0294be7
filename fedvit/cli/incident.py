"""``fedvit incident | emergency | drill``: the incident log, a privacy breach, and rehearsals of incidents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from fedvit.api.choices import ImmediateAction, IncidentStatus, Section
from fedvit.cli.api_session import ApiSession, api_command
from fedvit.cli.options import LimitOption, OffsetOption, Options, local_command
from fedvit.cli.output import console, plain, print_json, show, show_fields, show_rows, show_text
from fedvit.cli.state import settings_in_force
from fedvit.cli.supervisor import interruptible
from fedvit.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from fedvit.client import FedvitClient

app = typer.Typer(help="The incident log: what went wrong, and what was done about it.", no_args_is_help=True)
emergency = typer.Typer(
    help="Contain a privacy breach, and end it. Needs a token of scope emergency.", no_args_is_help=True
)

IncidentArgument = Annotated[str, Argument(help="The incident, such as INC-2026-1124-001.")]
BreachArgument = Annotated[str, Argument(help="The incident's name, such as PB-20250131-0300.")]
COLUMNS = ("incident_id", "severity", "status", "alertname", "opened_at", "resolved_at", "firing", "summary")
_AUTOMATIC = {"allowed": "automatic", "not_allowed": "not automatic", "never": "never automatic"}
DEFAULT_ACTIONS = (ImmediateAction.STOP_TRAINING, ImmediateAction.ISOLATE_DATA)


@api_command(app, "list", columns=COLUMNS)
def list_incidents(
    session: ApiSession,
    status: Annotated[IncidentStatus | None, Option("--status", help="Only open, or only resolved ones.")] = None,
    limit: LimitOption = 50,
    offset: OffsetOption = 0,
) -> object:
    """Incidents, newest first."""
    return session.client.incidents.list(status, limit, offset)


@api_command(app, "show")
def show_incident(session: ApiSession, incident_id: IncidentArgument) -> object:
    """One incident: its timeline, and the commands that the runbook proposes."""
    incident = session.client.incidents.get(incident_id)
    if session.as_json:
        return incident
    facts = plain(incident)
    steps, timeline = facts.pop("proposals"), facts.pop("timeline")
    show_fields(facts)
    console.print("\n[bold]what the runbook says[/]")
    for step in steps:
        outcome = f"; {step['outcome']}: {step['detail'] or 'under way'}" if step["outcome"] else ""
        console.print(f"[bold]{step['name']}[/] ({_AUTOMATIC[step['automatic']]}{outcome})", highlight=False)
        # To be copied: a table would break the lines.
        typer.echo(step["command"])
    console.print("\n[bold]timeline[/]")
    show_rows([entry | {"at": entry["at"][:19]} for entry in timeline], "at", "kind", "actor", "text")
    return None


@local_command(app, "contacts")
def contacts(options: Options) -> None:
    """Whom to call, by role, as the setting incidents.contacts says."""
    found = settings_in_force(options).incidents.contacts
    if not found and not options.as_json:
        raise NotFoundError("No contacts are configured.", cure="Set incidents.contacts, a mapping of roles to texts.")
    show(found, options.as_json)


@api_command(app, "note", change=True)
def note(
    session: ApiSession,
    incident_id: IncidentArgument,
    text: Annotated[str, Argument(help="The text of the note.")],
    section: Annotated[Section, Option("--section", help="Section of the report.")] = Section.REMARK,
) -> None:
    """Add a note; notes are never changed."""
    incidents = session.client.incidents
    noted = session.change(
        lambda: incidents.add_note(incident_id, text, section=section),
        present=lambda: {"status": incidents.get(incident_id).status},
    )
    show_text(f"Noted for {noted.incident_id}.", plain(noted), session.as_json)


@api_command(app, "report")
def report(session: ApiSession, incident_id: IncidentArgument) -> object:
    """The runbook's report template in Markdown, filled with what is known; the rest is left blank."""
    text = session.client.incidents.report(incident_id)
    if session.as_json:
        return {"report": text}
    typer.echo(text, nl=False)
    return None


@api_command(emergency, "status")
def emergency_status(session: ApiSession) -> object:
    """Whether an incident is in force, which clients are in quarantine, and whether training runs."""
    return _emergency_facts(session.client)


@api_command(emergency, "privacy-breach", confirm=True)
def privacy_breach(
    session: ApiSession,
    incident_id: BreachArgument,
    clients: Annotated[list[str] | None, Option("--client", help="An affected client (repeatable).")] = None,
    breach_type: Annotated[str, Option("--breach-type", help="What happened, in a word.")] = "data_exposure",
    actions: Annotated[
        list[ImmediateAction] | None,
        Option("--action", help="An immediate action (repeatable; default: stop_training and isolate_data)."),
    ] = None,
    description: Annotated[str | None, Option("--description", help="What happened, in words.")] = None,
) -> object:
    """Contain a privacy breach, and collect the evidence; harmless when repeated.

    The ledger is frozen, training ends, and the clients are quarantined and their tokens revoked, whatever --action
    says. The model is rolled back, to the last version without their contributions, only when --action asks for it.
    """
    client, affected = session.client, clients or []
    return session.change(
        lambda: client.emergency.privacy_breach(
            incident_id,
            affected_clients=affected,
            breach_type=breach_type,
            immediate_actions=actions or DEFAULT_ACTIONS,
            description=description,
        ),
        present=lambda: {
            **_emergency_facts(client),
            "affected": [name for name in affected if _is_known(client, name)],
            "unknown_clients": [name for name in affected if not _is_known(client, name)],
        },
        question=f"Act on the breach {incident_id} now?",
    )


@api_command(emergency, "stand-down", confirm=True)
def stand_down(
    session: ApiSession,
    incident_id: BreachArgument,
    justification: Annotated[str, Option("--justification", help="Why it is over.")],
) -> object:
    """End an incident: the ledger thaws; clients stay in quarantine until each is reinstated."""
    client = session.client
    return session.change(
        lambda: client.emergency.stand_down(incident_id, justification),
        present=lambda: _emergency_facts(client),
        question=f"Declare the incident {incident_id} over, so that the ledger may be charged again?",
    )


@local_command(options=("as_json",))
def drill(
    options: Options,
    names: Annotated[list[str] | None, Argument(metavar="NAME...", help="Which drills; `all`, or `short`.")] = None,
    list_: Annotated[bool, Option("--list", help="List the drills, and run none.")] = False,
    docs: Annotated[Path | None, Option(help="Also write drills.json and drills.md into this folder.")] = None,
) -> None:
    """Cause an incident on a real system, and resolve it as the runbook says; status 1 unless all drills pass.

    It runs in the folder of a checkout, on the real ports and in a temporary state folder. The incidents of a system in
    service are in `fedvit incident`.
    """
    # A signal must not leave a system running.
    with interruptible():
        from fedvit.incidents.drills.engine import run_drills
        from fedvit.incidents.drills.report import as_dicts, show_drills, show_result, show_table, write_docs
        from fedvit.incidents.drills.scenarios import drills_named

        if list_:
            show_drills(console, options.as_json)
            return
        if not names:
            raise UsageError("No drill is named.", cure="Name some, or `all`; `fedvit drill --list` shows them.")

        def say(line: str) -> None:
            typer.echo(line, err=True)

        results = run_drills(drills_named(names), Path.cwd(), say, lambda result: say(show_result(result)))
        if docs is not None:
            write_docs(docs, results, f"fedvit drill {' '.join(names)}")
        if options.as_json:
            print_json(as_dicts(results))
        else:
            show_table(console, results)
        if any(result.verdict == "failed" for result in results):
            raise typer.Exit(1)


def _emergency_facts(client: FedvitClient) -> dict[str, Any]:
    return {**plain(client.emergency.status()), "training": client.training.status().status}


def _is_known(client: FedvitClient, name: str) -> bool:
    try:
        client.clients.get(name)
    except NotFoundError:
        return False
    return True

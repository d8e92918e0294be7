"""One command's session with a control API: its address, token, confirmation, dry run and waiting."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

import typer

from fedvit.cli.options import STATE_OR_API, Options, report_errors, with_options
from fedvit.cli.output import console, errors, plain, print_json, progress_bar, show, show_fields
from fedvit.cli.state import open_existing_store, required_system, trusted_certificate
from fedvit.errors import FedvitError, InterruptedRunError, UnauthorizedError, UsageError

if TYPE_CHECKING:
    import httpx

    from fedvit.api.system import OperationView
    from fedvit.client import FedvitClient
    from fedvit.config import Settings
    from fedvit.store.store import Store

T = TypeVar("T")
P = ParamSpec("P")

POLL_S = 0.25
_TOKEN_CURE = "Set FEDVIT_TOKEN to a token of `fedvit token create`."  # noqa: S105 - no secret
# Another way than the network; tests put an application here.
TRANSPORT: httpx.BaseTransport | None = None


class _HeldBackError(Exception):
    """Carries the request that a dry run does not send."""

    def __init__(self, request: httpx.Request) -> None:
        super().__init__(str(request.url))
        self.request = request


@dataclass(frozen=True, slots=True)
class ApiSession:
    """The client of the control API, the settings, and the options of the command."""

    client: FedvitClient
    settings: Settings
    options: Options

    @property
    def as_json(self) -> bool:
        """Whether the command prints one JSON document."""
        return self.options.as_json

    def change(self, call: Callable[[], T], *, present: Callable[[], Any], question: str | None = None) -> T:
        """Make a change by ``call``: only show it in a dry run, and first ask the ``question`` where there is one.

        ``present`` reads what the change affects; called for a dry run and before a question, never with ``--yes``.

        Raises:
            UsageError: a confirmation is needed, and standard input is no terminal.
        """
        if self.options.dry_run:
            self._show_dry_run(call, plain(present()))
        if question is not None and not self.options.yes:
            _confirm(question, lambda: plain(present()))
        return call()

    def show(self, value: Any, *columns: str) -> None:
        """Print a response."""
        show(value, self.as_json, *columns)

    def finish(self, operation: OperationView, *, no_wait: bool = False, timeout_s: float | None = None) -> None:
        """Follow an operation to its end, and print it; status 1 when it did not succeed."""
        result = operation if no_wait else self._follow(operation, timeout_s)
        self.show(result)
        if result.status.ended and result.status != "succeeded":
            words = f"The operation {result.operation_id} is {result.status}."
            errors.print(f"[bold red]Error:[/] {words}", highlight=False)
            raise typer.Exit(1)

    def _follow(self, operation: OperationView, timeout_s: float | None) -> OperationView:
        name = operation.operation_id
        with progress_bar(errors, quiet=self.as_json) as update:

            def on_progress(now: OperationView) -> None:
                update(total=1.0, completed=now.progress, description=now.kind, text=now.stage)

            try:
                return self.client.operations.wait(operation, timeout_s, on_progress)
            except KeyboardInterrupt:
                cure = f"`fedvit operation wait {name}` waits again, `fedvit operation cancel {name}` ends it."
                raise InterruptedRunError(f"The operation {name} goes on.", cure=cure) from None

    def _show_dry_run(self, call: Callable[[], object], present: Mapping[str, Any]) -> NoReturn:
        try:
            call()
        except _HeldBackError as error:
            request = error.request
        else:
            raise AssertionError("a dry run sent its request")
        facts: dict[str, Any] = {"method": request.method, "url": str(request.url)}
        facts |= {"body": json.loads(request.content)} if request.content else {}
        facts |= {"if_match": request.headers["If-Match"]} if "If-Match" in request.headers else {}
        if self.as_json:
            print_json({"dry_run": True, "request": facts, "present": present})
        else:
            console.print("[bold]At present[/]")
            show_fields(present)
            console.print("\n[bold]Would be sent[/] (nothing was)")
            typer.echo(f"{facts.pop('method')} {facts.pop('url')}")
            show_fields(facts)
        raise typer.Exit


def api_command(
    app: typer.Typer | None = None,
    name: str | None = None,
    *,
    columns: Sequence[str] = (),
    change: bool = False,
    confirm: bool = False,
) -> Callable[[Callable[Concatenate[ApiSession, P], object]], Callable[..., None]]:
    """Decorator of a command that calls the control API: adds the shared options and prints what it returns.

    The command receives an :class:`ApiSession` as its first argument. It returns the response to print, or None when
    it has printed itself.

    Args:
        app: the group that the command is added to, as ``name``; None to add it elsewhere.
        name: of the command.
        columns: columns of the table, where a sequence is printed; all by default.
        change: the command changes something; adds ``--dry-run``.
        confirm: the change is confirmed before it is made; adds ``--yes``, too.
    """
    names = [*(["yes"] if confirm else []), *(["dry_run"] if change or confirm else [])]

    def decorate(function: Callable[Concatenate[ApiSession, P], object]) -> Callable[..., None]:
        def invoke(options: Options, values: dict[str, Any]) -> None:
            with api_session(options) as session:
                response = function(session, **values)  # type: ignore[call-arg]
                if response is not None:
                    session.show(response, *columns)

        command = with_options(function, [*names, *STATE_OR_API], invoke)
        return command if app is None else app.command(name)(command)

    return decorate


@contextlib.contextmanager
def api_session(options: Options) -> Iterator[ApiSession]:
    """A session with the control API that the user named, or with that of the system on --home; reports errors."""
    with report_errors(options.as_json):
        settings = options.settings()
        base_url = options.named_url
        if base_url is None:
            cure = "Start it with `fedvit up`, or name a control API with --url."
            base_url = required_system(settings.home, cure).urls.control
        with control_client(base_url, settings, _hold_back if options.dry_run else None) as client:
            yield ApiSession(client, settings, options)


def read_api_or_store(
    options: Options, from_api: Callable[[FedvitClient], object], from_store: Callable[[Store, Settings], Any]
) -> Any:
    """JSON types from the control API that the user named; without one, from the state folder."""
    if options.named_url is not None:
        with api_session(options) as session:
            return plain(from_api(session.client))

    settings = options.settings()
    with open_existing_store(settings) as store:
        return from_store(store, settings)


@contextlib.contextmanager
def control_client(
    base_url: str, settings: Settings, before_change: Callable[[httpx.Request], None] | None = None
) -> Iterator[FedvitClient]:
    """A client of a control API, with the token of FEDVIT_TOKEN and the certificate of the system."""
    # Imported here to keep `fedvit --help` fast.
    from fedvit.client import FedvitClient

    with FedvitClient(
        base_url,
        environment_token(),
        verify=trusted_certificate(settings) or True,
        transport=TRANSPORT,
        before_change=before_change,
    ) as client:
        try:
            yield client
        except UnauthorizedError as error:
            raise UnauthorizedError(error.message, cure=_TOKEN_CURE, **error.details) from None


def check_token(settings: Settings) -> None:
    """Raise UnauthorizedError, before anything is started, where a token is demanded and FEDVIT_TOKEN is empty."""
    if settings.access.mode == "tokens" and environment_token() is None:
        raise UnauthorizedError("This system demands a token.", cure=_TOKEN_CURE, reason="missing")


def environment_token() -> str | None:
    """The user's token, from FEDVIT_TOKEN."""
    return os.environ.get("FEDVIT_TOKEN", "").strip() or None


def _hold_back(request: httpx.Request) -> NoReturn:
    raise _HeldBackError(request)


def _confirm(question: str, present: Callable[[], Mapping[str, Any]]) -> None:
    if not is_terminal():
        raise UsageError(
            "This must be confirmed, and standard input is no terminal.",
            cure="Repeat it with --yes, or look first with --dry-run.",
        )
    show_fields(present(), errors)
    if not typer.confirm(question, err=True):
        raise FedvitError("Nothing was sent.")


def is_terminal() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin.isatty()

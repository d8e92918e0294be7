"""Shared command-line options, and the decorator that adds them to a command."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, get_type_hints

import typer
from rich.markup import escape
from typer import Option

from fedvit.cli.output import errors, print_json, show_traceback
from fedvit.errors import ConfigError, FedvitError

if TYPE_CHECKING:
    from fedvit.config import Settings

P = ParamSpec("P")

NoWaitOption = Annotated[bool, Option("--no-wait", help="Return at once instead of waiting for the end.")]
LimitOption = Annotated[int, Option("--limit", min=1, max=1000, help="Largest number of rows.")]
OffsetOption = Annotated[int, Option("--offset", min=0, help="Number of rows to skip first.")]
IfMatchOption = Annotated[
    int | None, Option("--if-match", min=0, help="Change only if the current revision is this one.")
]


# Options of commands on a state folder; on one, or on a control API; on a system that may have to be started.
STATE = ("home", "config", "as_json")
STATE_OR_API = ("home", "url", "config", "as_json")
SYSTEM = ("home", "config", "data", "assignments", "as_json")


@dataclass(frozen=True, slots=True)
class Options:
    """The values of the shared options of one call.

    A command offers the options that it names in :func:`local_command`; the others keep their defaults.
    """

    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask for confirmation.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Show the present state and the request; change nothing.")] = (
        False
    )
    home: Annotated[Path | None, Option("--home", help="State folder (default: FEDVIT_HOME, or ./var).")] = None
    url: Annotated[
        str | None, Option("--url", help="Address of a control API (default: FEDVIT_URL, or the system on --home).")
    ] = None
    config: Annotated[Path | None, Option("--config", "-c", help="YAML file of settings.", envvar="FEDVIT_CONFIG")] = (
        None
    )
    data: Annotated[Path | None, Option("--data", help="The data set: a folder, a zip or a wheel.")] = None
    assignments: Annotated[
        list[str] | None, Option("--set", help="Override one setting: --set training.rounds=5 (repeatable).")
    ] = None
    as_json: Annotated[bool, Option("--json", help="Print one JSON document.")] = False

    @property
    def named_url(self) -> str | None:
        """The control API that the user named: --url, or FEDVIT_URL where neither --url nor --home is given."""
        url = self.url if self.url is not None or self.home is not None else os.environ.get("FEDVIT_URL", "")
        return (url or "").strip() or None

    def settings(self, *assignments: str) -> Settings:
        """Settings from --config, --home, --data and --set; ``assignments`` follow those of --set."""
        return settings_from(self.config, self.home, self.data, [*(self.assignments or []), *assignments])


def settings_from(
    config: Path | None, home: Path | None = None, data: Path | None = None, assignments: Sequence[str] = ()
) -> Settings:
    """Settings from a file, overridden by a state folder, a data set and assignments (``section.key=value``)."""
    # Imported here to keep `fedvit --help` fast.
    from fedvit.settings import load_settings

    overrides: dict[str, Any] = {}
    for assignment in assignments:
        _assign(overrides, assignment)
    if home is not None:
        overrides["home"] = home
    if data is not None:
        overrides.setdefault("data", {})["path"] = data.absolute()
    return load_settings(config, overrides=overrides)


def _assign(tree: dict[str, Any], assignment: str) -> None:
    import yaml

    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment!r} has no value.", cure="Write --set section.key=value.")
    *sections, key = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = yaml.safe_load(text)


@contextmanager
def report_errors(as_json: bool = False) -> Iterator[None]:
    """Print a :class:`FedvitError` as one sentence, without a stack trace, and exit with its status."""
    try:
        yield
    except FedvitError as error:
        if as_json:
            print_json({"error": error.code, "message": error.message, "cure": error.cure})
        if "traceback" in error.details:
            show_traceback(str(error.details["traceback"]))
        # A message may contain square brackets, which are markup to Rich.
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_status) from None


def local_command(
    app: typer.Typer | None = None, name: str | None = None, *, options: Sequence[str] = STATE
) -> Callable[[Callable[Concatenate[Options, P], None]], Callable[..., None]]:
    """Decorator of a command that needs no control API: adds shared options and reports errors.

    Args:
        app: the group that the command is added to, as ``name``; None to add it elsewhere.
        name: of the command.
        options: fields of :class:`Options` that the command offers. It receives their values as its first argument.
    """

    def decorate(function: Callable[Concatenate[Options, P], None]) -> Callable[..., None]:
        def invoke(values_of_options: Options, values: dict[str, Any]) -> None:
            with report_errors(values_of_options.as_json):
                function(values_of_options, **values)  # type: ignore[call-arg]

        command = with_options(function, options, invoke)
        return command if app is None else app.command(name)(command)

    return decorate


def with_options(
    function: Callable[..., object], names: Sequence[str], invoke: Callable[[Options, dict[str, Any]], None]
) -> Callable[..., None]:
    """A Typer command with the parameters of ``function`` but its first, and the shared options called ``names``.

    ``invoke`` runs the command on the shared options and the values of the other parameters.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    parameters = [*own, *(SHARED[name] for name in names)]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        invoke(Options(**{name: values.pop(name) for name in names}), values)

    # Rich would keep the line breaks of a docstring.
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    command.__doc__ = "\n\n".join(" ".join(paragraph.splitlines()) for paragraph in paragraphs)
    # Typer reads both.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


_ANNOTATIONS = get_type_hints(Options, include_extras=True)
# Parameters of Typer commands, by the field of :class:`Options` that they set.
SHARED = {
    field.name: inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_ANNOTATIONS[field.name]
    )
    for field in fields(Options)
}

"""``fedvit shutdown``: end a running system over its control API."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedvit.cli.api_session import ApiSession, asking, url_given
from fedvit.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    NoWaitOption,
    UrlOption,
    YesOption,
    running_system,
)
from fedvit.cli.control import POLL_S
from fedvit.cli.output import plain
from fedvit.errors import ControlApiError, ControlUnreachableError, FedvitError

if TYPE_CHECKING:
    from fedvit.api.operations import OperationView

END_TIMEOUT_S = 120.0


def shutdown(
    mode: Annotated[
        Literal["graceful", "force"], typer.Option("--mode", help="After the round under way, or at once.")
    ] = "graceful",
    save_state: Annotated[bool, typer.Option("--save-state/--no-save-state", help="Save the state first.")] = True,
    no_wait: NoWaitOption = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a running system through its control API; `fedvit down` does it by a signal, on the same machine."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        operation = ask.change(
            lambda: ask.client.system.shutdown(mode, save_state=save_state),
            present=lambda: _standing(ask),
            question=f"Shut the whole system down ({mode})?",
        )
        if no_wait:
            ask.show(operation)
            return
        ended = _followed(ask, operation)
        if ended is not None and ended.status != "succeeded":
            ask.finish(ended)
        local = url_given(home, url) is None
        _await_end(lambda: not _answers(ask) and not (local and running_system(ask.settings.home)))
        ask.show({"stopped": True, "operation_id": operation.operation_id})


def _standing(ask: ApiSession) -> dict[str, Any]:
    health = ask.client.system.health()
    under_way = [each for each in ask.client.operations.iterate() if not each.status.ended]
    return {
        "system": health.status,
        "training": plain(health.training),
        "operations_under_way": plain(tuple(under_way)),
    }


def _followed(ask: ApiSession, operation: OperationView) -> OperationView | None:
    """The operation at its end, or None when the system was faster to go than to tell."""
    try:
        return ask.client.operations.wait(operation)
    except (ControlUnreachableError, ControlApiError):
        return None


def _answers(ask: ApiSession) -> bool:
    try:
        ask.client.system.healthz()
    except (ControlUnreachableError, ControlApiError):
        return False
    return True


def _await_end(is_gone: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while not is_gone():
        if time.monotonic() > deadline_s:
            raise FedvitError(
                f"The system was told to end, and is still there after {END_TIMEOUT_S:g} s.", cure="See `fedvit logs`."
            )
        time.sleep(POLL_S)

"""Talking to a control API, and following training through it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fedvit.cli.common import console, trusted_certificate
from fedvit.errors import UnauthorizedError

if TYPE_CHECKING:
    import httpx

    from fedvit.api.training import ProgressView
    from fedvit.client import FedvitClient
    from fedvit.config import Settings

POLL_S = 0.25
_CURE = "Set FEDVIT_TOKEN to a token of `fedvit token create`."
# Another way than the network; tests put an application here.
TRANSPORT: httpx.BaseTransport | None = None


@contextlib.contextmanager
def control_client(
    base_url: str, settings: Settings, before_change: Callable[[httpx.Request], None] | None = None
) -> Iterator[FedvitClient]:
    """A client of a control API, with the user's token, if he has set one, and the system's own certificate."""
    # Imported here: `fedvit --help` need not pay for it.
    from fedvit.client import FedvitClient

    with FedvitClient(
        base_url,
        user_token(),
        verify=trusted_certificate(settings) or True,
        transport=TRANSPORT,
        before_change=before_change,
    ) as client:
        try:
            yield client
        except UnauthorizedError as error:
            raise UnauthorizedError(error.message, cure=_CURE, **error.details) from None


def check_token(settings: Settings) -> None:
    """Say before anything is started that the control API will ask for a token.

    Raises:
        UnauthorizedError: one is demanded, and the user has set none.
    """
    if settings.access.mode == "tokens" and user_token() is None:
        raise UnauthorizedError("This system demands a token.", cure=_CURE, reason="missing")


def user_token() -> str | None:
    """The user's bearer token, from the environment."""
    return os.environ.get("FEDVIT_TOKEN", "").strip() or None


def follow_training(base_url: str, settings: Settings, *, quiet: bool) -> ProgressView:
    """Start training over the control API and follow it, with a progress bar, until it rests."""
    with control_client(base_url, settings) as client, _progress_bar(quiet) as show:
        progress = client.training.start()
        show(progress)
        while progress.status in (None, "running") or progress.phase != "resting":
            time.sleep(POLL_S)
            progress = client.training.status()
            show(progress)
    return progress


@contextlib.contextmanager
def _progress_bar(quiet: bool) -> Iterator[Callable[[ProgressView], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}  epsilon {task.fields[epsilon]}"),
        TextColumn("[dim]{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("", total=None, loss="–", accuracy="–", epsilon="–", phase="")

        def show(progress: ProgressView) -> None:
            bar.update(
                task,
                total=progress.rounds_total,
                completed=progress.rounds_done,
                phase=progress.phase,
                loss=_figure(progress.loss),
                accuracy=_figure(progress.accuracy),
                epsilon=_figure(progress.epsilon),
            )

        yield show


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def sentence(progress: ProgressView) -> str:
    """Training progress in words."""
    text = f"Training {progress.status} after {progress.rounds_done} of {progress.rounds_total} rounds"
    text += f": accuracy {_figure(progress.accuracy)}, epsilon {_figure(progress.epsilon)}."
    return f"{text} {progress.message}" if progress.message else text

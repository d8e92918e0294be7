"""Talking to a running system's control API, and following training through it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fedvit.cli.common import console
from fedvit.errors import FedvitError
from fedvit.ports import SystemUrls

if TYPE_CHECKING:
    import httpx

POLL_S = 0.25


@contextlib.contextmanager
def control_api(urls: SystemUrls) -> Iterator[httpx.Client]:
    """The control API; a connection that fails is an error that fedvit understands."""
    # Imported here: `fedvit --help` need not pay for it.
    import httpx

    with httpx.Client(base_url=urls.control, timeout=60, headers=bearer()) as client:
        try:
            yield client
        except httpx.HTTPError as error:
            raise FedvitError(f"{urls.control} does not answer: {error}.", cure="See `make logs`.") from None


def bearer() -> dict[str, str]:
    """The header that carries the user's token, if he has set one."""
    token = os.environ.get("FEDVIT_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON of a successful answer.

    Raises:
        FedvitError: the API refused; its own sentence.
    """
    if response.is_error:
        try:
            detail = response.json()["detail"]
        except (ValueError, KeyError):
            detail = response.text[:200]
        cure = "Set FEDVIT_TOKEN to a token of `fedvit token create`." if response.status_code == 401 else None
        raise FedvitError(f"The control API answered {response.status_code}: {detail}", cure=cure)
    return response.json()  # type: ignore[no-any-return]


def follow_training(urls: SystemUrls, *, quiet: bool) -> dict[str, Any]:
    """Start training over the control API and follow it, with a progress bar, until it rests."""
    with control_api(urls) as client, _progress_bar(quiet) as show:
        progress = answer_of(client.post("/api/training/start"))
        show(progress)
        while progress["status"] in (None, "running") or progress["phase"] != "resting":
            time.sleep(POLL_S)
            progress = answer_of(client.get("/api/training/status"))
            show(progress)
    return progress


@contextlib.contextmanager
def _progress_bar(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
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

        def show(progress: dict[str, Any]) -> None:
            bar.update(
                task,
                total=progress["rounds_total"],
                completed=progress["rounds_done"],
                phase=progress["phase"],
                loss=_figure(progress["loss"]),
                accuracy=_figure(progress["accuracy"]),
                epsilon=_figure(progress["epsilon"]),
            )

        yield show


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def sentence(progress: dict[str, Any]) -> str:
    """Training progress in words."""
    text = f"Training {progress['status']} after {progress['rounds_done']} of {progress['rounds_total']} rounds"
    text += f": accuracy {_figure(progress['accuracy'])}, epsilon {_figure(progress['epsilon'])}."
    return f"{text} {progress['message']}" if progress["message"] else text

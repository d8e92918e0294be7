"""Opening a state folder from the command line."""

from __future__ import annotations

from fedvit.config import Settings
from fedvit.errors import StateError
from fedvit.store.store import Store


def open_existing_store(settings: Settings) -> Store:
    """The store of a state folder that exists; a question must not make one.

    Raises:
        StateError: there is none, or it is corrupt.
    """
    if not (settings.home / "state.db").exists():
        raise StateError(
            f"There is no fedvit state at {settings.home}.", cure="Run `fedvit run`, or name the folder with --home."
        )
    return Store.open(settings.home)

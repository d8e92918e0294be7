"""Whether the state database answers."""

from __future__ import annotations

from fedvit.cli.state import open_existing_store
from fedvit.settings import environment_settings


def test_connection() -> bool:
    """Open the state database, ask it something, say in one line what it answered, and return True.

    Raises:
        ConfigError: the environment's settings are wrong.
        StateError: there is no state folder, or its database cannot be used.
    """
    settings = environment_settings()
    with open_existing_store(settings) as store:
        clients, run = store.clients.count(), store.runs.latest()
    training = f"training {run.status}" if run else "no training yet"
    print(f"The state database at {settings.home} answers: {clients} clients, {training}.")
    return True

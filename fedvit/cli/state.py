"""A state folder on the command line: opened only where it exists, changed only with a line in the audit trail."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from typing import Any

from fedvit.config import Settings
from fedvit.errors import StateError
from fedvit.store.records import AuditFacts
from fedvit.store.store import Store


def open_existing_store(settings: Settings) -> Store:
    """The store of a state folder that exists; reading must not make one.

    Raises:
        StateError: there is none, or it is corrupt.
    """
    if not (settings.home / "state.db").exists():
        raise StateError(
            f"There is no fedvit state at {settings.home}.", cure="Run `fedvit run`, or name the folder with --home."
        )
    return Store.open(settings.home)


def local_actor() -> str:
    """The user of this machine's command line, for the audit trail."""
    try:
        return f"local:{getpass.getuser()}"
    except (KeyError, OSError):  # In a container the user may have no name.
        return f"local:{os.getuid()}"


def audit_local(store: Store, action: str, params: Mapping[str, Any]) -> None:
    """Write one change that was made on the command line to the audit trail; ``action`` begins with ``CLI``."""
    store.audit.append(
        AuditFacts(
            actor=local_actor(),
            scopes=(),
            source="local",
            request_id="cli",
            action=action,
            params=params,
            before=None,
            after=None,
            status=200,
        )
    )

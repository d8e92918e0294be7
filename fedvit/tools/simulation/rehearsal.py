"""Faulty clients in a real system, for drills; only in a state folder that a drill has created."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fedvit.clients.workload import check_no_workload
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.errors import ConfigError, StateError
from fedvit.ports import ClientHostPort
from fedvit.tools.simulation.faults import Faults

REHEARSAL_FILE = "rehearsal"
"""A file of this name marks a temporary state folder of a drill."""
ACTIVE_FILE = "rehearsal-begun"
"""Faults occur while the state folder has a file of this name."""


def allow_rehearsal(home: Path) -> None:
    """Mark an empty state folder as one in which clients may be faulty.

    Raises:
        StateError: the folder holds a state.
    """
    if (home / "state.db").exists():
        raise StateError(f"{home} holds a state.", cure="Rehearse in an empty folder.")
    home.mkdir(parents=True, exist_ok=True)
    (home / REHEARSAL_FILE).touch()


def check_rehearsal(settings: Settings) -> None:
    """Check that faults are configured only in the state folder of a drill.

    Raises:
        ConfigError: ``drill.faults`` is set, and no drill has created the state folder, or there is a workload.
    """
    if settings.drill.faults:
        check_no_workload(settings, "A drill with faulty clients")
    if settings.drill.faults and not (settings.home / REHEARSAL_FILE).exists():
        raise ConfigError(
            f"drill.faults makes clients poison the model, and {settings.home} is no drill's folder.",
            cure="Leave drill.faults out; `fedvit drill high-loss` rehearses it in a folder of its own.",
        )


def activate_faults(home: Path) -> None:
    """Let faults occur from each client's next task on."""
    (home / ACTIVE_FILE).touch()


def faulty_clients(settings: Settings) -> Collection[str]:
    """The ids of the faulty clients, sorted."""
    return sorted(_faults(settings).of)


def rehearsed_host(settings: Settings) -> ClientHostPort:
    """The client host of a client proxy if ``drill.faults`` is set.

    Raises:
        ConfigError: see :func:`check_rehearsal`.
    """
    check_rehearsal(settings)
    # Imported here: these modules load torch.
    from fedvit.clients.workload import limit_threads
    from fedvit.tools.simulation.clients import faulty_host

    return limit_threads(settings, faulty_host(settings, _faults(settings), (settings.home / ACTIVE_FILE).exists))


def _faults(settings: Settings) -> Faults:
    ids = [client.client_id for client in VirtualFleet.open(settings.data).clients()]
    return Faults(settings.drill.faults, ids, settings.data.partition.seed)

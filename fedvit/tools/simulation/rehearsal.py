"""Clients that lie in a real system, for drills: only in a state folder that a drill has made for it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fedvit.config import Settings
from fedvit.data.fleet import VirtualFleet
from fedvit.errors import ConfigError, StateError
from fedvit.ports import ClientHostPort
from fedvit.tools.simulation.faults import Faults

MARK = "rehearsal"
"""A file of this name says that nothing in its state folder is worth keeping."""
BEGUN = "rehearsal-begun"
"""While there is a file of this name, faulty clients lie; before, they are as honest as the others."""


def allow_rehearsal(home: Path) -> None:
    """Mark a state folder, before anything is in it, as one in which clients may lie.

    Raises:
        StateError: there is a state already.
    """
    if (home / "state.db").exists():
        raise StateError(f"{home} holds a state.", cure="Rehearse in an empty folder.")
    home.mkdir(parents=True, exist_ok=True)
    (home / MARK).touch()


def check_rehearsal(settings: Settings) -> None:
    """Make sure that clients lie in a rehearsal only.

    Raises:
        ConfigError: the settings let clients lie, and the state folder is none that a drill has made.
    """
    if settings.drill.faults and not (settings.home / MARK).exists():
        raise ConfigError(
            f"drill.faults makes clients poison the model, and {settings.home} is no drill's folder.",
            cure="Leave drill.faults out; `fedvit drill high-loss` rehearses it in a folder of its own.",
        )


def begin_lying(home: Path) -> None:
    """Let faulty clients lie from their next task on."""
    (home / BEGUN).touch()


def faulty_clients(settings: Settings) -> Collection[str]:
    """Those that lie, sorted."""
    return sorted(_faults(settings).of)


def rehearsed_host(settings: Settings) -> ClientHostPort:
    """What a client proxy hosts where ``drill.faults`` is set.

    Raises:
        ConfigError: see :func:`check_rehearsal`.
    """
    check_rehearsal(settings)
    # torch, only where clients train.
    from fedvit.clients.workload import limit_threads
    from fedvit.tools.simulation.learners import faulty_host

    host = faulty_host(settings, _faults(settings), (settings.home / BEGUN).exists)
    limit_threads(settings)
    return host


def _faults(settings: Settings) -> Faults:
    ids = [client.client_id for client in VirtualFleet.open(settings.data).clients()]
    return Faults(settings.drill.faults, ids, settings.data.partition.seed)

"""The folder of a sweep: what it is, and what every finished trial came to. A killed sweep goes on from here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedvit.atomic_write import write_atomically
from fedvit.config import Settings
from fedvit.errors import ConflictError, StateError
from fedvit.privacy.secrets import load_or_create_root_secret
from fedvit.store.locks import system_lock
from fedvit.tools.sweep.outcome import TrialOutcome
from fedvit.tools.sweep.space import TrialPlan, sweep_digest


class Journal:
    """One file a finished trial, written whole or not at all.

    Args:
        folder: made when the sweep begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trials = folder / "trials"
        self._identity = folder / "sweep.json"

    def check(self, settings: Settings) -> None:
        """Whether this folder is free, or this very sweep's; nothing is written.

        Raises:
            ConflictError: it is another sweep's.
        """
        if not self._identity.exists():
            return
        if json.loads(self._identity.read_text()).get("digest") != sweep_digest(settings):
            raise ConflictError(
                f"{self.folder} holds a sweep with other settings.",
                cure="Repeat those to go on with it, or name another folder with --to.",
            )

    @contextmanager
    def working(self, settings: Settings) -> Iterator[None]:
        """Have the folder to oneself.

        Raises:
            ConflictError: it is another sweep's.
            StateError: another process works on it.
        """
        self._trials.mkdir(parents=True, exist_ok=True)
        try:
            lock = system_lock(self.folder)
            lock.__enter__()
        except StateError:
            raise StateError(
                f"Another process works on the sweep in {self.folder}.",
                cure="Wait for its end, or name another folder with --to.",
            ) from None
        try:
            self.check(settings)
            write_atomically(self._identity, json.dumps({"digest": sweep_digest(settings)}))
            yield
        finally:
            lock.__exit__(None, None, None)

    def secret(self) -> bytes:
        """The sweep's key, behind the noise of all its trials; made once, so that an interrupted trial repeats itself.

        Raises:
            StateError: somebody changed it.
        """
        return load_or_create_root_secret(self.folder)

    def write(self, outcome: TrialOutcome) -> None:
        """Remember a trial that will not be run again."""
        text = json.dumps(outcome.to_json(), allow_nan=False)
        write_atomically(self._trials / f"{outcome.trial_id}.json", text)

    def finished(self, plans: list[TrialPlan]) -> list[TrialOutcome]:
        """What is known of these trials, in their order.

        Raises:
            StateError: a file is not what this program wrote.
        """
        paths = [self._trials / f"{plan.trial_id}.json" for plan in plans]
        return [_read(path) for path in paths if path.exists()]


def _read(path: Path) -> TrialOutcome:
    try:
        return TrialOutcome.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise StateError(f"{path} cannot be read: {error}.", cure="Delete it; its trial is then run again.") from None

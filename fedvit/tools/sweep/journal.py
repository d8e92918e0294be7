"""Journal of a sweep: its identity and the outcomes of finished trials, from which a killed sweep continues."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedvit.atomic_write import write_atomically
from fedvit.config import Settings
from fedvit.errors import ConflictError, StateError
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.private_files import open_private_folder
from fedvit.store.locks import system_lock
from fedvit.tools.sweep.outcome import FAILED, TrialOutcome
from fedvit.tools.sweep.space import TrialPlan, sweep_digest


class Journal:
    """A folder with one file for each finished trial, written atomically.

    Args:
        folder: created when the sweep begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trials = folder / "trials"
        self._identity = folder / "sweep.json"

    def check(self, settings: Settings) -> None:
        """Check that the folder is unused or belongs to this sweep; nothing is written.

        Raises:
            ConflictError: the folder belongs to another sweep.
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
        """Lock the folder.

        Raises:
            ConflictError: the folder belongs to another sweep.
            StateError: another process has locked it.
        """
        # It will hold a secret, see :meth:`secret`.
        open_private_folder(self.folder)
        self._trials.mkdir(exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(system_lock(self.folder))
            except StateError:
                raise StateError(
                    f"Another process works on the sweep in {self.folder}.",
                    cure="Wait for its end, or name another folder with --to.",
                ) from None
            self.check(settings)
            write_atomically(self._identity, json.dumps({"digest": sweep_digest(settings)}))
            yield

    def secret(self) -> bytes:
        """The secret of the noise of all trials; created once, so that an interrupted trial can be repeated.

        Raises:
            StateError: the file was changed.
        """
        return load_or_create_root_secret(self.folder)

    def write(self, outcome: TrialOutcome) -> None:
        """Store the outcome of a trial that has ended."""
        text = json.dumps(outcome.to_json(), allow_nan=False)
        write_atomically(self._trials / f"{outcome.trial_id}.json", text)

    def finished(self, plans: list[TrialPlan]) -> list[TrialOutcome]:
        """The outcomes of those trials that need not be run again: all that ended, except for those that failed.

        Raises:
            StateError: a file cannot be read.
        """
        return [outcome for outcome in self.outcomes(plans) if outcome.status != FAILED]

    def outcomes(self, plans: list[TrialPlan]) -> list[TrialOutcome]:
        """The stored outcomes of these trials, in their order, also of those that failed.

        Raises:
            StateError: a file cannot be read.
        """
        outcomes = []
        for path in (self._trials / f"{plan.trial_id}.json" for plan in plans):
            try:
                if path.exists():
                    outcomes.append(TrialOutcome.from_json(json.loads(path.read_text())))
            except (ValueError, TypeError) as error:
                cure = "Delete it; its trial is then run again."
                raise StateError(f"{path} cannot be read: {error}.", cure=cure) from None
        return outcomes

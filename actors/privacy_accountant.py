"""The privacy accountant as an actor: one process writes the ledger, all others ask it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from actors.handles import forwards
from fedvit.ports import AccountantPort, Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import settings_from_json


@forwards(AccountantPort, "_ready")
class PrivacyAccountantActor:
    """Runs a :class:`fedvit.privacy.PrivacyAccountant`; a restart reads the ledger again."""

    def __init__(self, settings_json: str) -> None:
        self._accountant = PrivacyAccountant(settings=settings_from_json(settings_json))
        self._ahead = ThreadPoolExecutor(max_workers=1)

    def prepare(self) -> int:
        """Return the process id once the ledger is read."""
        return os.getpid()

    def charge(self, charges: Sequence[Charge]) -> None:
        """See :meth:`fedvit.privacy.PrivacyAccountant.write`; the budget is composed while clients train."""
        self._accountant.write(charges)
        self._ahead.submit(self._accountant.budget)

    def _ready(self) -> PrivacyAccountant:
        return self._accountant

"""The privacy accountant over the ledger of the state folder."""

from __future__ import annotations

from fedvit.cli.state import open_existing_store
from fedvit.config import Settings
from fedvit.privacy.accountant import PrivacyAccountant as _PrivacyAccountant
from fedvit.settings import environment_settings
from fedvit.store.store import Store


class PrivacyAccountant(_PrivacyAccountant):
    """fedvit's own; without a store it opens that of the environment's settings, which must exist.

    Raises:
        ConfigError: the environment's settings are wrong.
        StateError: there is no state folder, or its database cannot be used.
    """

    def __init__(self, store: Store | None = None, settings: Settings | None = None) -> None:
        settings = settings or environment_settings()
        super().__init__(store or open_existing_store(settings), settings)

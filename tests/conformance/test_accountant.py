"""The accountant port: real, simulated without privacy, and the shipped double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from contracts.accountant import AccountantContract

from fedvit.errors import ConflictError
from fedvit.ports import AccountantPort
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import GenerousAccountant
from fedvit.tools.simulation.server import NoPrivacy


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        yield opened


class TestPrivacyAccountant(AccountantContract):
    @pytest.fixture
    def accountant(self, store: Store) -> AccountantPort:
        return PrivacyAccountant(store, load_settings(environ={}, overrides={"home": store.home}))


class TestGenerousAccountant(AccountantContract):
    enforces = False

    @pytest.fixture
    def accountant(self, store: Store) -> AccountantPort:
        return GenerousAccountant(store)


class TestNoPrivacy(AccountantContract):
    keeps_ledger = enforces = False

    @pytest.fixture
    def accountant(self, tmp_path: Path) -> AccountantPort:
        return NoPrivacy(load_settings(environ={}, overrides={"home": tmp_path}))

    def test_a_new_budget_begins_a_period_once_for_each_key(self, accountant: AccountantPort) -> None:
        with pytest.raises(ConflictError):
            accountant.reset_budget(1.0, "there is none", "someone")

"""Differential privacy: events, epsilon, the accountant of the ledger, mechanisms and secret randomness.

``PrivacyAccountant`` is importable from here for the runbook; it is loaded on first use, because it imports the store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedvit.privacy.accountant import PrivacyAccountant

__all__ = ["PrivacyAccountant"]


def __getattr__(name: str) -> Any:
    if name == "PrivacyAccountant":
        from fedvit.privacy.accountant import PrivacyAccountant

        return PrivacyAccountant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

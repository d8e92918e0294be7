"""Python client of the control API: one method for each route, frozen values, errors of :mod:`fedvit.errors`.

::

    with FedvitClient("http://127.0.0.1:8000", token=TOKEN) as fedvit:
        release = fedvit.model.rollback("v1.1.3", force=True)
        operation = fedvit.operations.wait(fedvit.model.retrain("fine_tune"))
"""

from __future__ import annotations

from fedvit.client.client import FedvitClient

__all__ = ["FedvitClient"]

"""Vehicles that only show that they are there: ``python -m fedvit.incidents.drills.beacons URL INTERVAL_S NAME...``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from fedvit.client import FedvitClient
from fedvit.errors import FedvitError


def beat(url: str, interval_s: float, names: Sequence[str]) -> None:
    """Send a heartbeat for each, again and again; a line that is cut is none of their business."""
    while True:
        with FedvitClient(url) as client:
            for name in names:
                try:
                    client.clients.heartbeat(name)
                except FedvitError:
                    break
        time.sleep(interval_s)


if __name__ == "__main__":
    beat(sys.argv[1], float(sys.argv[2]), sys.argv[3:])

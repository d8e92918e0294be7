"""What the runbook leaves to the operator, what the drill puts there, and what happens to somebody who forgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from drill import Drill

DEVICE = "truck-7"
LOOPBACK = "127.0.0.1"
SHELL = 0


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One of them.

    Attributes:
        text: as it is printed.
        value: what the drill puts there.
        refusals: HTTP statuses, one of which it gets as printed; ``SHELL`` where bash itself refuses; none where it is
            not tried.
        help_in: the member of the problem document that says what would be right.
    """

    text: str
    value: Callable[[Drill], str]
    refusals: tuple[int, ...] = ()
    help_in: str = "detail"


def doubted(drill: Drill) -> str:
    """A simulated vehicle, always the same."""
    clients = drill.get("/api/clients/status?limit=1000")["clients"]
    return str(min(client["client_id"] for client in clients if client["kind"] == "virtual"))


def older_version(drill: Drill) -> str:
    """The printed version where it exists, else the oldest."""
    versions = [item["version"] for item in drill.get("/api/model/versions?limit=1000")]
    return "v1.2.3" if "v1.2.3" in versions else str(versions[-1])


def archive(drill: Drill) -> str:
    """The newest backup in the folder."""
    return max(path.name for path in drill.checkout.glob("fedvit-backup-*.bak"))


# In the order in which a command's own are filled: until the first is, the command is tried with all of them in it.
PLACEHOLDERS = (
    Placeholder("<admin-token>", lambda drill: drill.tokens["admin"], (401,), "cure"),
    Placeholder("<emergency-token>", lambda drill: drill.tokens["emergency"], (401,), "cure"),
    Placeholder("{...}", lambda _: '{"camera": "front"}', (400,), "example"),
    Placeholder('"..."', lambda _: '"Agreed with the privacy officer, for a drill."', (422,)),
    Placeholder("<device-id>", lambda _: DEVICE, (404, 422)),
    Placeholder("v1.2.3", older_version, (404,), "cure"),
    Placeholder("<edge-device-ip>", lambda _: LOOPBACK, (SHELL,)),
    Placeholder("<client-subnet>", lambda _: LOOPBACK, (SHELL,)),
    Placeholder("<client-id>", doubted),
    Placeholder("<incident-id>", lambda drill: str(drill.memory["incident_id"])),
    Placeholder("<backup-file>", archive),
    Placeholder("<incident>", lambda drill: str(drill.get("/api/incidents")[0]["incident_id"]), (SHELL,)),
)

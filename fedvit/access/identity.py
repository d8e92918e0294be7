"""Who asks, and what that allows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from fedvit.errors import ConfigError, ForbiddenError


class Scope(StrEnum):
    """What a token may be good for. Admin implies operator implies viewer; the others stand alone."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    EMERGENCY = "emergency"
    DEVICE = "device"
    ALERTS = "alerts"


# Who answers an incident must see what is going on; nothing else is implied by it, nor does an admin stand in for it.
_IMPLIED: dict[Scope, frozenset[Scope]] = {
    Scope.VIEWER: frozenset({Scope.VIEWER}),
    Scope.OPERATOR: frozenset({Scope.VIEWER, Scope.OPERATOR}),
    Scope.ADMIN: frozenset({Scope.VIEWER, Scope.OPERATOR, Scope.ADMIN}),
    Scope.EMERGENCY: frozenset({Scope.VIEWER, Scope.EMERGENCY}),
    Scope.DEVICE: frozenset({Scope.DEVICE}),
    Scope.ALERTS: frozenset({Scope.ALERTS}),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks.

    Attributes:
        actor: the name that the audit trail keeps; unique to a token, a subject, or ``anonymous``.
        scopes: as granted, without what they imply.
        authenticated: whether a token proved it; if not, this is the open loopback mode.
        client_id: the one client that its token speaks for; None binds it to none.
    """

    actor: str
    scopes: frozenset[Scope]
    authenticated: bool
    client_id: str | None = None

    def may(self, any_of: Collection[Scope]) -> bool:
        """Whether one of the scopes is granted or implied."""
        return any(wanted in _IMPLIED[held] for held in self.scopes for wanted in any_of)

    def check_speaks_for(self, client_id: str) -> None:
        """Make sure that this is no device that speaks for another client.

        Raises:
            ForbiddenError: its token is bound to another client.
        """
        if self.client_id not in (None, client_id):
            raise ForbiddenError(
                f"This token speaks for the client {self.client_id!r}.", cure="Use the token of the client you name."
            )


ANONYMOUS = Identity("anonymous", frozenset(Scope), authenticated=False)


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Scopes by name.

    Raises:
        ConfigError: there are none, or a name is unknown.
    """
    wanted = set(names)
    unknown = sorted(wanted - set(Scope))
    if unknown or not wanted:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError(f"No scope is called {found}.", cure=f"Name one or more of: {', '.join(Scope)}.")
    return frozenset(map(Scope, wanted))

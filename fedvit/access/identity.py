"""Identity of a caller, and the scopes that it may use."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from fedvit.errors import ConfigError, ForbiddenError


class Scope(StrEnum):
    """A permission of a token. Admin implies operator, and operator viewer; emergency implies viewer."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    EMERGENCY = "emergency"
    DEVICE = "device"
    ALERTS = "alerts"


# An incident responder has to see the state of the system. Admin does not imply emergency.
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
    """A caller.

    Attributes:
        actor: the name in the audit trail; unique to a token, a subject, or ``anonymous``.
        scopes: as granted, without the implied ones.
        authenticated: whether a token proved it; False in the open loopback mode.
        client_id: the only client that its token may act for; None without that restriction.
    """

    actor: str
    scopes: frozenset[Scope]
    authenticated: bool
    client_id: str | None = None

    def may(self, any_of: Collection[Scope]) -> bool:
        """Whether one of the scopes is granted or implied."""
        return any(wanted in _IMPLIED[held] for held in self.scopes for wanted in any_of)

    def check_speaks_for(self, client_id: str) -> None:
        """Make sure that the caller may act for this client.

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
        given = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError(f"No scope is called {given}.", cure=f"Name one or more of: {', '.join(Scope)}.")
    return frozenset(map(Scope, wanted))

"""Identity of a caller, the scopes that it may use, and the addresses at which callers have to prove it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from fedvit.api.transport import is_loopback
from fedvit.config import Settings
from fedvit.errors import ConfigError, ForbiddenError

_EVERYWHERE = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - compared, not listened on


class Scope(StrEnum):
    """A permission of a token. Admin implies operator, and operator viewer; emergency implies viewer."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    EMERGENCY = "emergency"
    DEVICE = "device"
    RELEASES = "releases"
    ALERTS = "alerts"


# An incident responder has to see the state of the system. Admin does not imply emergency.
_IMPLIED: dict[Scope, frozenset[Scope]] = {
    Scope.VIEWER: frozenset({Scope.VIEWER}),
    Scope.OPERATOR: frozenset({Scope.VIEWER, Scope.OPERATOR}),
    Scope.ADMIN: frozenset({Scope.VIEWER, Scope.OPERATOR, Scope.ADMIN}),
    Scope.EMERGENCY: frozenset({Scope.VIEWER, Scope.EMERGENCY}),
    Scope.DEVICE: frozenset({Scope.DEVICE}),
    Scope.RELEASES: frozenset({Scope.RELEASES}),
    Scope.ALERTS: frozenset({Scope.ALERTS}),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller.

    Attributes:
        actor: the name in the audit trail; unique to a token, a subject, or ``anonymous``.
        scopes: as granted, without the implied ones.
        authenticated: whether a token proved it; False in the open loopback mode.
        client_id: the only client that a device token may act for; None where the token names no client.
    """

    actor: str
    scopes: frozenset[Scope]
    authenticated: bool
    client_id: str | None = None

    def may(self, any_of: Collection[Scope]) -> bool:
        """Whether one of the scopes is granted or implied."""
        return any(wanted in _IMPLIED[held] for held in self.scopes for wanted in any_of)

    @property
    def operates(self) -> bool:
        """Whether it may change the system: it holds operator, admin or emergency."""
        return self.may((Scope.OPERATOR, Scope.EMERGENCY))

    def check_speaks_for(self, client_id: str) -> None:
        """Raise ForbiddenError unless the caller may act for this client.

        A device may act for the client that its token names and for no other; an operator, and anybody in the open
        loopback mode, for every client.
        """
        if self.client_id == client_id or (self.client_id is None and self.may({Scope.OPERATOR})):
            return
        named = "no client" if self.client_id is None else f"the client {self.client_id!r}"
        raise ForbiddenError(f"This token speaks for {named}.", cure="Use the token of the client you name.")


ANONYMOUS = Identity("anonymous", frozenset(Scope), authenticated=False)


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Scopes by name; raises ConfigError where there are none, or a name is unknown."""
    wanted = set(names)
    unknown = sorted(wanted - set(Scope))
    if unknown or not wanted:
        given = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError(f"No scope is called {given}.", cure=f"Name one or more of: {', '.join(Scope)}.")
    return frozenset(map(Scope, wanted))


def check_exposure(settings: Settings) -> None:
    """Refuse an address at which others could send requests without a token, or could read one on the network.

    Raises:
        ConfigError: ``serving.host`` is not loopback, and tokens or their protection are missing.
    """
    host, access = settings.serving.host, settings.access
    if is_loopback(host):
        return
    if access.mode != "tokens":
        raise ConfigError(
            f"'serving.host' is {host!r}, which others can reach, and 'access.mode' is {access.mode!r}.",
            cure="Set access.mode to tokens, or serving.host to 127.0.0.1.",
        )
    if access.tls_cert is not None and host in _EVERYWHERE:
        raise ConfigError(
            f"'serving.host' is {host!r}, which no certificate names, so that replicas and edges could not trust it.",
            cure="Set serving.host to the name or address that access.tls_cert names.",
        )
    if access.tls_cert is None and not access.behind_tls_proxy:
        raise ConfigError(
            f"'serving.host' is {host!r}, and tokens would cross the network in the clear.",
            cure="Set access.tls_cert and access.tls_key, or access.behind_tls_proxy if a proxy ends TLS before it.",
        )

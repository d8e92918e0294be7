"""Checks that a server address other than the loopback is protected by tokens and TLS."""

from __future__ import annotations

from fedvit.api.transport import is_loopback
from fedvit.config import Settings
from fedvit.errors import ConfigError

_EVERYWHERE = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - compared, not listened on


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

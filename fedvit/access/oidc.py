"""Verification of JSON web tokens (RFC 7519) of an OpenID Connect issuer, an alternative to fedvit's own tokens."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jwt

from fedvit.access.identity import Identity, Scope
from fedvit.api.transport import exchange, json_of, open_http
from fedvit.config import OidcConfig
from fedvit.errors import ConfigError, IntegrityError, UnauthorizedError

_REQUIRED = ["exp", "iat", "iss", "aud", "sub"]
_LEEWAY_S = 10.0
_FETCH_TIMEOUT_S = 5.0
_MAX_KEYS_BYTES = 2**20


class OidcVerifier:
    """Checks signature, issuer, audience and expiry, always with the configured algorithm and key file."""

    def __init__(self, config: OidcConfig) -> None:
        self._config = config
        self._keys = _read_keys(config)
        self._remote = _IssuerKeys(config.jwks_url) if config.jwks_url else None

    def verify(self, text: str) -> Identity:
        """The identity that this token proves. Unknown scopes are ignored.

        Raises:
            UnauthorizedError: it is not valid, or grants nothing here.
        """
        try:
            claims = self._claims(text)
        except jwt.ExpiredSignatureError:
            raise _refusal("is expired", "expired") from None
        except jwt.PyJWKClientConnectionError:
            raise _refusal("cannot be checked: its issuer does not answer", "issuer_unreachable") from None
        except jwt.PyJWTError:
            raise _refusal("is not valid", "invalid") from None
        scopes = _scopes(claims.get(self._config.scope_claim))
        if not scopes:
            raise _refusal("grants no scope of fedvit", "no_scope")
        return Identity(f"oidc:{claims['sub']}"[:200], scopes, authenticated=True)

    def _claims(self, text: str) -> dict[str, Any]:
        return jwt.decode(
            text,
            self._key(text),
            algorithms=[self._config.algorithm],
            issuer=self._config.issuer,
            audience=self._config.audience,
            leeway=_LEEWAY_S,
            options={"require": _REQUIRED},
        )

    def _key(self, text: str) -> jwt.PyJWK:
        if self._remote is not None:
            return self._remote.get_signing_key_from_jwt(text)
        key_id = jwt.get_unverified_header(text).get("kid")
        for key in self._keys:
            if key.key_id == key_id or (key_id is None and len(self._keys) == 1):
                return key
        raise jwt.InvalidKeyError(f"no key {key_id!r}")


class _IssuerKeys(jwt.PyJWKClient):
    """The key set at a URL, fetched in bounded time and size; PyJWT's own reading is neither."""

    def fetch_data(self) -> Any:
        try:
            with open_http(self.uri, timeout_s=_FETCH_TIMEOUT_S) as http:
                request = http.build_request("GET", self.uri)
                response = exchange(http, request, max_bytes=_MAX_KEYS_BYTES, deadline_s=_FETCH_TIMEOUT_S)
            keys = json_of(response.raise_for_status())
        except (httpx.HTTPError, IntegrityError, ValueError) as error:
            raise jwt.PyJWKClientConnectionError(f"the key set cannot be fetched: {error}") from error
        if self.jwk_set_cache is not None:
            self.jwk_set_cache.put(keys)
        return keys


def _read_keys(config: OidcConfig) -> list[jwt.PyJWK]:
    if config.jwks_path is None:
        return []
    try:
        content = json.loads(config.jwks_path.read_text(encoding="utf-8"))
        return jwt.PyJWKSet.from_dict(content if isinstance(content, dict) else {}).keys
    except (OSError, ValueError, jwt.PyJWTError) as error:
        raise ConfigError(
            f"The key set {config.jwks_path} cannot be read: {error}.", cure="Set access.oidc.jwks_path to a JWKS file."
        ) from None


def _scopes(claim: object) -> frozenset[Scope]:
    names = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return frozenset(Scope(name) for name in names if isinstance(name, str) and name in set(Scope))


def _refusal(why: str, reason: str) -> UnauthorizedError:
    return UnauthorizedError(f"The bearer token {why}.", cure="Sign in again at the issuer.", reason=reason)

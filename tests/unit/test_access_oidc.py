"""JSON web tokens: only the configured issuer, audience, algorithm and key are believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm
from raises import raises_naming

from fedvit.access.identity import Scope
from fedvit.access.oidc import OidcVerifier
from fedvit.config import OidcConfig
from fedvit.errors import ConfigError, UnauthorizedError
from fedvit.types import utc_now

KEY = ec.generate_private_key(ec.SECP256R1())
ISSUER, AUDIENCE = "https://issuer.example", "fedvit"


@pytest.fixture
def verifier(tmp_path: Path) -> OidcVerifier:
    public = json.loads(ECAlgorithm.to_jwk(KEY.public_key())) | {"kid": "k1", "use": "sig", "alg": "ES256"}
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [public]}))
    return OidcVerifier(OidcConfig(issuer=ISSUER, audience=AUDIENCE, jwks_path=path, algorithm="ES256"))


def claims(**changed: Any) -> dict[str, Any]:
    now = int(utc_now().timestamp())
    facts = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ana", "iat": now, "exp": now + 60, "scope": "openid operator"}
    return {name: value for name, value in (facts | changed).items() if value is not None}


def signed(payload: dict[str, Any], key: Any = KEY, algorithm: str = "ES256", kid: str | None = "k1") -> str:
    return jwt.encode(payload, key, algorithm, headers={"kid": kid} if kid else {})


def refusal(verifier: OidcVerifier, text: str) -> str:
    with pytest.raises(UnauthorizedError) as caught:
        verifier.verify(text)
    return str(caught.value.details["reason"])


@pytest.mark.parametrize("kid", ["k1", None])
def test_a_good_token_is_its_subject_with_the_scopes_that_fedvit_knows(verifier: OidcVerifier, kid: str | None) -> None:
    identity = verifier.verify(signed(claims(), kid=kid))
    assert (identity.actor, identity.scopes, identity.authenticated) == ("oidc:ana", {Scope.OPERATOR}, True)
    assert verifier.verify(signed(claims(scope=["viewer", 7, "root"]))).scopes == {Scope.VIEWER}


@pytest.mark.parametrize(
    "changed",
    [
        {"iss": "https://evil.example"},
        {"aud": "other"},
        {"iss": None},
        {"aud": None},
        {"exp": None},
        {"iat": None},
        {"sub": None},
    ],
)
def test_a_claim_that_is_wrong_or_missing_is_refused(verifier: OidcVerifier, changed: dict[str, Any]) -> None:
    assert refusal(verifier, signed(claims(**changed))) == "invalid"


def test_an_expired_token_and_one_without_our_scopes_are_refused(verifier: OidcVerifier) -> None:
    now = int(utc_now().timestamp())
    assert refusal(verifier, signed(claims(exp=now - 60))) == "expired"
    assert refusal(verifier, signed(claims(scope="openid profile"))) == "no_scope"
    assert refusal(verifier, signed(claims(scope=None))) == "no_scope"


def test_another_key_another_algorithm_or_none_is_refused(verifier: OidcVerifier) -> None:
    public = KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    forged = [
        signed(claims(), ec.generate_private_key(ec.SECP256R1())),
        signed(claims(), kid="k2"),
        signed(claims(), "", "none"),
        # The public key as an HMAC secret: works where the header picks the algorithm.
        signed(claims(), public, "HS256"),
        signed(claims())[:-4] + "AAAA",
        "eyJ.eyJ.x",
        "é",
    ]
    assert [refusal(verifier, text) for text in forged] == ["invalid"] * len(forged)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"keys": []}'])
def test_a_key_set_that_is_none_is_refused_at_the_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "jwks.json"
    if content is not None:
        path.write_text(content)
    with raises_naming(ConfigError, "jwks.json"):
        OidcVerifier(OidcConfig(issuer=ISSUER, audience=AUDIENCE, jwks_path=path))

"""Bearer tokens and identities: who is believed, and what he may do."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from raises import raises_naming

from fedvit.access import tokens
from fedvit.access.identity import Identity, Scope, parse_scopes
from fedvit.access.tokens import create_token, verify_token
from fedvit.errors import ConfigError, ForbiddenError, NotFoundError, UnauthorizedError
from fedvit.store.records import Token
from fedvit.store.store import Store

NOW = datetime(2030, 5, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        yield opened


def refusal(store: Store, text: str, now: datetime = NOW) -> str:
    with pytest.raises(UnauthorizedError) as caught:
        verify_token(store, text, now)
    assert caught.value.cure
    return str(caught.value.details["reason"])


def test_a_token_is_who_it_was_made_for(store: Store) -> None:
    result = create_token(store, "Ana", ["operator", "releases"], now=NOW)
    identity = verify_token(store, result.text, NOW)
    assert identity.actor == f"token:{result.token.token_id}:Ana"
    assert identity.scopes == {Scope.OPERATOR, Scope.RELEASES}
    assert identity.authenticated


@pytest.mark.parametrize("scopes", [["device"], ["device", "releases"], ["device", "operator"]])
def test_a_device_token_that_names_no_client_is_not_created(store: Store, scopes: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_token(store, "truck", scopes, now=NOW)
    assert "--client" in str(caught.value.cure)
    assert store.tokens.all() == []


@pytest.mark.parametrize("scopes", [["device", "operator"], ["viewer"], ["releases", "emergency"]])
def test_a_token_that_names_a_client_has_the_scopes_of_a_vehicle_only(store: Store, scopes: list[str]) -> None:
    with pytest.raises(ConfigError):
        create_token(store, "truck", scopes, now=NOW, client_id="truck-7")
    assert store.tokens.all() == []


def test_a_device_token_of_an_earlier_version_is_refused_at_use(store: Store) -> None:
    secret = "s" * 43
    digest = hashlib.sha256(secret.encode()).hexdigest()
    store.tokens.add(Token("0" * 12, "edges", digest, ("device",), NOW))
    assert refusal(store, f"fvt_{'0' * 12}_{secret}") == "unbound"
    assert store.tokens.get("0" * 12).last_used_at is None


def test_a_device_acts_for_the_client_of_its_token_and_an_operator_for_all(store: Store) -> None:
    text = create_token(store, "truck", ["device", "releases"], now=NOW, client_id="truck-7").text
    truck = verify_token(store, text, NOW)
    truck.check_speaks_for("truck-7")
    Identity("x", frozenset({Scope.OPERATOR}), authenticated=True).check_speaks_for("truck-8")
    others = (Identity("x", parse_scopes([scope]), authenticated=True) for scope in ("device", "releases", "viewer"))
    for identity in (truck, *others):
        with pytest.raises(ForbiddenError):
            identity.check_speaks_for("truck-8")


def test_two_tokens_share_nothing(store: Store) -> None:
    first, second = (create_token(store, "Ana", ["viewer"], now=NOW) for _ in range(2))
    assert len({first.text, second.text}) == 2
    assert first.text.startswith(f"fvt_{first.token.token_id}_")
    assert len(first.text) == len("fvt_") + 12 + len("_") + 43
    assert {token.token_id for token in store.tokens.all()} == {first.token.token_id, second.token.token_id}


def test_the_secret_is_nowhere_in_the_state(store: Store) -> None:
    result = create_token(store, "Ana", ["viewer"], now=NOW)
    verify_token(store, result.text, NOW)
    secret = result.text.removeprefix(f"fvt_{result.token.token_id}_").encode()
    files = [path for path in store.home.rglob("*") if path.is_file()]
    assert files
    assert not any(secret in path.read_bytes() for path in files)
    assert secret.decode() not in repr(result)


def test_a_wrong_secret_is_refused_like_an_unknown_token(store: Store) -> None:
    result = create_token(store, "Ana", ["admin"], now=NOW)
    other = create_token(store, "Ben", ["viewer"], now=NOW)
    swapped = f"fvt_{result.token.token_id}_{other.text.removeprefix(f'fvt_{other.token.token_id}_')}"
    unknown = f"fvt_{'0' * 12}_{'A' * 43}"
    messages = set()
    for text in (swapped, unknown):
        with pytest.raises(UnauthorizedError) as caught:
            verify_token(store, text, NOW)
        messages.add((str(caught.value), str(caught.value.details)))
    assert len(messages) == 1


@pytest.mark.parametrize("position", [-1, -20, -43])
def test_one_character_changed_is_refused(store: Store, position: int) -> None:
    text = create_token(store, "Ana", ["viewer"], now=NOW).text
    characters = list(text)
    characters[position] = "A" if characters[position] != "A" else "B"
    assert refusal(store, "".join(characters)) == "invalid"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "fvt_",
        "fvt__",
        "fvt_' OR 1=1 --_x",
        f"fvt_{'0' * 12}_{'A' * 42}",
        f"fvt_{'0' * 12}_{'é' * 43}",
        "a" * 9999,
        f"fvt_{'0' * 12}_{'A' * 43}\n",
    ],
)
def test_what_has_not_the_form_of_a_token_is_refused(store: Store, text: str) -> None:
    assert refusal(store, text) == "malformed"


def test_a_token_ends_at_its_expiry(store: Store) -> None:
    text = create_token(store, "Ana", ["viewer"], now=NOW, lifetime=timedelta(days=1)).text
    assert verify_token(store, text, NOW + timedelta(hours=23)).authenticated
    assert refusal(store, text, NOW + timedelta(days=1)) == "expired"


def test_a_token_ends_when_it_is_revoked(store: Store) -> None:
    result = create_token(store, "Ana", ["viewer"], now=NOW)
    revoked = store.tokens.revoke(result.token.token_id, NOW)
    assert store.tokens.revoke(result.token.token_id, NOW + timedelta(days=1)) == revoked
    assert refusal(store, result.text) == "revoked"
    with raises_naming(NotFoundError, "nobody"):
        store.tokens.revoke("nobody", NOW)


def test_a_hash_tampered_with_in_the_file_is_no_longer_matched(store: Store) -> None:
    result = create_token(store, "Ana", ["viewer"], now=NOW)
    with closing(sqlite3.connect(store.home / "state.db")) as connection:
        connection.execute("UPDATE tokens SET secret_hash = substr(secret_hash, 2) || substr(secret_hash, 1, 1)")
        connection.commit()
    assert refusal(store, result.text) == "invalid"


def test_secrets_are_compared_in_constant_time_also_for_unknown_tokens(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def spy(left: str, right: str) -> bool:
        compared.append((len(left), len(right)))
        return hmac.compare_digest(left, right)

    result = create_token(store, "Ana", ["viewer"], now=NOW)
    monkeypatch.setattr(tokens, "hmac", SimpleNamespace(compare_digest=spy))
    verify_token(store, result.text, NOW)
    refusal(store, f"fvt_{'0' * 12}_{'A' * 43}")
    assert compared == [(64, 64), (64, 64)]


def test_last_use_is_remembered_once_a_minute(store: Store) -> None:
    result = create_token(store, "Ana", ["viewer"], now=NOW)
    for seconds, expected in ((0, 0), (59, 0), (60, 60), (61, 60)):
        verify_token(store, result.text, NOW + timedelta(seconds=seconds))
        assert store.tokens.get(result.token.token_id).last_used_at == NOW + timedelta(seconds=expected)


@pytest.mark.parametrize("name", ["", " a", "a" * 65, "a\nb", "a\x00", "<b>", "a/b"])
def test_a_name_that_would_confuse_a_log_is_refused(store: Store, name: str) -> None:
    with pytest.raises(ConfigError):
        create_token(store, name, ["viewer"], now=NOW)
    assert store.tokens.all() == []


def test_scopes_and_lifetimes_must_be_some(store: Store) -> None:
    with raises_naming(ConfigError, "'root'"):
        create_token(store, "Ana", ["viewer", "root"], now=NOW)
    with pytest.raises(ConfigError):
        create_token(store, "Ana", [], now=NOW)
    with pytest.raises(ConfigError):
        create_token(store, "Ana", ["viewer"], now=NOW, lifetime=timedelta(0))
    assert store.tokens.all() == []


@pytest.mark.parametrize(
    ("held", "allowed"),
    [
        ("viewer", {"viewer"}),
        ("operator", {"viewer", "operator"}),
        ("admin", {"viewer", "operator", "admin"}),
        ("emergency", {"viewer", "emergency"}),
        ("device", {"device"}),
        ("releases", {"releases"}),
    ],
)
def test_what_a_scope_implies(held: str, allowed: set[str]) -> None:
    identity = Identity("x", parse_scopes([held]), authenticated=True)
    assert {str(scope) for scope in Scope if identity.may([scope])} == allowed


def test_no_scope_allows_nothing() -> None:
    assert not any(Identity("x", frozenset(), authenticated=True).may([scope]) for scope in Scope)

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from raises import raises_naming
from tiny_release import manifest_of

from fedvit.errors import IntegrityError, StateError, UsageError
from fedvit.wire.manifest import (
    MAX_ENVELOPE_BYTES,
    SIGNING_KEY_FILE,
    key_id,
    load_or_create_signing_key,
    parse_public_key,
    public_key_text,
    sign_manifest,
    verify_manifest,
)

KEY = Ed25519PrivateKey.generate()
TRUSTED = [KEY.public_key()]
MANIFEST = manifest_of(b"model", classes=("rot", "grün", "blau"))
FIELDS = sorted(json.loads(sign_manifest(MANIFEST, KEY))["signed"])


def tampered(change: Callable[[dict[str, Any]], None]) -> str:
    envelope = json.loads(sign_manifest(MANIFEST, KEY))
    change(envelope)
    return json.dumps(envelope)


def signed_as(signed: Any, key: Ed25519PrivateKey = KEY) -> str:
    """An envelope whose signature is good, whatever it signs."""
    content = json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()
    signature = base64.b64encode(key.sign(content)).decode()
    return json.dumps({"signed": signed, "signatures": [{"keyid": key_id(key.public_key()), "sig": signature}]})


def test_a_round_trip_changes_nothing() -> None:
    assert verify_manifest(sign_manifest(MANIFEST, KEY), TRUSTED) == MANIFEST


def test_the_signature_covers_the_content_and_not_its_spelling() -> None:
    envelope = json.loads(sign_manifest(MANIFEST, KEY))
    shuffled = {"signatures": envelope["signatures"], "signed": dict(reversed(envelope["signed"].items()))}
    assert verify_manifest(json.dumps(shuffled, indent=3, ensure_ascii=False), TRUSTED) == MANIFEST


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_under_the_signature(field: str) -> None:
    def flip(envelope: dict[str, Any]) -> None:
        value = envelope["signed"][field]
        if isinstance(value, str):
            envelope["signed"][field] = ("0" if value[0] != "0" else "1") + value[1:]
        elif isinstance(value, list):
            value.append("another")
        elif isinstance(value, dict):
            value["accuracy"] = 1.0
        else:
            envelope["signed"][field] = value + 1

    with pytest.raises(IntegrityError, match="signature does not match"):
        verify_manifest(tampered(flip), TRUSTED)


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_may_be_missing_even_if_that_is_signed(field: str) -> None:
    signed = json.loads(sign_manifest(MANIFEST, KEY))["signed"]
    del signed[field]
    with raises_naming(IntegrityError, f"'{field}'"):
        verify_manifest(signed_as(signed), TRUSTED)


def test_an_unknown_field_is_refused_even_if_it_is_signed() -> None:
    signed = json.loads(sign_manifest(MANIFEST, KEY))["signed"] | {"run_me": "rm"}
    with raises_naming(IntegrityError, "'run_me'"):
        verify_manifest(signed_as(signed), TRUSTED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence", 0),
        ("sequence", True),
        ("sequence", 1.0),
        ("artifact_digest", "../../etc/passwd"),
        ("artifact_digest", "A" * 64),
        ("artifact_bytes", 0),
        ("artifact_bytes", 2**50),
        ("classes", []),
        ("classes", ["a", "a"]),
        ("classes", "abc"),
        ("classes", ["a", 1]),
        ("image_size", 100_000),
        ("version", ""),
        ("version", "v1\n"),
        ("epsilon", -1.0),
        ("delta", 0),
        ("delta", "1e-5"),
        ("metrics", {"accuracy": "good"}),
        ("metrics", [1]),
        ("format", 2),
        ("format", True),
        ("_type", "something-else"),
    ],
)
def test_a_field_out_of_range_is_named_even_if_it_is_signed(field: str, value: Any) -> None:
    signed = json.loads(sign_manifest(MANIFEST, KEY))["signed"] | {field: value}
    with raises_naming(IntegrityError, field):
        verify_manifest(signed_as(signed), TRUSTED)


def test_a_foreign_key_is_refused_and_named() -> None:
    foreign_key = Ed25519PrivateKey.generate()
    with raises_naming(IntegrityError, key_id(foreign_key.public_key())[:12]):
        verify_manifest(sign_manifest(MANIFEST, foreign_key), TRUSTED)


def test_a_foreign_signature_under_a_trusted_name_is_refused() -> None:
    envelope = json.loads(sign_manifest(MANIFEST, Ed25519PrivateKey.generate()))
    envelope["signatures"][0]["keyid"] = key_id(KEY.public_key())
    with pytest.raises(IntegrityError):
        verify_manifest(json.dumps(envelope), TRUSTED)


def test_nothing_is_trusted_without_a_key() -> None:
    with pytest.raises(IntegrityError):
        verify_manifest(sign_manifest(MANIFEST, KEY), [])


def test_one_trusted_signature_among_others_is_enough() -> None:
    both = json.loads(sign_manifest(MANIFEST, Ed25519PrivateKey.generate()))
    both["signatures"] += json.loads(sign_manifest(MANIFEST, KEY))["signatures"]
    assert verify_manifest(json.dumps(both), TRUSTED) == MANIFEST


@pytest.mark.parametrize(
    "envelope",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"signed": {}, "signatures": []}',
        '{"signed": [], "signatures": []}',
        '{"signed": {}, "signatures": {}}',
        '{"signed": {}, "signatures": [], "more": 1}',
        '{"signed": {}, "signatures": [1, null, {"keyid": ["a"], "sig": 3}]}',
        '{"signed": {"a": NaN}, "signatures": []}',
        '{"signed": {"a": 1e999}, "signatures": []}',
        '{"signed": {"a": ' + "9" * 5000 + '}, "signatures": []}',
        "[" * 100_000,
        " " * (MAX_ENVELOPE_BYTES + 1),
    ],
    ids=range(14),
)
def test_malformed_envelopes_are_refused(envelope: str) -> None:
    with pytest.raises(IntegrityError):
        verify_manifest(envelope, TRUSTED)


@pytest.mark.parametrize("signature", [None, 7, "", "not base64!", base64.b64encode(bytes(64)).decode()])
def test_malformed_signatures_are_refused(signature: object) -> None:
    def change(envelope: dict[str, Any]) -> None:
        envelope["signatures"][0]["sig"] = signature

    with pytest.raises(IntegrityError):
        verify_manifest(tampered(change), TRUSTED)


@pytest.mark.parametrize("changes", [{"epsilon": float("nan")}, {"epsilon": float("inf")}, {"classes": ()}])
def test_what_a_vehicle_would_refuse_is_not_signed(changes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        sign_manifest(manifest_of(b"model", **changes), KEY)


def test_the_signing_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    first = load_or_create_signing_key(folder)
    assert load_or_create_signing_key(folder).private_bytes_raw() == first.private_bytes_raw()
    assert stat.S_IMODE((folder / SIGNING_KEY_FILE).stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [SIGNING_KEY_FILE]


def test_processes_that_begin_together_end_with_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = pool.map(lambda _: load_or_create_signing_key(tmp_path).private_bytes_raw(), range(16))
    assert len(set(keys)) == 1


def test_a_damaged_signing_key_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / SIGNING_KEY_FILE
    path.write_text("-----BEGIN NOTHING-----")
    with pytest.raises(StateError):
        load_or_create_signing_key(tmp_path)
    assert path.read_text() == "-----BEGIN NOTHING-----"


def test_a_public_key_survives_its_text() -> None:
    text = public_key_text(KEY.public_key())
    assert "\n" not in text
    assert parse_public_key(f"  {text}\n").public_bytes_raw() == KEY.public_key().public_bytes_raw()


@pytest.mark.parametrize("text", ["", "hello", "AAAA", "é" * 44, base64.b64encode(bytes(33)).decode()])
def test_what_is_no_public_key_is_said(text: str) -> None:
    with pytest.raises(UsageError):
        parse_public_key(text)

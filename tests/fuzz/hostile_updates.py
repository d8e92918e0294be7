"""Mutations of updates, histograms and mailbox messages, which know the formats that they break.

A case is made from its seed and its number alone, so that it can be made again.
"""

from __future__ import annotations

import hmac
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import numpy as np

from fedvit.types import ClientOutcome, Encoding
from fedvit.updates import ClientFailures, ClientUpdate
from fedvit.wire.histograms import HistogramSpec
from fedvit.wire.mailbox import Message, MessageKind, new_message_id, sign_message
from fedvit.wire.updates import encode_smaller, encode_update

CLIENT, ROUND, EXAMPLES = "truck-1", 3, 30
KEY = bytes(range(32))
MESSAGE_ID = new_message_id(datetime(2025, 6, 1, tzinfo=UTC))
SPEC = HistogramSpec({"blur": (0.1, 0.2), "contrast": (1.0, 2.0, 3.0)}, 4, (-4, 0, 1, 4))
Shapes = Mapping[str, tuple[int, ...]]
SMALL: Shapes = {"a": (4, 5), "b": (), "c": (300,), "d": (0, 3)}


def _demo() -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (96, 112, 1, 1), "embed.bias": (96,), "pos": (1, 16, 96)}
    for block in ("blocks.0", "blocks.1"):
        for layer, (wide, deep) in {"qkv": (288, 96), "proj": (96, 96), "fc1": (192, 96), "fc2": (96, 192)}.items():
            shapes |= {f"{block}.{layer}.weight": (wide, deep), f"{block}.{layer}.bias": (wide,)}
        shapes |= {f"{block}.{name}": (96,) for name in ("norm1", "norm2", "scale1", "scale2")}
    return shapes | {"head.weight": (4, 288), "head.bias": (4,)}


DEMO = _demo()
"""Parameters like those of the demonstration's model, about 170,000 values."""

NUMBERS = [
    *(b"0", b"-1", b"00", b"-0", b"1.5", b"1e5", b"1e400", b"1e-400", b"NaN", b"-Infinity", b"true", b"null", b'"1"'),
    *(str(n).encode() for n in (255, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63))),
    *(b"1" + b"0" * 400, b"9" * 5000, b"[]", b"{}", b"[" * 9 + b"]" * 9, b"[" * 3000 + b"]" * 3000, b"[" * 5000),
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 0.5, 1e308, 2**31, 2**53, 2**63, 2**64, 10**400, "", "1", "\0", "\ud800", "\x1b[2J\n"),
    *("x" * 10_000, "../../x", [], {}, [[]], [[[[[[[[[[1]]]]]]]]]], ["a", 1], [["a", 1, None]] * 2, {"a": {"a": 1}}),
]
TYPES = ["F64", "F32", "F16", "BF16", "U8", "I8", "U16", "U32", "I64", "BOOL", "F8_E4M3", "", "O", 7, None]
SPECIAL = [
    np.array(value, dtype).tobytes()
    for dtype in ("<f8", "<f4", "<f2")
    for value in (np.nan, np.inf, -np.inf, -0.0, np.finfo(dtype).tiny / 4, np.finfo(dtype).max)
]
_NUMBER = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes of one kind, for a model of these shapes."""

    kind: str
    content: bytes
    shapes: Shapes = field(default_factory=dict)


def make_case(seed: int, number: int) -> Case:
    """A case of a seed: two in three are updates."""
    draw = random.Random(f"{seed}/{number}")
    return draw.choice([_update, _update, _update, _update, _histogram, _message])(draw)


# --- updates ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Draft:
    """A safetensors file in the making; ``length`` is what it says about its header."""

    header: bytes
    body: bytes
    length: int | None = None

    def content(self) -> bytes:
        length = len(self.header) if self.length is None else self.length
        return length.to_bytes(8, "little") + self.header + self.body


@cache
def valid_updates(demo: bool) -> list[bytes]:
    """An update in every encoding, one that is not encoded, and a failure."""
    shapes, draw = DEMO if demo else SMALL, np.random.default_rng(7)
    sums = {name: np.asarray(EXAMPLES * draw.normal(0, 0.01, shape)) for name, shape in shapes.items()}
    update = ClientUpdate(ROUND, ClientOutcome(CLIENT, EXAMPLES), sums, float(EXAMPLES))
    smaller = [encode_smaller(update, encoding, draw.random, 0.2) for encoding in Encoding]
    return [*smaller, encode_update(update), encode_update(ClientFailures.of(ROUND, [CLIENT], "no data"))]


def _update(draw: random.Random) -> Case:
    demo = draw.random() < 0.05
    content = draw.choice(valid_updates(demo))
    end = 8 + int.from_bytes(content[:8], "little")
    draft = Draft(content[8:end], content[end:])
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        draw.choice(_EDITS)(draw, draft)
    return Case("update", _damaged(draw, draft.content()), DEMO if demo else SMALL)


def _edit_entry(draw: random.Random, draft: Draft) -> None:
    header = _loaded(draft)
    names = [name for name, entry in header.items() if isinstance(entry, dict) and entry.keys() >= {"shape", "dtype"}]
    if not names:
        return
    name = draw.choice(names)
    entry, other = header[name], header[draw.choice(names)]
    match draw.randrange(9):
        case 0:
            entry["dtype"] = draw.choice(TYPES)
        case 1:
            entry["shape"] = draw.choice([[2**62, 4], [2**40], [-1, -4], [0, 2**62], [True], [1] * 100, "4", *VALUES])
        case 2:
            entry["data_offsets"] = draw.choice([other.get("data_offsets"), [0, 2**63], [8, 0], [0], *VALUES])
        case 3:
            begin, end = _pair(entry.get("data_offsets"))
            entry["data_offsets"] = [begin + draw.randint(-9, 9), end + draw.randint(-9, 9)]
        case 4:
            del header[name]
        case 5:
            header[draw.choice(["x", "a#index", "a#scale", "../a", "\0", "n" * 5000])] = header.pop(name)
        case 6:
            header |= {f"e{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40)}
        case 7:
            entry[draw.choice([*entry, "x"])] = draw.choice(VALUES)
        case 8:
            header[name] = draw.choice(VALUES)
    draft.header = _dumped(header)


def _edit_facts(draw: random.Random, draft: Draft) -> None:
    header = _loaded(draft)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict):
        return
    try:
        facts = json.loads(metadata["update"])
        facts[draw.choice([*facts, "encoding", "x"])] = draw.choice([*VALUES, *Encoding, [[CLIENT, 10**400, None]]])
        metadata["update"] = _dumped(facts).decode()
    except (KeyError, ValueError, TypeError, RecursionError):
        metadata[draw.choice(["update", "x"])] = draw.choice(VALUES)
    if draw.random() < 0.1:
        header["__metadata__"] = draw.choice(VALUES)
    draft.header = _dumped(header)


def _edit_text(draw: random.Random, draft: Draft) -> None:
    draft.header = mutated_text(draw, draft.header)


def _edit_body(draw: random.Random, draft: Draft) -> None:
    at, value = draw.randint(0, len(draft.body)), draw.choice(SPECIAL)
    draft.body = draft.body[:at] + value + draft.body[at + len(value) :]


def _edit_length(draw: random.Random, draft: Draft) -> None:
    draft.length = draw.choice([0, 1, 2**63, 2**64 - 1, len(draft.header) + draw.randint(-9, 9) & 2**64 - 1])


def _splice(draw: random.Random, draft: Draft) -> None:
    other = draw.choice(valid_updates(False))
    draft.body = other[8 + int.from_bytes(other[:8], "little") :]


_EDITS: list[Callable[[random.Random, Draft], None]] = [
    *(_edit_entry, _edit_entry, _edit_facts, _edit_facts, _edit_text, _edit_text, _edit_body, _edit_body),
    *(_edit_length, _splice),
]


def _loaded(draft: Draft) -> dict[str, Any]:
    try:
        header = json.loads(draft.header)
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _pair(offsets: Any) -> tuple[int, int]:
    good = isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
    return (offsets[0], offsets[1]) if good else (0, 0)


# --- histograms and messages -----------------------------------------------------------------------------------------


def _histogram(draw: random.Random) -> Case:
    counts = [draw.choice((0, 3, -2, 17)) for _ in range(SPEC.cells)]
    if draw.random() < 0.5:
        counts[draw.randrange(len(counts))] = draw.choice(VALUES)
    kind, value = draw.choice([("histogram", {"counts": counts}), ("spec", _mutated_spec(draw))])
    return Case(kind, _damaged(draw, _mutated_sometimes(draw, _dumped(value))))


def _mutated_spec(draw: random.Random) -> dict[str, Any]:
    value = SPEC.to_json()
    match draw.randrange(4):
        case 0:
            value[draw.choice([*value, "x"])] = draw.choice(VALUES)
        case 1:
            value["edges"][draw.choice(["blur", "label", "x" * 500])] = draw.choice(
                [[2.0, 1.0], [1e308] * 2000, *VALUES]
            )
        case 2:
            value["edges"]["blur"] = [draw.choice(VALUES) for _ in range(3)]
    return value


def _message(draw: random.Random) -> Case:
    body: dict[str, Any] = {"run_id": "run-0001", "round_index": 1, "sha256": "0" * 64}
    if draw.random() < 0.5:
        body[draw.choice([*body, "x"])] = draw.choice(VALUES)
    kind = draw.choice(list(MessageKind))
    content = sign_message(Message(CLIENT, MESSAGE_ID, kind, body), KEY)
    if draw.random() < 0.6:
        # By somebody who has the key.
        payload = mutated_text(draw, json.loads(content)["payload"].encode()).decode(errors="replace")
        code = hmac.digest(KEY, b"fedvit mailbox message\0" + payload.encode(), "sha256").hex()
        content = json.dumps({"payload": payload, "hmac": code}).encode()
    else:
        content = _mutated_sometimes(draw, content)
    return Case("message", _damaged(draw, content))


# --- any text and any bytes ------------------------------------------------------------------------------------------


def mutated_text(draw: random.Random, text: bytes) -> bytes:
    """JSON with a number replaced, a field repeated, a part cut out or doubled, or half of a character in it."""
    match draw.randrange(5):
        case 0 | 1:
            places = list(_NUMBER.finditer(text))
            if not places:
                return text
            place = draw.choice(places)
            return text[: place.start()] + draw.choice(NUMBERS) + text[place.end() :]
        case 2:
            colon = text.find(b":")
            return text[:1] + text[1 : colon + 1] + b"1," + text[1:]
        case 3:
            begin, end = sorted(draw.randint(0, len(text)) for _ in range(2))
            return text[:begin] + text[end:] if draw.random() < 0.5 else text[:end] + text[begin:]
        case _:
            at = draw.randint(0, len(text))
            return text[:at] + draw.choice([b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"\0", b"//", b"'"]) + text[at:]


def _mutated_sometimes(draw: random.Random, text: bytes) -> bytes:
    return mutated_text(draw, text) if draw.random() < 0.5 else text


def _damaged(draw: random.Random, content: bytes) -> bytes:
    """Sometimes bits flipped, cut short, or longer."""
    chance = draw.random()
    if not content or chance > 0.3:
        return content
    if chance < 0.05:
        return content[: draw.randint(0, len(content))]
    if chance < 0.1:
        return content + draw.randbytes(draw.choice((1, 8, 4096)))
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        damaged[draw.randrange(min(len(damaged), 600) if chance < 0.2 else len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)

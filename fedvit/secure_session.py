"""Messages of a secure aggregation session, as fleets carry them; the protocol itself is :mod:`fedvit.secagg`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedvit.types import TrainTask
from fedvit.wire.untrusted import MAX_REASON, one_line

ADVERTISE, SHARE, MASK, CONFIRM, UNMASK = "advertise", "share", "mask", "confirm", "unmask"
PHASES = (ADVERTISE, SHARE, MASK, CONFIRM, UNMASK)
"""The phases of a session, in their order. A client answers each of them once."""
_ANSWER, _REFUSAL = b"\x00", b"\x01"


@dataclass(frozen=True, slots=True)
class SecureSession:
    """One attempt of a round under secure aggregation. Every value is public.

    Attributes:
        session: 64 hex digits; no other attempt has them.
        task: of the round and the attempt.
        parameters: JSON of :class:`fedvit.secagg.parameters.Parameters`.
        identities: Ed25519 public key of every participant, hex, by client id.
    """

    session: str
    task: TrainTask
    parameters: str
    identities: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "identities": dict(self.identities)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SecureSession:
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "task": TrainTask(**value["task"])})


@dataclass(frozen=True, slots=True)
class SecureAnswer:
    """A client's answer to one phase: its message, or the reason why it takes no further part."""

    client_id: str
    content: bytes = b""
    error: str | None = None

    def to_bytes(self) -> bytes:
        """As a vehicle sends it."""
        if self.error is None:
            return _ANSWER + self.content
        return _REFUSAL + one_line(self.error).encode()

    @classmethod
    def from_bytes(cls, client_id: str, sent: bytes) -> SecureAnswer:
        """The inverse of :meth:`to_bytes`, of bytes that anybody may have sent."""
        kind, content = sent[:1], sent[1:]
        if kind == _ANSWER:
            return cls(client_id, content)
        if kind != _REFUSAL or len(content) > 4 * MAX_REASON:
            return cls(client_id, error="its answer has an unknown form")
        return cls(client_id, error=one_line(content.decode("utf-8", "replace")) or "it gave no reason")

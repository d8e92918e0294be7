"""What a client keeps for itself from one of its rounds to the next: control variates, a model of its own.

It lies in ``clients/`` of the state folder, as on a vehicle's own disk: it is not sent, not backed up, not charged.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fedvit.types import Weights
from fedvit.wire.tensors import decode_weights, encode_weights

_MAX_BYTES = 8 * 2**30


class ClientState:
    """The arrays of all clients of a run, by client and round.

    A round reads what the round before it left, however often it is tried: a repeated round repeats its release.

    Args:
        home: the state folder.
        kind: what is kept; kinds do not meet.
    """

    def __init__(self, home: Path, kind: str) -> None:
        self._home = home / "clients"
        self._kind = kind

    def before(self, run_id: str, round_index: int, client_id: str) -> tuple[Weights, str]:
        """What the client's last round before this one left, and its SHA-256, hex; nothing at first."""
        earlier = [path for path in self._files(run_id, client_id) if path.stem < f"{round_index:08d}"]
        content = earlier[-1].read_bytes() if earlier else encode_weights({})
        return decode_weights(content, max_bytes=_MAX_BYTES), hashlib.sha256(content).hexdigest()

    def leave(self, run_id: str, round_index: int, client_id: str, arrays: Weights) -> None:
        """Keep ``arrays``, float32, as what this round left; of the rounds before, only the last one stays."""
        folder = self._folder(run_id, client_id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = folder / f".{os.getpid()}"
        draft.write_bytes(encode_weights(arrays))
        os.replace(draft, folder / f"{round_index:08d}.safetensors")
        for old in [path for path in self._files(run_id, client_id) if path.stem < f"{round_index:08d}"][:-1]:
            old.unlink()

    def _files(self, run_id: str, client_id: str) -> list[Path]:
        return sorted(self._folder(run_id, client_id).glob("*.safetensors"))

    def _folder(self, run_id: str, client_id: str) -> Path:
        return self._home / client_id / run_id / self._kind

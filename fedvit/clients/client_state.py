"""State of clients between rounds: control variates, personal models, and values dropped by compression.

It is stored in ``clients/`` of the state folder (on a vehicle: on its own disk) and is not sent, backed up or charged.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedvit.atomic_write import write_atomically
from fedvit.types import Weights
from fedvit.wire.tensors import decode_weights, encode_weights

_MAX_BYTES = 8 * 2**30


class ClientState:
    """Arrays of one kind, by run, client and round.

    A round reads the state after the client's previous round, also when it is repeated: its output is then the same.

    Args:
        home: the state folder.
        kind: name of the arrays; states of different kinds are separate.
    """

    def __init__(self, home: Path, kind: str) -> None:
        self._home = home / "clients"
        self._kind = kind

    def load(self, run_id: str, round_index: int, client_id: str) -> tuple[Weights, str]:
        """The state after the client's last round before this one, and its SHA-256, hex; no arrays at first."""
        earlier = [path for path in self._files(run_id, client_id) if path.stem < f"{round_index:08d}"]
        content = earlier[-1].read_bytes() if earlier else encode_weights({})
        return decode_weights(content, max_bytes=_MAX_BYTES), hashlib.sha256(content).hexdigest()

    def save(self, run_id: str, round_index: int, client_id: str, arrays: Weights) -> None:
        """Store ``arrays``, float32, as the state after this round; of earlier rounds, only the last one is kept."""
        folder = self._folder(run_id, client_id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(folder / f"{round_index:08d}.safetensors", encode_weights(arrays))
        for old in [path for path in self._files(run_id, client_id) if path.stem < f"{round_index:08d}"][:-1]:
            old.unlink()

    def _files(self, run_id: str, client_id: str) -> list[Path]:
        return sorted(self._folder(run_id, client_id).glob("*.safetensors"))

    def _folder(self, run_id: str, client_id: str) -> Path:
        return self._home / client_id / run_id / self._kind

"""State of clients between rounds: control variates, personal models, and values dropped by compression.

It is stored in ``clients/`` of the state folder (on a vehicle: on its own disk) and is not sent, backed up or charged.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fedvit.atomic_write import write_atomically
from fedvit.errors import DataError
from fedvit.types import CLIENT_ID, MAX_ROUND, RUN_ID, Weights
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
        """The state after the client's last round before this one, and its SHA-256, hex; no arrays at first.

        Raises:
            DataError: the ids or the round index can be no part of a path.
        """
        content = self._content(run_id, round_index, client_id)
        return decode_weights(content, max_bytes=_MAX_BYTES), hashlib.sha256(content).hexdigest()

    def digest(self, run_id: str, round_index: int, client_id: str) -> str:
        """The SHA-256, hex, of the state that :meth:`load` returns, with its errors."""
        return hashlib.sha256(self._content(run_id, round_index, client_id)).hexdigest()

    def save(self, run_id: str, round_index: int, client_id: str, arrays: Weights) -> None:
        """Store ``arrays``, float32, as the state after this round; of earlier rounds, only the last one is kept.

        Raises:
            DataError: the ids or the round index can be no part of a path.
        """
        folder, name = self._folder(run_id, client_id), _name(round_index)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.safetensors", encode_weights(arrays))
        for old in [path for path in self._files(run_id, client_id) if path.stem < name][:-1]:
            old.unlink()

    def _content(self, run_id: str, round_index: int, client_id: str) -> bytes:
        name = _name(round_index)
        earlier = [path for path in self._files(run_id, client_id) if path.stem < name]
        return earlier[-1].read_bytes() if earlier else encode_weights({})

    def _files(self, run_id: str, client_id: str) -> list[Path]:
        return sorted(self._folder(run_id, client_id).glob("*.safetensors"))

    def _folder(self, run_id: str, client_id: str) -> Path:
        for name, pattern in ((client_id, CLIENT_ID), (run_id, RUN_ID)):
            if re.fullmatch(pattern, name) is None:
                raise DataError(f"{name[:80]!r} is no name of a client or a run.", cure=f"A name matches {pattern}.")
        return self._home / client_id / run_id / self._kind


def _name(round_index: int) -> str:
    """The name of a round's file; names sort as rounds do."""
    if not 0 <= round_index <= MAX_ROUND:
        raise DataError(f"{round_index} is no round index.", cure=f"It is between 0 and {MAX_ROUND}.")
    return f"{round_index:08d}"

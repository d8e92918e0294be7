"""Secret randomness for Poisson sampling, privacy noise and cohort selection: keys, identities of outputs, streams.

Each client has one secret key. Those of virtual clients are derived from one root key in the state folder (mode 0600).
A real vehicle generates its own key and never sends it.

Each mechanism output has one stream, derived from everything that determines the output: the task with its context
(settings, model, image size, classes), the data and the state of the client. A retry of the same output draws the same
numbers, so it publishes the same value and costs nothing more. An output with any difference has an unrelated stream,
so no noise protects two values.

The generator is AES-256 in counter mode, keyed by HKDF-SHA256 (RFC 5869; similar to NIST SP 800-90A's CTR_DRBG).
Imports no torch, because the accountant uses it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedvit.atomic_write import create_atomically
from fedvit.errors import StateError
from fedvit.private_files import FILE_MODE, ensure_private, open_private_folder
from fedvit.types import TrainTask

SECRET_BYTES = 32
_TWO_POW_MINUS_53 = 2.0**-53
_PAIRS_AT_ONCE = 1 << 14
_LEFT_OUT = ("noise_at", "attempt", "participants", "sum_weight")
"""Fields of a task that are left out at their default: an output from before they existed keeps its identity."""


def load_or_create_root_secret(home: Path, create: Callable[[int], bytes] = secrets.token_bytes) -> bytes:
    """The root key of a state folder, created by the first call.

    Args:
        home: the state folder.
        create: returns that many random bytes; only a simulation replaces the system's secret ones.

    Raises:
        StateError: the key file has the wrong length, or belongs to another user and others can read it.
    """
    path = home / "keys" / "root.key"
    open_private_folder(path.parent)
    if not path.exists():
        # Of two processes that start together, one key wins for both.
        create_atomically(path, create(SECRET_BYTES), mode=FILE_MODE)
    ensure_private([path])
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise StateError(
            f"The key file {path} holds {len(secret)} bytes instead of {SECRET_BYTES}.",
            cure="Restore it from a backup; without it an interrupted round cannot be repeated exactly.",
        )
    return secret


def derive_secret(root: bytes, name: str) -> bytes:
    """An independent key for ``name`` (a client id, or a purpose such as ``cohort``)."""
    return hmac.digest(root, name.encode(), "sha256")


def output_id(task: TrainTask, client_id: str, num_examples: int) -> str:
    """SHA-256, hex, of the task, which names base weights and context, the client and its number of examples.

    It is what the ledgers of server and client hold; only the client knows its data and its state. A retry has the same
    identity, draws the same noise and is charged once; anything else is another output.
    """
    # Canonical JSON with sorted keys; the task is encoded once for a cohort.
    whose = f'"client_id":{json.dumps(client_id)},"num_examples":{num_examples:d}'
    return hashlib.sha256(f'{{{whose},"task":{_canonical(task)}}}'.encode()).hexdigest()


@lru_cache(maxsize=8)
def _canonical(task: TrainTask) -> str:
    facts = {name: value for name, value in asdict(task).items() if value or name not in _LEFT_OUT}
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)


class SecretStream:
    """A cryptographic stream of uniforms, coins and standard normals.

    Args:
        secret: the client's key, at least 32 bytes, never logged and never sent.
        purpose: use of the numbers; streams of different purposes are unrelated.
        context: JSON facts that identify the output; any difference gives an unrelated stream.

    Raises:
        ValueError: the secret is too short.
    """

    def __init__(self, secret: bytes, purpose: str, context: dict[str, Any]) -> None:
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes is too short: {SECRET_BYTES} are needed")
        info = json.dumps({"purpose": purpose, "context": context}, sort_keys=True, allow_nan=False).encode()
        key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=hashlib.sha256(info).digest()).derive(secret)
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        # The unused second number of the last pair.
        self._spare = np.empty(0, dtype=np.float64)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """``count`` uniform integers of 64 bits."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """``count`` uniforms in the open interval (0, 1), 53 bits each."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * _TWO_POW_MINUS_53

    def coins(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """``count`` independent coins, each true with ``probability``: exact Poisson sampling."""
        return np.asarray(self.uniform(count) < probability, dtype=np.bool_)

    def normal(self, count: int, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """``count`` standard normals, computed in float64; consecutive draws equal one large draw.

        Box and Muller 1958: the radius of each pair from one 53-bit uniform and its angle from another, so that all
        lie within 8.66 standard deviations; of exact normals, fewer than one in 10^17 lies beyond. The same stream
        gives the same bits on one machine; another processor's logarithm may differ in the last bit.
        """
        spare = self._spare[:count]
        pairs = np.empty(((count - len(spare) + 1) // 2, 2), dtype=dtype)
        # In pieces that fit the processor's cache: 7 ns a number, 4 of them for AES; inversion took 30.
        elsewhere: Future[float] | None = None
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            piece = pairs[start : start + _PAIRS_AT_ONCE]
            uniforms = self.uniform(2 * len(piece)).reshape(-1, 2)
            if elsewhere is None and start + _PAIRS_AT_ONCE < len(pairs):
                elsewhere = _helper().submit(_fill, piece, uniforms)
                continue
            second = _fill(piece, uniforms)
            if elsewhere is not None:
                elsewhere.result()
                elsewhere = None
        drawn = np.concatenate([spare.astype(dtype), pairs.ravel()]) if len(spare) else pairs.ravel()
        if count:
            self._spare = np.array([second]) if len(drawn) > count else self._spare[:0]
        return drawn[:count]


@cache
def _helper() -> ThreadPoolExecutor:
    """One additional thread: numpy releases the interpreter lock while it computes."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise")


def _fill(piece: npt.NDArray[Any], uniforms: npt.NDArray[np.float64]) -> float:
    """Write the normals of uniforms [N, 2] into ``piece`` [N, 2]; return the last one, unrounded."""
    first, second = _box_muller(uniforms)
    piece[:, 0], piece[:, 1] = first, second
    return float(second[-1])


def _box_muller(uniforms: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Uniforms [N, 2] to two independent arrays of N standard normals, mostly in place."""
    radius = np.log(uniforms[:, 0])
    radius *= -2.0
    np.sqrt(radius, out=radius)
    # Tangent of half the angle, from which sine and cosine follow: numpy has a fast tangent only.
    tangent = uniforms[:, 1] - 0.5
    tangent *= np.pi
    np.tan(tangent, out=tangent)
    square = tangent * tangent
    radius /= 1.0 + square
    tangent *= radius
    tangent *= 2.0
    np.subtract(1.0, square, out=square)
    square *= radius
    return square, tangent

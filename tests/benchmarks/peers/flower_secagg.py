"""The arithmetic of Flower's SecAgg+ on one vector; runs in an environment of its own. Imports nothing of fedvit.

Flower's own functions are called in the order of its client and its server, without its messages.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

# Flower's defaults.
CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE = 8.0, 1 << 22, 1 << 32


def main() -> None:
    """Measure one client, and the server's unmasking; prints CPU seconds as JSON."""
    case = json.loads(sys.argv[1])
    vector = np.random.default_rng(0).normal(size=case["length"]).astype(np.float32)
    neighbours, threshold = case["neighbours"], case["threshold"]
    peers = [generate_key_pairs() for _ in range(neighbours)]
    started = time.process_time()
    masked, own_shares = client(vector, peers, threshold)
    client_s = time.process_time() - started
    shape = [vector.shape]
    started = time.process_time()
    total = [masked.copy()]
    for _ in range(case["clients"] - 1 - case["dropped"]):
        total = parameters_addition(total, [masked])
    for _ in range(case["clients"] - case["dropped"]):
        secret = combine_shares(own_shares[:threshold])
        total = parameters_subtraction(total, pseudo_rand_gen(secret, MOD_RANGE, shape))
    # A dropped client shared masks with those of its neighbours that are left.
    left = neighbours * (case["clients"] - case["dropped"]) // case["clients"]
    own_private, _ = peers[0]
    for _ in range(case["dropped"]):
        combine_shares(own_shares[:threshold])
        for _, public in peers[:left]:
            key = generate_shared_key(own_private, public)
            total = parameters_addition(total, pseudo_rand_gen(key, MOD_RANGE, shape))
    parameters_mod(total, MOD_RANGE)
    print(json.dumps({"client": client_s, "server": time.process_time() - started}))


def client(vector: np.ndarray, peers: list, threshold: int) -> tuple[np.ndarray, list[bytes]]:
    """Keys, shares, quantisation and masks of one client; the masked vector, and the shares of its seed."""
    (private, _), (share_private, _) = generate_key_pairs(), generate_key_pairs()
    seed = os.urandom(32)
    seed_shares = create_shares(seed, threshold, len(peers) + 1)
    key_shares = create_shares(private_key_to_bytes(private), threshold, len(peers) + 1)
    for (_, public), one, other in zip(peers, seed_shares[1:], key_shares[1:], strict=True):
        key = generate_shared_key(share_private, public)
        # It opens as many as it sends.
        decrypt(key, encrypt(key, one + other))
    scaled = parameters_multiply([vector], 1.0)
    masked = factor_combine(TARGET_RANGE, quantize(scaled, CLIPPING_RANGE, TARGET_RANGE))
    shapes = [array.shape for array in masked]
    masked = parameters_addition(masked, pseudo_rand_gen(seed, MOD_RANGE, shapes))
    for position, (_, public) in enumerate(peers):
        mask = pseudo_rand_gen(generate_shared_key(private, public), MOD_RANGE, shapes)
        masked = parameters_addition(masked, mask) if position % 2 else parameters_subtraction(masked, mask)
    masked = parameters_mod(masked, MOD_RANGE)
    return masked[-1], seed_shares


if __name__ == "__main__":
    main()

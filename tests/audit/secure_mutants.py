"""Faults of secure aggregation and of distributed noise."""

from __future__ import annotations

from tests.audit.mutant import CHARGED_NOISE, DISTRIBUTED_NOISE, KEYS, RELEASED_SUM, SECURE_AGGREGATION, Mutant

CLIENT, SERVER, NOISE = "secagg/client.py", "secagg/server.py", "secagg/noise.py"

SECURE_MUTANTS = (
    Mutant(
        "noise sized for all participants",
        NOISE,
        DISTRIBUTED_NOISE,
        (
            (
                "_deviation(noise_multiplier * delta, honest)",
                "_deviation(noise_multiplier * delta, participants)",
            ),
        ),
    ),
    Mutant(
        "a sum with half of its noise",
        NOISE,
        RELEASED_SUM,
        (("_deviation(noise_multiplier * delta, honest)", "_deviation(noise_multiplier * delta, 4 * honest)"),),
    ),
    Mutant(
        "a sensitivity without the rounding",
        NOISE,
        DISTRIBUTED_NOISE,
        (
            (
                "math.ceil(math.sqrt(distance**2 + padded / 4 + _hoeffding(padded) * (2 * distance + root)))",
                "int(distance)",
            ),
        ),
    ),
    Mutant(
        "rounding without the conditional bound",
        NOISE,
        DISTRIBUTED_NOISE,
        (("> plan.sensitivity**2 and plan.bounded:", "> math.inf and plan.bounded:"),),
    ),
    Mutant(
        "contributions without noise",
        NOISE,
        DISTRIBUTED_NOISE,
        (("piece += noise.sample(stream, len(piece))", "noise.sample(stream, len(piece))"),),
    ),
    Mutant(
        "masks used in every session",
        CLIENT,
        SECURE_AGGREGATION,
        (
            (
                "self._mask_private, self._share_private = random_secret(entropy), random_secret(entropy)",
                "self._mask_private, self._share_private = identity.private_bytes_raw(), random_secret(entropy)",
            ),
            ("self._seed = random_secret(entropy)", "self._seed = hashlib.sha256(self._mask_private).digest()"),
            ('return f"fedvit-secagg-pair/{parameters.digest}/{first}', 'return f"fedvit-secagg-pair/{first}'),
            ('return f"fedvit-secagg-own/{parameters.digest}/{client_id}"', 'return f"fedvit-secagg-own/{client_id}"'),
        ),
    ),
    Mutant(
        "a threshold that two sets of survivors reach",
        "secagg/parameters.py",
        SECURE_AGGREGATION,
        (
            (
                "return (count + colluding) // 2 + 1 if degree == count - 1",
                "return (count + colluding) // 2 if degree == count - 1",
            ),
        ),
    ),
    Mutant(
        "a threshold at which a part of the sum is unmasked",
        "secagg/parameters.py",
        SECURE_AGGREGATION,
        (("else degree // 2 + 2 + colluding", "else degree // 2 + 1 + colluding"),),
    ),
    Mutant(
        "a threshold that counts no colluding clients",
        "secagg/parameters.py",
        SECURE_AGGREGATION,
        (
            (
                "_least_threshold(count, degree, _most_in_a_row(count, degree, colluding))",
                "_least_threshold(count, degree, 0)",
            ),
        ),
    ),
    Mutant(
        "each client waits for its neighbours' confirmations",
        CLIENT,
        SECURE_AGGREGATION,
        (
            (
                "for c in self.parameters.confirmers if c in kept]",
                "for c in (self.client_id, *self._neighbours) if c in kept]",
            ),
        ),
    ),
    Mutant(
        "one confirmation too few",
        CLIENT,
        SECURE_AGGREGATION,
        (("if len(signatures) < self.parameters.threshold:", "if len(signatures) < self.parameters.threshold - 1:"),),
    ),
    Mutant(
        "masks seeded with 32 bits",
        "secagg/masks.py",
        SECURE_AGGREGATION,
        (("info=purpose.encode()).derive(secret)", "info=purpose.encode()).derive(secret)[:4].ljust(_KEY_BYTES)"),),
    ),
    Mutant(
        "secrets of 32 bits",
        "secagg/shamir.py",
        SECURE_AGGREGATION,
        (("drawn := entropy(SECRET_BYTES)", "drawn := entropy(4).rjust(SECRET_BYTES)"),),
    ),
    Mutant(
        "a client that takes unsigned keys",
        CLIENT,
        SECURE_AGGREGATION,
        (
            (
                "if not messages.is_signed(self._peers, neighbour, keys.signature, keys.signed(",
                "if not keys.signature and messages.is_signed(self._peers, neighbour, b'', keys.signed(",
            ),
        ),
    ),
    Mutant(
        "a server that takes unsigned keys",
        SERVER,
        SECURE_AGGREGATION,
        (
            (
                "if not messages.is_signed(self._peers, client_id, keys.signature, keys.signed(",
                "if not keys.signature and messages.is_signed(self._peers, client_id, b'', keys.signed(",
            ),
        ),
    ),
    Mutant(
        "a client that confirms a second set",
        CLIENT,
        SECURE_AGGREGATION,
        (("if phase not in self._answered:", 'if phase not in self._answered or phase == "confirm":'),),
    ),
    Mutant(
        "a client that confirms any number of survivors",
        CLIENT,
        SECURE_AGGREGATION,
        (("or len(survivors) < self.parameters.min_survivors:", "or not survivors:"),),
    ),
    Mutant(
        "an attempt with the noise of the one before",
        "privacy/randomness.py",
        KEYS,
        (("if value or name not in _LEFT_OUT}", 'if name != "attempt" and (value or name not in _LEFT_OUT)}'),),
    ),
    Mutant(
        "records whose noise the server leaves out",
        "rounds/protection.py",
        CHARGED_NOISE,
        (('if self._place == "server" else None', 'if self._place == "server" and self.follows_fleet else None'),),
    ),
    Mutant(
        "whole clients without their own noise",
        "clients/host.py",
        CHARGED_NOISE,
        (('if task.privacy_unit == "client" and task.noise_place == "client":', "if False:"),),
    ),
)

"""Error of a sum with distributed noise, beside central noise and local noise of the same epsilon.

Run by ``make bench-distributed-noise`` (a few minutes); writes docs/benchmarks/distributed_noise.json and
docs/benchmarks.md. BENCH_SUMS sets the number of sums, 40 unless given.
"""

from __future__ import annotations

import json
import math
import os

import numpy as np

from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event, Gaussian
from fedvit.privacy.mechanism import Vector
from fedvit.privacy.randomness import SecretStream
from fedvit.secagg.noise import Plan, RingVector, decode, encode, event_of, plan_for
from tests.benchmarks.results import write_result

CLIENTS = (30, 100, 1_000)
LENGTH = 20_000
SUMS = int(os.environ.get("BENCH_SUMS", "40"))
NOISE_MULTIPLIER, CLIP, DELTA = 1.0, 1.0, 1e-6


def main() -> None:
    """Measure and write."""
    figures = {f"{clients:,} clients": _figures(clients) for clients in CLIENTS}
    central: dict[Event, int] = {Gaussian(NOISE_MULTIPLIER): 1}
    write_result(
        "distributed_noise",
        title="Distributed noise beside central and local noise",
        what=(
            f"Mean squared error of a sum of {LENGTH:,} values, over that of central noise: a Gaussian of multiplier "
            f"{NOISE_MULTIPLIER:g} (epsilon {epsilon_pld(central, DELTA):.3f} at delta {DELTA:g}), added once. Each "
            "contribution has norm 1. Shares of the noise suffice for 90% of the clients. In the first column 10% drop "
            f"out, in the third nobody; both over {SUMS} sums. With local noise every client adds all the noise, and "
            "10% drop out; its column is the root of the ratio, which is that of the standard deviations. Epsilon is "
            "the accounted one of the distributed noise; the ring is the one that its bounds demand."
        ),
        command="make bench-distributed-noise",
        figures=figures,
        ratios={
            f"distributed / central noise, {name}": figure["distributed / central"] for name, figure in figures.items()
        },
    )
    print(json.dumps(figures, indent=2))


def _figures(clients: int) -> dict[str, float]:
    honest = clients * 9 // 10
    plan = plan_for(
        length=LENGTH,
        sensitivity=CLIP,
        largest_norm=CLIP,
        total_norm=CLIP * clients,
        participants=clients,
        honest=honest,
        noise_multiplier=NOISE_MULTIPLIER,
        max_bits=20,
        rotation=b"distributed noise",
    )
    rng = np.random.default_rng(clients)
    dropped, whole = np.array([_squared_errors(plan, clients, honest, rng) for _ in range(SUMS)]).mean(axis=0)
    # Of the noise alone, which is added to each contribution before the sum.
    local = float(np.mean(rng.normal(scale=NOISE_MULTIPLIER * CLIP * math.sqrt(honest), size=SUMS * LENGTH) ** 2))
    central = (NOISE_MULTIPLIER * CLIP) ** 2
    spent: dict[Event, int] = {event_of(plan): 1}
    return {
        "distributed / central": round(dropped / central, 4),
        "standard error": round(math.sqrt(2 / (SUMS * LENGTH)), 4),
        "nobody drops out": round(whole / central, 4),
        "local / central, deviations": round(math.sqrt(local / central), 2),
        "epsilon": round(epsilon_pld(spent, DELTA), 3),
        "ring bits": plan.bits,
    }


def _squared_errors(plan: Plan, clients: int, honest: int, rng: np.random.Generator) -> tuple[float, float]:
    """Mean squared errors of the sum of the first ``honest`` clients, and of all."""
    total, plain = np.zeros(plan.padded, dtype=np.uint32), np.zeros(plan.length)
    dropped = 0.0
    for client in range(clients):
        contribution = rng.normal(size=plan.length)
        contribution *= CLIP / np.linalg.norm(contribution)
        plain += contribution
        total += encode(plan, contribution, SecretStream(rng.bytes(32), "noise", {}))
        if client + 1 == honest:
            dropped = _squared_error(plan, total, plain)
    return dropped, _squared_error(plan, total, plain)


def _squared_error(plan: Plan, total: RingVector, plain: Vector) -> float:
    return float(np.mean((decode(plan, total & np.uint32((1 << plan.bits) - 1)) - plain) ** 2))


if __name__ == "__main__":
    main()

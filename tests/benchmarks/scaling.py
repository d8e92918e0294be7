"""The cost model of docs/explanation/scaling.md: seconds and memory of a round by cohort, parameters and proxies.

``python -m tests.benchmarks.scaling`` measures a grid and prints the fit; the document quotes it.
"""

from __future__ import annotations

import json

import numpy as np
from scipy.optimize import nnls

from tests.benchmarks.rounds import ours

GRID = [
    # clients, parameters, proxies
    (10, 1_000, 2),
    (500, 1_000, 2),
    (2000, 1_000, 2),
    (500, 1_000, 1),
    (20, 1_000_000, 2),
    (20, 1_000_000, 1),
    (80, 1_000_000, 2),
    (20, 4_000_000, 2),
    (10, 4_000_000, 1),
]
TERMS = ("1", "K", "K d / p", "d p", "d")


def features(clients: int, parameters: int, proxies: int) -> list[float]:
    """What the seconds of a round are linear in."""
    k, d, p = float(clients), parameters / 1e6, float(min(proxies, 2))
    return [1.0, k, k * d / p, d * proxies, d]


def main() -> None:
    """Measure, fit, print."""
    rows, seconds, memory = [], [], []
    for clients, parameters, proxies in GRID:
        options = {"clients": clients, "parameters": parameters, "arrays": 10}
        result = ours("EmptyClients", options, {"ray": {"proxies": proxies}}, rounds=8)
        rows.append(features(clients, parameters, proxies))
        seconds.append(result["round_s"])
        memory.append(result["peak_mb"])
        print(json.dumps({"clients": clients, "parameters": parameters, "proxies": proxies, **result}), flush=True)
    # Relative errors count: or the largest round alone would say what the smallest costs.
    matrix, target = np.array(rows), np.array(seconds)
    result, _ = nnls(matrix / target[:, None], np.ones(len(target)))
    fitted = matrix @ result
    print("seconds =", " + ".join(f"{value:.3g} * {term}" for value, term in zip(result, TERMS, strict=True)))
    print("worst relative error:", f"{np.max(np.abs(fitted / target - 1)):.0%}")
    sizes = np.array([[1.0, parameters / 1e6, proxies * parameters / 1e6] for _, parameters, proxies in GRID])
    held, _ = nnls(sizes, np.array(memory))
    print("MB =", " + ".join(f"{value:.3g} * {term}" for value, term in zip(held, ("1", "d", "d p"), strict=True)))


if __name__ == "__main__":
    main()

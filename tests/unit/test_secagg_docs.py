"""The figures of docs/explanation/secure-aggregation.md are those that the code computes."""

from __future__ import annotations

import math
import re
from pathlib import Path

from fedvit.secagg.noise import plan_for
from fedvit.secagg.parameters import parameters_for

PAGE = (Path(__file__).parents[2] / "docs/explanation/secure-aggregation.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first line begins with the heading."""
    lines = PAGE[PAGE.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in lines]


def graph(clients: int, colluding: int) -> str:
    names = [f"client-{number:05}" for number in range(clients)]
    survivors = math.ceil(0.7 * clients)
    graph = parameters_for(
        "0" * 64, names, min_survivors=survivors, max_colluding=colluding, dropout_rate=0.3, bits=20, length=1
    )
    return f"{graph.neighbours} {graph.threshold}"


def test_the_table_of_neighbours_is_current() -> None:
    printed = [[re.sub(r"\s+", " ", cell) for cell in row] for row in rows("| clients | neighbours, threshold")]
    sizes = [int(row[0]) for row in printed]
    assert len(sizes) == 4
    assert printed == [[str(size), graph(size, 0), graph(size, size // 10)] for size in sizes]


def test_the_table_of_rings_is_current() -> None:
    printed = rows("| clients | numbers | ring")
    assert len(printed) == 4
    for clients, numbers, bits, deviation, share in printed:
        plan = plan_for(
            length=int(numbers),
            sensitivity=1.0,
            largest_norm=1.0,
            total_norm=float(clients),
            participants=int(clients),
            honest=math.ceil(0.7 * int(clients)),
            noise_multiplier=1.0,
            max_bits=20,
            rotation=b"r" * 32,
        )
        shown = [str(plan.bits), f"{plan.client_deviation:g}", f"{plan.bits * plan.padded / 32 / plan.length:.2f}"]
        assert [bits, deviation, share] == shown

"""Partition of the training records among virtual clients: pure and deterministic functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fedvit.config import PartitionConfig
from fedvit.data.records import Record
from fedvit.errors import DataError

# A redraw keeps the distribution of the scheme; moving records distorts it, so it is done last.
_MAX_DRAWS = 100

_Parts = list[list[int]]


def partition(records: Sequence[Record], num_classes: int, config: PartitionConfig) -> tuple[tuple[int, ...], ...]:
    """Indices into ``records`` for each client: disjoint, covering, ascending, at least ``min_examples`` each.

    Schemes: ``iid`` (equal random shares); ``dirichlet``, label skew after Hsu et al. 2019 (arXiv:1909.06335) in its
    class-wise form (Yurochkin et al. 2019, arXiv:1905.12022): each class is divided by shares drawn from
    Dirichlet(alpha) over the clients; ``shard`` (McMahan et al. 2017, arXiv:1602.05629): records sorted by label are
    cut into ``clients * shards_per_client`` pieces; ``natural``: whole units, so that no unit is in two clients.

    Raises:
        DataError: the numbers cannot be satisfied, or ``natural`` is used for records without units.
    """
    if config.seed < 0:
        raise DataError(f"data.partition.seed is {config.seed}.", cure="Set it to zero or more.")
    _check_enough(len(records), config)
    rng = np.random.default_rng(config.seed)
    parts = _SCHEMES[config.scheme](records, num_classes, config, rng)
    _check_exact_cover(parts, len(records))
    return tuple(tuple(sorted(part)) for part in parts)


def _check_enough(num_records: int, config: PartitionConfig) -> None:
    needed = config.clients * config.min_examples
    if num_records < needed:
        raise DataError(
            f"{num_records} training records are too few for {config.clients} clients with at least "
            f"{config.min_examples} each ({needed}).",
            cure="Lower data.partition.clients or data.partition.min_examples.",
        )


def _check_exact_cover(parts: _Parts, num_records: int) -> None:
    assigned = sorted(index for part in parts for index in part)
    if assigned != list(range(num_records)):
        raise AssertionError("a record is assigned to no client or to two: privacy per client would not hold")


def _iid(records: Sequence[Record], num_classes: int, config: PartitionConfig, rng: np.random.Generator) -> _Parts:
    return [part.tolist() for part in np.array_split(rng.permutation(len(records)), config.clients)]


def _dirichlet(
    records: Sequence[Record], num_classes: int, config: PartitionConfig, rng: np.random.Generator
) -> _Parts:
    labels = np.asarray([record.label for record in records])
    for _ in range(_MAX_DRAWS):
        parts = _draw_dirichlet(labels, num_classes, config, rng)
        if _smallest(parts) >= config.min_examples:
            return parts
    return _fill_up(parts, labels, config.min_examples)


def _draw_dirichlet(
    labels: npt.NDArray[np.int64], num_classes: int, config: PartitionConfig, rng: np.random.Generator
) -> _Parts:
    parts: _Parts = [[] for _ in range(config.clients)]
    for label in range(num_classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(config.clients, config.alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.extend(piece.tolist())
    return parts


def _fill_up(parts: _Parts, labels: npt.NDArray[np.int64], min_examples: int) -> _Parts:
    """Move records of the largest client's most common class to the smallest client until all have enough."""
    while _smallest(parts) < min_examples:
        largest, smallest = max(parts, key=len), min(parts, key=len)
        label = Counter(labels[largest].tolist()).most_common(1)[0][0]
        smallest.append(largest.pop(next(i for i, index in enumerate(largest) if labels[index] == label)))
    return parts


def _shard(records: Sequence[Record], num_classes: int, config: PartitionConfig, rng: np.random.Generator) -> _Parts:
    num_shards = config.clients * config.shards_per_client
    if len(records) // num_shards * config.shards_per_client < config.min_examples or len(records) < num_shards:
        raise DataError(
            f"{len(records)} training records in {num_shards} shards cannot give each of {config.clients} clients "
            f"{config.min_examples} records.",
            cure="Lower data.partition.clients, shards_per_client or min_examples.",
        )
    shuffled = rng.permutation(len(records))
    by_label = shuffled[np.argsort([records[i].label for i in shuffled], kind="stable")]
    shards = np.array_split(by_label, num_shards)
    assigned = rng.permutation(num_shards).reshape(config.clients, config.shards_per_client)
    return [np.concatenate([shards[i] for i in row]).tolist() for row in assigned]


def _natural(records: Sequence[Record], num_classes: int, config: PartitionConfig, rng: np.random.Generator) -> _Parts:
    units = _units(records)
    if len(units) < config.clients:
        raise DataError(
            f"{len(units)} units cannot be divided among {config.clients} clients.",
            cure="Lower data.partition.clients.",
        )
    for _ in range(_MAX_DRAWS):
        order = rng.permutation(len(units))
        parts = [[i for u in order[c :: config.clients] for i in units[u]] for c in range(config.clients)]
        if _smallest(parts) >= config.min_examples:
            return parts
    return _assign_evenly(units, config)


def _units(records: Sequence[Record]) -> _Parts:
    by_unit: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if record.unit is None:
            raise DataError(
                f"Partition scheme 'natural' needs units, and record {record.key} has none.",
                cure="Set data.partition.scheme to iid, dirichlet or shard, or use a source with units (gtsrb).",
            )
        by_unit[record.unit].append(index)
    return [by_unit[unit] for unit in sorted(by_unit)]


def _assign_evenly(units: _Parts, config: PartitionConfig) -> _Parts:
    """Assign the largest unit first, always to the smallest client."""
    parts: _Parts = [[] for _ in range(config.clients)]
    for unit in sorted(units, key=len, reverse=True):
        min(parts, key=len).extend(unit)
    if _smallest(parts) < config.min_examples:
        raise DataError(
            f"{len(units)} whole units cannot give each of {config.clients} clients {config.min_examples} records "
            f"(the smallest would have {_smallest(parts)}).",
            cure="Lower data.partition.clients or data.partition.min_examples.",
        )
    return parts


def _smallest(parts: _Parts) -> int:
    return min(len(part) for part in parts)


_SCHEMES: dict[str, Callable[[Sequence[Record], int, PartitionConfig, np.random.Generator], _Parts]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shard": _shard,
    "natural": _natural,
}

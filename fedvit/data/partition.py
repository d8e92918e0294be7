"""Partition of the training records among virtual clients, and the virtual fleet: deterministic in every process."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedvit.config import DataConfig, PartitionConfig
from fedvit.data.records import ImageSource, Record
from fedvit.data.sources import open_source
from fedvit.errors import DataError
from fedvit.types import Client, ClientKind

# A redraw keeps the distribution of the scheme; moving records distorts it, so it is done last.
_MAX_DRAWS = 100

_Parts = list[list[int]]


@dataclass(frozen=True, slots=True)
class VirtualFleet:
    """A data set and its partition; implements :class:`fedvit.clients.host.ClientRecords`."""

    source: ImageSource
    parts: dict[str, tuple[int, ...]]
    """Indices into ``source.train`` by client id."""

    @classmethod
    def open(cls, config: DataConfig) -> VirtualFleet:
        """Partition the training records of the configured data set; equal settings give an equal fleet.

        Raises:
            DataError: the data set cannot be read, or cannot be partitioned as configured.
        """
        source = open_source(config)
        parts = partition(source.train, len(source.classes), config.partition)
        width = max(2, len(str(len(parts) - 1)))
        return cls(source, {f"vehicle-{i:0{width}d}": part for i, part in enumerate(parts)})

    def records(self, client_id: str) -> tuple[Record, ...]:
        """The records of one client."""
        return tuple(self.source.train[i] for i in self.parts[client_id])

    def check_disjoint(self) -> None:
        """Check that no two clients have an equal image: it would lose privacy twice and be charged once.

        Raises:
            DataError: two clients have, both records and clients are named; or an image cannot be read.
        """
        first: dict[str, tuple[str, str]] = {}
        for client_id, part in self.parts.items():
            for record in (self.source.train[i] for i in part):
                content = hashlib.sha256(self.source.read(record)).hexdigest()
                holder, key = first.setdefault(content, (client_id, record.key))
                if holder != client_id:
                    raise DataError(
                        f"{record.key} of {client_id} and {key} of {holder} are the same image: a record in two "
                        "clients loses twice the privacy that it is charged.",
                        cure="Remove one of the two, or partition by natural units that contain both.",
                    )

    def parts_digest(self) -> str:
        """SHA-256 of the partition, hex; it differs after a change even if the settings are equal."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def clients(self) -> list[Client]:
        """The fleet as clients to register."""
        return [Client(name, ClientKind.VIRTUAL, num_examples=len(part)) for name, part in self.parts.items()]


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
    needed = config.clients * config.min_examples
    if len(records) < needed:
        raise DataError(
            f"{len(records)} training records are too few for {config.clients} clients with at least "
            f"{config.min_examples} each ({needed}).",
            cure="Lower data.partition.clients or data.partition.min_examples.",
        )
    parts = _SCHEMES[config.scheme](records, num_classes, config, np.random.default_rng(config.seed))
    if sorted(index for part in parts for index in part) != list(range(len(records))):
        raise AssertionError("a record is assigned to no client or to two: privacy per client would not hold")
    return tuple(tuple(sorted(part)) for part in parts)


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
        message = f"{len(units)} units cannot be divided among {config.clients} clients."
        raise DataError(message, cure="Lower data.partition.clients.")
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

"""Virtual fleet: a data set partitioned among simulated vehicles, equally in every process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from fedvit.config import DataConfig
from fedvit.data.partition import partition
from fedvit.data.sources import ImageSource, Record, open_source
from fedvit.errors import DataError
from fedvit.types import Client, ClientKind


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

"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fedvit.config import CohortConfig
from fedvit.privacy.randomness import SecretStream
from fedvit.types import Client, Cohort


def eligible(clients: Sequence[Client], config: CohortConfig) -> tuple[str, ...]:
    """Ids of the clients that may be drawn, sorted.

    They are active, have data, are not in quarantine, and are validated where the setting says so.
    """
    validated_only = config.client_selection == "validated_only"
    return tuple(
        sorted(
            c.client_id
            for c in clients
            if c.active and c.num_examples and not c.quarantined and (c.validated or not validated_only)
        )
    )


def draw_cohort(
    config: CohortConfig,
    client_ids: Sequence[str],
    *,
    run_id: str,
    round_index: int,
    secret: bytes,
    in_flight: Collection[str] = (),
) -> Cohort:
    """The cohort of one round, by secret coins; equal arguments give an equal cohort, so that a retry draws the same.

    ``uniform`` draws ``places`` clients without replacement (all of them where there are fewer). Those in flight still
    work on an earlier round: they are not drawn, and each of them takes up one of the places. ``poisson`` tosses a coin
    for each client, whatever falls to the others; there nobody may be in flight.

    Raises:
        ValueError: somebody is in flight, and the cohort is to be a Poisson sample.
    """
    if config.sampling_prob is not None:
        if in_flight:
            raise ValueError("a Poisson sample of whoever happens to be free is none")
        stream = SecretStream(secret, "cohort", {"run_id": run_id, "round_index": round_index})
        heads = stream.coins(len(client_ids), config.sampling_prob)
        return Cohort(round_index, tuple(c for c, head in zip(sorted(client_ids), heads, strict=True) if head))
    ids = sorted(client_id for client_id in client_ids if client_id not in in_flight)
    wanted = None if config.selection == "all" else config.places
    places = len(ids) if wanted is None else max(0, wanted - len(in_flight))
    if places < len(ids):
        stream = SecretStream(secret, "cohort", {"run_id": run_id, "round_index": round_index})
        ranks = np.argsort(stream.uniform(len(ids)), kind="stable")
        ids = sorted(ids[i] for i in ranks[:places])
    return Cohort(round_index, tuple(ids))

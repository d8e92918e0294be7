"""FleetHistograms of clients' data, and how their updates looked. Functions of an open session."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.store.fleet import get_meta, set_meta
from fedvit.store.tables import ClientRoundRow, HistogramRow, RoundRow
from fedvit.types import UpdateStatistics
from fedvit.wire.histograms import ClientHistogram, HistogramSpec

_SPEC_KEY = "histogram_spec/"


def add(session: Session, histograms: Sequence[ClientHistogram], spec: HistogramSpec, at: datetime) -> int:
    """Write the histograms that are not there yet, and what their counts mean; return how many."""
    key = _SPEC_KEY + spec.digest
    if histograms and get_meta(session, key) is None:
        set_meta(session, key, spec.to_json())
    new = 0
    for histogram in histograms:
        if session.get(HistogramRow, (histogram.run_id, histogram.round_index, histogram.client_id)) is None:
            session.add(_row(histogram, at))
            new += 1
    return new


def spec(session: Session, digest: str) -> HistogramSpec | None:
    """What the counts of a histogram mean, by its ``spec_digest``."""
    found = get_meta(session, _SPEC_KEY + digest)
    # Before there were risks a histogram had one count less: such a window can be compared with none.
    return HistogramSpec.from_json(found) if found is not None and "risk_votes" in found else None


def latest_spec(session: Session, until: datetime) -> HistogramSpec | None:
    """What the newest histogram means that is no younger than ``until``."""
    query = select(HistogramRow.spec_digest).where(HistogramRow.at <= until).order_by(HistogramRow.at.desc()).limit(1)
    digest = session.scalar(query)
    return None if digest is None else spec(session, digest)


def latest(session: Session, until: datetime | None) -> dict[str, ClientHistogram]:
    """Each client's newest histogram, or its newest that is no younger than ``until``."""
    newest = select(HistogramRow.client_id, func.max(HistogramRow.at).label("at")).group_by(HistogramRow.client_id)
    if until is not None:
        newest = newest.where(HistogramRow.at <= until)
    found = newest.subquery()
    same = (HistogramRow.client_id == found.c.client_id) & (HistogramRow.at == found.c.at)
    rows = session.scalars(select(HistogramRow).join(found, same).order_by(HistogramRow.client_id))
    return {row.client_id: _sketch(row) for row in rows}


def conduct(session: Session, rounds: int) -> dict[str, UpdateStatistics]:
    """How updates looked in the latest so many committed rounds, whichever runs they belong to; by client."""
    committed = select(RoundRow.run_id, RoundRow.round_index, RoundRow.committed_at)
    recent = (
        committed.where(RoundRow.committed_at.is_not(None)).order_by(RoundRow.committed_at.desc()).limit(rounds)
    ).subquery()
    same = (ClientRoundRow.run_id == recent.c.run_id) & (ClientRoundRow.round_index == recent.c.round_index)
    seen = (ClientRoundRow.client_id, ClientRoundRow.update_norm, ClientRoundRow.alignment)
    query = select(recent.c.run_id, recent.c.round_index, *seen).join(ClientRoundRow, same)
    query = query.where(ClientRoundRow.update_norm.is_not(None)).order_by(recent.c.committed_at)
    norms: dict[str, list[float]] = {}
    alignments: dict[str, dict[str, float]] = {}
    for run_id, round_index, client_id, norm, alignment in session.execute(query):
        norms.setdefault(client_id, []).append(norm or 0.0)
        if alignment is not None:
            alignments.setdefault(client_id, {})[f"{run_id}/{round_index}"] = alignment
    return {c: UpdateStatistics(tuple(found), alignments.get(c, {})) for c, found in norms.items()}


def _row(histogram: ClientHistogram, at: datetime) -> HistogramRow:
    return HistogramRow(
        run_id=histogram.run_id,
        round_index=histogram.round_index,
        client_id=histogram.client_id,
        at=at,
        num_examples=histogram.num_examples,
        spec_digest=histogram.spec_digest,
        deviation=histogram.deviation,
        counts=np.array(histogram.counts, dtype="<i4").tobytes(),
    )


def _sketch(row: HistogramRow) -> ClientHistogram:
    counts = tuple(int(count) for count in np.frombuffer(row.counts, dtype="<i4"))
    place = (row.client_id, row.run_id, row.round_index, row.num_examples)
    return ClientHistogram(*place, row.spec_digest, row.deviation, counts)

"""Sketches of clients' data, and how their updates looked. Functions of an open session."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.store.fleet import get_meta, set_meta
from fedvit.store.tables import ClientRoundRow, RoundRow, SketchRow
from fedvit.types import Conduct
from fedvit.wire.sketch import Sketch, SketchSpec

_SPEC_KEY = "sketch_spec/"


def add(session: Session, sketches: Sequence[Sketch], spec: SketchSpec, at: datetime) -> int:
    """Write the sketches that are not there yet, and what their counts mean; return how many."""
    key = _SPEC_KEY + spec.digest
    if sketches and get_meta(session, key) is None:
        set_meta(session, key, spec.to_json())
    new = 0
    for sketch in sketches:
        if session.get(SketchRow, (sketch.run_id, sketch.round_index, sketch.client_id)) is None:
            session.add(_row(sketch, at))
            new += 1
    return new


def spec(session: Session, digest: str) -> SketchSpec | None:
    """What the counts of a sketch mean, by its ``spec_digest``."""
    found = get_meta(session, _SPEC_KEY + digest)
    # Before there were risks a sketch had one count less: such a window can be compared with none.
    return SketchSpec.from_json(found) if found is not None and "risk_votes" in found else None


def latest_spec(session: Session, until: datetime) -> SketchSpec | None:
    """What the newest sketch means that is no younger than ``until``."""
    query = select(SketchRow.spec_digest).where(SketchRow.at <= until).order_by(SketchRow.at.desc()).limit(1)
    digest = session.scalar(query)
    return None if digest is None else spec(session, digest)


def latest(session: Session, until: datetime | None) -> dict[str, Sketch]:
    """Each client's newest sketch, or its newest that is no younger than ``until``."""
    newest = select(SketchRow.client_id, func.max(SketchRow.at).label("at")).group_by(SketchRow.client_id)
    if until is not None:
        newest = newest.where(SketchRow.at <= until)
    found = newest.subquery()
    same = (SketchRow.client_id == found.c.client_id) & (SketchRow.at == found.c.at)
    rows = session.scalars(select(SketchRow).join(found, same).order_by(SketchRow.client_id))
    return {row.client_id: _sketch(row) for row in rows}


def conduct(session: Session, rounds: int) -> dict[str, Conduct]:
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
    return {c: Conduct(tuple(found), alignments.get(c, {})) for c, found in norms.items()}


def _row(sketch: Sketch, at: datetime) -> SketchRow:
    return SketchRow(
        run_id=sketch.run_id,
        round_index=sketch.round_index,
        client_id=sketch.client_id,
        at=at,
        num_examples=sketch.num_examples,
        spec_digest=sketch.spec_digest,
        deviation=sketch.deviation,
        counts=np.array(sketch.counts, dtype="<i4").tobytes(),
    )


def _sketch(row: SketchRow) -> Sketch:
    counts = tuple(int(count) for count in np.frombuffer(row.counts, dtype="<i4"))
    place = (row.client_id, row.run_id, row.round_index, row.num_examples)
    return Sketch(*place, row.spec_digest, row.deviation, counts)

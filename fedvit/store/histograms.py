"""Private histograms of the clients' data."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import UpdateRejectedError
from fedvit.store.metadata import get_value, set_value
from fedvit.store.repository import Repository, columns_of, record_of
from fedvit.store.tables import HistogramRow
from fedvit.wire.histograms import ClientHistogram, HistogramSpec

_SPEC_KEY = "histogram_spec/"


class Histograms(Repository):
    """The histograms that clients have sent, and the specs that say what their counts mean."""

    def add(self, histograms: Sequence[ClientHistogram], spec: HistogramSpec) -> int:
        """Write the histograms that are not stored yet, all of one spec; return how many are new."""
        key, at, new = _SPEC_KEY + spec.digest, self._now(), 0
        with self._write() as session:
            if histograms and get_value(session, key) is None:
                set_value(session, key, spec.to_json())
            for histogram in histograms:
                if session.get(HistogramRow, (histogram.run_id, histogram.round_index, histogram.client_id)) is None:
                    counts = np.array(histogram.counts, dtype="<i4").tobytes()
                    session.add(HistogramRow(at=at, **columns_of(histogram, counts=counts)))
                    new += 1
        return new

    def latest(self, until: datetime | None = None) -> dict[str, ClientHistogram]:
        """Each client's newest histogram, or its newest that is no younger than ``until``."""
        newest = select(HistogramRow.client_id, func.max(HistogramRow.at).label("at")).group_by(HistogramRow.client_id)
        if until is not None:
            newest = newest.where(HistogramRow.at <= until)
        times = newest.subquery()
        same = (HistogramRow.client_id == times.c.client_id) & (HistogramRow.at == times.c.at)
        query = select(HistogramRow).join(times, same).order_by(HistogramRow.client_id)
        with self._read() as session:
            return {row.client_id: _to_histogram(row) for row in session.scalars(query)}

    def latest_spec(self, until: datetime) -> HistogramSpec | None:
        """The spec of the newest histogram that is no younger than ``until``; None where there is none."""
        query = select(HistogramRow.spec_digest).where(HistogramRow.at <= until).order_by(HistogramRow.at.desc())
        with self._read() as session:
            digest = session.scalar(query.limit(1))
            return None if digest is None else _spec(session, digest)

    def spec(self, digest: str) -> HistogramSpec | None:
        """The spec with this digest; None where no histogram of it was stored."""
        with self._read() as session:
            return _spec(session, digest)


def _spec(session: Session, digest: str) -> HistogramSpec | None:
    value = get_value(session, _SPEC_KEY + digest)
    try:
        return None if value is None else HistogramSpec.from_json(value)
    except UpdateRejectedError:
        # Older specs have no risk votes and one count less: such a histogram can be compared with none.
        return None


def _to_histogram(row: HistogramRow) -> ClientHistogram:
    counts = tuple(int(count) for count in np.frombuffer(row.counts, dtype="<i4"))
    return record_of(ClientHistogram, row, counts=counts)

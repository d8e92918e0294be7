"""Training runs and their rounds.

A round is opened with a cohort, and committed with outcomes, results and a model version in one transaction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.records import RoundCommit, RoundTally
from fedvit.store.repository import Repository, among, get_row, insert_row, next_number, record_of
from fedvit.store.tables import ChargeRow, ClientRoundRow, ClientRow, RoundRow, RunRow, VersionRow
from fedvit.store.versions import insert_version
from fedvit.types import (
    ClientOutcome,
    Cohort,
    ModelVersion,
    Participation,
    RoundRecord,
    Run,
    RunStatus,
    UpdateStatistics,
)

RESUMABLE = [status.value for status in RunStatus if status.resumable]
_INSERT_OUTCOME = (
    "INSERT INTO client_rounds (run_id, round_index, client_id, num_examples, error, update_norm, alignment) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_ROUND_OF_OUTCOME = (ClientRoundRow.run_id == RoundRow.run_id) & (ClientRoundRow.round_index == RoundRow.round_index)


class Runs(Repository):
    """Training runs. At most one of them can be continued."""

    def create(
        self,
        *,
        rounds_total: int,
        noise_multiplier: float,
        config: Mapping[str, Any],
        config_digest: str,
        data_digest: str,
        reason: str | None = None,
    ) -> Run:
        """Begin the next run, ``run-0001`` and so on. ``config`` holds JSON types only; ``reason`` says why it begins.

        Raises:
            ConflictError: another run can still be continued.
        """
        with self._write() as session:
            _check_none_resumable(session, except_for=None)
            ordinal = next_number(session, RunRow.ordinal)
            row = RunRow(
                run_id=f"run-{ordinal:04d}",
                ordinal=ordinal,
                status=RunStatus.RUNNING.value,
                rounds_total=rounds_total,
                rounds_done=0,
                noise_multiplier=noise_multiplier,
                config=dict(config),
                config_digest=config_digest,
                data_digest=data_digest,
                started_at=self._now(),
                reason=reason,
            )
            return record_of(Run, insert_row(session, row))

    def set_config(self, run_id: str, config: Mapping[str, Any]) -> Run:
        """Replace the recorded configuration of a run, of JSON types only. Raises NotFoundError where there is none."""
        with self._write() as session:
            row = get_row(session, RunRow, run_id)
            row.config = dict(config)
            return record_of(Run, row)

    def extend(self, run_id: str, rounds_total: int, config: Mapping[str, Any], config_digest: str, reason: str) -> Run:
        """Let a run go on, also after its end, to another last round, with the configuration that names it.

        Raises:
            NotFoundError: no such run.
            ConflictError: another run can still be continued.
        """
        with self._write() as session:
            _check_none_resumable(session, except_for=run_id)
            row = get_row(session, RunRow, run_id)
            row.rounds_total, row.config, row.config_digest = rounds_total, dict(config), config_digest
            row.status, row.reason, row.ended_at = RunStatus.RUNNING.value, reason, None
            return record_of(Run, row)

    def get(self, run_id: str) -> Run:
        """One run; raises NotFoundError where there is none."""
        return self._get(Run, RunRow, run_id)

    def all(self) -> list[Run]:
        """All runs, oldest first."""
        return self._records(Run, select(RunRow).order_by(RunRow.ordinal))

    def latest(self) -> Run | None:
        """The run begun last, or None."""
        return self._first(Run, select(RunRow).order_by(RunRow.ordinal.desc()))

    def set_status(self, run_id: str, status: RunStatus, reason: str | None = None) -> Run:
        """Move a run to ``status``; every status but RUNNING sets ``ended_at``, RUNNING clears it.

        Raises:
            NotFoundError: no such run.
            ConflictError: ``status`` is resumable, and another run is so already.
        """
        with self._write() as session:
            row = get_row(session, RunRow, run_id)
            if status.resumable:
                _check_none_resumable(session, except_for=run_id)
            row.status, row.reason = status.value, reason
            row.ended_at = None if status is RunStatus.RUNNING else self._now()
            return record_of(Run, row)

    def abandon(self, reason: str) -> None:
        """End the run that could be continued, if there is one; the next start begins another, of the same settings."""
        with self._write() as session:
            for row in session.scalars(select(RunRow).where(RunRow.status.in_(RESUMABLE))):
                # Without the digest of its settings it is not found by them.
                row.status, row.reason, row.config_digest = RunStatus.SUPERSEDED.value, reason, ""
                row.ended_at = self._now()


def _check_none_resumable(session: Session, *, except_for: str | None) -> None:
    for run_id in session.scalars(select(RunRow.run_id).where(RunRow.status.in_(RESUMABLE))):
        if run_id != except_for:
            raise ConflictError(f"{run_id} is not finished.", cure="Continue it, or end it before another run goes on.")


class Rounds(Repository):
    """The rounds of all runs, and how each client fared in them."""

    def open(self, run_id: str, round_index: int, cohort: Cohort) -> RoundRecord:
        """Record the cohort of the run's next round (1-based); a retry gets the cohort that is on record.

        A round that was opened with an empty cohort (all clients were in flight) has charged and trained nobody, so its
        cohort may still be recorded.

        Raises:
            NotFoundError: no such run.
            ConflictError: ``round_index`` is not ``rounds_done + 1``, or the cohort was drawn for another round.
        """
        with self._write() as session:
            expected = get_row(session, RunRow, run_id).rounds_done + 1
            if round_index != expected:
                raise ConflictError(
                    f"Round {round_index} of {run_id} cannot be opened.", cure=f"Its next round is {expected}."
                )
            if cohort.round_index != round_index:
                raise ConflictError(
                    f"Round {round_index} of {run_id} was given the cohort of round {cohort.round_index}.",
                    cure="Draw the cohort for the round that it takes part in.",
                )
            client_ids = list(cohort.client_ids)
            row = session.get(RoundRow, (run_id, round_index))
            if row is None:
                key = {"run_id": run_id, "round_index": round_index}
                session.add(RoundRow(**key, cohort=client_ids, opened_at=self._now(), num_updates=0))
            else:
                row.cohort = row.cohort or client_ids
            session.flush()
            return _record(session, run_id, round_index)

    def commit(self, run_id: str, round_index: int, commit: RoundCommit) -> ModelVersion:
        """Outcomes, results, the run's progress and the new version ``v1.<run ordinal>.<n>``, in one transaction.

        Raises:
            NotFoundError: the round was never opened.
            ConflictError: it is committed already, an outcome is of a client outside the cohort or a client's second
                one, or a client that contributed was quarantined meanwhile. A late outcome belongs to the cohort of the
                round that it started in.
        """
        with self._write() as session:
            run, row = get_row(session, RunRow, run_id), _round_row(session, run_id, round_index)
            if row.committed_at is not None:
                raise ConflictError(
                    f"Round {round_index} of {run_id} is committed already.",
                    cure=f"Its next round is {run.rounds_done + 1}.",
                )
            _check_outcomes(session, row, commit.outcomes)
            _check_quarantine(session, row, commit.outcomes)
            now = self._now()
            row.committed_at, row.epsilon, row.duration_s = now, commit.epsilon, commit.duration_s
            row.loss, row.accuracy = _finite(commit.loss), _finite(commit.accuracy)
            row.num_updates = sum(outcome.error is None for outcome in commit.outcomes)
            run.rounds_done = round_index
            _insert_outcomes(session, row, commit.outcomes)
            return insert_version(session, run, round_index, commit, now)

    def get(self, run_id: str, round_index: int) -> RoundRecord:
        """One round; raises NotFoundError where there is none."""
        with self._read() as session:
            return _record(session, run_id, round_index)

    def of_run(self, run_id: str) -> list[RoundRecord]:
        """The rounds of a run in order, the open one included. Raises NotFoundError where there is no such run."""
        with self._read() as session:
            get_row(session, RunRow, run_id)
            return _records(session, RoundRow.run_id == run_id)

    def engagements(
        self, run_id: str, before: int, client_ids: Sequence[str] | None = None
    ) -> dict[str, tuple[int, int]]:
        """By client, in how many rounds of a run it was charged, and the last one that it was charged or folded in.

        Rounds from ``before`` on do not count. A charged round counts whatever became of it; a late update counts in
        the round that took it. None asks for all clients.
        """
        index = ChargeRow.round_index
        charged = select(ChargeRow.unit_id, func.count(index.distinct()), func.max(index))
        charged = charged.where(ChargeRow.run_id == run_id, index < before).group_by(ChargeRow.unit_id)
        folded = select(ClientRoundRow.client_id, func.max(ClientRoundRow.round_index)).where(
            ClientRoundRow.run_id == run_id, ClientRoundRow.round_index < before, ClientRoundRow.error.is_(None)
        )
        if client_ids is not None:
            charged = charged.where(among(ChargeRow.unit_id, client_ids))
            folded = folded.where(among(ClientRoundRow.client_id, client_ids))
        with self._read() as session:
            engaged = {client_id: (count, last) for client_id, count, last in session.execute(charged)}
            for client_id, last in session.execute(folded.group_by(ClientRoundRow.client_id)):
                count, charged_last = engaged.get(client_id, (0, 0))
                engaged[client_id] = (count, max(last, charged_last))
            return engaged

    def awaited(self, run_id: str, started: int, round_index: int) -> tuple[set[str], set[str]]:
        """Clients whose answers to round ``started`` the open round may take, and those that have given one already.

        A round ``started`` that was never opened awaits no client.

        Raises:
            NotFoundError: ``round_index`` was never opened.
        """
        with self._read() as session:
            row = _round_row(session, run_id, round_index)
            cohort, answered = _cohort_and_answered(session, row, round_index - started)
            return cohort - answered, cohort & answered

    def answer_of(self, client_id: str, run_id: str, started: int) -> tuple[int, str | None] | None:
        """The round that took a client's answer to round ``started``, and why it does not count; None: none has."""
        own = (RoundRow.run_id == run_id, RoundRow.round_index >= started)
        cohorts = select(RoundRow.round_index, RoundRow.cohort).where(*own).order_by(RoundRow.round_index)
        outcome = select(ClientRoundRow.round_index, ClientRoundRow.error).where(
            ClientRoundRow.run_id == run_id,
            ClientRoundRow.client_id == client_id,
            ClientRoundRow.round_index >= started,
        )
        with self._read() as session:
            # A client is selected again only after it has answered, or was given up.
            selected = [index for index, cohort in session.execute(cohorts) if client_id in cohort]
            if not selected or selected[0] != started:
                return None
            row = session.execute(outcome.order_by(ClientRoundRow.round_index).limit(1)).first()
            if row is None or (len(selected) > 1 and row.round_index >= selected[1]):
                return None
            return row.round_index, row.error

    def answers(self, run_id: str) -> list[tuple[int, str, bool]]:
        """The answers to the committed rounds of a run, in order: the round, the client, and whether it counts."""
        query = select(ClientRoundRow.round_index, ClientRoundRow.client_id, ClientRoundRow.error)
        query = query.where(ClientRoundRow.run_id == run_id).order_by(ClientRoundRow.round_index)
        with self._read() as session:
            return [(index, client_id, error is None) for index, client_id, error in session.execute(query)]

    def participation(self) -> dict[str, Participation]:
        """How the rounds of every client went that took part in one, over all runs."""
        query = select(ClientRoundRow.client_id, func.count(), func.count(ClientRoundRow.error))
        with self._read() as session:
            rows = session.execute(query.group_by(ClientRoundRow.client_id))
            return {client_id: Participation(rounds, failures) for client_id, rounds, failures in rows}

    def update_statistics(self, rounds: int) -> dict[str, UpdateStatistics]:
        """Norms and alignments of noised updates in the last ``rounds`` committed rounds of all runs, by client."""
        committed = select(RoundRow.run_id, RoundRow.round_index, RoundRow.committed_at)
        recent = (
            committed.where(RoundRow.committed_at.is_not(None)).order_by(RoundRow.committed_at.desc()).limit(rounds)
        ).subquery()
        same = (ClientRoundRow.run_id == recent.c.run_id) & (ClientRoundRow.round_index == recent.c.round_index)
        columns = (ClientRoundRow.client_id, ClientRoundRow.update_norm, ClientRoundRow.alignment)
        query = select(recent.c.run_id, recent.c.round_index, *columns).join(ClientRoundRow, same)
        query = query.where(ClientRoundRow.update_norm.is_not(None)).order_by(recent.c.committed_at)
        norms: dict[str, list[float]] = {}
        alignments: dict[str, dict[str, float]] = {}
        with self._read() as session:
            for run_id, round_index, client_id, norm, alignment in session.execute(query):
                norms.setdefault(client_id, []).append(norm or 0.0)
                if alignment is not None:
                    alignments.setdefault(client_id, {})[f"{run_id}/{round_index}"] = alignment
        return {c: UpdateStatistics(tuple(values), alignments.get(c, {})) for c, values in norms.items()}

    def tally(self, since: datetime, until: datetime) -> RoundTally:
        """How many rounds that began, or were committed, from ``since`` to ``until`` ended in which way."""
        committed = RoundRow.committed_at.between(since, until)
        rounds = select(func.count()).select_from(RoundRow)
        opened = rounds.join(RunRow, RunRow.run_id == RoundRow.run_id).where(
            RoundRow.opened_at.between(since, until), RoundRow.committed_at.is_(None)
        )
        answers = select(func.count(), func.count(ClientRoundRow.error)).where(committed)
        with self._read() as session:
            given, refused = session.execute(answers.join_from(ClientRoundRow, RoundRow, _ROUND_OF_OUTCOME)).one()
            return RoundTally(
                committed=session.scalar(rounds.where(committed)) or 0,
                under_way=session.scalar(opened.where(RunRow.status.in_(RESUMABLE))) or 0,
                lost=session.scalar(opened.where(RunRow.status.not_in(RESUMABLE))) or 0,
                answers=given,
                refused=refused,
            )


def _check_outcomes(session: Session, row: RoundRow, outcomes: Sequence[ClientOutcome]) -> None:
    """Each is the only one of its client, which was selected for the round that it started in and not heard since."""
    checked: set[str] = set()
    starts = {staleness: _cohort_and_answered(session, row, staleness) for staleness in {o.staleness for o in outcomes}}
    for outcome in outcomes:
        cohort, answered = starts[outcome.staleness]
        again = outcome.client_id in checked or outcome.client_id in answered
        if again or outcome.client_id not in cohort:
            fault = "is not in the cohort of" if outcome.client_id not in cohort else "counts twice in"
            raise ConflictError(
                f"Client {outcome.client_id!r} {fault} round {row.round_index - outcome.staleness} of {row.run_id}.",
                cure="Commit at most one outcome for each client and round of the recorded cohorts.",
            )
        checked.add(outcome.client_id)


def _cohort_and_answered(session: Session, row: RoundRow, staleness: int) -> tuple[set[str], set[str]]:
    """The cohort of the round ``staleness`` rounds before, and all clients whose answers were taken since it opened."""
    first = row.round_index - staleness
    origin = session.get(RoundRow, (row.run_id, first)) if staleness >= 0 else None
    since = ClientRoundRow.round_index.between(first, row.round_index)
    answered = session.scalars(select(ClientRoundRow.client_id).where(ClientRoundRow.run_id == row.run_id, since))
    return set(origin.cohort if origin else ()), set(answered)


def _check_quarantine(session: Session, row: RoundRow, outcomes: Sequence[ClientOutcome]) -> None:
    """In the committing transaction, so that an incident's reported reach stays true, whatever was under way."""
    contributed = {outcome.client_id for outcome in outcomes if outcome.error is None}
    in_quarantine = session.scalars(select(ClientRow.client_id).where(ClientRow.quarantined_at.is_not(None)))
    caught = sorted(contributed.intersection(in_quarantine))
    if caught:
        raise ConflictError(
            f"Round {row.round_index} of {row.run_id} is discarded: {', '.join(caught[:10])} came into quarantine "
            "while it was trained.",
            cure="The next start trains it again without them.",
        )


def _insert_outcomes(session: Session, row: RoundRow, outcomes: Sequence[ClientOutcome]) -> None:
    key = (row.run_id, row.round_index)
    facts = [
        (*key, o.client_id, o.num_examples, o.error, _finite(o.update_norm), _finite(o.alignment)) for o in outcomes
    ]
    if facts:
        # By the driver: to bind so many values by name would take longer than to write the rows.
        session.connection().exec_driver_sql(_INSERT_OUTCOME, facts)


def _record(session: Session, run_id: str, round_index: int) -> RoundRecord:
    _round_row(session, run_id, round_index)
    return _records(session, RoundRow.run_id == run_id, RoundRow.round_index == round_index)[0]


def _records(session: Session, *conditions: ColumnElement[bool]) -> list[RoundRecord]:
    trained = (
        (VersionRow.run_id == RoundRow.run_id)
        & (VersionRow.round_index == RoundRow.round_index)
        & VersionRow.derived_from.is_(None)
    )
    query = select(RoundRow, VersionRow.version).outerjoin(VersionRow, trained)
    pairs = session.execute(query.where(*conditions).order_by(RoundRow.round_index))
    return [
        record_of(RoundRecord, row, committed=row.committed_at is not None, version=version) for row, version in pairs
    ]


def _round_row(session: Session, run_id: str, round_index: int) -> RoundRow:
    row = session.get(RoundRow, (run_id, round_index))
    if row is None:
        cure = "A round exists once it has been opened."
        raise NotFoundError(f"{run_id} has no round {round_index}.", cure=cure)
    return row


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

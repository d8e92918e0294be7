"""Runs and their rounds. Functions of an open session; what they write is committed together or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.fleet import quarantined_clients
from fedvit.store.records import RoundCommit
from fedvit.store.tables import ChargeRow, ClientRoundRow, RoundRow, RunRow, VersionRow, among
from fedvit.store.versions import insert_version
from fedvit.types import ClientOutcome, Cohort, ModelVersion, Participation, RoundRecord, Run, RunStatus, utc_now

_OUTCOME = (
    "INSERT INTO client_rounds (run_id, round_index, client_id, num_examples, error, update_norm, alignment) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
RESUMABLE = [status.value for status in RunStatus if status.resumable]


def create_run(
    session: Session,
    *,
    rounds_total: int,
    noise_multiplier: float,
    config: Mapping[str, Any],
    config_digest: str,
    data_digest: str,
) -> Run:
    """Begin the next run.

    Raises:
        ConflictError: another run can still be continued.
    """
    _check_none_resumable(session, except_for=None)
    ordinal = 1 + (session.scalar(select(func.max(RunRow.ordinal))) or 0)
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
        started_at=utc_now(),
    )
    session.add(row)
    session.flush()
    return _to_run(row)


def run(session: Session, run_id: str) -> Run:
    """One run.

    Raises:
        NotFoundError: no such run.
    """
    return _to_run(_run_row(session, run_id))


def runs(session: Session) -> list[Run]:
    """All runs, oldest first."""
    return [_to_run(row) for row in session.scalars(select(RunRow).order_by(RunRow.ordinal))]


def latest_run(session: Session) -> Run | None:
    """The run begun last."""
    row = session.scalar(select(RunRow).order_by(RunRow.ordinal.desc()).limit(1))
    return None if row is None else _to_run(row)


def set_run_status(session: Session, run_id: str, status: RunStatus, reason: str | None) -> Run:
    """Move a run to ``status``; whatever is not running has an end.

    Raises:
        NotFoundError: no such run.
        ConflictError: ``status`` is resumable, and another run is so already.
    """
    row = _run_row(session, run_id)
    if status.resumable:
        _check_none_resumable(session, except_for=run_id)
    row.status = status.value
    row.reason = reason
    row.ended_at = None if status is RunStatus.RUNNING else utc_now()
    return _to_run(row)


def open_round(session: Session, run_id: str, round_index: int, cohort: Cohort) -> RoundRecord:
    """Record the cohort of the run's next round, or give back the one already on record for it.

    A round that was opened for nobody (all were in flight) has charged and trained nobody: its cohort may yet be drawn.

    Raises:
        NotFoundError: no such run.
        ConflictError: ``round_index`` is not the run's next round, or the cohort was drawn for another one.
    """
    expected = _run_row(session, run_id).rounds_done + 1
    if round_index != expected:
        raise ConflictError(f"Round {round_index} of {run_id} cannot be opened.", cure=f"Its next round is {expected}.")
    if cohort.round_index != round_index:
        raise ConflictError(
            f"Round {round_index} of {run_id} was handed the cohort of round {cohort.round_index}.",
            cure="Draw the cohort for the round that it takes part in.",
        )
    client_ids = list(cohort.client_ids)
    row = session.get(RoundRow, (run_id, round_index))
    if row is None:
        session.add(
            RoundRow(run_id=run_id, round_index=round_index, cohort=client_ids, opened_at=utc_now(), num_updates=0)
        )
    else:
        row.cohort = row.cohort or client_ids
    session.flush()
    return round_record(session, run_id, round_index)


def commit_round(session: Session, run_id: str, round_index: int, commit: RoundCommit) -> ModelVersion:
    """Write outcomes and results, advance the run and insert the model version.

    Raises:
        NotFoundError: the round was never opened.
        ConflictError: it is committed already, an outcome is a stranger's or a client's second one, or a client that
            contributed was quarantined meanwhile. A late outcome belongs to the cohort of the round that it started in.
    """
    owner, row = _run_row(session, run_id), _round_row(session, run_id, round_index)
    if row.committed_at is not None:
        raise ConflictError(
            f"Round {round_index} of {run_id} is committed already.", cure=f"Its next round is {owner.rounds_done + 1}."
        )
    _check_outcomes(session, row, commit.outcomes)
    _check_quarantine(session, row, commit.outcomes)
    row.committed_at = utc_now()
    row.loss, row.accuracy = _finite(commit.loss), _finite(commit.accuracy)
    row.epsilon = commit.epsilon
    row.duration_s = commit.duration_s
    row.num_updates = sum(outcome.error is None for outcome in commit.outcomes)
    owner.rounds_done = round_index
    _insert_outcomes(session, row, commit.outcomes)
    return insert_version(session, owner, round_index, commit)


def rounds(session: Session, run_id: str) -> list[RoundRecord]:
    """The rounds of a run in order, the open one included.

    Raises:
        NotFoundError: no such run.
    """
    _run_row(session, run_id)
    return _select_rounds(session, RoundRow.run_id == run_id)


def round_record(session: Session, run_id: str, round_index: int) -> RoundRecord:
    """One round.

    Raises:
        NotFoundError: no such round.
    """
    found = _select_rounds(session, RoundRow.run_id == run_id, RoundRow.round_index == round_index)
    if not found:
        raise _no_round(run_id, round_index)
    return found[0]


def participation(session: Session) -> dict[str, Participation]:
    """How the rounds of every client went that took part in one."""
    counts = select(ClientRoundRow.client_id, func.count(), func.count(ClientRoundRow.error))
    rows = session.execute(counts.group_by(ClientRoundRow.client_id))
    return {client_id: Participation(rounds, failures) for client_id, rounds, failures in rows}


def engagements(
    session: Session, run_id: str, before: int, client_ids: Sequence[str] | None
) -> dict[str, tuple[int, int]]:
    """By client, in how many rounds of a run it was charged, and the last round that it was charged or folded in.

    Rounds from ``before`` on do not count. One that was charged does, whatever became of it; a late update counts in
    the round that took it.
    """
    charged = select(ChargeRow.unit_id, func.count(ChargeRow.round_index.distinct()), func.max(ChargeRow.round_index))
    folded = select(ClientRoundRow.client_id, func.max(ClientRoundRow.round_index))
    if client_ids is not None:
        charged = charged.where(among(ChargeRow.unit_id, client_ids))
        folded = folded.where(among(ClientRoundRow.client_id, client_ids))
    earlier = (ChargeRow.run_id == run_id, ChargeRow.round_index < before)
    engaged = {
        c: (count, last) for c, count, last in session.execute(charged.where(*earlier).group_by(ChargeRow.unit_id))
    }
    folded = folded.where(
        ClientRoundRow.run_id == run_id, ClientRoundRow.round_index < before, ClientRoundRow.error.is_(None)
    )
    for client_id, last in session.execute(folded.group_by(ClientRoundRow.client_id)):
        count, charged_last = engaged.get(client_id, (0, 0))
        engaged[client_id] = (count, max(last, charged_last))
    return engaged


def awaited(session: Session, run_id: str, started: int, round_index: int) -> tuple[set[str], set[str]]:
    """Whose answers to round ``started`` the open round ``round_index`` may take, and who has given one already.

    Raises:
        NotFoundError: ``round_index`` was never opened.
    """
    cohort, answered = _start(session, _round_row(session, run_id, round_index), round_index - started)
    return cohort - answered, cohort & answered


def answer_of(session: Session, client_id: str, run_id: str, started: int) -> tuple[int, str | None] | None:
    """The round that took a client's answer to round ``started``, and why it does not count; None: none has."""
    own = (RoundRow.run_id == run_id, RoundRow.round_index >= started)
    rounds = session.execute(select(RoundRow.round_index, RoundRow.cohort).where(*own).order_by(RoundRow.round_index))
    # It is drawn again only once it has answered, or was given up.
    drawn = [index for index, cohort in rounds if client_id in cohort]
    if not drawn or drawn[0] != started:
        return None
    outcome = select(ClientRoundRow.round_index, ClientRoundRow.error).where(
        ClientRoundRow.run_id == run_id, ClientRoundRow.client_id == client_id, ClientRoundRow.round_index >= started
    )
    found = session.execute(outcome.order_by(ClientRoundRow.round_index).limit(1)).first()
    if found is None or (len(drawn) > 1 and found.round_index >= drawn[1]):
        return None
    return found.round_index, found.error


def answers(session: Session, run_id: str) -> list[tuple[int, str, bool]]:
    """What the committed rounds of a run took: the round, whose answer, and whether it counts; in the rounds' order."""
    columns = select(ClientRoundRow.round_index, ClientRoundRow.client_id, ClientRoundRow.error)
    rows = session.execute(columns.where(ClientRoundRow.run_id == run_id).order_by(ClientRoundRow.round_index))
    return [(round_index, client_id, error is None) for round_index, client_id, error in rows]


def _check_none_resumable(session: Session, *, except_for: str | None) -> None:
    others = session.scalars(select(RunRow.run_id).where(RunRow.status.in_(RESUMABLE)))
    for run_id in others:
        if run_id != except_for:
            raise ConflictError(f"{run_id} is not finished.", cure="Continue it, or end it before another run goes on.")


def _check_outcomes(session: Session, row: RoundRow, outcomes: Sequence[ClientOutcome]) -> None:
    """Each is the only one of its client, which was drawn for the round that it started in and answered none since."""
    seen: set[str] = set()
    starts = {staleness: _start(session, row, staleness) for staleness in {o.staleness for o in outcomes}}
    for outcome in outcomes:
        cohort, answered = starts[outcome.staleness]
        again = outcome.client_id in seen or outcome.client_id in answered
        if again or outcome.client_id not in cohort:
            fault = "is not in the cohort of" if outcome.client_id not in cohort else "counts twice in"
            raise ConflictError(
                f"Client {outcome.client_id!r} {fault} round {row.round_index - outcome.staleness} of {row.run_id}.",
                cure="Commit at most one outcome for each client and round of the recorded cohorts.",
            )
        seen.add(outcome.client_id)


def _start(session: Session, row: RoundRow, staleness: int) -> tuple[set[str], set[str]]:
    """The cohort of the round ``staleness`` rounds ago, and all that were taken an answer from since it was drawn."""
    first = row.round_index - staleness
    origin = session.get(RoundRow, (row.run_id, first)) if staleness >= 0 else None
    since = ClientRoundRow.round_index.between(first, row.round_index)
    answered = session.scalars(select(ClientRoundRow.client_id).where(ClientRoundRow.run_id == row.run_id, since))
    return set(origin.cohort if origin else ()), set(answered)


def _check_quarantine(session: Session, row: RoundRow, outcomes: Sequence[ClientOutcome]) -> None:
    """In this transaction: what is told of an incident's reach stays true, whatever was under way."""
    contributed = {outcome.client_id for outcome in outcomes if outcome.error is None}
    caught = sorted(contributed.intersection(quarantined_clients(session)))
    if caught:
        raise ConflictError(
            f"Round {row.round_index} of {row.run_id} is discarded: {', '.join(caught[:10])} came into quarantine "
            "while it was trained.",
            cure="The next start trains it again without them.",
        )


def _insert_outcomes(session: Session, row: RoundRow, outcomes: Sequence[ClientOutcome]) -> None:
    facts = [
        (
            row.run_id,
            row.round_index,
            o.client_id,
            o.num_examples,
            o.error,
            _finite(o.update_norm),
            _finite(o.alignment),
        )
        for o in outcomes
    ]
    if facts:
        # By the driver: to bind so many values by name would take longer than to write the rows.
        session.connection().exec_driver_sql(_OUTCOME, facts)


def _select_rounds(session: Session, *conditions: ColumnElement[bool]) -> list[RoundRecord]:
    trained = (
        (VersionRow.run_id == RoundRow.run_id)
        & (VersionRow.round_index == RoundRow.round_index)
        & VersionRow.derived_from.is_(None)
    )
    query = select(RoundRow, VersionRow.version).outerjoin(VersionRow, trained)
    pairs = session.execute(query.where(*conditions).order_by(RoundRow.round_index))
    return [_to_round(row, version) for row, version in pairs]


def _run_row(session: Session, run_id: str) -> RunRow:
    row = session.get(RunRow, run_id)
    if row is None:
        raise NotFoundError(f"There is no run {run_id!r}.", cure="Runs are named like run-0001.")
    return row


def _round_row(session: Session, run_id: str, round_index: int) -> RoundRow:
    row = session.get(RoundRow, (run_id, round_index))
    if row is None:
        raise _no_round(run_id, round_index)
    return row


def _no_round(run_id: str, round_index: int) -> NotFoundError:
    return NotFoundError(f"{run_id} has no round {round_index}.", cure="A round exists once it has been opened.")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _to_run(row: RunRow) -> Run:
    return Run(
        run_id=row.run_id,
        ordinal=row.ordinal,
        status=RunStatus(row.status),
        rounds_total=row.rounds_total,
        rounds_done=row.rounds_done,
        noise_multiplier=row.noise_multiplier,
        config=row.config,
        config_digest=row.config_digest,
        data_digest=row.data_digest,
        started_at=row.started_at,
        ended_at=row.ended_at,
        reason=row.reason,
    )


def _to_round(row: RoundRow, version: str | None) -> RoundRecord:
    return RoundRecord(
        run_id=row.run_id,
        round_index=row.round_index,
        cohort=tuple(row.cohort),
        committed=row.committed_at is not None,
        version=version,
        loss=row.loss,
        accuracy=row.accuracy,
        epsilon=row.epsilon,
        num_updates=row.num_updates,
        duration_s=row.duration_s,
    )

"""Check that no client takes part more often, or sooner again, than the accountant assumes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedvit.rounds.steering import AggregationSettings
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.runs import AuditRun, run_settings, write_key, zero_updates

CHECK = "participations"
_CLIENTS, _SEPARATION, _LATE_ROUNDS = 6, 3, 18
_COHORT = {"selection": "uniform", "size": _CLIENTS // _SEPARATION, "min_separation": _SEPARATION}
_BANDED = {"noise": "banded", "bands": _SEPARATION}


def check(scope: Scope) -> Iterator[Finding]:
    """Runs in which clients have to rest, come to their cap, or answer a round late."""
    for subject, faults in (
        ("separated rounds", _separated_faults(scope)),
        ("separated rounds, late updates", _late_faults(scope)),
        ("capped rounds", _capped_faults(scope)),
    ):
        yield Finding.of(CHECK, subject, list(faults), "as often and as far apart as is charged")


def _separated_faults(scope: Scope) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as home:
        write_key(Path(home))
        cohort = {**_COHORT, "max_participations": 2}
        settings = run_settings(Path(home), scope, rounds=6, cohort=cohort, privacy=_BANDED)
        with AuditRun(settings, zero_updates(_CLIENTS)) as run:
            run.run()
            yield from _faults(run, cap=2, apart=_SEPARATION)


def _late_faults(scope: Scope) -> Iterator[str]:
    """In every third round, the first client of the cohort answers one round late, and rests from there."""

    def held(round_index: int, client_ids: Sequence[str]) -> Sequence[str]:
        return client_ids[:1] if round_index % _SEPARATION == 1 else ()

    with tempfile.TemporaryDirectory() as home:
        write_key(Path(home))
        cohort = {**_COHORT, "max_participations": _LATE_ROUNDS}
        settings = run_settings(Path(home), scope, rounds=_LATE_ROUNDS, cohort=cohort, privacy=_BANDED)
        mode = AggregationSettings(mode="asynchronous", buffer_size=2)
        with AuditRun(settings, zero_updates(_CLIENTS), groups=_CLIENTS, held=held, mode=mode) as run:
            run.run()
            yield from _faults(run, cap=_LATE_ROUNDS, apart=_SEPARATION)
            charged, counted = _charged(run), _counted(run)
            late = sum(index not in charged[client_id] for client_id in counted for index in counted[client_id])
            if late < 3:
                yield f"{late} late updates are taken; nothing is shown"


def _capped_faults(scope: Scope) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as home:
        write_key(Path(home))
        cohort = {"selection": "all", "max_participations": 2}
        settings = run_settings(Path(home), scope, rounds=4, cohort=cohort)
        with AuditRun(settings, zero_updates(_CLIENTS)) as run:
            run.run()
            yield from _faults(run, cap=2, apart=1)


def _charged(run: AuditRun) -> dict[str, list[int]]:
    """By client, the rounds that it was charged for."""
    charged: dict[str, list[int]] = {}
    for entry in run.store.ledger.entries():
        charged.setdefault(entry.charge.unit_id, []).append(entry.charge.round_index)
    return charged


def _counted(run: AuditRun) -> dict[str, list[int]]:
    """By client, the rounds that took an update of it."""
    counted: dict[str, list[int]] = {}
    for index, client_id, counts in run.store.rounds.answers(run.tasks()[0].run_id):
        if counts:
            counted.setdefault(client_id, []).append(index)
    return counted


def _faults(run: AuditRun, *, cap: int, apart: int) -> Iterator[str]:
    charged, counted = _charged(run), _counted(run)
    if not any(len(indices) > 1 for indices in charged.values()):
        yield "no client takes part twice; nothing is shown"
    for client_id, indices in charged.items():
        if len(indices) > cap:
            yield f"{client_id} takes part in {len(indices)} rounds; at most {cap} are charged"
        for index in indices:
            earlier = [other for other in (*indices, *counted.get(client_id, [])) if other < index]
            if earlier and index - max(earlier) < apart:
                yield f"{client_id} takes part in round {index}, {index - max(earlier)} after its last participation"

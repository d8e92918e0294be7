"""Audit suite: all checks by name, and their runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedvit.errors import UsageError
from fedvit.tools.audit import (
    charging,
    clients,
    finetuning,
    histograms,
    keys,
    mechanisms,
    one_run,
    participations,
    randomness,
    ranks,
    records,
    released,
    secure,
)
from fedvit.tools.audit.findings import Finding, Scope

CHECKS: dict[str, Callable[[Scope], Iterator[Finding]]] = {
    records.CHECK: records.check,
    ranks.CHECK: ranks.check,
    clients.CHECK: clients.check,
    clients.LATE_CHECK: clients.check_late,
    histograms.CHECK: histograms.check,
    randomness.NOISE_CHECK: randomness.check_noise,
    mechanisms.CHECK: mechanisms.check,
    randomness.SAMPLING_CHECK: randomness.check_sampling,
    keys.CHECK: keys.check,
    participations.CHECK: participations.check,
    charging.CHECK: charging.check,
    finetuning.CHECK: finetuning.check,
    released.RECORD_CHECK: released.check_step,
    released.RANKS_CHECK: released.check_ranks,
    released.CLIENT_CHECK: released.check_round,
    one_run.CHECK: one_run.check,
    secure.NOISE_CHECK: secure.check_noise,
    secure.PROTOCOL_CHECK: secure.check_protocol,
    secure.RELEASED_CHECK: secure.check_released,
}


@dataclass(frozen=True, slots=True)
class Timed:
    """A finding and its duration."""

    finding: Finding
    seconds: float


def audit(scope: Scope, only: Sequence[str] = ()) -> Iterator[Timed]:
    """Run checks and yield their findings; an exception ends a check with a failed finding.

    Raises:
        UsageError: there is no check of this name.
    """
    for name in only:
        if name not in CHECKS:
            raise UsageError(f"There is no check {name!r}.", cure=f"There are: {', '.join(CHECKS)}.")
    for name in only or CHECKS:
        started_s = time.monotonic()
        for finding in _findings(name, scope):
            yield Timed(finding, time.monotonic() - started_s)
            started_s = time.monotonic()


def _findings(name: str, scope: Scope) -> Iterator[Finding]:
    try:
        yield from CHECKS[name](scope)
    except Exception as error:
        # Any error: the check has not shown what it should.
        yield Finding(name, "broke off", False, f"{type(error).__name__}: {error}")

"""Runs drills one after another on as few systems as is honest: a start is what costs most."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fedvit.errors import ConfigError, FedvitError
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import PROGRAMS, Drill, Result, Stage, fault_in
from fedvit.incidents.drills.runbook import RUNBOOK
from fedvit.incidents.drills.site import Site, await_that
from fedvit.incidents.drills.tally import mark, tally
from fedvit.metrics.alert_rules import RULES
from fedvit.store.store import Store
from fedvit.tools.simulation.rehearsal import allow_rehearsal

FACTOR = 30.0
"""How many times as fast as in service alerts are in a drill."""
# Beside the site's own: a budget that a few rounds can see the end of, weights that stay where they are, a fleet whose
# silence shows in seconds, and incidents apart.
SHARED = {
    "FEDVIT_PRIVACY__NOISE_MULTIPLIER": "50",
    "FEDVIT_TRAINING__ROUNDS": "20000",
    "FEDVIT_TRAINING__LEARNING_RATE": "0.01",
    "FEDVIT_TRAINING__ROUND_TIMEOUT_S": "60",
    "FEDVIT_FLEET__HEARTBEAT_INTERVAL_S": "2",
    "FEDVIT_FLEET__HEARTBEAT_TIMEOUT_S": "6",
    "FEDVIT_FLEET__CHECK_INTERVAL_S": "1",
    "FEDVIT_FLEET__TASK_INTERVAL_S": "1",
    "FEDVIT_INCIDENTS__REOPEN_WITHIN_S": "0.1",
}
Say = Callable[[str], None]


def check_checkout(folder: Path) -> None:
    """Make sure that drills can be run here.

    Raises:
        ConfigError: it is no checkout: there is no runbook, no Makefile, or no alert rules.
    """
    for name in (RUNBOOK, Path("Makefile"), RULES):
        if not (folder / name).exists():
            raise ConfigError(
                f"{folder} has no {name}: drills type the runbook's commands in a checkout.",
                cure="Run `fedvit drill` in the folder of the checkout.",
            )


def what_is_missing(drill: Drill) -> str | None:
    """Why a drill cannot be run on this machine, or None."""
    missing = [name for name in (*PROGRAMS, *drill.needs) if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "needs root" if drill.needs_root and os.geteuid() else None


def run_drills(drills: Sequence[Drill], root: Path, say: Say, on_result: Callable[[Result], None]) -> list[Result]:
    """Run them; one that cannot be run is skipped, one that fails keeps no other from running.

    Args:
        root: the checkout.
        say: told what is done.
        on_result: told each result when it is there.

    Raises:
        ConfigError: ``root`` is no checkout.
        PortInUseError: a port that the runbook prints is taken.
    """
    check_checkout(root)
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="fedvit-drill-", ignore_cleanup_errors=True) as folder,
        closing(Sites(root, Path(folder), say)) as sites,
    ):
        for drill in drills:
            for result in _run(drill, sites, say):
                results.append(result)
                on_result(result)
    return results


def _run(drill: Drill, sites: Sites, say: Say) -> Iterator[Result]:
    reason = what_is_missing(drill)
    for stage in drill.stages:
        name = f"{drill.name}/{stage.name}" if stage.name else drill.name
        if reason is not None:
            yield Result(name, str(stage.alert), "skipped", why=reason)
            continue
        say(f"=== {name}: {drill.title}")
        result = _played(name, stage, sites.of(drill), say)
        if result.verdict == "failed":
            # Whatever it left behind must not be blamed on the next.
            sites.close()
        yield result


def _played(name: str, stage: Stage, site: Site, say: Say) -> Result:
    course, cost, incident, why = Course(site, stage.alert, say), None, None, None
    try:
        settings = site.read_settings()
        _trains(site)
        course.begin()
        with Store.open(site.home) as store:
            before = mark(store)
        stage.play(course)
        with Store.open(site.home) as store:
            cost = tally(store, settings, before)
        why = fault_in(cost, stage)
        incident = course.incident()
        say(site.run(f"fedvit incident report {incident}").checked().out)
    except FedvitError as error:
        why = str(error)
        say(f"FAILED: {why}")
    return Result(
        name,
        str(stage.alert),
        "green" if why is None else "failed",
        course.detected_after_s,
        course.recovered_after_s,
        cost,
        incident,
        why or "",
        tuple(course.notes),
    )


def _trains(site: Site) -> None:
    """Return when rounds are committed, as on any other day."""
    status: dict[str, Any] = await_that("the API answers", lambda: site.get("/api/training/status"))
    if status["status"] != "running":
        site.post("/api/training/start")
    done = status["rounds_done"] if status["status"] == "running" else 0
    site.training(lambda now: now["status"] == "running" and now["rounds_done"] > done, "a round is committed")


class Sites:
    """The one system that runs at a time: what the next drill shares with the one before, it finds running."""

    def __init__(self, root: Path, folder: Path, say: Say) -> None:
        self._root, self._folder, self._say = root, folder, say
        self._site: Site | None = None
        self._key: Mapping[str, str] | None = None
        self._count = 0

    def of(self, drill: Drill) -> Site:
        """A running system with the drill's settings."""
        if self._site is None or self._key != drill.settings:
            self.close()
            self._count += 1
            settings = {**SHARED, **drill.settings}
            self._site = Site(self._folder / str(self._count) / "checkout", self._root, settings)
            self._key = drill.settings
            if drill.rehearsal:
                allow_rehearsal(self._site.home)
            self._say("a system starts")
            self._site.start(FACTOR)
            for scope in ("admin", "emergency"):
                self._site.tokens[scope] = self._site.fedvit("token", "create", scope, "--scope", scope)["token"]
        return self._site

    def close(self) -> None:
        """Stop what runs; a second Ctrl-C must not leave half of it behind."""
        if self._site is None:
            return
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._site.stop()
        finally:
            self._site = self._key = None
            for number, handler in previous.items():
                signal.signal(number, handler)

"""Runner of drills: one after another, on as few systems as their settings allow."""

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
from fedvit.incidents.drills.drill import PROGRAMS, Drill, DrillResult, Stage, StageRun, fault_in
from fedvit.incidents.drills.losses import LossBaseline, count_losses
from fedvit.incidents.drills.runbook import RUNBOOK
from fedvit.incidents.drills.system import DrillSystem, wait_until
from fedvit.metrics.alert_rules import RULES
from fedvit.store.store import Store
from fedvit.tools.simulation.rehearsal import allow_rehearsal

FACTOR = 30.0
"""How many times as fast as in service alerts are evaluated in a drill."""
# In addition to the system's own: a budget that lasts a few rounds, weights that hardly change, a fleet whose silence
# is noticed within seconds, and a new incident for each stage.
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
    """Check that a folder is a checkout, in which drills can run.

    Raises:
        ConfigError: there is no runbook, no Makefile, or no alert rules.
    """
    for name in (RUNBOOK, Path("Makefile"), RULES):
        if not (folder / name).exists():
            raise ConfigError(
                f"{folder} has no {name}: drills type the runbook's commands in a checkout.",
                cure="Run `fedvit drill` in the folder of the checkout.",
            )


def what_is_missing(drill: Drill) -> str | None:
    """Why a drill cannot run on this machine, or None."""
    missing = [name for name in (*PROGRAMS, *drill.needs) if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "needs root" if drill.needs_root and os.geteuid() else None


def run_drills(
    drills: Sequence[Drill], root: Path, say: Say, on_result: Callable[[DrillResult], None]
) -> list[DrillResult]:
    """Run drills; one that cannot run is skipped, and a failure does not stop the others.

    Args:
        root: the checkout.
        say: called with each line of progress.
        on_result: called with each result.

    Raises:
        ConfigError: ``root`` is no checkout.
        PortInUseError: a port that the runbook prints is taken.
    """
    check_checkout(root)
    # A process in the background inherits an ignored SIGINT; endless commands of the runbook are ended with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="fedvit-drill-", ignore_cleanup_errors=True) as folder,
        closing(SharedSystem(root, Path(folder), say)) as system,
    ):
        for drill in drills:
            for result in _run(drill, system, say):
                results.append(result)
                on_result(result)
    return results


def _run(drill: Drill, shared: SharedSystem, say: Say) -> Iterator[DrillResult]:
    reason = what_is_missing(drill)
    for stage in drill.stages:
        name = f"{drill.name}/{stage.name}" if stage.name else drill.name
        if reason is not None:
            yield DrillResult(name, str(stage.alert), "skipped", why=reason)
            continue
        say(f"=== {name}: {drill.title}")
        result = _run_stage(name, stage, shared.start_for(drill), say)
        if result.verdict == "failed":
            # The next drill must not start in the state that a failed one has left.
            shared.close()
        yield result


def _run_stage(name: str, stage: Stage, system: DrillSystem, say: Say) -> DrillResult:
    run, losses, incident, why = StageRun(system, stage.alert, say), None, None, None
    try:
        settings = system.read_settings()
        _wait_for_a_round(system)
        run.begin()
        with Store.open(system.home) as store:
            before = LossBaseline.of(store)
        stage.play(run)
        with Store.open(system.home) as store:
            losses = count_losses(store, settings, before)
        why = fault_in(losses, stage)
        incident = run.incident()
        say(system.run(f"fedvit incident report {incident}").checked().out)
    except FedvitError as error:
        why = str(error)
        say(f"FAILED: {why}")
    verdict, detected_s, recovered_s = "green" if why is None else "failed", run.detected_after_s, run.recovered_after_s
    notes = tuple(run.notes)
    return DrillResult(name, str(stage.alert), verdict, detected_s, recovered_s, losses, incident, why or "", notes)


def _wait_for_a_round(system: DrillSystem) -> None:
    """Start training if it does not run, and wait until a round is committed."""
    status: dict[str, Any] = wait_until("the API answers", lambda: system.get("/api/training/status"))
    if status["status"] != "running":
        system.post("/api/training/start")
    done = status["rounds_done"] if status["status"] == "running" else 0
    system.wait_for_training(
        lambda now: now["status"] == "running" and now["rounds_done"] > done, "a round is committed"
    )


class SharedSystem:
    """The one system that runs at a time; consecutive drills with equal settings share it."""

    def __init__(self, root: Path, folder: Path, say: Say) -> None:
        self._root, self._folder, self._say = root, folder, say
        self._system: DrillSystem | None = None
        self._key: Mapping[str, str] | None = None
        self._count = 0

    def start_for(self, drill: Drill) -> DrillSystem:
        """A running system with the drill's settings."""
        if self._system is None or self._key != drill.settings:
            self.close()
            self._count += 1
            settings = {**SHARED, **drill.settings}
            self._system = DrillSystem(self._folder / str(self._count) / "checkout", self._root, settings)
            self._key = drill.settings
            if drill.rehearsal:
                allow_rehearsal(self._system.home)
            self._say("a system starts")
            self._system.start(FACTOR)
            for scope in ("admin", "emergency"):
                self._system.tokens[scope] = self._system.fedvit("token", "create", scope, "--scope", scope)["token"]
        return self._system

    def close(self) -> None:
        """Stop the system; signals are ignored meanwhile, so that a second Ctrl-C leaves nothing running."""
        if self._system is None:
            return
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._system.stop()
        finally:
            self._system = self._key = None
            for number, handler in previous.items():
                signal.signal(number, handler)

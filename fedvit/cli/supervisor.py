"""The process that ``fedvit up`` leaves running: how it is started, what it does, how it is ended.

As a module it is that process, and reads its settings from standard input; not for people.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from fedvit.cli.common import find_system
from fedvit.errors import FedvitError, InterruptedRunError, UsageError

if TYPE_CHECKING:
    from fedvit.config import Settings

DOWN_TIMEOUT_S = 60.0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, and both end with one sentence."""
    try:
        with sigterm_unwinds():
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "Interrupted; everything committed is safe.", cure="The same command continues from there."
        ) from None


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM is Ctrl-C."""

    def interrupt(_: int, __: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_this_process() -> None:
    """Take the way of ``fedvit down``: for a system that was asked over its API to shut down."""
    os.kill(os.getpid(), signal.SIGTERM)


def supervisor_log(settings: Settings) -> Path:
    """Where the process that ``up`` leaves running writes what it has to say."""
    return settings.home / "logs" / "supervisor.log"


def spawn_supervisor(settings: Settings, on_step: Callable[[str], None]) -> None:
    """Start the process and return once its system is ready; ``on_step`` is told each step.

    Raises:
        FedvitError: it could not start; its own sentence.
    """
    log = supervisor_log(settings)
    command = [sys.executable, "-m", "fedvit.cli.supervisor"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(settings.model_dump_json())
    child.stdin.close()
    for line in child.stdout:
        fact = _fact(line)
        if "step" in fact:
            on_step(fact["step"])
        elif "error" in fact:
            child.wait()
            failure = UsageError if fact["exit_status"] == UsageError.exit_status else FedvitError
            raise failure(fact["error"], cure=fact["cure"])
        elif fact.get("ready"):
            return
    raise FedvitError(f"The system ended at its start with status {child.wait()}.", cure=f"See {log}.")


def _fact(line: str) -> dict[str, Any]:
    """A fact that the process told; nothing for what some library printed in between."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def supervise(settings: Settings, on_ready: Callable[[], None] = lambda: None) -> None:
    """What ``up`` leaves running: tell the steps as JSON lines, then wait for a signal.

    Raises:
        FedvitError: the system could not start; told as a line, too.
    """

    def tell(**fact: Any) -> None:
        # Whoever started us may be gone by the time we stop.
        with contextlib.suppress(BrokenPipeError, ValueError):
            print(json.dumps(fact), flush=True)

    try:
        system = find_system(settings)
        with interruptible(), system.running(lambda step: tell(step=step), end_this_process, train=True):
            on_ready()
            tell(ready=True)
            signal.pause()
    except InterruptedRunError:
        return
    except FedvitError as error:
        tell(error=error.message, cure=error.cure, exit_status=error.exit_status)
        raise


def stop_process(pid: int) -> None:
    """SIGTERM, then wait for the end of the process itself."""
    try:
        handle = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([handle], [], [], DOWN_TIMEOUT_S)
    finally:
        os.close(handle)
    if not ended:
        raise FedvitError(
            f"Process {pid} did not end within {DOWN_TIMEOUT_S:g} s.", cure=f"See the logs, then `kill -9 {pid}`."
        )


def main() -> int:
    """Run the system until a signal ends it; the exit status of the error that did, otherwise."""
    from fedvit.settings import settings_from_json

    settings = settings_from_json(sys.stdin.read())

    def log_to_file() -> None:
        log = supervisor_log(settings)
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, sys.stderr.fileno())

    try:
        supervise(settings, on_ready=log_to_file)
    except FedvitError as error:
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
